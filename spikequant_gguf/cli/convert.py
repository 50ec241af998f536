"""The command `spikequant convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Console
from ..errors import InputError
from .common import Force, Threads, command

if TYPE_CHECKING:
    from ..converter import Calibrate, Recipe
    from ..converter.calibrated import CalibrationOptions

__all__ = ["convert"]

_DEFAULT_TEXT_NOTE = (
    "note: calibrated on Python's documentation, for want of a text. With one like those that the model will "
    "see it loses less: SmolLM2-135M calibrated on web text has KL divergence 0.083 instead of 0.111 on "
    "WikiText-2, 0.063 instead of 0.089 on C4. Give yours with --calibration"
)


@command
def convert(
    console: Console,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="GGUF file, folder of a Hugging Face checkpoint, or its id there (owner/name).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--outfile",
            "-o",
            help="File to write; {ftype} in it becomes spk4. A folder gets a file named after the model.",
            show_default="named after the model, in the current folder",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what each tensor would become, with sizes; write nothing.")
    ] = False,
    preset: Annotated[
        str,
        typer.Option(
            "--preset", metavar="NAME", help="fast (sparser), balanced, or accurate (more salient)."
        ),
    ] = "balanced",
    salience: Annotated[
        str,
        typer.Option(
            "--salience",
            metavar="C|auto",
            help="Salience threshold of the activation encoder, 0..7.5; auto: the best one for each layer.",
        ),
    ] = "auto",
    salient_share: Annotated[
        float | None,
        typer.Option(
            "--salient-share",
            min=0,
            max=1,
            help="Share of salient activations, on average, that auto aims at.",
            show_default="the preset's; balanced: 0.12",
        ),
    ] = None,
    silence: Annotated[
        float | None,
        typer.Option(
            "--silence",
            help="Silence threshold in steps, 0..4: larger is sparser.",
            show_default="the preset's; balanced: 0.5",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="Importance matrix of llama-imatrix.", show_default=False)
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="Text to calibrate on, like those that the model will see. The default one is on every "
            "machine, but left SmolLM2-135M a third to two fifths more KL divergence than web text.",
            show_default="a part of Python's documentation",
        ),
    ] = None,
    calibration_chunks: Annotated[
        int | None,
        typer.Option(
            "--calibration-chunks",
            min=1,
            help="Chunks of 512 tokens to calibrate on.",
            show_default="the preset's: fast 64, balanced 128, accurate 256; half as many and so on where "
            "that takes more than 10 GB",
        ),
    ] = None,
    smoothing: Annotated[
        bool, typer.Option("--smoothing/--no-smoothing", help="Scale channels before quantization.")
    ] = True,
    sensitivity: Annotated[
        bool | None,
        typer.Option(
            "--sensitivity/--no-sensitivity",
            help="Measure by gradients in torch how much errors of each layer matter.",
            show_default="where transformers has the model and it takes no more than 10 GB",
        ),
    ] = None,
    calibrated: Annotated[
        bool,
        typer.Option("--calibrated/--no-calibration", help="Without it, weights are rounded to the nearest."),
    ] = True,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="Type of matching tensors, as in ffn_down=q8_0; may be repeated, the last match counts.",
            show_default=False,
        ),
    ] = None,
    tensor_type_file: Annotated[
        Path | None,
        typer.Option("--tensor-type-file", help="File with one REGEX=TYPE per line.", show_default=False),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option("--model-name", help="Name of the model in the file.", show_default="the source's"),
    ] = None,
    metadata: Annotated[
        Path | None,
        typer.Option("--metadata", help="JSON file of authorship, with general.* keys.", show_default=False),
    ] = None,
    override_kv: Annotated[
        list[str] | None,
        typer.Option(
            "--override-kv",
            metavar="KEY=TYPE:VALUE",
            help="Another key of the metadata, as in tokenizer.ggml.add_bos_token=bool:true; repeatable.",
            show_default=False,
        ),
    ] = None,
    split_max_size: Annotated[
        str | None,
        typer.Option(
            "--split-max-size", metavar="N(M|G)", help="Largest size of a file.", show_default="one file"
        ),
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="Make embeddings and output SPK4, too.")] = False,
    threads: Threads = None,
    force: Force = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on with what a stopped conversion wrote, or start over."
        ),
    ] = True,
) -> None:
    """Make a spike GGUF of a model: its linear layers become SPK4.

    The same source and options give the same bytes, whatever the number of threads.
    """
    from ..converter import ConvertOptions, plan
    from ..converter import convert as run
    from ..converter.calibrated import CalibrationOptions, journal_path
    from ..converter.presets import PRESETS
    from ..format import DEFAULT_SALIENCE, DEFAULT_SILENCE
    from ..host import default_threads
    from ..texts import read_text
    from ..variants import ConverterProgress
    from .tables import show_conversion, show_plan

    rules = [*(_read_rules(tensor_type_file) if tensor_type_file else []), *(tensor_type or [])]
    threshold = _threshold(salience)
    settings = CalibrationOptions(
        text=None if calibration is None else read_text(calibration),
        preset=preset,
        salience=threshold,
        salient_share=salient_share,
        silence=silence,
        chunks=calibration_chunks,
        smoothing=smoothing,
        sensitivity=sensitivity,
        threads=threads or default_threads(),
        journal=journal_path(source, out),
        announce=lambda estimate: console.say(estimate.sentence(threads or default_threads())),
    )
    default_silence = PRESETS[preset].silence if calibrated else DEFAULT_SILENCE
    options = ConvertOptions(
        salience=DEFAULT_SALIENCE if threshold is None else threshold,
        silence=default_silence if silence is None else silence,
        importance=imatrix,
        tensor_types=tuple(rules),
        pure=pure,
        threads=threads,
        force=force,
        resume=resume,
        metadata=metadata,
        model_name=model_name,
        override_kv=tuple(override_kv or ()),
        split_max_size=split_max_size,
    )
    with console.progress() as progress:
        if dry_run:
            planned = plan(source, options, ConverterProgress(progress))
        else:
            calibrate = _calibration(settings) if calibrated else _no_calibration
            report = run(source, out, options, ConverterProgress(progress), calibrate=calibrate)
    if dry_run:
        console.result(planned.to_json, lambda out: show_plan(out, planned))
    else:
        console.result(report.to_json, lambda out: show_conversion(out, report))
        if calibrated and calibration is None:
            console.say(_DEFAULT_TEXT_NOTE)


def _threshold(text: str) -> float | None:
    """The number of --salience; None for auto."""
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"--salience {text} is no number", "give a number, for example 2.3, or auto"
        ) from None


def _calibration(settings: CalibrationOptions) -> Calibrate:
    from ..converter.calibrated import calibration

    return calibration(settings)


def _no_calibration(source: object, planned: object, progress: object) -> Recipe:
    """A recipe that only says, in the file's metadata, that there was none."""
    from ..converter import Recipe

    return Recipe(options=("--no-calibration",))


def _read_rules(path: Path) -> list[str]:
    """The rules of a file, without empty lines and comments."""
    from ..texts import read_text

    lines = read_text(path).data.decode("utf-8", "replace").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
