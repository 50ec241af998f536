"""The command `spikequant energy`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import JsonOutput, Model, Quiet, TextFile, Threads, Verbose, command, examples

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(
        epilog=examples(
            "spikequant energy model-SPK4.gguf -f wiki.test.raw",
            "spikequant energy model-SPK4.gguf --decode --constants jouppi-7nm --json",
        )
    )(energy)


def energy(
    model: Model,
    file: TextFile = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to count.")] = 256,
    decode: Annotated[bool, typer.Option("--decode/--prompt", help="One by one, or all at once.")] = False,
    constants: Annotated[
        str, typer.Option("--constants", help="horowitz-45nm, jouppi-7nm, or a TOML file of that form.")
    ] = "horowitz-45nm",
    threads: Threads = None,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Count the spikes of a real text and model the energy of the linear layers."""
    with command(json_output, quiet, verbose) as console:
        from ..energy import energy as evaluate
        from .tables import show_energy

        result = evaluate(model, file, tokens=tokens, decode=decode, constants=constants, threads=threads)
        console.result(result.to_json, lambda out: show_energy(out, result))
