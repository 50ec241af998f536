"""NumPy = C = dot product = event kernels, bit for bit: codes, potentials and outputs, any thread count."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from golden import activation_cases, product_cases, weight_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from spikequant_gguf import codec
from spikequant_gguf.errors import FormatError
from spikequant_gguf.format import (
    BLOCK_SPK4,
    BLOCK_SPKA,
    TYPE_SPK4,
    TYPE_SPKA,
    blocks_from_bytes,
    blocks_to_bytes,
)
from spikequant_gguf.ggml_api import MatMul, mul_mat, mul_mat_id
from spikequant_gguf.native import load
from spikequant_gguf.validation import first_weight_fault

pytestmark = pytest.mark.usefixtures("runtime")

BUFFERS = ("CPU", "CPU_SPIKE")
THREADS = (1, 2, 3, 4, 7, 8, 16, 64)
REPEATS = 100  # of each product, over all numbers of threads
PROPERTY = settings(deadline=None, max_examples=60)

# What weights and activations can look like; each draws from a generator.
DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "zero": lambda rng, shape: np.zeros(shape),
    "outliers": lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.02, 300, 1),
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 1e-40,
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-30,
    "large": lambda rng, shape: rng.standard_normal(shape) * 1e30,
    "largest": lambda rng, shape: np.sign(rng.standard_normal(shape)) * np.float32(3.4e38),
    "constant": lambda rng, shape: np.full(shape, 0.37),
    "grid": lambda rng, shape: np.round(rng.standard_normal(shape) * 4) / 4,
    "sparse": lambda rng, shape: np.where(rng.random(shape) < 0.9, 0, rng.standard_normal(shape)),
}
# The largest finite values overflow in the rotation: that makes a token of NaN, and is an error for weights.
WEIGHT_DISTRIBUTIONS = [name for name in DISTRIBUTIONS if name != "largest"]


def draw(kind: str, seed: int, *shape: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        return DISTRIBUTIONS[kind](np.random.default_rng(seed), shape).astype(np.float32)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit, all NaN alike."""
    return a.shape == b.shape and np.array_equal(
        np.where(np.isnan(a), np.uint32(0x7FC00000), a.view(np.uint32)),
        np.where(np.isnan(b), np.uint32(0x7FC00000), b.view(np.uint32)),
    )


def expected_product(weights: np.ndarray, x: np.ndarray, **encoder: float) -> np.ndarray:
    return codec.matmul(weights, codec.encode_activations(x, **encoder))


# ---- the reference quantizer and the encoder


@pytest.mark.parametrize("case", [c for c in weight_cases() if c["rotated"]], ids=lambda c: c["name"])
def test_golden_weights(case):
    data = load().quantize(TYPE_SPK4, case["weights"], case["importance"])
    assert blocks_from_bytes(data).tobytes() == case["blocks"].tobytes()


@pytest.mark.parametrize("case", activation_cases(), ids=lambda c: c["name"])
def test_golden_activations(case):
    settings = {key: case[key] for key in ("salience", "silence", "zero_point", "rotated")}
    assert load().encode_activations(case["x"], **settings).tobytes() == case["blocks"].tobytes()


@pytest.mark.parametrize("case", product_cases(), ids=lambda c: c["name"])
def test_golden_products(case):
    assert same(load().vec_dot(case["weights"], case["activations"]), case["y"])


@PROPERTY
@given(
    st.sampled_from(WEIGHT_DISTRIBUTIONS),
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.integers(1, 9),
    st.booleans(),
)
def test_quantizer_and_dequantizer(kind, seed, rows, blocks, weighted):
    weights = draw(kind, seed, rows, 64 * blocks)
    importance = np.abs(draw("laplace", seed + 1, 64 * blocks)) if weighted else None
    reference = codec.encode_weights(weights, importance)
    data = load().quantize(TYPE_SPK4, weights, importance)
    assert blocks_from_bytes(data).tobytes() == reference.tobytes()
    assert load().validate(TYPE_SPK4, data)
    assert same(load().dequantize(TYPE_SPK4, data, weights.shape[1]), codec.decode_weights(reference))


