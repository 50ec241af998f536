"""Commands about model files: convert, inspect, verify, dequantize."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from .common import Force, Model, Threads, command, examples
from .convert import convert

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(
        epilog=examples(
            "spikequant convert model-F16.gguf",
            "spikequant convert ./SmolLM2-135M-Instruct -o smollm2-SPK4.gguf",
            "spikequant convert model-F16.gguf --dry-run",
            "spikequant convert model-F16.gguf --tensor-type 'ffn_down=q8_0' --split-max-size 4G",
        )
    )(convert)
    app.command(
        epilog=examples(
            "spikequant inspect model-SPK4.gguf",
            "spikequant inspect model-SPK4.gguf --no-tensors --json",
            'spikequant inspect model-SPK4.gguf --neuron blk.3.ffn_up:17 -p "Neurons fire." -o neuron.png',
        )
    )(inspect)
    app.command(epilog=examples("spikequant verify model-SPK4.gguf"))(verify)
    app.command(
        epilog=examples(
            "spikequant dequantize model-SPK4.gguf",
            "spikequant dequantize model-SPK4.gguf --outtype q8_0 -o model-Q8_0.gguf",
        )
    )(dequantize)


@command
def inspect(
    console: Console,
    model: Model,
    tensors: Annotated[bool, typer.Option("--tensors/--no-tensors", help="List the tensors.")] = True,
    metadata: Annotated[bool, typer.Option("--metadata/--no-metadata", help="List the metadata.")] = True,
    neuron: Annotated[
        str | None,
        typer.Option(
            "--neuron", help="Follow the neuron TENSOR:ROW through one token of a text.", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text.", show_default="a sentence on neurons")
    ] = None,
    position: Annotated[
        int | None, typer.Option("--position", help="Place of the token in it, from 0.", show_default="last")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--outfile", "-o", help="Write the trace as .png, .svg or .html.", show_default=False),
    ] = None,
    force: Force = False,
    threads: Threads = None,
) -> None:
    """Show the tensors of a GGUF file (shapes, types, statistics) and its metadata, or one neuron at work."""
    if neuron is not None:
        _inspect_neuron(console, model, neuron, prompt, position, out, force, threads)
        return
    if prompt is not None or position is not None or out is not None:
        raise typer.BadParameter("--prompt, --position and --outfile belong to --neuron")
    from ..inspect_file import inspect_file
    from .tables import show_inspect

    report = inspect_file(model)
    console.result(report.to_json, lambda out: show_inspect(out, report, tensors, metadata))


def _inspect_neuron(
    console: Console,
    model: Path,
    neuron: str,
    prompt: str | None,
    position: int | None,
    out: Path | None,
    force: bool,
    threads: int | None,
) -> None:
    from ..neuron import DEFAULT_TEXT, trace_neuron
    from ..neuron_file import check_picture_path, write_neuron
    from .neuron import show_neuron

    if out is not None:
        check_picture_path(out, force)
    text = DEFAULT_TEXT if prompt is None else prompt
    trace = trace_neuron(model, neuron, text, position=position, threads=threads)
    if out is not None:
        write_neuron(trace, out)
    console.result(trace.to_json, lambda screen: show_neuron(screen, trace))
    if out is not None:
        console.say(f"written: {out}")


@command
def verify(
    console: Console,
    model: Model,
) -> None:
    """Check a whole GGUF file: bounds of all tensors, and every block of spike data."""
    from ..verify import verify_file
    from .tables import show_verify

    report = verify_file(model)
    console.result(lambda: {"ok": report.ok} | asdict(report), lambda out: show_verify(out, report))
    report.raise_if_faulty()


@command
def dequantize(
    console: Console,
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option(
            "--outfile", "-o", help="File to write.", show_default="beside MODEL, named after the type"
        ),
    ] = None,
    outtype: Annotated[str, typer.Option("--outtype", help="f16, bf16 or q8_0.")] = "f16",
    force: Force = False,
) -> None:
    """Turn a spike model back into a GGUF that every llama.cpp reads."""
    from ..dequantize import dequantize as run
    from .tables import show_dequantize

    target = out
    if target is None:
        stem = re.sub(r"[-.]SPK4$", "", model.stem, flags=re.IGNORECASE)
        target = model.with_name(f"{stem}-{outtype.upper()}.gguf")
    with console.progress() as progress:
        report = run(model, target, outtype, force=force, progress=progress)
    console.result(report.to_json, lambda out: show_dequantize(out, report))
