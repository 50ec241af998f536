"""What is in a GGUF file: its tensors with shapes, types and statistics, and its metadata."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType

from .errors import InputError
from .format import (
    BLOCK_SPK4,
    KEY_ENCODER_SALIENCE,
    KEY_ENCODER_SILENCE,
    KEY_ENCODER_TENSORS,
    KEY_STATISTICS_RELATIVE_ERROR,
    KEY_STATISTICS_SALIENT_INPUT_SHARE,
    KEY_STATISTICS_SALIENT_WEIGHT_SHARE,
    KEY_STATISTICS_TENSORS,
    SPK4_NOT_ROTATED,
    TYPE_SPK4,
)
from .gguf_header import GGUFHeader, MetadataValue, TensorInfo, read_header

__all__ = [
    "InspectReport",
    "ModelSize",
    "TensorSummary",
    "inspect_file",
    "model_size",
    "model_type",
    "type_name",
]

_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_SHOWN_ITEMS = 8


@dataclass(frozen=True)
class TensorSummary:
    """One tensor.

    Attributes:
        name: of the tensor.
        shape: as ggml counts: shape[0] inputs, shape[1] rows.
        type: name of the type.
        bytes: size of the data; None for an unknown type.
        bits_per_weight: of the data.
        rotated: of SPK4: whether stored in the rotated basis.
        salient_weight_share, salient_input_share, relative_error: statistics that the converter recorded;
            None if it did not.
        salience, silence: settings of the activation encoder in the file; None where defaults apply.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int | None
    bits_per_weight: float | None
    rotated: bool | None = None
    salient_weight_share: float | None = None
    salient_input_share: float | None = None
    relative_error: float | None = None
    salience: float | None = None
    silence: float | None = None


@dataclass(frozen=True)
class ModelSize:
    """Size of a model over all its files.

    Attributes:
        file_bytes: of the files.
        parameters: elements of all tensors.
        tensor_bytes: data of all tensors; None if a type is unknown.
        bits_per_weight: tensor bits per parameter.
    """

    file_bytes: int
    parameters: int
    tensor_bytes: int | None

    @property
    def bits_per_weight(self) -> float | None:
        if self.tensor_bytes is None or not self.parameters:
            return None
        return 8 * self.tensor_bytes / self.parameters


@dataclass(frozen=True)
class InspectReport:
    """The content of one file, without data.

    Attributes:
        path: of the file.
        type: of the model, for example ``spk4``.
        size: of the model; all parts of a split one.
        types: bytes per tensor type.
        metadata: values by key; long arrays are cut and say so.
        tensors: in the order of the file.
    """

    path: str
    type: str
    size: ModelSize
    types: dict[str, int]
    metadata: dict[str, object]
    tensors: tuple[TensorSummary, ...]

    def to_json(self) -> dict:
        """The report as plain JSON types."""
        return {
            "path": self.path,
            "type": self.type,
            **asdict(self.size),
            "bits_per_weight": self.size.bits_per_weight,
            "types": self.types,
            "metadata": self.metadata,
            "tensors": [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in self.tensors],
        }


def inspect_file(path: str | Path) -> InspectReport:
    """Read metadata and tensor list of a GGUF file. Raises InputError."""
    path = Path(path)
    header = read_header(path)
    statistics = _columns(
        header,
        KEY_STATISTICS_TENSORS,
        KEY_STATISTICS_SALIENT_WEIGHT_SHARE,
        KEY_STATISTICS_SALIENT_INPUT_SHARE,
        KEY_STATISTICS_RELATIVE_ERROR,
    )
    encoder = _columns(header, KEY_ENCODER_TENSORS, KEY_ENCODER_SALIENCE, KEY_ENCODER_SILENCE)
    tensors = tuple(_summary(path, tensor, statistics, encoder) for tensor in header.tensors)
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[tensor.type] += tensor.bytes or 0
    return InspectReport(
        path=str(path),
        type=model_type(header),
        size=model_size(path),
        types=dict(types.most_common()),
        metadata={key: _shown(value) for key, value in header.metadata.items()},
        tensors=tensors,
    )


