"""Versions of one model in other types, made once and kept in the cache.

All come from one F16 file, which is the reference: stock types by llama-quantize of the same tree, SPK4 by
this package's converter with its default settings. A file's name carries what it was made from and how; so a
file that is there can be used, and one made otherwise has another name.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import filelock

from . import __version__, runtime
from .errors import InputError, SpikeQuantError, UnsupportedError
from .files import atomic_path, file_sha256
from .ggml_patch.cache import make_folder, short_hash
from .ggml_patch.progress import Progress, SilentProgress
from .gguf_header import GGUFHeader, read_header
from .inspect_file import model_type, type_name
from .models import models_folder
from .texts import read_text

__all__ = ["DEFAULT_TYPES", "REFERENCE_TYPE", "STOCK_TYPES", "Variants", "quantized_tensor_types"]

REFERENCE_TYPE = "f16"
SPIKE_TYPE = "spk4"
SPIKE_OPTIONS = {
    SPIKE_TYPE: ("balanced", False),
    "spk4-fast": ("fast", False),
    "spk4-accurate": ("accurate", False),
    "spk4-pure": ("balanced", True),
}
"""The converter's preset, and whether embeddings and output become SPK4, too, by the names of `--types`."""
DEFAULT_TYPES = ("f16", "q4_0", "q4_k_m", "iq4_xs", "spk4")
STOCK_TYPES = (
    *(
        "f32",
        "f16",
        "bf16",
        "q8_0",
        "q6_k",
        "q5_k_m",
        "q5_k_s",
        "q5_1",
        "q5_0",
        "q4_k_m",
        "q4_k_s",
        "q4_1",
        "q4_0",
    ),
    *(
        "iq4_xs",
        "iq4_nl",
        "q3_k_l",
        "q3_k_m",
        "q3_k_s",
        "iq3_m",
        "iq3_s",
        "iq3_xs",
        "iq3_xxs",
        "q2_k",
        "q2_k_s",
    ),
    *("iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq1_0", "tq2_0"),
)
"""Types that llama-quantize makes, by the names of `--types`."""

_FLOAT_TYPES = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
_STEP = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