@PROPERTY
@given(
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.floats(0.125, 7.375, width=32),
    st.floats(0, 4, width=32),
    st.integers(0, 15),
    st.booleans(),
)
def test_encoder_and_decoder(kind, seed, blocks, salience, silence, zero_point, rotated):
    x = draw(kind, seed, 3, 64 * blocks)
    x[1, seed % x.shape[1]] = [np.nan, np.inf, -np.inf][seed % 3]
    arguments = (salience, silence, zero_point, rotated)
    reference = codec.encode_activations(x, *arguments)
    encoded = load().encode_activations(x, *arguments)
    assert encoded.tobytes() == reference.tobytes()
    assert same(load().decode_activations(encoded), codec.decode_activations(reference))


def test_ten_million_weights():
    """A volume that makes rare roundings occur: all distributions, 10 million weights, byte for byte."""
    kinds = [kind for kind in WEIGHT_DISTRIBUTIONS if kind not in ("zero", "constant")]
    total = 0
    for seed, kind in enumerate(kinds):
        rows = -(-10_000_000 // len(kinds) // 1024)
        weights = draw(kind, seed, rows, 1024)
        reference = codec.encode_weights(weights)
        assert blocks_from_bytes(load().quantize(TYPE_SPK4, weights)).tobytes() == reference.tobytes(), kind
        total += weights.size
    assert total >= 10_000_000


# ---- products through ggml


@PROPERTY
@given(
    st.sampled_from(WEIGHT_DISTRIBUTIONS),
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.integers(0, 2**32 - 1),
    st.integers(1, 300),
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 4, 5, 8, 31, 64, 65, 130]),
)
def test_product(weight_kind, kind, seed, rows, blocks, tokens):
    weights = codec.encode_weights(draw(weight_kind, seed, rows, 64 * blocks))
    x = draw(kind, seed + 1, tokens, 64 * blocks)
    if seed % 4 == 0:
        x[seed % tokens, 0] = np.nan
    expected = expected_product(weights, x)
    for buffer in BUFFERS:
        found = mul_mat(TYPE_SPK4, blocks_to_bytes(weights), x, buffer=buffer, threads=1 + seed % 3)
        assert same(found, expected), buffer


