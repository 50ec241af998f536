"""Files made to harm whoever reads them, each with what our reader says. `CASES` has them by name.

For GGUF: sizes that overflow, data outside the file, overlaps, names that are there twice or steer terminals,
counts without an end, settings out of range. For checkpoints: paths out of the folder, pickles, archives that
unpack without an end, headers that lie. What is odd but within the format is here, too, and must be read.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spikequant_gguf import format as f
from spikequant_gguf.codec import encode_weights
from spikequant_gguf.format import blocks_to_bytes

__all__ = ["CASES", "Case", "Payload"]

F32, F16, Q4_0, Q8_0, Q4_K, SPK4, SPKA = 0, 1, 2, 8, 12, 90, 91
U8, I8, U32, STRING, ARRAY, U64 = 0, 1, 4, 8, 9, 10
ROW = blocks_to_bytes(
    encode_weights(np.random.default_rng(0).standard_normal((1, 64)).astype("f4"))
).tobytes()


@dataclass(frozen=True)
class Case:
    """Attributes:
    files: to write, by name.
    reader: verify, source or checkpoint.
    sentence: part of the error, or of the first fault; None if the file must be accepted.
    """

    files: dict[str, bytes]
    reader: str
    sentence: str | None


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (self.path, "w")


# ---- GGUF by hand


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


ARCHITECTURE = value("general.architecture", STRING, text("llama"))
VERSION = value(f.KEY_VERSION, U32, struct.pack("<I", f.FORMAT_VERSION))


def gguf(
    tensors: list[bytes],
    data: bytes = ROW + bytes(28),
    values: list[bytes] | None = None,
    *,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    values = [ARCHITECTURE, VERSION] if values is None else values
    n_tensors, n_values = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + b"".join(values) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def array(key: str, kind: int, count: int, payload: bytes) -> bytes:
    return value(key, ARRAY, struct.pack("<IQ", kind, count) + payload)


def floats(key: str, *numbers: float) -> bytes:
    return array(key, 6, len(numbers), struct.pack(f"<{len(numbers)}f", *numbers))


def texts(key: str, *names: str) -> bytes:
    return array(key, STRING, len(names), b"".join(map(text, names)))


def row(place: int, *changed: int) -> bytes:
    """The bytes of a valid row with some changed."""
    raw = bytearray(ROW)
    raw[place : place + len(changed)] = bytes(changed)
    return bytes(raw) + bytes(28)


W = tensor("w", (64, 1), SPK4, 0)
BIG, HUGE = 2**63, 2**64 - 1
NESTED = struct.pack("<IQ", ARRAY, 1) * 100

_SPIKES: dict[str, tuple[bytes, str | None]] = {
    "sound": (gguf([W]), None),
    # sizes
    "product of sizes wraps to 64": (gguf([tensor("w", (64, 2**58 + 1), SPK4, 0)]), "it is cut off"),
    "product of sizes wraps to 0": (gguf([tensor("w", (64, 2**32, 2**32), SPK4, 0)]), "it is cut off"),
    # stock llama.cpp lets this through its check, and aborts
    "product of sizes just below 2^63": (gguf([tensor("w", (128, 2**56 - 2**24), SPK4, 0)]), "it is cut off"),
    "bytes wrap though elements do not": (gguf([tensor("w", (64, 2**57), Q4_0, 0)]), "it is cut off"),
    "first size is 2^64 - 1": (gguf([tensor("w", (HUGE, 1), SPK4, 0)]), "inputs"),
    "first size is 2^63": (gguf([tensor("w", (BIG, 1), SPK4, 0)]), "inputs"),
    "first size is 0": (gguf([tensor("w", (0, 1), SPK4, 0)]), "without elements"),
    "last size is 0": (gguf([tensor("w", (64, 1, 0), SPK4, 0)]), "without elements"),
    "half a block": (gguf([tensor("w", (32, 1), SPK4, 0)]), "32 inputs"),
    "row that is too long": (gguf([tensor("w", (64 * 600, 1), SPK4, 0)]), "more than the 33792"),
    "no dimensions": (gguf([tensor("w", (), SPK4, 0)]), "0 dimensions"),
    "five dimensions": (gguf([tensor("w", (64, 1, 1, 1, 1), SPK4, 0)]), "5 dimensions"),
    "2^32 - 1 dimensions": (gguf([text("w") + struct.pack("<I", 2**32 - 1)]), "4294967295 dimensions"),
    # places
    "offset near 2^64 wraps": (gguf([tensor("w", (64, 1), SPK4, HUGE - 31)]), "it is cut off"),
    "offset of 2^63": (gguf([tensor("w", (64, 1), SPK4, BIG)]), "it is cut off"),
    "starts at the end": (gguf([tensor("w", (64, 1), SPK4, 64)]), "it is cut off"),
    "one byte too short": (gguf([W], ROW[:-1]), "it is cut off"),
    "no data": (gguf([W], b""), "it is cut off"),
    "not aligned": (gguf([tensor("w", (64, 1), SPK4, 4)], bytes(100)), "not aligned to 32"),
    "overlap": (gguf([W, tensor("v", (64, 1), SPK4, 32)], ROW * 3), "overlaps tensor 'w'"),
    "same place": (gguf([W, tensor("v", (64, 1), SPK4, 0)], ROW * 3), "overlaps tensor 'w'"),
    "hole": (gguf([tensor("w", (64, 1), SPK4, 4096)], bytes(4096) + ROW), None),
    "bytes after the end": (gguf([W], ROW + bytes(5000)), None),
    # alignment
    "alignment of 0": (
        gguf([W], values=[value("general.alignment", U32, bytes(4))]),
        "not a power of two",
    ),
    "alignment of 2^31": (
        gguf([W], values=[value("general.alignment", U32, struct.pack("<I", 2**31))]),
        "it is cut off",
    ),
    "alignment of 2^63": (
        gguf([W], values=[value("general.alignment", U64, struct.pack("<Q", BIG))]),
        "it is cut off",
    ),
    "alignment as text": (
        gguf([W], values=[value("general.alignment", STRING, text("32"))]),
        "not a power of two",
    ),
    "negative alignment": (gguf([W], values=[value("general.alignment", I8, b"\xe0")]), "not a power of two"),
    # counts and lengths
    "2^64 - 1 tensors": (gguf([W], counts=(HUGE, 2)), "0 dimensions"),
    "2^64 - 1 values": (gguf([W], counts=(1, HUGE)), "cut off or damaged|unknown value type"),
    "more tensors than there are": (gguf([W], b"", counts=(2, 2)), "0 dimensions"),
    "key of 2^64 - 1 bytes": (
        gguf([], values=[struct.pack("<Q", HUGE)], counts=(0, 1)),
        "cut off or damaged",
    ),
    "text of 2^63 bytes": (
        gguf([], values=[value("k", STRING, struct.pack("<Q", BIG))]),
        "cut off or damaged",
    ),
    "array of 2^61 numbers": (gguf([], values=[array("k", U64, 2**61, b"")]), "cut off or damaged"),
    "array of 2^60 texts": (gguf([], values=[array("k", STRING, 2**60, b"")]), "claims"),
    "arrays of arrays": (gguf([], values=[value("k", ARRAY, NESTED)]), "unknown value type 9"),
    "value of type 2^32 - 1": (gguf([], values=[value("k", 2**32 - 1, b"")]), "unknown value type"),
    "tensor of type 2^32 - 1": (gguf([tensor("w", (64, 1), 2**32 - 1, 0)]), None),
    # names
    "tensor twice": (gguf([W, tensor("w", (64, 1), SPK4, 64)], ROW * 4), "tensor 'w' is there twice"),
    "key twice": (gguf([W], values=[VERSION, VERSION]), "is there twice"),
    "name that steers a terminal": (
        gguf([tensor("\x1b[2J\x1b]0;owned\x07\n", (64, 1), SPK4, BIG)]),
        r"\\x1b\[2J\\x1b\]0;owned\\x07 ",
    ),
    "name that turns text around": (gguf([tensor("w\u202egpj", (64, 1), SPK4, BIG)]), r"\\u202egpj"),
    "name that is no text": (gguf([tensor(b"\xff\xfe", (64, 1), SPK4, BIG)]), r"xff.*xfe"),
    "name of a megabyte": (gguf([tensor("w" * 2**20, (64, 1), SPK4, BIG)]), r"^.{100,1200}$"),
    "tensor without a name": (gguf([tensor("", (64, 1), SPK4, BIG)]), "it is cut off"),
    # blocks
    "activations in a file": (gguf([tensor("w", (64, 1), SPKA, 0)]), "SPKA"),
    "infinite threshold": (gguf([W], row(0, 0xF0, 0x7F)), "row 0, block 0: threshold is not finite"),
    "threshold of zero": (gguf([W], row(0, 0x08, 0x00)), "row 0, block 0: threshold is zero"),
    "third kind of salient": (gguf([W], row(2, 0xC1, 0xC2)), "no valid extension"),
    "salient position twice": (gguf([W], row(2, 0x45, 0x85)), "not ascending"),
    "infinite norm": (
        gguf([W, tensor("n", (2,), F32, 64)], ROW + bytes(28) + struct.pack("<2f", 1, float("inf"))),
        "value 1 is not finite",
    ),
    "scale that is no number": (
        gguf([W, tensor("s", (32,), Q4_0, 64)], ROW + bytes(28) + b"\x01\x7e" + bytes(16)),
        "row 0, block 0: a scale is not finite",
    ),
    # our metadata
    "version of the future": (gguf([W], values=[value(f.KEY_VERSION, U32, b"\xff" * 4)]), "knows version 2"),
    "version of the past": (gguf([W], values=[value(f.KEY_VERSION, U32, b"\1\0\0\0")]), "the model again"),
    "version as text": (gguf([W], values=[value(f.KEY_VERSION, STRING, text("2"))]), "knows version 2"),
    "salience of NaN": (
        gguf([W], values=[value(f.KEY_SALIENCE_THRESHOLD, 6, struct.pack("<f", float("nan")))]),
        "salience_threshold is nan",
    ),
    "settings for nobody": (
        gguf(
            [W],
            values=[
                texts(f.KEY_ENCODER_TENSORS, "v"),
                floats(f.KEY_ENCODER_SALIENCE, 2),
                floats(f.KEY_ENCODER_SILENCE, 1),
            ],
        ),
        "no such SPK4 tensor",
    ),
    "fewer settings than names": (
        gguf(
            [W],
            values=[
                texts(f.KEY_ENCODER_TENSORS, "w"),
                floats(f.KEY_ENCODER_SALIENCE),
                floats(f.KEY_ENCODER_SILENCE, 1),
            ],
        ),
        "0 values for 1 names",
    ),
    "negative settings": (
        gguf(
            [W],
            values=[
                texts(f.KEY_ENCODER_TENSORS, "w"),
                floats(f.KEY_ENCODER_SALIENCE, -1),
                floats(f.KEY_ENCODER_SILENCE, 1),
            ],
        ),
        "encoder.salience is -1",
    ),
    # other files
    "gzip": (gzip.compress(bytes(10**6)), "not a GGUF file"),
    "text": (b"#!/bin/sh\nrm -rf /\n", "not a GGUF file"),
    "three bytes": (b"GGU", "not a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
}

_SOURCES: dict[str, tuple[bytes, str]] = {
    "source with holes in its parts": (
        gguf(
            [tensor("w", (64, 1), F32, 0)], bytes(256), [ARCHITECTURE, value("split.count", 2, b"\x03\x00")]
        ),
        "one of 3 parts",
    ),
    "source of rows without an end": (
        gguf([tensor("w", (2**62, 4), F16, 0)], b"", [ARCHITECTURE]),
        "cut off",
    ),
    "source whose blocks do not fit": (
        gguf([tensor("w", (33, 2), Q4_K, 0)], bytes(400), [ARCHITECTURE]),
        "do not fit its type Q4_K",
    ),
    "source that is a number": (
        gguf([tensor("w", (64, 1), F32, 0)], bytes(256), [value("general.architecture", U32, bytes(4))]),
        "no general.architecture",
    ),
    "source that is an adapter": (
        gguf(
            [tensor("w", (64, 1), F32, 0)],
            bytes(256),
            [ARCHITECTURE, value("general.type", STRING, text("adapter"))],
        ),
        "holds no model",
    ),
}


# ---- checkpoints


def safetensors(header: object, data: bytes = bytes(8), *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def index(name: object) -> bytes:
    return json.dumps({"weight_map": {"a": name}}).encode()


def _zip_bomb() -> bytes:
    """Two gigabytes of zeros in a pickle's archive of two megabytes."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(1 << 20))
    return raw.getvalue()