class Variants:
    """The versions of one source model.

    Args:
        source: GGUF file; of floats, or of a stock quantized type, which is dequantized first.
        imatrix: importance matrix for all quantizers, or None.
        calibration: text to calibrate SPK4 on; None for the converter's default.
        calibration_chunks: of that text; None for the converter's default.
        threads: that quantize.

    Raises:
        InputError: a file cannot be read. UnsupportedError: the source is a spike model.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        imatrix: str | Path | None = None,
        calibration: str | Path | None = None,
        calibration_chunks: int | None = None,
        threads: int,
        progress: Progress | None = None,
    ) -> None:
        self.source = Path(source)
        self.imatrix = None if imatrix is None else Path(imatrix)
        self._calibration = None if calibration is None else read_text(calibration)
        self._calibration_chunks = calibration_chunks
        self._threads = threads
        self._progress = progress or SilentProgress()
        if self.source.is_dir():
            raise InputError(
                f"{source} is a folder, and types are made of a GGUF file",
                "convert it with convert_hf_to_gguf.py first (`spikequant doctor` shows its place)",
            )
        self.header = read_header(self.source)
        self.source_type = model_type(self.header)
        if self.source_type == SPIKE_TYPE:
            raise UnsupportedError(
                f"{source} is a spike model, which other types cannot be made from",
                "give the model that it was made from, or compare finished files without --types",
            )
        self._progress.step("hash", self.source.name)
        digest = file_sha256(self.source, self._progress.advance)
        self._folder = make_folder(models_folder() / digest[:16])
        self._imatrix_digest = "" if self.imatrix is None else file_sha256(self.imatrix)

    def make(self, kind: str) -> Path:
        """Path of the version of type `kind`, for example ``q4_0``; makes it if it is not in the cache.

        Raises:
            InputError: there is no such type. SpikeQuantError: the quantizer refuses the model.
        """
        kind = kind.lower()
        if kind not in (*STOCK_TYPES, *SPIKE_OPTIONS):
            raise InputError(
                f"there is no type '{kind}'", f"choose from {', '.join((*SPIKE_OPTIONS, *STOCK_TYPES))}"
            )
        if kind == self.source_type and kind in ("f32", "f16", "bf16"):
            return self.source
        path = self._folder / f"{_base_name(self.source)}-{kind.upper()}-{self._settings(kind)}.gguf"
        with filelock.FileLock(self._folder / f".{kind}.lock"):
            if not path.is_file():
                origin = self.source if kind == REFERENCE_TYPE else self.make(REFERENCE_TYPE)
                with atomic_path(path) as partial:
                    if kind in SPIKE_OPTIONS:
                        self._convert(origin, partial, *SPIKE_OPTIONS[kind])
                    else:
                        self._quantize(origin, partial, kind)
        return path

    def _settings(self, kind: str) -> str:
        """Eight digits that change with everything but the source that a version depends on."""
        info = runtime.require_runtime()
        parts = [info.llama_cpp_version or "", "" if kind in ("f32", "f16", "bf16") else self._imatrix_digest]
        if kind in SPIKE_OPTIONS:
            parts += [__version__, info.patch_id or "", _converter_digest()]
            if self._calibration is not None:
                parts.append(self._calibration.sha256)
            if self._calibration_chunks is not None:
                parts.append(f"{self._calibration_chunks} chunks")
        return short_hash(*parts)[:8]

    def _quantize(self, origin: Path, out: Path, kind: str) -> None:
        self._progress.step("quantize", kind.upper())
        command: list[str | Path] = [runtime.tool("llama-quantize")]
        if origin == self.source and quantized_tensor_types(self.header):
            command.append("--allow-requantize")  # to floats only: see make
        if self.imatrix is not None and kind not in ("f32", "f16", "bf16"):
            command += ["--imatrix", self.imatrix]
        command += [origin, out, kind.upper(), str(self._threads)]
        lines: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            try:
                for line in process.stdout or ():
                    lines.append(line.strip())
                    if counted := _STEP.search(line):
                        self._progress.advance(int(counted.group(1)), int(counted.group(2)))
            except BaseException:
                process.kill()
                raise
        if process.returncode or not out.is_file():
            raise SpikeQuantError(
                f"llama-quantize could not make {kind.upper()} of {origin}: {_reason(lines)}",
                "leave this type out of --types, or give it what it asks for",
            )

    def _convert(self, origin: Path, out: Path, preset: str, pure: bool) -> None:
        from .converter import ConvertOptions, convert  # needed for this type only
        from .converter.calibrated import CalibrationOptions, calibration

        self._progress.step("convert", f"{SPIKE_TYPE.upper()}, {preset}{', pure' if pure else ''}")
        options = CalibrationOptions(
            self._calibration, preset, chunks=self._calibration_chunks, threads=self._threads
        )
        convert(
            origin,
            out,
            ConvertOptions(importance=self.imatrix, pure=pure, threads=self._threads, resume=False),
            ConverterProgress(self._progress),
            calibrate=calibration(options),
        )


class ConverterProgress:
    """Shows the stages of the converter as steps."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stage: str | None = None

    def __call__(self, stage: str, item: str | None, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            self._progress.step(stage)
        if total:
            self._progress.advance(done, total)


def quantized_tensor_types(header: GGUFHeader) -> Sequence[str]:
    """Names of the quantized tensor types in a file, sorted."""
    return sorted({type_name(tensor.type_id) for tensor in header.tensors} - set(_FLOAT_TYPES))


def _base_name(source: Path) -> str:
    """The file's name without suffix and type, as in ``Model-135M.Q4_1.gguf``."""
    return re.sub(r"[-.](?:[QF]\d\w*|BF16|I?Q\d\w*)$", "", source.stem, flags=re.IGNORECASE)


def _converter_digest() -> str:
    """Changes with the converter's code, so that its users never see a file of an older one."""
    from . import converter

    digest = hashlib.sha256()
    for file in sorted(Path(converter.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _reason(lines: Sequence[str]) -> str:
    errors = [
        line for line in lines if re.search(r"fail|error|invalid|missing|requires", line, re.IGNORECASE)
    ]
    return (errors or [line for line in lines if line] or ["it gives no reason"])[-1]
