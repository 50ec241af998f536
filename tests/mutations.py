"""Damages files in a repeatable way: the mutator, and the file formats it starts from."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

from spikequant_gguf import format as f
from spikequant_gguf.codec import encode_weights
from spikequant_gguf.format import blocks_to_bytes

__all__ = [
    "Mutator",
    "gguf_bytes",
    "imatrix_bytes",
    "old_imatrix_bytes",
    "safetensors_bytes",
    "spike_gguf_bytes",
]

# Sizes, counts and offsets at which arithmetic goes wrong.
_NUMBERS = [
    *range(10),
    *(2**n + d for n in (7, 8, 15, 16, 31, 32, 62, 63) for d in (-1, 0, 1)),
    2**64 - 1,
    2**64 - 32,
    90,
    91,
]


class Mutator:
    """Makes damaged versions of some files.

    Args:
        originals: contents to start from.
        seed: the same seed gives the same sequence.
    """

    def __init__(self, originals: list[bytes], seed: int) -> None:
        self._originals = originals
        self._random = random.Random(seed)

    def next(self) -> bytes:
        """The next damaged file."""
        rng = self._random
        data = bytearray(rng.choice(self._originals))
        for _ in range(1 + (rng.random() < 0.5) + (rng.random() < 0.2)):
            rng.choices(self._STEPS, self._WEIGHTS)[0](self, data)
        return bytes(data)

    def _at(self, data: bytearray, size: int = 1) -> int:
        """A place; half of them near the beginning, where the header is."""
        last = max(len(data) - size, 0)
        return self._random.randint(0, min(last, 600) if self._random.random() < 0.5 else last)

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._at(data)] ^= 1 << self._random.randrange(8)

    def _byte(self, data: bytearray) -> None:
        if data:
            data[self._at(data)] = self._random.choice((0, 1, 0x7F, 0x80, 0xFF, self._random.randrange(256)))

    def _number(self, data: bytearray) -> None:
        size = self._random.choice((2, 4, 8))
        at = self._at(data, size)
        value = self._random.choice(_NUMBERS) % 2 ** (8 * size)
        data[at : at + size] = value.to_bytes(size, "little")

    def _cut(self, data: bytearray) -> None:
        del data[self._at(data) :]

    def _remove(self, data: bytearray) -> None:
        at = self._at(data)
        del data[at : at + self._random.randint(1, 40)]

    def _repeat(self, data: bytearray) -> None:
        at = self._at(data)
        piece = data[at : at + self._random.randint(1, 40)]
        data[at:at] = piece * self._random.randint(1, 3)

    def _swap(self, data: bytearray) -> None:
        a, b = self._at(data, 8), self._at(data, 8)
        data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]

    def _append(self, data: bytearray) -> None:
        data += self._random.randbytes(self._random.randint(1, 100))

    _STEPS = (_flip, _byte, _number, _cut, _remove, _repeat, _swap, _append)
    _WEIGHTS = (6, 6, 8, 2, 2, 2, 1, 1)


def spike_gguf_bytes(folder: Path) -> bytes:
    """A small SPK4 file with all our metadata."""
    weights = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    metadata = {
        f.KEY_VERSION: f.FORMAT_VERSION,
        f.KEY_TYPE_NAME: "spk4",
        f.KEY_SALIENCE_THRESHOLD: 2.3,
        f.KEY_ENCODER_TENSORS: ["q"],
        f.KEY_ENCODER_SALIENCE: [2.5],
        f.KEY_ENCODER_SILENCE: [0.75],
        f.KEY_STATISTICS_TENSORS: ["q"],
        f.KEY_STATISTICS_SALIENT_WEIGHT_SHARE: [0.02],
        f.KEY_STATISTICS_RELATIVE_ERROR: [0.1],
    }
    return _gguf(
        folder / "spikes.gguf",
        metadata,
        {"q": (blocks_to_bytes(encode_weights(weights)), T(90)), "norm": (np.ones(8, np.float32), None)},
    )


def gguf_bytes(folder: Path) -> bytes:
    """A small stock GGUF, as the converter reads it."""
    metadata = {
        "general.name": "Tiny",
        "tokenizer.ggml.tokens": ["<unk>", "a", "ü"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
        "llama.block_count": 1,
    }
    tensors = {
        "token_embd.weight": (np.ones((3, 32), np.float16), None),
        "blk.0.attn_q.weight": (gguf.quants.quantize(np.ones((2, 64), np.float32), T.Q8_0), T.Q8_0),
        "output_norm.weight": (np.ones(32, np.float32), None),
    }
    return _gguf(folder / "stock.gguf", metadata, tensors)


def imatrix_bytes(folder: Path) -> bytes:
    """A small importance matrix as llama-imatrix writes it."""
    metadata = {"general.type": "imatrix", "imatrix.datasets": ["wiki.txt"], "imatrix.chunk_count": 5}
    tensors = {
        "q.in_sum2": (np.ones((1, 64), np.float32), None),
        "q.counts": (np.ones((1, 1), np.float32), None),
    }
    return _gguf(folder / "imatrix.gguf", metadata, tensors)


def old_imatrix_bytes(folder: Path) -> bytes:
    """The same in the older form."""
    entry = struct.pack("<i", 1) + b"q" + struct.pack("<ii", 3, 8) + np.ones(8, "<f4").tobytes()
    return struct.pack("<i", 1) + entry + struct.pack("<ii", 9, 4) + b"wiki"


def safetensors_bytes(folder: Path) -> bytes:
    """A small file of safetensors."""
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(32)


def _gguf(path: Path, metadata: dict, tensors: dict) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    path.unlink()
    return data
