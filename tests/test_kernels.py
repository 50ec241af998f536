"""Every kernel that this CPU runs, called directly: the same integers as NumPy, at every edge."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_void_p

import numpy as np
import pytest

from spikequant_gguf import codec
from spikequant_gguf.format import BLOCK_SPKA, SALIENT_SLOTS
from spikequant_gguf.native import load

pytestmark = pytest.mark.usefixtures("runtime")

TILE, LINE = 128, 64
HALF_TILE, HALF_LINE = 64, 32
PROGRAM_BYTES = 4 + 4 + 16 * 8  # spike_program
CHUNKS_AT = 28  # n_chunks in spike_train
MAX_BLOCKS = 511  # SPIKE_MAX_TILED_INPUTS / 64
TRAIN_BYTES = CHUNKS_AT + 4 + 8 * -(-MAX_BLOCKS // 64)  # spike_train
CLASSES = 2
LIST_SLACK = 64
AHEAD_SHIFT, AHEAD_FIRST = 16, 48


class _Ahead(ctypes.Structure):
    """spike_ahead of spike-kernels.h."""

    _fields_ = [
        ("runs", c_void_p),
        ("second", c_size_t),
        ("third", c_size_t),
        ("position", c_uint32),
        ("step", c_uint32),
    ]


class _Kernels(ctypes.Structure):
    """spike_kernels of spike-kernels.h."""

    _fields_ = [
        ("name", c_char_p),
        ("integrate", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_void_p)),
        ("integrate_half", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p)),
        ("add_salient", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
        ("salients_ahead", c_bool),
        ("even_strips", c_bool),
        (
            "integrate_ahead",
            ctypes.CFUNCTYPE(None, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
        ),
        ("list_spikes", c_void_p),
        ("prompt", c_void_p),
    ]


def _runs(name: str) -> bool:
    flags = open("/proc/cpuinfo", encoding="ascii", errors="ignore").read().split()
    needed = {
        "plain_c": [],
        "avx2": ["avx2"],
        "avx512": ["avx512f", "avx512bw", "avx512vl", "avx512_vbmi2", "avx512_vbmi", "avx512vbmi"],
    }
    wanted = needed[name]
    if name == "avx512":
        return all(flag in flags for flag in wanted[:4]) and any(flag in flags for flag in wanted[4:])
    return all(flag in flags for flag in wanted)


KERNELS = [name for name in ("plain_c", "avx2", "avx512") if _runs(name)]


def kernels(name: str) -> _Kernels:
    return _Kernels.in_dll(load().cpu, f"spike_kernels_{name}")


class Train:
    """A spike train as the runtime builds it in chunks of so many blocks, and what it was built from."""

    def __init__(self, activations: np.ndarray, chunk_blocks: int = 63) -> None:
        cpu = load().cpu
        cpu.spike_train_size.restype, cpu.spike_train_size.argtypes = c_size_t, (c_int64, c_int64)
        cpu.spike_train_build.argtypes = (c_void_p, c_int64, c_void_p)
        cpu.spike_train_build.restype = None
        self.n_inputs = activations.shape[-1] * 64
        self.fine, self.coarse, _, _ = (part[0] for part in codec.activation_values(activations[None]))
        self.chunks = -(-self.n_inputs // 64 // chunk_blocks)
        size = cpu.spike_train_size(self.n_inputs, self.chunks)
        self.memory = np.zeros(size + 64, np.uint8)
        start = -self.memory.ctypes.data % 64
        self.bytes = self.memory[start : start + size]
        self.lists_at = TRAIN_BYTES + self.chunks * CLASSES * PROGRAM_BYTES
        self.max_spikes = self.n_inputs + self.chunks * CLASSES * 2 * 16 * 3 + LIST_SLACK
        self.bytes[CHUNKS_AT : CHUNKS_AT + 4].view(np.int32)[0] = self.chunks
        values = self.bytes[self.lists_at + 2 * self.max_spikes :][: 2 * self.n_inputs].view(np.int8)
        values[: self.n_inputs], values[self.n_inputs :] = self.fine, self.coarse
        cpu.spike_train_build(activations.ctypes.data, self.n_inputs, self.bytes.ctypes.data)

    def potentials(self, name: str, codes: np.ndarray, ahead: bool = False) -> np.ndarray:
        """int32[2, rows] of codes uint8[rows, n_inputs], rows of a tile or half of one: fine and coarse, each
        code counted from 8.

        With `ahead`, by the kernel that prefetches.
        """
        half = len(codes) == HALF_TILE
        line = HALF_LINE if half else LINE
        lines = np.zeros((self.n_inputs + 1, line), np.uint8)
        lines[:-1] = (codes[:line] | codes[line:] << 4).T
        lists = self.bytes[self.lists_at :][: 2 * self.max_spikes].view(np.uint16)
        offsets = lists.astype(np.uint32) * line
        result = np.zeros((CLASSES, len(codes)), np.int32)
        base = self.bytes.ctypes.data
        for chunk in range(self.chunks):
            for k in range(CLASSES):
                program = base + TRAIN_BYTES + (chunk * CLASSES + k) * PROGRAM_BYTES
                arguments = program, offsets.ctypes.data, result[k].ctypes.data
                runs = np.full(AHEAD_FIRST + self.max_spikes, lines.ctypes.data, np.uint64)
                requests = _Ahead(
                    runs.ctypes.data, LINE, 2 * LINE * (chunk % 2), AHEAD_FIRST << AHEAD_SHIFT, 3 << 14
                )
                where = lines.ctypes.data
                if half:
                    kernels(name).integrate_half(
                        where, *arguments, ctypes.addressof(requests) if ahead else None
                    )
                elif ahead:
                    kernels(name).integrate_ahead(where, 1, *arguments, 0, ctypes.addressof(requests))
                else:
                    kernels(name).integrate(where, *arguments)
        return result

    def expected(self, codes: np.ndarray) -> np.ndarray:
        signed = codes.astype(np.int64) - 8
        return np.stack([signed @ self.fine.astype(np.int64), signed @ self.coarse.astype(np.int64)])


def spka(values: np.ndarray, coarse: np.ndarray | None = None) -> np.ndarray:
    """BLOCK_SPKA with exactly these integer values, -16..15; coarse: which ones are."""
    n = len(values)
    blocks = np.zeros(n // 64, BLOCK_SPKA)
    coarse = np.zeros(n, bool) if coarse is None else coarse
    salient = coarse | (values < -8) | (values > 7)
    stored = np.where(salient, values + 16, values + 8).astype(np.uint8)

    def bits(mask: np.ndarray) -> np.ndarray:
        return np.packbits(mask.reshape(-1, 64), axis=1, bitorder="little").view("<u8")[:, 0]

    blocks["threshold"], blocks["zero_point"], blocks["salient_shift"] = 1.0, 8, 3 if coarse.any() else 0
    blocks["salient_mask"], blocks["coarse_mask"] = bits(salient), bits(coarse)
    blocks["fifth_bits"] = bits(salient & (stored >= 16))
    nibbles = (stored & 15).reshape(-1, 64)
    blocks["codes"] = nibbles[:, :32] | nibbles[:, 32:] << 4
    codec.validate_activations(blocks[None])
    return blocks


ADVERSARIAL = {
    "all earliest": lambda n: np.full(n, -16),
    "all latest": lambda n: np.full(n, 1),
    "alternating signs": lambda n: np.where(np.arange(n) % 2, 15, -16),
    "all times": lambda n: np.arange(n) % 32 - 16,
    "one spike": lambda n: np.where(np.arange(n) == n - 1, -16, 0),
    "silence": lambda n: np.zeros(n, int),
    "positive then negative": lambda n: np.where(np.arange(n) < n // 2, 15, -16),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("pattern", ADVERSARIAL)
@pytest.mark.parametrize("n_inputs", [64, 576, 4032, 4096, 8128])
@pytest.mark.parametrize("extreme", [0, 15, None])
def test_adversarial_trains(name, pattern, n_inputs, extreme):
    values = ADVERSARIAL[pattern](n_inputs)
    rng = np.random.default_rng(n_inputs)
    codes = (
        rng.integers(0, 16, (TILE, n_inputs), np.uint8)
        if extreme is None
        else np.full((TILE, n_inputs), extreme, np.uint8)
    )
    codes[5], codes[70] = 0, 15  # the extremes side by side in one byte
    for coarse in (None, values != 0):
        train = Train(spka(values, coarse))
        for rows in (codes, codes[:HALF_TILE], codes[HALF_TILE:]):
            assert np.array_equal(train.potentials(name, rows), train.expected(rows))


@pytest.mark.parametrize("name", KERNELS)
def test_random_trains(name):
    """600 shapes and distributions, from dense to sparse, with and without coarse values."""
    rng = np.random.default_rng(1)
    for _ in range(600):
        n_inputs = 64 * int(rng.integers(1, 40))
        spread = rng.choice([0.3, 1.0, 3.0, 8.0, 30.0])
        values = np.clip(np.rint(rng.standard_normal(n_inputs) * spread), -16, 15).astype(int)
        coarse = (rng.random(n_inputs) < rng.choice([0, 0.02, 0.3])) & (values != 0)
        codes = rng.integers(0, 16, (rng.choice([TILE, HALF_TILE]), n_inputs), np.uint8)
        train = Train(spka(values, coarse), int(rng.integers(1, 64)))
        ahead = bool(kernels(name).integrate_ahead) and rng.random() < 0.5
        assert np.array_equal(train.potentials(name, codes, ahead), train.expected(codes))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_salient_weights(name, density):
    rng = np.random.default_rng(2)
    for n_blocks in (1, 2, 3, 4, 7, 9, 64, MAX_BLOCKS):
        values = rng.integers(-16, 16, n_blocks * 64).astype(np.int8)
        if n_blocks == MAX_BLOCKS:
            values[:] = -16  # sums at the limit of 16 bits
        salients = rng.integers(0, 256, (n_blocks, SALIENT_SLOTS, TILE)).astype(
            np.uint8
        )  # all patterns, the invalid one, too
        if n_blocks == MAX_BLOCKS:
            salients = (salients & 63) | 0x40
        salients[rng.random(salients.shape) >= density] = 0
        found = np.zeros(TILE, np.int16)
        next_tile = salients.ctypes.data if n_blocks % 2 else None
        kernels(name).add_salient(
            salients.ctypes.data, values.ctypes.data, n_blocks, found.ctypes.data, next_tile
        )
        sign = np.array([0, 1, -1, 0])[salients >> 6]
        looked_up = values.reshape(n_blocks, 64)[np.arange(n_blocks)[:, None, None], salients & 63].astype(
            np.int64
        )
        assert np.array_equal(found, (sign * looked_up).sum(axis=(0, 1)))


def test_integer_potentials_of_the_dot_product():
    cpu = load().cpu
    potentials = cpu.spike_potentials_of_row
    potentials.argtypes, potentials.restype = (
        (c_void_p, c_void_p, c_int64, POINTER(c_int32), POINTER(c_int32)),
        None,
    )
    rng = np.random.default_rng(3)
    for n_blocks in (1, 9, 64):
        weights = codec.encode_weights(rng.standard_normal((5, n_blocks * 64)).astype(np.float32))
        tokens = codec.encode_activations((rng.standard_cauchy((4, n_blocks * 64))).astype(np.float32))
        expected = codec.potentials(weights, tokens)
        assert all(map(np.array_equal, expected, codec.potentials_by_spikes(weights, tokens)))
        for t in range(4):
            for r in range(5):
                fine, coarse = c_int32(), c_int32()
                potentials(weights[r].ctypes.data, tokens[t].ctypes.data, n_blocks, fine, coarse)
                assert (fine.value, coarse.value) == (expected[0][t, r], expected[1][t, r])