@cache
def shared_product(rows, n_in, tokens):
    """Weights, inputs and the outputs of NumPy."""
    weights = codec.encode_weights(draw("laplace", 1, rows, n_in))
    x = draw("outliers", 2, tokens, n_in)
    return blocks_to_bytes(weights), x, expected_product(weights, x)


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 1),
        (129, 576, 1),
        (300, 1536, 33),
        (200, 192, 64),
        (70, 128, 40),
        (2051, 192, 3),
        (385, 128, 130),
    ],
    ids=str,
)
def test_threads(buffer, threads, shape):
    weights, x, expected = shared_product(*shape)
    with MatMul(TYPE_SPK4, weights, x.shape[1], len(x), buffer=buffer, threads=threads) as product:
        product.set_input(x)
        for _ in range(-(-REPEATS // len(THREADS))):
            product.compute()
            assert same(product.output(), expected)


@pytest.mark.parametrize("tokens", [3, 26])
@pytest.mark.parametrize("n_in", [4032, 4096, 8128, 32704, 32768, 33792])
def test_long_rows(n_in, tokens):
    """More inputs than one program of spikes holds, and every potential at its limit."""
    for w_kind, x_kind in (("normal", "normal"), ("outliers", "outliers")):
        weights = codec.encode_weights(draw(w_kind, 3, 130, n_in))
        x = draw(x_kind, 4, tokens, n_in)
        for buffer in BUFFERS:
            found = mul_mat(TYPE_SPK4, blocks_to_bytes(weights), x, buffer=buffer, threads=2)
            assert same(found, expected_product(weights, x)), (buffer, w_kind)


@pytest.mark.parametrize("extreme", ["largest code", "smallest code", "alternating"])
def test_lanes_at_their_limit(extreme):
    """All neurons see codes of one extreme while every input fires as early as it can."""
    n_in, rows = 4032, 128
    pattern = {"largest code": [0xFF], "smallest code": [0x00], "alternating": [0xF0, 0x0F]}[extreme]
    weights = np.zeros((rows, n_in // 64), codec.encode_weights(np.zeros((1, 64), np.float32)).dtype)
    weights["codes"] = np.resize(np.array(pattern, np.uint8), weights["codes"].shape)
    kind = 0x80 if extreme == "smallest code" else 0x40
    weights["salient"] = [kind | 0, kind | 1, kind | 62, kind | 63]
    weights["salient"][:, 0, 2:] = [kind | 0, kind | 63]
    weights["header"][:, 0] = 0x3C00 | (15 if extreme == "smallest code" else 0)  # threshold 1
    codec.validate_weights(weights)
    unrotated = np.array(weights)
    unrotated["header"][:, 0] |= 0x8000
    x = np.full((3, n_in), 7.4, np.float32)
    x[1] *= -1
    x[2, ::2] *= -2000  # coarse
    for matrix, rotated in ((weights, True), (unrotated, False)):
        expected = codec.matmul(matrix, codec.encode_activations(x, rotated=rotated))
        for buffer, copies in itertools.product(BUFFERS, (1, 30)):  # few tokens, and many
            found = mul_mat(TYPE_SPK4, blocks_to_bytes(matrix), np.tile(x, (copies, 1)), buffer=buffer)
            assert same(found, np.tile(expected, (copies, 1))), (buffer, copies)


@pytest.mark.parametrize("tokens", [5, 40])
def test_coarse_values_far_beyond_fine_ones(tokens):
    """Shifts up to the largest, which sums of both potentials outgrow: alone and beside ordinary tokens."""
    n_in = 2560
    weights = codec.encode_weights(draw("normal", 11, 300, n_in))
    x = draw("normal", 12, tokens, n_in)
    for t in range(0, tokens, 2):
        x[t, : 64 * (1 if t % 4 else 19)] *= 2.0 ** (17 - t % 11)  # in one or almost half of 40 blocks
    expected = expected_product(weights, x)
    encoded = codec.encode_activations(x)
    fine, coarse, _, shift = codec.activation_values(encoded)
    merged = np.abs(fine).sum(axis=-1) + np.abs(coarse).sum(axis=-1, dtype=np.int64) * 2.0**shift
    assert (31 * merged > 2**31).any() and (31 * merged < 2**24).any()
    assert same(mul_mat(TYPE_SPK4, blocks_to_bytes(weights), x, buffer="CPU_SPIKE"), expected)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_encoder_settings_of_a_tensor(buffer):
    weights = codec.encode_weights(draw("normal", 5, 200, 320))
    x = draw("laplace", 6, 4, 320)
    found = mul_mat(TYPE_SPK4, blocks_to_bytes(weights), x, buffer=buffer, salience=1.5, silence=0.8)
    assert same(found, expected_product(weights, x, salience=1.5, silence=0.8))
    assert not same(found, expected_product(weights, x))


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("per_expert", [False, True])
def test_mixture_of_experts(buffer, threads, per_expert):
    experts, used, tokens, rows, n_in = 5, 2, 40, 200, 192
    rng = np.random.default_rng(7)
    weights = [codec.encode_weights(draw("normal", 10 + e, rows, n_in)) for e in range(experts)]
    x = draw("outliers", 8, *((tokens, used, n_in) if per_expert else (tokens, n_in)))
    ids = np.stack([rng.permutation(experts - 1)[:used] for _ in range(tokens)]).astype(
        np.int32
    )  # one expert idle
    found = mul_mat_id(
        TYPE_SPK4, np.stack([blocks_to_bytes(w) for w in weights]), x, ids, buffer=buffer, threads=threads
    )
    for t in range(tokens):
        for slot in range(used):
            row = x[t, slot] if per_expert else x[t]
            assert same(found[t, slot], expected_product(weights[ids[t, slot]], row[None])[0])


def test_repacked_weights_come_back_unchanged():
    for rows, n_in in ((1, 64), (128, 64), (129, 128), (2048 + 77, 192)):
        data = blocks_to_bytes(codec.encode_weights(draw("outliers", rows, rows, n_in)))
        with MatMul(TYPE_SPK4, data, n_in, 1, buffer="CPU_SPIKE") as product:
            assert np.array_equal(product.weight_bytes().reshape(data.shape), data)


# ---- every bit pattern


def sound_alone(blocks: np.ndarray) -> list[bool]:
    """What ggml says of BLOCK_SPK4[n]: each block must be valid as the first one of a row or as another."""
    rows = np.zeros((len(blocks), 2), BLOCK_SPK4)
    rows["header"][:, 0] = 0x3C00
    rows[:, 1] = blocks
    return [
        first_weight_fault(blocks[i : i + 1, None]) is None or first_weight_fault(rows[i : i + 1]) is None
        for i in range(len(blocks))
    ]


def test_every_header():
    """All 65,536, valid or not: the values of the reference; valid are the same ones."""
    native = load()
    headers = np.arange(0x10000, dtype=np.uint16)
    blocks = codec.encode_weights(draw("normal", 1, 1, 64)).repeat(len(headers), axis=0)
    blocks["header"][:, 0] = headers
    data = blocks_to_bytes(blocks)
    with np.errstate(all="ignore"):
        assert same(native.dequantize(TYPE_SPK4, data, 64), codec.decode_weights(blocks))
    valid = ((headers & 0x7C00) != 0x7C00) & ((headers & 0x7FF0) != 0)
    assert [first_weight_fault(row[None]) is None for row in blocks] == valid.tolist()
    found = [native.validate(TYPE_SPK4, row) for row in data]
    assert found == sound_alone(blocks[:, 0]) and not all(found)


def test_every_byte_at_every_place_of_a_block():
    """256 x 72 weights, of a first block and another: decoded and judged as by the reference."""
    native = load()
    base = blocks_to_bytes(codec.encode_weights(draw("laplace", 2, 1, 128), rotated=False))
    data = base.repeat(256 * base.shape[1], axis=0)
    place = np.arange(base.shape[1]).repeat(256)
    data[np.arange(len(data)), place] = np.tile(np.arange(256), base.shape[1])
    with np.errstate(all="ignore"):
        decoded = codec.decode_weights(blocks_from_bytes(data))
        assert same(native.dequantize(TYPE_SPK4, data, 128), decoded)
    judged = [native.validate(TYPE_SPK4, row) for row in data]
    alone = np.reshape(sound_alone(blocks_from_bytes(data).reshape(-1)), (-1, 2)).all(axis=1)
    assert judged == alone.tolist() and 0 < sum(judged) < len(judged)


def test_every_byte_at_every_place_of_a_token():
    """256 x 64 activations, unvalidated."""
    native = load()
    base = native.encode_activations(draw("outliers", 3, 1, 64), rotated=False).view(np.uint8)
    data = base.repeat(256 * base.shape[1], axis=0)
    place = np.arange(base.shape[1]).repeat(256)
    data[np.arange(len(data)), place] = np.tile(np.arange(256), base.shape[1])
    blocks = data.view(BLOCK_SPKA)
    faults = []
    for token in blocks:
        try:
            codec.validate_activations(token[None])
            faults.append("")
        except FormatError as error:
            faults.append(error.reason)
    valid = blocks[np.array(faults) == ""]
    assert 0 < len(valid) < len(blocks)
    with np.errstate(all="ignore"):
        assert same(native.decode_activations(valid), codec.decode_activations(valid))
    native.decode_activations(blocks)  # whatever it is, without a crash
    # ggml's check knows blocks, and one rule is about tokens
    of_token = "salient shift in a token without coarse values"
    judged = [native.validate(TYPE_SPKA, token.view(np.uint8)) for token in blocks]
    assert judged == [fault in ("", of_token) for fault in faults] and of_token in faults


# ---- instruction sets

_CHILD = """
import json, sys
import numpy as np
from test_exactness import codec, draw, mul_mat, blocks_to_bytes, TYPE_SPK4, load
from zlib import crc32
found = {}
for seed in range(60):
    rng = np.random.default_rng(seed)
    rows, blocks = int(rng.integers(1, 400)), int(rng.integers(1, 30))
    tokens = int(rng.choice([1, 2, 3, 7, 17, 40, 70]))
    kind = ["normal", "outliers", "sparse", "laplace"][seed % 4]
    weights = codec.encode_weights(draw(kind, seed, rows, 64 * blocks))
    x = draw(kind, seed + 1000, tokens, 64 * blocks)
    found[str(seed)] = crc32(mul_mat(TYPE_SPK4, blocks_to_bytes(weights), x, buffer="CPU_SPIKE").tobytes())
json.dump({"kernel": load().cpu.spikequant_kernel().decode(), "found": found}, sys.stdout)
"""


def run_with_kernel(name: str) -> dict:
    environment = {**os.environ, "SPIKEQUANT_FORCE_ISA": name, "PYTHONPATH": os.path.dirname(__file__)}
    child = subprocess.run(
        [sys.executable, "-c", _CHILD], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(child.stdout)


def test_all_kernels_give_the_same_bits():
    reference = run_with_kernel("plain-c")
    assert reference["kernel"] == "plain-c"
    compared = []
    for name in ("avx2", "avx512"):
        other = run_with_kernel(name)
        if other["kernel"] == name:  # else the machine does not run it, and the library said so
            assert other["found"] == reference["found"], name
            compared.append(name)
    if "avx2" in open("/proc/cpuinfo", encoding="ascii", errors="ignore").read():
        assert "avx2" in compared
