"""The command `spikequant energy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from .common import Models, TextFile, Threads, command, examples

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(
        epilog=examples(
            "spikequant energy model-SPK4.gguf -f wiki.test.raw",
            "spikequant energy model-SPK4.gguf model-Q4_0.gguf --repeats 9     (measured in turns)",
            "spikequant energy model-SPK4.gguf --shape 7b --constants jouppi-7nm --json",
        )
    )(energy)


@command
def energy(
    console: Console,
    models: Models,
    file: TextFile = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens of the text.")] = 256,
    decode: Annotated[
        bool | None,
        typer.Option(
            "--decode/--prompt", help="One by one, or up to 512 at once.", show_default="both, in turn"
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            help="Model a larger model of this shape (1.1b, 7b), assuming MODEL's shares of spikes.",
            show_default=False,
        ),
    ] = None,
    constants: Annotated[
        str,
        typer.Option(
            "--constants", help="horowitz-45nm, jouppi-7nm, jouppi-7nm-hbm2, or a TOML file of that form."
        ),
    ] = "horowitz-45nm",
    dram_bit: Annotated[
        float | None,
        typer.Option("--dram-bit", min=0.0, help="Picojoules per bit of DRAM.", show_default="as of the set"),
    ] = None,
    measuring: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Measure, too, where this machine has a counter."),
    ] = True,
    repeats: Annotated[
        int, typer.Option("--repetitions", "--repeats", "-r", min=5, help="Measured rounds, in turns.")
    ] = 5,
    seconds: Annotated[float, typer.Option("--seconds", help="Of a measured sample, at least.")] = 3.0,
    idle_seconds: Annotated[
        float, typer.Option("--idle-seconds", help="Of the sample of the idle machine before each.")
    ] = 2.0,
    powercap: Annotated[
        Path, typer.Option("--powercap", help="Folder of the RAPL counters, for instance in a container.")
    ] = Path("/sys/class/powercap"),
    threads: Threads = None,
) -> None:
    """Count the spikes of a real text, model the energy of the linear layers, measure that of the models.

    The first MODEL is a spike model, which is counted; all are measured, one of each type.
    """
    from ..energy import PHASES, MeasureOptions
    from ..energy import energy as evaluate
    from .energy_tables import show_energy

    with console.progress() as progress:
        result = evaluate(
            models,
            file,
            tokens=tokens,
            phases=PHASES if decode is None else (PHASES[decode],),
            shape=shape,
            constants=constants,
            dram_bit=dram_bit,
            measuring=measuring,
            options=MeasureOptions(repeats, seconds, idle_seconds),
            powercap=powercap,
            threads=threads,
            progress=progress,
        )
    console.result(result.to_json, lambda out: show_energy(out, result))
