"""The command `spikequant report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from .common import Force, TextFile, Threads, command, examples

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(
        epilog=examples(
            "spikequant report compare.json energy.json -o report.html",
            "spikequant report *.json benchmarks/results/*.json --model model-SPK4.gguf --png pictures",
            "spikequant report --model model-SPK4.gguf --neuron blk.12.ffn_down:7",
        )
    )(report)


@command
def report(
    console: Console,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILES]",
            help="What compare, energy, sweep, bench and the benchmarks print with --json.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--outfile", "-o", help="Page to write.")] = Path("report.html"),
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", help="Spike model, for raster, salience and tensors.", show_default=False
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option("--layer", help="Tensor of the raster.", show_default="a down projection in the middle"),
    ] = None,
    neuron: Annotated[
        str | None, typer.Option("--neuron", help="TENSOR:ROW to follow.", show_default="row 0 of the layer")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text for the raster.", show_default=False)
    ] = None,
    file: TextFile = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Folder for the figures as PNG.", show_default=False)
    ] = None,
    force: Force = False,
    threads: Threads = None,
) -> None:
    """Make one page of figures and tables, complete in itself, from the JSON of the other commands."""
    from ..neuron import DEFAULT_TEXT
    from ..report import make_report
    from .tables import line

    with console.progress() as progress:
        made = make_report(
            files or [],
            out,
            model=model,
            layer=layer,
            neuron=neuron,
            text=file,
            prompt=DEFAULT_TEXT if prompt is None else prompt,
            png_folder=png,
            force=force,
            threads=threads,
            progress=progress,
        )

    def show(screen: object) -> None:
        line(screen, f"{made.path}: {len(made.pictures)} figures, {made.bytes / 1e6:.1f} MB")  # type: ignore[arg-type]

    console.result(made.to_json, show)
    for what in made.missing:
        console.say(f"note: not in it: {what}; the page says how to make it")
