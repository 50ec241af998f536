"""Reads metadata and tensor list of a GGUF file, with every length checked against the file's size.

gguf.GGUFReader trusts the counts in a file, so that a damaged one may keep it busy for ever; this reader
names the problem instead. It reads no tensor data, and takes less memory than the file's size and 64 MB.
"""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Union

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from .errors import InputError

__all__ = ["GGUFHeader", "MetadataValue", "TensorInfo", "read_header"]

MetadataValue = Union[int, float, bool, str, NDArray, "list[str]"]
"""A scalar, a numeric or bool array as NumPy array, or an array of strings as list."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32

# Memory that Python objects may take beyond the size of the file, and about what some of them take: a few
# megabytes can list millions of tiny strings.
_OBJECT_BYTES = 56 << 20
_ITEM_BYTES, _VALUE_BYTES, _TENSOR_BYTES = 10, 300, 900
_LONG_STRING = 1 << 16

# GGUF value types: NumPy type of scalars, by number
_SCALARS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")
_STRING = 8
_ARRAY = 9


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor list.

    Attributes:
        name: of the tensor.
        shape: dimensions as ggml counts them: shape[0] is the number of inputs, the length of a row.
        type_id: ggml type.
        offset: first byte of the data, from the start of the file.
        n_bytes: size of the data; None for a type that gguf does not know, or rows that are not whole blocks.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    n_bytes: int | None

    @property
    def n_rows(self) -> int:
        """Rows of all matrices of the tensor."""
        return int(np.prod(self.shape[1:], dtype=object))


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself.

    Attributes:
        file_bytes: size of the file.
        version: of GGUF.
        metadata: values by key.
        tensors: in the order of the file.
        alignment: of tensor data, in bytes.
        data_offset: where tensor data starts.
    """

    file_bytes: int
    version: int
    metadata: dict[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int


class _Cursor:
    """A position in the file. Reading past the end raises InputError."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.at = 0
        self.size = os.fstat(file.fileno()).st_size
        self._file = file
        self._objects = 0

    def error(self, problem: str) -> InputError:
        return InputError(f"{self.path}: {problem}", "download or convert the model again")

    def take(self, n_bytes: int, what: str) -> bytes:
        if n_bytes <= self.size - self.at:
            data = self._file.read(n_bytes)
            self.at += len(data)
            if len(data) == n_bytes:
                return data
        raise self.error(f"the file is cut off or damaged: {what} at byte {self.at} does not fit into it")

    def account(self, n_bytes: int, what: str) -> None:
        """Counts memory of objects. Raises InputError when they take too much."""
        self._objects += n_bytes
        if self._objects > self.size + _OBJECT_BYTES:
            raise self.error(f"the header is damaged: {what} and those before it would fill the memory")

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def string(self, what: str) -> str:
        n_bytes = self.u64(what)
        if n_bytes > _LONG_STRING and n_bytes <= self.size - self.at:
            # one character beyond ASCII can make all four bytes wide, and so does a byte that is no text
            self.account(5 * n_bytes, what)
        text = self.take(n_bytes, what).decode("utf-8", "backslashreplace")
        self.account(sys.getsizeof(text) + _ITEM_BYTES, what)
        return text

    def value(self, key: str) -> MetadataValue:
        what = f"metadata '{key}'"
        kind = self.u32(what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            kind = self.u32(what)
            count = self.u64(what)
            if kind == _STRING:
                if count > (self.size - self.at) // 8:
                    raise self.error(f"the file is cut off or damaged: {what} claims {count} strings")
                return [self.string(what) for _ in range(count)]
            dtype = self.scalar(kind, what)
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        dtype = self.scalar(kind, what)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def scalar(self, kind: int, what: str) -> np.dtype:
        dtype = _SCALARS[kind] if kind < len(_SCALARS) else None
        if dtype is None:
            raise self.error(f"{what} has the unknown value type {kind}")
        return np.dtype(dtype)


def read_header(path: str | Path) -> GGUFHeader:
    """Reads the header of a GGUF file.

    Raises:
        InputError: the file cannot be read, is no little-endian GGUF 2 or 3, or its header is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            cursor = _Cursor(file, path)
            if cursor.size == 0:
                raise cursor.error("the file is empty")
            return _parse(cursor)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}", "check the path and its permissions"
        ) from error


def _parse(cursor: _Cursor) -> GGUFHeader:
    if cursor.take(min(len(_MAGIC), cursor.size), "magic") != _MAGIC:
        raise InputError(f"{cursor.path}: not a GGUF file", "give the path of a .gguf model")
    version = cursor.u32("version")
    if version not in _VERSIONS:
        big_endian = version & 0xFFFF == 0
        problem = (
            "big-endian GGUF is not supported" if big_endian else f"GGUF version {version} is not supported"
        )
        raise InputError(f"{cursor.path}: {problem}", "convert the model again")
    n_tensors, n_values = cursor.u64("tensor count"), cursor.u64("metadata count")

    metadata: dict[str, MetadataValue] = {}
    for number in range(n_values):
        key = cursor.string(f"metadata key {number}")
        if key in metadata:
            raise cursor.error(f"metadata '{key}' is there twice")
        cursor.account(_VALUE_BYTES, f"metadata '{key}'")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error("general.alignment is not a power of two")

    entries = [_tensor_entry(cursor, number) for number in range(n_tensors)]
    data_offset = -(-cursor.at // alignment) * alignment
    names: set[str] = set()
    for name, *_ in entries:
        if name in names:
            raise cursor.error(f"tensor '{name}' is there twice")
        names.add(name)
    tensors = tuple(
        TensorInfo(name, shape, type_id, data_offset + offset, _size(shape, type_id))
        for name, shape, type_id, offset in entries
    )
    return GGUFHeader(cursor.size, version, metadata, tensors, alignment, data_offset)


def _tensor_entry(cursor: _Cursor, number: int) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(f"name of tensor {number}")
    what = f"entry of tensor '{name}'"
    cursor.account(_TENSOR_BYTES, what)
    n_dims = cursor.u32(what)
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.error(f"tensor '{name}' has {n_dims} dimensions, not 1 to {_MAX_DIMS}")
    shape = tuple(cursor.u64(what) for _ in range(n_dims))
    return name, shape, cursor.u32(what), cursor.u64(what)


def _size(shape: tuple[int, ...], type_id: int) -> int | None:
    block = GGML_QUANT_SIZES.get(GGMLQuantizationType._value2member_map_.get(type_id))
    if block is None or shape[0] % block[0] != 0:
        return None
    return int(np.prod(shape, dtype=object)) // block[0] * block[1]