INDEX = "model.safetensors.index.json"
ONE = safetensors({"a": entry()})
_FOLDERS: dict[str, tuple[dict[str, bytes], str]] = {
    "index out of the folder": (
        {INDEX: index("../secret.safetensors")},
        "not a safetensors file of this folder",
    ),
    "index with an absolute path": ({INDEX: index("/etc/x.safetensors")}, "not a safetensors file of this"),
    "index with a path of Windows": (
        {INDEX: index("C:x.safetensors")},
        "not a safetensors file of this folder",
    ),
    "index with a backslash": ({INDEX: index("..\\x.safetensors")}, "not a safetensors file of this folder"),
    "index with NUL": ({INDEX: index("x\0.safetensors")}, "not a safetensors file of this folder"),
    "index with a hidden file": ({INDEX: index(".x.safetensors")}, "not a safetensors file of this folder"),
    "index with a pickle": ({INDEX: index("pytorch_model.bin")}, "not a safetensors file of this folder"),
    "index with a list": ({INDEX: index(["x.safetensors"])}, "not a safetensors file of this folder"),
    "index of a list": ({INDEX: b"[1]"}, "no weight_map"),
    "index without an end": ({INDEX: b'{"a":' * 100_000}, "JSON in it is damaged"),
    "header of 2^64 - 1 bytes": ({"model.safetensors": safetensors(b"{}", length=HUGE)}, "cut off"),
    "header longer than the file": ({"model.safetensors": safetensors(b"{}", length=100)}, "cut off"),
    "header of 7 bytes": ({"model.safetensors": bytes(7)}, "cut off"),
    "header that is no text": ({"model.safetensors": safetensors(b"\xff\xfe")}, "JSON in it is damaged"),
    "header with a number without an end": (
        {"model.safetensors": safetensors(b'{"a": ' + b"9" * 5000 + b"}")},
        "damaged",
    ),
    "name twice": (
        {"model.safetensors": safetensors(b'{"a": {}, "a": {}}')},
        "a key is there twice",
    ),
    "hole": (
        {"model.safetensors": safetensors({"a": entry(), "b": entry(16, 24)}, bytes(24))},
        "'b' do not follow those before it",
    ),
    "overlapping data": (
        {"model.safetensors": safetensors({"a": entry(), "b": entry(4, 12)}, bytes(12))},
        "'b' do not follow those before it",
    ),
    "data outside": ({"model.safetensors": safetensors({"a": entry(shape=(2**20,), end=2**22)})}, "cut off"),
    "end before the beginning": (
        {"model.safetensors": safetensors({"a": entry(8, 0)})},
        "entry of tensor 'a'",
    ),
    "size that overflows": (
        {"model.safetensors": safetensors({"a": entry(shape=(2**32, 2**32))})},
        "has 8 bytes of data",
    ),
    "size of a float": (
        {"model.safetensors": safetensors({"a": entry(shape=(2.0,))})},
        "entry of tensor 'a'",
    ),
    "size that is true": (
        {"model.safetensors": safetensors({"a": entry(shape=(True, 2))})},
        "entry of tensor",
    ),
    "wrong type of element": ({"model.safetensors": safetensors({"a": entry(dtype="F64")})}, "has 8 bytes"),
    "type that is a list": (
        {"model.safetensors": safetensors({"a": entry(dtype=["F32"])})},
        "entry of tensor",
    ),
    "pickle": ({"pytorch_model.bin": pickle.dumps(Payload("owned"))}, "can run any code and is not read"),
    "pickle beside an index": (
        {"pytorch_model.bin": pickle.dumps(Payload("owned")), INDEX: index("pytorch_model.bin")},
        "not a safetensors file of this folder",
    ),
    "pickle by another name": ({"model.safetensors": pickle.dumps(Payload("owned"))}, "cut off"),
    "archive without an end": ({"pytorch_model.bin": _zip_bomb()}, "can run any code and is not read"),
    "archive by another name": ({"model.safetensors": _zip_bomb()}, "cut off"),
    "configuration without an end": (
        {"model.safetensors": ONE, "config.json": b"[" * 10**6},
        "configuration",
    ),
}

CASES: dict[str, Case] = {
    **{f"spikes: {name}": Case({"m.gguf": raw}, "verify", said) for name, (raw, said) in _SPIKES.items()},
    **{f"{name}": Case({"m.gguf": raw}, "source", said) for name, (raw, said) in _SOURCES.items()},
    **{f"checkpoint: {name}": Case(files, "checkpoint", said) for name, (files, said) in _FOLDERS.items()},
}


def write(case: Case, folder: Path) -> Path:
    """Writes the files; returns what a reader is given."""
    for name, raw in case.files.items():
        (folder / name).write_bytes(raw)
    return folder if case.reader == "checkpoint" else folder / "m.gguf"
