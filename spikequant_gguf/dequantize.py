"""Turns a spike model back into a GGUF of stock types, which every llama.cpp reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf.quants
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import QuantError
from numpy.typing import NDArray

from .converter.metadata import encode_text, encode_u32, read_raw_metadata
from .converter.write import Layout, OutputFile, OutputTensor, check_output
from .errors import InputError, UnsupportedError
from .evaluation import check_model_file
from .files import file_sha256
from .format import KEY_SOURCE, KEY_SOURCE_SHA256
from .ggml_patch.progress import Progress, SilentProgress
from .gguf_header import TensorInfo, read_header
from .inspect_file import type_name

__all__ = ["OUTPUT_TYPES", "DequantizeReport", "dequantize"]

_T = GGMLQuantizationType
OUTPUT_TYPES = ("f16", "bf16", "q8_0")
_FILE_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_KEPT = (_T.F32, _T.F16, _T.BF16, _T.F64, _T.I8, _T.I16, _T.I32, _T.I64)
_LARGEST_F16 = 65504.0
_CHUNK_VALUES = 1 << 22  # 16 MB of float32 at once
_OWN_KEYS = b"spikequant."


@dataclass(frozen=True)
class DequantizeReport:
    """What was written.

    Attributes:
        source, path: files read and written.
        type: name of the output type.
        tensors: number of tensors that were turned into it; the others were copied.
        file_bytes: size of the new file.
        seconds: time taken.
    """

    source: str
    path: str
    type: str
    tensors: int
    file_bytes: int
    seconds: float

    def to_json(self) -> dict:
        """The report as plain JSON types."""
        return asdict(self)


def dequantize(
    model: str | Path,
    out: str | Path,
    output_type: str = "f16",
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> DequantizeReport:
    """Write a model's quantized tensors in a stock type; tensors of floats are copied.

    Needs no runtime. The file appears under its name when it is complete.

    Args:
        output_type: one of OUTPUT_TYPES. Rows that are no whole blocks of Q8_0 become F16.
        force: replace an existing file.

    Raises:
        InputError: the model is missing or damaged. OutputError: `out` cannot be written.
        UnsupportedError: a tensor's type is unknown, its values are too large for F16, or the model has
            several parts.
    """
    started = time.perf_counter()
    source, path, wanted = Path(model), Path(out), output_type.lower()
    if wanted not in OUTPUT_TYPES:
        raise InputError(f"there is no output type '{output_type}'", f"choose from {', '.join(OUTPUT_TYPES)}")
    progress = progress or SilentProgress()
    progress.step("verify", source.name)
    check_model_file(source)
    check_output(path, force, [source])
    header = read_header(source)
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(
            f"{source} is one of several parts of a model", "merge them with llama-gguf-split"
        )
    targets = [_target(tensor, _T[wanted.upper()]) for tensor in header.tensors]
    progress.step("hash", source.name)
    metadata = {
        key: value
        for key, value in read_raw_metadata(source, len(header.metadata)).items()
        if not key.startswith(_OWN_KEYS)
    }
    metadata[b"general.file_type"] = encode_u32(int(_FILE_TYPES[wanted]))
    metadata[KEY_SOURCE.encode()] = encode_text(source.name)
    metadata[KEY_SOURCE_SHA256.encode()] = encode_text(file_sha256(source, progress.advance))
    layout = Layout(
        metadata,
        [OutputTensor(t.name, t.shape, kind) for t, kind in zip(header.tensors, targets, strict=True)],
        header.alignment,
    )
    progress.step("write", path.name)
    data = np.memmap(source, np.uint8, mode="r")
    with OutputFile(path, force) as output:
        output.begin(layout)
        for number, (tensor, kind) in enumerate(zip(header.tensors, targets, strict=True)):
            output.write_tensor(_converted(tensor, kind, data))
            progress.advance(number + 1, len(targets))
        output.commit(metadata)
    return DequantizeReport(
        source=str(source),
        path=str(path),
        type=wanted,
        tensors=sum(kind != tensor.type_id for tensor, kind in zip(header.tensors, targets, strict=True)),
        file_bytes=layout.file_bytes,
        seconds=time.perf_counter() - started,
    )


def _target(tensor: TensorInfo, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type that a tensor gets."""
    kind = _T._value2member_map_.get(tensor.type_id)
    if kind is None or tensor.n_bytes is None:
        raise UnsupportedError(
            f"tensor '{tensor.name}' has the unknown type {tensor.type_id}", "update spikequant-gguf"
        )
    if kind in _KEPT:
        return kind
    return wanted if tensor.shape[0] % GGML_QUANT_SIZES[wanted][0] == 0 else _T.F16


def _converted(
    tensor: TensorInfo, kind: GGMLQuantizationType, data: NDArray[np.uint8]
) -> Iterator[NDArray[np.uint8]]:
    """The tensor's data in the type `kind`, in pieces."""
    n_bytes = tensor.n_bytes or 0
    raw = data[tensor.offset : tensor.offset + n_bytes].reshape(tensor.n_rows, n_bytes // tensor.n_rows)
    step = max(1, _CHUNK_VALUES // tensor.shape[0])
    for first in range(0, tensor.n_rows, step):
        rows = raw[first : first + step]
        yield np.ascontiguousarray(rows) if kind == tensor.type_id else _requantize(tensor, kind, rows)


def _requantize(tensor: TensorInfo, kind: GGMLQuantizationType, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    try:
        values = gguf.quants.dequantize(rows, _T(tensor.type_id))
    except (NotImplementedError, QuantError) as error:
        raise UnsupportedError(
            f"tensor '{tensor.name}' of type {type_name(tensor.type_id)} cannot be dequantized: {error}",
            "use llama-quantize for this model",
        ) from error
    if kind == _T.F16 and np.abs(values).max(initial=0.0) > _LARGEST_F16:
        raise UnsupportedError(
            f"tensor '{tensor.name}' has values too large for F16", "choose --outtype bf16"
        )
    return np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8).reshape(len(rows), -1)
