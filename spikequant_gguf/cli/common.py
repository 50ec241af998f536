"""Options that several commands have, spelled as in llama.cpp where it has them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import Console

__all__ = [
    "Chunks",
    "CtxSize",
    "Force",
    "Model",
    "Models",
    "TextFile",
    "Threads",
    "command",
    "examples",
]

JsonOutput = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no messages but errors.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log, and tracebacks of errors.")
]

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="GGUF file.", show_default=False)]
Models = Annotated[list[Path], typer.Argument(metavar="MODEL", help="GGUF files.", show_default=False)]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        help="Text to evaluate. Default: wiki.test.raw in the folder $SPIKEQUANT_DATA, "
        "without that variable Python's documentation.",
        show_default=False,
    ),
]
CtxSize = Annotated[
    int, typer.Option("--ctx-size", "-c", min=8, help="Tokens per chunk; the second half is scored.")
]
Chunks = Annotated[
    int | None, typer.Option("--chunks", min=1, help="Evaluate only so many chunks.", show_default="all")
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="Threads.", show_default="physical cores")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


def examples(*lines: str) -> str:
    """The end of a command's help. Blank lines keep lines apart there."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


def command(function: Callable[..., None]) -> Callable[..., None]:
    """What typer shall call for `function`: with --json, --quiet and --verbose in place of its `console`.

    `function` gets the Console that these options ask for. If it fails, the program ends with the right exit
    code.
    """

    @functools.wraps(function)
    def run(*, json_output: bool, quiet: bool, verbose: bool, **arguments: Any) -> None:
        console = Console(json_output=json_output, quiet=quiet, verbose=verbose)
        with console.exit_codes(typer.Exit, passing=(typer.Exit, typer.Abort, typer.BadParameter)):
            function(console=console, **arguments)

    own = inspect.signature(function, eval_str=True)
    parameters = {name: each for name, each in own.parameters.items() if name != "console"}
    for name, option in (("json_output", JsonOutput), ("quiet", Quiet), ("verbose", Verbose)):
        parameters[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option
        )
    run.__signature__ = own.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    return run
