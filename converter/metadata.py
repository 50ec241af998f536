"""GGUF metadata as bytes: the source's values are carried over without decoding, ours are encoded here.

A value is held as it stands in the file: its type number and its payload. So a key's value survives a
conversion bit for bit, whatever its type.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "RawMetadata",
    "encode_bool",
    "encode_f32",
    "encode_f32s",
    "encode_int",
    "encode_string",
    "encode_text",
    "encode_texts",
    "encode_u32",
    "read_raw_metadata",
    "texts",
]

RawMetadata = Mapping[bytes, bytes]
"""Encoded values by the bytes of their key."""

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
# bytes of a scalar by its type number; 0 for strings and arrays
_SCALAR_BYTES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)
_FIRST_VALUE = 24  # after magic, version and the two counts


def texts(values: RawMetadata) -> dict[str, str]:
    """The values that are texts, by key."""
    kind = struct.pack("<I", _STRING)
    return {
        key.decode(): value[12:].decode("utf-8", "replace")
        for key, value in values.items()
        if value.startswith(kind)
    }


def read_raw_metadata(path: Path, n_values: int) -> dict[bytes, bytes]:
    """The metadata of a GGUF file whose header gguf_header.read_header has found to be sound.

    Args:
        path: of the file.
        n_values: number of metadata values.
    """
    values: dict[bytes, bytes] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = _FIRST_VALUE
        for _ in range(n_values):
            key_end = _after_string(data, at)
            key = data[at + 8 : key_end]
            (kind,) = struct.unpack_from("<I", data, key_end)
            at = _after_value(data, key_end + 4, kind)
            values[key] = data[key_end:at]
    return values


def _after_string(data: mmap.mmap, at: int) -> int:
    return at + 8 + struct.unpack_from("<Q", data, at)[0]


def _after_value(data: mmap.mmap, at: int, kind: int) -> int:
    if kind == _STRING:
        return _after_string(data, at)
    if kind != _ARRAY:
        return at + _SCALAR_BYTES[kind]
    item_kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item_kind != _STRING:
        return at + count * _SCALAR_BYTES[item_kind]
    for _ in range(count):
        at = _after_string(data, at)
    return at


def encode_u32(value: int) -> bytes:
    return struct.pack("<II", _UINT32, value)


def encode_int(value: int) -> bytes:
    """Of a number from 0 on as unsigned, which is what most keys of llama.cpp are."""
    try:
        return struct.pack("<II", _UINT32, value) if value >= 0 else struct.pack("<Ii", _INT32, value)
    except struct.error as error:
        raise OverflowError(f"{value} does not fit 32 bits") from error


def encode_bool(value: bool) -> bytes:
    return struct.pack("<I?", _BOOL, value)


def encode_f32(value: float) -> bytes:
    return struct.pack("<If", _FLOAT32, value)


def encode_text(value: str) -> bytes:
    return struct.pack("<I", _STRING) + encode_string(value)


def encode_texts(values: Iterable[str]) -> bytes:
    """An array of strings."""
    items = [encode_string(value) for value in values]
    return struct.pack("<IIQ", _ARRAY, _STRING, len(items)) + b"".join(items)


def encode_f32s(values: ArrayLike) -> bytes:
    """An array of float32."""
    array = np.asarray(values, "<f4")
    return struct.pack("<IIQ", _ARRAY, _FLOAT32, array.size) + array.tobytes()


def encode_string(value: str | bytes) -> bytes:
    """Length and UTF-8 bytes, as names and keys are stored."""
    data = value.encode("utf-8", "backslashreplace") if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data
