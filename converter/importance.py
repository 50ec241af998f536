"""Reads importance matrices, as llama-imatrix writes them: GGUF, or the older ``.dat`` form.

An importance is the mean square of an input over a text: a weight of the squared error of its column.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from spikequant_gguf.errors import InputError
from spikequant_gguf.gguf_header import MetadataValue, TensorInfo, read_header

__all__ = ["Importance", "read_importance"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_REMEDY = "make it again with llama-imatrix"


@dataclass(frozen=True)
class _Entry:
    """sums: float32[n_matrices * n_in]; counts: float32[n_matrices], or of one value for all matrices."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]


@dataclass(frozen=True)
class Importance:
    """An importance matrix. Its values stay in the file until they are needed.

    Attributes:
        path: of the file.
        datasets: names of the texts it was computed from, as the file states them.
        chunks: number of pieces of text it was computed from; 0 if not stated.
    """

    path: Path
    datasets: tuple[str, ...]
    chunks: int
    _entries: Mapping[str, _Entry]

    def __len__(self) -> int:
        """Number of tensors it knows."""
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def of(self, name: str, matrix: int, n_in: int) -> NDArray[np.float32] | None:
        """float32[n_in] for one matrix of a tensor, None if the file does not know the tensor.

        An expert that saw no token gets ones.

        Raises:
            InputError: values or the number of tokens are not finite or negative.
        """
        entry = self._entries.get(name)
        if entry is None:
            return None
        sums = np.asarray(entry.sums[matrix * n_in : (matrix + 1) * n_in], np.float32)
        count = entry.counts[matrix if len(entry.counts) > 1 else 0]
        if len(sums) == n_in and np.isfinite(count) and count >= 0:
            count = np.rint(count)
            with np.errstate(all="ignore"):  # what is not finite then is refused
                values = sums / count if count > 0 else np.ones(n_in, np.float32)
            if (np.isfinite(values) & (values >= 0)).all():
                return values
        raise InputError(
            f"{self.path}: the values of tensor '{name}' are not all finite and 0 or more", _REMEDY
        )

    def check(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Checks sizes before any work is done.

        Args:
            tensors: names and shapes (inputs first) of those to quantize.

        Raises:
            InputError: an entry's size does not fit its tensor, or no tensor has an entry.
        """
        known = 0
        for name, shape in tensors:
            entry = self._entries.get(name)
            if entry is None:
                continue
            known += 1
            matrices = int(np.prod(shape[2:], dtype=object))
            if len(entry.sums) != shape[0] * matrices or len(entry.counts) not in (1, matrices):
                raise InputError(
                    f"{self.path}: tensor '{name}' has {len(entry.sums)} values, not {shape[0] * matrices}",
                    "make the importance matrix from this very model",
                )
        if not known:
            raise InputError(
                f"{self.path}: the importance matrix knows none of the model's tensors",
                "make it from this very model with llama-imatrix",
            )


def read_importance(path: Path) -> Importance:
    """Reads an importance matrix of either form.

    Raises:
        InputError: the file cannot be read, is damaged, or is no importance matrix.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    return _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)


def _read_gguf(path: Path) -> Importance:
    header = read_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise InputError(
            f"{path}: a GGUF file, but no importance matrix", "give a file that llama-imatrix wrote"
        )
    data = np.memmap(path, np.uint8, mode="r")
    arrays = {tensor.name: _values(path, data, tensor) for tensor in header.tensors}
    entries = {}
    for name, sums in arrays.items():
        if name.endswith(_SUMS):
            stem = name.removesuffix(_SUMS)
            counts = arrays.get(stem + _COUNTS)
            if counts is None or len(sums) % len(counts) != 0:
                raise InputError(f"{path}: no counts for the sums of tensor '{stem}'", _REMEDY)
            entries[stem] = _Entry(sums, counts)
    if not entries:
        raise InputError(f"{path}: the importance matrix is empty", _REMEDY)
    datasets = header.metadata.get("imatrix.datasets", [])
    return Importance(
        path,
        tuple(datasets) if isinstance(datasets, list) else (),
        _count(header.metadata.get("imatrix.chunk_count")),
        entries,
    )


def _values(path: Path, data: NDArray[np.uint8], tensor: TensorInfo) -> NDArray[np.float32]:
    if tensor.type_id != GGMLQuantizationType.F32 or not tensor.n_bytes:
        raise InputError(f"{path}: tensor '{tensor.name}' does not hold F32 values", _REMEDY)
    if tensor.offset + tensor.n_bytes > len(data):
        raise InputError(f"{path}: the file is cut off in tensor '{tensor.name}'", _REMEDY)
    return data[tensor.offset : tensor.offset + tensor.n_bytes].view("<f4")


def _count(value: MetadataValue | None) -> int:
    return value if isinstance(value, int) else 0


def _read_legacy(path: Path) -> Importance:
    """An int32 number of entries; of each: int32 length and name, int32 calls, int32 n and n float32."""
    broken = InputError(
        f"{path}: neither a GGUF file nor a complete importance matrix of the old form", _REMEDY
    )
    if path.stat().st_size < 4:
        raise broken
    data = np.memmap(path, np.uint8, mode="r")
    at = 0

    def take(n_bytes: int) -> NDArray[np.uint8]:
        nonlocal at
        if not 0 <= n_bytes <= len(data) - at:
            raise broken
        at += n_bytes
        return data[at - n_bytes : at]

    def number() -> int:
        return struct.unpack("<i", take(4).tobytes())[0]

    entries: dict[str, _Entry] = {}
    n_entries = number()
    if n_entries < 1:
        raise broken
    for _ in range(n_entries):
        name = take(number()).tobytes().decode("utf-8", "backslashreplace")
        calls = number()
        n_values = number()
        if n_values < 1 or not name:
            raise broken
        # the sums are of means per call; without calls they are taken as they are
        entries[name] = _Entry(take(4 * n_values).view("<f4"), np.array([max(calls, 1)], np.float32))
    chunks, datasets = 0, ()
    if at < len(data):  # optional
        chunks = number()
        if at < len(data):
            datasets = (take(number()).tobytes().decode("utf-8", "backslashreplace"),)
    return Importance(path, tuple(filter(None, datasets)), max(chunks, 0), entries)
