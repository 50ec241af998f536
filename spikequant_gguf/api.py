"""The functions of this package for Python programs: what the commands do, without the terminal.

    from spikequant_gguf import convert, perplexity

    report = convert("model-F16.gguf", "model-SPK4.gguf")
    print(report.bits_per_weight, perplexity(report.path, "wiki.test.raw").ppl)

Every function returns a frozen dataclass with ``to_json()``, raises SpikeQuantError with a sentence and a
remedy, keeps no state and, given ``progress``, calls it with (step, units done, units in all). There is no
class around a model: programs use `llama_cpp.Llama` with the converted file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ggml_patch.progress import Progress as Steps
from .ggml_patch.progress import SilentProgress
from .texts import Text

if TYPE_CHECKING:
    from .compare import Comparison
    from .converter import ConvertOptions, ConvertReport
    from .converter.calibrated import CalibrationOptions
    from .dequantize import DequantizeReport
    from .energy import EnergyResult
    from .perplexity import PerplexityResult

__all__ = ["Progress", "compare", "convert", "dequantize", "energy", "perplexity"]

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, the units of it that are done, and all units of it (0 if not known)."""
PathLike = str | os.PathLike[str]


def convert(
    source: PathLike,
    out: PathLike | None = None,
    options: ConvertOptions | None = None,
    *,
    calibration: CalibrationOptions | bool = True,
    progress: Progress | None = None,
) -> ConvertReport:
    """Makes a spike GGUF, as the command `convert` does.

    Args:
        source: GGUF file, folder of a Hugging Face checkpoint, or its id there.
        out: file to write; None for a name after the model, in the current folder.
        options: types of tensors and settings of the encoder; None for the defaults.
        calibration: how to calibrate; True for the default text and settings, False for rounding to the
            nearest.
        progress: see this module.

    Raises:
        SpikeQuantError: as converter.convert.
    """
    from . import converter
    from .converter.calibrated import CalibrationOptions
    from .converter.calibrated import calibration as calibrated

    def report(stage: str, item: str | None, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    settings = CalibrationOptions() if calibration is True else calibration
    return converter.convert(
        source, out, options, report, calibrate=calibrated(settings) if settings else None
    )


def perplexity(
    model: PathLike,
    text: Text | PathLike | None = None,
    *,
    ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a model, llama-perplexity's figure.

    Args:
        model: GGUF file of any type.
        text: to evaluate; None for wiki.test.raw in $SPIKEQUANT_DATA, else Python's documentation.
        ctx: tokens of a chunk.
        chunks: how many of them; None for all.
        threads: None for one per physical core.
        progress: see this module.

    Raises:
        InputError: the model or the text is missing, damaged or too short.
    """
    from .perplexity import perplexity as run

    return run(_path(model), _text(text), ctx=ctx, chunks=chunks, threads=threads, progress=_steps(progress))


def compare(
    models: Sequence[PathLike],
    text: Text | PathLike | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Accuracy and speed of several versions of one model, as the command `compare` shows them.

    Args:
        models: GGUF files with the same vocabulary.
        text: as of `perplexity`.
        progress: see this module.
        options: reference, names, ctx, chunks, threads, rounds, prompt and decode of compare.compare.

    Raises:
        InputError: there are fewer than two models, or they do not fit together.
    """
    from .compare import compare as run

    return run([_path(model) for model in models], _text(text), progress=_steps(progress), **options)


def energy(
    model: PathLike,
    text: Text | PathLike | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> EnergyResult:
    """What the linear layers of a spike model do for a text, and what that costs by cited constants.

    Args:
        model: GGUF file with SPK4 tensors.
        text: as of `perplexity`.
        progress: see this module.
        options: tokens, phases, shape, constants, measuring and threads of energy.energy.

    Raises:
        InputError: the text is too short, or the model has no spikes.
    """
    from .energy import energy as run

    return run(_path(model), _text(text), progress=_steps(progress), **options)


def dequantize(
    model: PathLike,
    out: PathLike,
    output_type: str = "f16",
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> DequantizeReport:
    """Turns a spike model into a GGUF that every llama.cpp reads.

    Args:
        model: GGUF file.
        out: file to write.
        output_type: ``f16``, ``bf16`` or ``q8_0``.
        force: replace an existing file.
        progress: see this module.

    Raises:
        InputError, OutputError, UnsupportedError: as dequantize.dequantize.
    """
    from .dequantize import dequantize as run

    return run(_path(model), _path(out), output_type, force=force, progress=_steps(progress))


class _Callback:
    """Turns steps into calls of one function."""

    def __init__(self, function: Progress) -> None:
        self._function = function
        self._step = ""

    def step(self, name: str, detail: str = "") -> None:
        self._step = name
        self._function(name, 0, 0)

    def advance(self, done: int, total: int) -> None:
        self._function(self._step, done, total)

    def note(self, text: str) -> None:
        pass  # sentences are in the results


def _steps(progress: Progress | None) -> Steps:
    return SilentProgress() if progress is None else _Callback(progress)


def _path(path: PathLike) -> Path:
    return Path(os.fspath(path))


def _text(text: Text | PathLike | None) -> Text | Path | None:
    return text if text is None or isinstance(text, Text) else _path(text)
