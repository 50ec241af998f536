"""The command `spikequant sweep` and its tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console as Screen
from rich.table import Table

from ..console import Console
from .common import CtxSize, TextFile, Threads, command, examples

if TYPE_CHECKING:
    from ..sweep import SweepPoint, SweepResult

__all__ = ["add_commands"]

_TITLES = {
    "bits": "Widths of weights and activations",
    "salience": "Salient activations at W4A4",
    "ablations": "One part left out, W4A4",
    "baselines": "Published W4A4 methods in the same harness",
}
_DOCUMENT = "sweep.json"


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(
        epilog=examples(
            "spikequant sweep model-F16.gguf -f wiki.test.raw --calibration c4.txt",
            "spikequant sweep model-F16.gguf --what bits,ablations --chunks 8 -o study",
            "spikequant sweep ./checkpoint --quick --json",
        )
    )(sweep)


@command
def sweep(
    console: Console,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="GGUF file, checkpoint folder, or owner/name on Hugging Face.",
            show_default=False,
        ),
    ],
    file: TextFile = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="Text to calibrate on. Default: Python's documentation.",
            show_default=False,
        ),
    ] = None,
    what: Annotated[
        str,
        typer.Option("--what", help="Studies by commas: bits, salience, ablations, baselines; or all."),
    ] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points on fewer chunks: minutes.")] = False,
    chunks: Annotated[
        int | None,
        typer.Option("--chunks", min=1, help="Chunks of the text.", show_default="4, with --quick 2"),
    ] = None,
    calibration_chunks: Annotated[
        int | None,
        typer.Option(
            "--calibration-chunks",
            min=1,
            help="Chunks of the calibration text.",
            show_default="16, with --quick 4",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for document, plots and finished points; those are not measured again.",
        ),
    ] = Path("sweep"),
    coding: Annotated[
        str,
        typer.Option("--coding", help="How spikes are counted: ttfs (one per code) or rate (one per step)."),
    ] = "ttfs",
    ctx_size: CtxSize = 512,
    threads: Threads = None,
) -> None:
    """Study bit widths, salience, ablations and published methods in torch, against the float model.

    Needs torch, transformers and matplotlib. An interrupted sweep goes on where it was.
    """
    from ..console import to_json_text
    from ..files import atomic_path
    from ..simulate.packages import require_packages
    from ..sweep import sweep as run

    require_packages("matplotlib", extra="report")
    with console.progress() as progress:
        result = run(
            source,
            file,
            out,
            calibration=calibration,
            what="all" if what == "all" else [name.strip() for name in what.split(",") if name.strip()],
            quick=quick,
            chunks=chunks,
            calibration_chunks=calibration_chunks,
            ctx=ctx_size,
            coding=coding,
            threads=threads,
            progress=progress,
        )
    from ..sweep.plots import draw

    result = replace(result, plots=draw(result, out))
    with atomic_path(out / _DOCUMENT) as partial:
        partial.write_text(to_json_text(result.to_json()) + "\n", encoding="utf-8")
    console.result(result.to_json, lambda screen: _show(screen, result))
    console.say(f"written: {out / _DOCUMENT} and {len(result.plots)} plots")


def _show(out: Screen, result: SweepResult) -> None:
    """A table per study, and below all that the figures depend on."""
    from .tables import conditions, line

    for study, title in _TITLES.items():
        points = [point for point in result.points if point.study == study]
        if points:
            out.print(_table(title, points))
    about = conditions(result.text, result.chunks, result.ctx, result.threads, result.host)
    reference = result.reference
    line(
        out,
        f"{reference['name']} in float32: PPL {reference['ppl']:.3f} ± {reference['ppl_stderr']:.3f}; "
        "KLD and × PPL are against it.",
    )
    line(out, f"PPL and KLD: {about}.")
    line(out, f"Calibration: {result.calibration.name}, {result.calibration_chunks} chunks.")
    for note in result.notes:
        line(out, f"Note: {note}")


def _table(title: str, points: list[SweepPoint]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, title=title, title_justify="left")
    table.add_column("method", overflow="fold")
    for column in ("PPL", "× PPL", "KLD", "same top", "salient", "silent", "spikes/token"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            point.name,
            f"{point.ppl:.3f}" if point.ppl < 1e6 else f"{point.ppl:.2e}",
            f"{point.ppl_ratio:.3f}" if point.ppl_ratio < 1e4 else f"{point.ppl_ratio:.1e}",
            f"{point.kld:.4f} ± {point.kld_stderr:.4f}",
            f"{100 * point.same_top:.1f} %",
            f"{100 * point.salient_share:.1f} %",
            "–" if point.silent_share is None else f"{100 * point.silent_share:.1f} %",
            "–" if point.spikes_per_token is None else f"{point.spikes_per_token:,.0f}",
            style="bold" if point.name in ("all parts", "SpikeQuant", "c = 2.3", "W4A4") else None,
        )
    return table