def model_size(path: str | Path) -> ModelSize:
    """Size of a model; if its file is the first of several parts, of all of them. Raises InputError."""
    headers = [read_header(part) for part in _parts(Path(path))]
    tensors = [tensor for header in headers for tensor in header.tensors]
    known = all(tensor.n_bytes is not None for tensor in tensors)
    return ModelSize(
        file_bytes=sum(header.file_bytes for header in headers),
        parameters=sum(_elements(tensor) for tensor in tensors),
        tensor_bytes=sum(tensor.n_bytes or 0 for tensor in tensors) if known else None,
    )


def model_type(header: GGUFHeader) -> str:
    """Type of a model, for example ``q4_k_m``: its file type, else the type of most of its weights."""
    file_type = header.metadata.get("general.file_type")
    member = LlamaFileType._value2member_map_.get(file_type) if isinstance(file_type, int) else None
    if member is not None:
        return member.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
    weights: Counter[str] = Counter()
    for tensor in header.tensors:
        weights[type_name(tensor.type_id)] += _elements(tensor)
    return weights.most_common(1)[0][0].lower() if weights else "empty"


def type_name(type_id: int) -> str:
    """Name of a tensor type, in upper case; its number if it is unknown."""
    member = GGMLQuantizationType._value2member_map_.get(type_id)
    return member.name if member is not None else f"type {type_id}"


def _parts(path: Path) -> list[Path]:
    """All files of a split model, by its naming convention, else just the file."""
    match = _SPLIT_NAME.search(path.name)
    if match is None:
        return [path]
    total = int(match.group(2))
    parts = [
        path.with_name(f"{path.name[: match.start()]}-{number:05d}-of-{total:05d}.gguf")
        for number in range(1, total + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise InputError(f"{part} is missing: the model has {total} parts", "download the missing part")
    return parts


def _elements(tensor: TensorInfo) -> int:
    return int(np.prod(tensor.shape, dtype=object))


def _columns(header: GGUFHeader, names_key: str, *keys: str) -> dict[str, list[float | None]]:
    """Values by tensor name of parallel metadata arrays; damaged ones (see `verify`) count as absent."""
    names = header.metadata.get(names_key)
    if not isinstance(names, list):
        return {}
    columns = []
    for key in keys:
        values = header.metadata.get(key)
        usable = isinstance(values, np.ndarray) and len(values) == len(names)
        columns.append(values.tolist() if usable else [None] * len(names))
    return {name: list(row) for name, *row in zip(names, *columns, strict=True)}


def _summary(
    path: Path,
    tensor: TensorInfo,
    statistics: dict[str, list[float | None]],
    encoder: dict[str, list[float | None]],
) -> TensorSummary:
    bits = None if tensor.n_bytes is None else 8 * tensor.n_bytes / max(1, _elements(tensor))
    share, input_share, error = statistics.get(tensor.name, (None, None, None))
    salience, silence = encoder.get(tensor.name, (None, None))
    return TensorSummary(
        name=tensor.name,
        shape=tensor.shape,
        type=type_name(tensor.type_id),
        bytes=tensor.n_bytes,
        bits_per_weight=bits,
        rotated=_is_rotated(path, tensor) if tensor.type_id == TYPE_SPK4 else None,
        salient_weight_share=share,
        salient_input_share=input_share,
        relative_error=error,
        salience=salience or None,  # 0 stands for the default
        silence=silence or None,
    )


def _is_rotated(path: Path, tensor: TensorInfo) -> bool | None:
    """What the first block says; `verify` checks that all others agree. None if the file ends before it."""
    if tensor.offset >= path.stat().st_size:  # any 64-bit number, and more than can be sought
        return None
    with path.open("rb") as file:
        file.seek(tensor.offset)
        raw = file.read(BLOCK_SPK4.itemsize)
    if len(raw) < BLOCK_SPK4.itemsize:
        return None
    return not int(np.frombuffer(raw, BLOCK_SPK4)["header"][0]) & SPK4_NOT_ROTATED


def _shown(value: MetadataValue) -> object:
    """A metadata value as plain JSON types, long arrays cut."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and len(value) > _SHOWN_ITEMS:
        return {"items": len(value), "first": value[:_SHOWN_ITEMS]}
    return value
