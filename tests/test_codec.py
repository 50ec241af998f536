"""The NumPy reference against golden vectors, a scalar form of FORMAT.md, and what theory promises."""

from __future__ import annotations

import numpy as np
import pytest
from golden import activation_cases, product_cases, weight_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spikequant_gguf import FormatError, InputError, UnsupportedError
from spikequant_gguf.codec import (
    activation_values,
    decode_activations,
    decode_weights,
    encode_activations,
    encode_weights,
    matmul,
    pack_weights,
    potentials,
    potentials_by_spikes,
    readout,
    rotate,
    spike_train,
    threshold_from_header,
    threshold_on_grid,
    threshold_to_header,
    validate_activations,
    validate_weights,
    weight_values,
)
from spikequant_gguf.format import (
    BLOCK_SPK4,
    BLOCK_SPKA,
    FIRST_BLOCK_SLOTS,
    MAX_INPUTS,
    QK_SPK,
    SALIENT_SLOTS,
    salient_limits,
    salient_slots,
)
from spikequant_gguf.validation import first_weight_fault

F = np.float32
FLT_MAX = np.finfo(np.float32).max
ALL_THRESHOLDS = np.array([h for h in range(0x10, 0x7C00, 0x10)], np.uint16)

quick = settings(deadline=None, derandomize=True, max_examples=60)
slow = settings(deadline=None, derandomize=True, max_examples=12)

finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
usual_floats = st.floats(-8, 8, width=32)


def arrays(elements, max_rows=3, max_blocks=3):
    return st.tuples(st.integers(1, max_rows), st.integers(1, max_blocks)).flatmap(
        lambda shape: hnp.arrays(np.float32, (shape[0], shape[1] * QK_SPK), elements=elements)
    )


encoders = st.fixed_dictionaries(
    {
        "salience": st.floats(2.0**-7, 7.375, width=32),
        "silence": st.floats(0, 4, width=32),
        "zero_point": st.integers(0, 15),
        "rotated": st.booleans(),
    }
)


def random_weights(rng: np.random.Generator, rows: int, n_blocks: int, not_rotated: int = 0) -> np.ndarray:
    """Any valid rows, also those that no quantizer would write."""
    blocks = np.zeros((rows, n_blocks), BLOCK_SPK4)
    header = rng.choice(ALL_THRESHOLDS, rows) | rng.integers(0, 16, rows).astype(np.uint16)
    blocks["header"][:, 0] = header | not_rotated << 15
    blocks["codes"] = rng.integers(0, 256, blocks["codes"].shape)
    for row in range(rows):
        for block in range(n_blocks):
            slots = blocks["salient"][row, block, 2 if block == 0 else 0 :]
            used = rng.integers(0, len(slots) + 1)
            positions = np.sort(rng.choice(QK_SPK, used, replace=False))
            slots[:used] = positions | rng.integers(1, 3, used) << 6
    return blocks


def random_activations(
    rng: np.random.Generator, tokens: int, n_blocks: int, not_rotated: int = 0
) -> np.ndarray:
    """Any valid tokens, also those that no encoder would write."""
    blocks = np.zeros((tokens, n_blocks), BLOCK_SPKA)
    blocks["threshold"] = (2.0 ** rng.uniform(-20, 10, tokens))[:, None]
    blocks["zero_point"] = rng.integers(0, 16, tokens)[:, None]
    blocks["flags"] = not_rotated
    blocks["codes"] = rng.integers(0, 256, blocks["codes"].shape)
    masks = rng.integers(0, 2**64, (3, tokens, n_blocks), dtype=np.uint64)
    blocks["salient_mask"] = masks[0]
    blocks["fifth_bits"] = masks[0] & masks[1]
    blocks["coarse_mask"] = masks[0] & masks[2]
    coarse = (blocks["coarse_mask"] != 0).any(axis=1)
    blocks["salient_shift"] = np.where(coarse, rng.integers(1, 16, tokens), 0)[:, None]
    return blocks


# ---- golden vectors


@pytest.mark.parametrize("case", weight_cases(), ids=lambda case: case["name"])
def test_golden_weights(case):
    blocks = encode_weights(case["weights"], case["importance"], case["rotated"])
    assert blocks.tobytes() == case["blocks"].tobytes()
    validate_weights(blocks)


@pytest.mark.parametrize("case", activation_cases(), ids=lambda case: case["name"])
def test_golden_activations(case):
    blocks = encode_activations(
        case["x"], case["salience"], case["silence"], case["zero_point"], case["rotated"]
    )
    assert blocks.tobytes() == case["blocks"].tobytes()
    validate_activations(blocks)


@pytest.mark.parametrize("case", product_cases(), ids=lambda case: case["name"])
def test_golden_products(case):
    fine, coarse = potentials(case["weights"], case["activations"])
    assert np.array_equal(fine, case["fine"]) and np.array_equal(coarse, case["coarse"])
    np.testing.assert_array_equal(matmul(case["weights"], case["activations"]), case["y"])


# ---- the specification, one scalar at a time


def scalar_rotate(x):
    x = [F(value) for value in x]
    for h in (1, 2, 4, 8, 16, 32):
        for j in range(QK_SPK):
            if j & h == 0:
                x[j], x[j + h] = x[j] + x[j + h], x[j] - x[j + h]
    return [value * F(0.125) for value in x]


def scalar_encode(x, salience, silence, zero_point, rotated):
    """Section 6 of FORMAT.md for one token: step, shift, and (code, salient, coarse) of each element."""
    n = len(x)
    nothing = [(0, False, False)] * n
    if not np.isfinite(x).all():
        return F(np.nan), 0, nothing
    if rotated:
        x = [value for b in range(0, n, QK_SPK) for value in scalar_rotate(x[b : b + QK_SPK])]
    if not np.isfinite(x).all():
        return F(np.nan), 0, nothing
    magnitudes = sorted(abs(value) for value in x)
    mad, top = magnitudes[n // 2], magnitudes[-1]
    step = max(mad * (F(salience) / F(7.5)), (top * F(2.0**-15)) / F(15), F(2.0**-100))
    inverse = F(1) / step
    shift = 1
    while np.rint((top * inverse) * F(2.0**-shift)) > 15:
        shift += 1
    lo, hi = F(-zero_point), F(15 - zero_point)
    elements = []
    for value in x:
        u = value * inverse
        q = F(0) if abs(u) < F(silence) else np.rint(u)
        if lo <= q <= hi:
            elements.append((int(q), False, False))
            continue
        edge = lo if q < lo else hi
        fine = -16 <= q <= 15
        code = q if fine else min(max(np.rint(u * F(2.0**-shift)), F(-16)), F(15))
        candidate = code if fine else code * F(2.0**shift)
        if abs(edge - u) <= abs(candidate - u):
            elements.append((int(edge), False, False))
        else:
            elements.append((int(code), True, not fine))
    return step, shift if any(coarse for _, _, coarse in elements) else 0, elements


def check_against_scalar(x, encoder):
    blocks = encode_activations(x, **encoder)
    validate_activations(blocks)
    fine, coarse, steps, shifts = activation_values(blocks)
    salient = np.unpackbits(blocks["salient_mask"].copy().view(np.uint8), bitorder="little").reshape(x.shape)
    with np.errstate(all="ignore"):
        for token in range(len(x)):
            step, shift, elements = scalar_encode(x[token], **encoder)
            np.testing.assert_array_equal(steps[token], step)
            assert shifts[token] == shift
            assert fine[token].tolist() == [0 if coarse else code for code, _, coarse in elements]
            assert coarse[token].tolist() == [code if coarse else 0 for code, _, coarse in elements]
            assert salient[token].tolist() == [salient for _, salient, _ in elements]


@quick
@given(arrays(usual_floats), encoders)
def test_encoder_is_the_specification(x, encoder):
    check_against_scalar(x, encoder)


@quick
@given(arrays(st.floats(width=32), max_blocks=2), encoders)
def test_encoder_is_the_specification_for_any_floats(x, encoder):
    check_against_scalar(x, encoder)


@slow
@given(st.integers(0, 2**32), encoders)
def test_encoder_is_the_specification_for_heavy_tails(seed, encoder):
    rng = np.random.default_rng(seed)
    check_against_scalar((rng.standard_t(1.2, (2, 128)) * 10.0 ** rng.integers(-30, 30)).astype(F), encoder)


def scalar_grid(t):
    values = threshold_from_header(ALL_THRESHOLDS).astype(np.float64)
    distance = np.abs(values - np.float64(t))
    nearest = np.flatnonzero(distance == distance.min())
    even = [i for i in nearest if ALL_THRESHOLDS[i] >> 4 & 1 == 0]  # ties go to an even mantissa
    return F(values[even[0] if len(nearest) > 1 else nearest[0]])


def scalar_quantize(w, importance, rotated):
    """Section 7 of FORMAT.md for one row: integer values, threshold and zero-point."""
    n = len(w)
    blocks = range(0, n, QK_SPK)
    importance = [F(value) for value in importance]
    if rotated:
        w = [value for b in blocks for value in scalar_rotate(w[b : b + QK_SPK])]
        for b in blocks:
            total = F(0)
            for value in importance[b : b + QK_SPK]:
                total = total + value
            importance[b : b + QK_SPK] = [total * F(1 / 64)] * QK_SPK
    free = set()
    for b in blocks:
        free.update(sorted(range(b, b + QK_SPK), key=lambda i: (-abs(w[i]), i))[: 4 if b else 2])
    others = [w[i] for i in range(n) if i not in free]
    smallest, largest = min(others), max(others)
    s0 = (largest - smallest) / F(15)
    middle = F(0.5) * (smallest + largest)
    best = None
    for c in range(20):
        theta = scalar_grid(s0 * (F(1.08) - F(0.04) * F(c)))
        inverse = F(1) / theta
        centre = np.rint(F(7.5) - middle * inverse)
        for z in (min(max(centre + F(d), F(0)), F(15)) for d in (-1, 0, 1)):
            error = F(0)
            for i in range(n):
                reach = F(16) if i in free else F(0)
                q = min(max(np.rint(w[i] * inverse), -z - reach), F(15) - z + reach)
                t = theta * q - w[i]
                error = error + (t * t) * importance[i]
            if best is None or error < best[0]:
                best = error, theta, z
    _, theta, z = best
    inverse = F(1) / theta
    values = []
    for b in blocks:
        gains, block = [], []
        for i in range(b, b + QK_SPK):
            q = np.rint(w[i] * inverse)
            clamped, extended = min(max(q, -z), F(15) - z), min(max(q, -z - F(16)), F(31) - z)
            a, e = theta * clamped - w[i], theta * extended - w[i]
            if q != clamped and a * a - e * e > 0:
                gains.append((-(a * a - e * e), i - b, extended))
            block.append(clamped)
        for _, position, extended in sorted(gains)[: 4 if b else 2]:
            block[position] = extended
        values += block
    return [int(v) for v in values], theta, int(z)


@slow
@given(
    hnp.arrays(np.float32, (1, QK_SPK), elements=usual_floats),
    st.one_of(st.none(), hnp.arrays(np.float32, QK_SPK, elements=st.floats(0, 4, width=32))),
    st.booleans(),
)
def test_quantizer_is_the_specification(w, importance, rotated):
    check_quantizer(w, importance, rotated)


@pytest.mark.parametrize("n_in", [64, 128, 192])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 3e4])
def test_quantizer_is_the_specification_for_long_tails(scale, n_in):
    rng = np.random.default_rng(5)
    weights = (rng.standard_t(2, (1, n_in)) * scale).astype(F)
    for rotated in (True, False):
        check_quantizer(weights, rng.random(n_in).astype(F), rotated)


def test_quantizer_is_the_specification_for_equal_weights():
    """More equal outliers in every block than it has slots: the lower positions take them."""
    w = np.zeros((1, 192), F)
    w[0, ::9] = 3
    w[0, 4::9] = -3
    w[0, 8::9] = 1
    check_quantizer(w, None, False)


@pytest.mark.parametrize("rotated", [True, False])
def test_quantizer_fills_all_slots(rotated):
    w = np.random.default_rng(0).standard_t(2, (32, 192))
    used = np.count_nonzero(salient_slots(encode_weights(w, rotated=rotated)), axis=-1)
    assert used.max(axis=0).tolist() == [2, 4, 4]


def check_quantizer(w, importance, rotated):
    blocks = encode_weights(w, importance, rotated)
    validate_weights(blocks)
    values, thresholds = weight_values(blocks)
    ones = np.ones(w.shape[1], F)
    expected, theta, z = scalar_quantize(w[0], ones if importance is None else importance, rotated)
    assert thresholds[0] == theta
    assert blocks["header"][0, 0] & 15 == z
    assert values[0].tolist() == expected


# ---- rotation


@quick
@given(arrays(st.floats(-1e6, 1e6, width=32)))
def test_rotation_is_its_own_inverse(x):
    before = x.copy()
    twice = rotate(rotate(x))
    assert twice.dtype == np.float32
    assert np.array_equal(x, before), "the argument was changed"
    blocks, back = x.reshape(-1, QK_SPK), twice.reshape(-1, QK_SPK)
    # 12 additions per value, each of a relative error 2^-24 of at most the block's norm times 8
    bound = 12 * 2.0**-24 * 8 * np.linalg.norm(blocks.astype(np.float64), axis=1) + 1e-44
    assert (np.abs(back - blocks).max(axis=1) <= bound).all()


def test_rotation_is_the_hadamard_transform():
    h = np.array([[1]])
    for _ in range(6):
        h = np.block([[h, h], [h, -h]])
    assert np.array_equal(rotate(np.eye(QK_SPK)), (h / 8).astype(F))
    impulse = np.zeros((1, QK_SPK), F)
    impulse[0, 0] = 8
    assert np.array_equal(rotate(impulse), np.ones((1, QK_SPK), F))
    assert impulse[0, 1] == 0, "a single block must be copied, too"


@quick
@given(arrays(usual_floats, max_rows=1, max_blocks=2))
def test_rotation_is_exact_to_the_bit(x):
    with np.errstate(all="ignore"):
        expected = [
            value for b in range(0, x.shape[1], QK_SPK) for value in scalar_rotate(x[0, b : b + QK_SPK])
        ]
    assert rotate(x).tobytes() == np.array(expected, F).tobytes()


def test_rotation_overflow_is_silent():
    with np.errstate(all="raise"):
        assert np.isinf(rotate(np.full(QK_SPK, FLT_MAX))).any()


# ---- thresholds


def test_every_threshold_survives_header_and_grid():
    theta = threshold_from_header(ALL_THRESHOLDS)
    assert len(theta) == 1983 and theta[0] == 2.0**-20 and theta[-1] == 65024
    assert (np.diff(theta) > 0).all()
    assert np.array_equal(threshold_on_grid(theta), theta)
    assert np.array_equal(threshold_to_header(theta), ALL_THRESHOLDS)


@quick
@given(st.floats(2.0**-22, 70000.0, width=32))
def test_grid_takes_the_nearest_threshold(t):
    assert threshold_on_grid(t) == scalar_grid(t)


def test_grid_between_thresholds():
    theta = threshold_from_header(ALL_THRESHOLDS)
    middle = ((theta[1:].astype(np.float64) + theta[:-1]) / 2).astype(F)
    even = np.where(ALL_THRESHOLDS[1:] >> 4 & 1, theta[:-1], theta[1:])
    assert np.array_equal(threshold_on_grid(middle), even)
    assert np.array_equal(threshold_on_grid(np.nextafter(middle, F(0))), theta[:-1])
    assert np.array_equal(threshold_on_grid(np.nextafter(middle, F(1e9))), theta[1:])


@pytest.mark.parametrize(
    "t, nearest", [(0, 2.0**-20), (-1, 2.0**-20), (np.nan, 2.0**-20), (1e9, 65024), (np.inf, 65024)]
)
def test_grid_clamps(t, nearest):
    assert threshold_on_grid(t) == nearest


# ---- weights: decoding


def test_every_code_byte_at_every_position():
    blocks = np.zeros((16 * 256, 1), BLOCK_SPK4)
    byte, z = np.meshgrid(np.arange(256), np.arange(16))
    blocks["header"][:, 0] = 0xBC00 | z.ravel()  # 1.0, not rotated
    for j in range(32):
        blocks["codes"] = 0x99
        blocks["codes"][:, 0, j] = byte.ravel()
        values, theta = weight_values(blocks)
        assert (theta == 1).all()
        expected = np.repeat(9 - z.ravel()[:, None], QK_SPK, axis=1)
        expected[:, j] = byte.ravel() % 16 - z.ravel()
        expected[:, j + 32] = byte.ravel() // 16 - z.ravel()
        assert np.array_equal(values, expected)
        assert np.array_equal(decode_weights(blocks), expected)


@pytest.mark.parametrize("block, slot", [(0, 2), (1, 0), (1, 1), (1, 2)])
def test_every_salient_byte_in_neighbouring_slots(block, slot):
    a, b, kinds = (index.ravel() for index in np.meshgrid(np.arange(64), np.arange(64), np.arange(4)))
    first, second = kinds % 2 + 1, kinds // 2 + 1
    blocks = np.zeros((64 * 64 * 4, 3), BLOCK_SPK4)
    blocks["header"][:, 0] = 0x3C08
    blocks["codes"] = 0x88
    blocks["salient"][:, block, slot] = first << 6 | a
    blocks["salient"][:, block, slot + 1] = second << 6 | b
    # the slots before these are used, too
    before = np.arange(2 if block == 0 else 0, slot)
    blocks["salient"][:, block, before] = 0x40 | before
    valid = (a < b) & (a >= slot)
    expected = np.zeros((len(blocks), 3, QK_SPK), int)
    each = np.arange(len(blocks))
    expected[:, block, before] = 16
    expected[each, block, a] += np.where(first == 1, 16, -16)
    expected[each, block, b] += np.where(second == 1, 16, -16)
    expected = expected.reshape(len(blocks), -1)
    assert np.array_equal(weight_values(blocks)[0][valid], expected[valid])
    validate_weights(blocks[valid])
    for i in np.flatnonzero(a >= b)[::97]:
        with pytest.raises(FormatError, match="ascending"):
            validate_weights(blocks[i : i + 1])


def test_the_header_is_no_salient_weight_and_no_other_block_has_one():
    blocks = np.zeros((1, 2), BLOCK_SPK4)
    blocks["header"] = 0x5555  # as slots: two weights at 21
    blocks["codes"] = 0x55
    values, theta = weight_values(blocks)
    expected = np.zeros((1, 128), int)
    expected[0, 64 + 21] = 32
    assert np.array_equal(values, expected) and theta == threshold_from_header(0x5555)
    slots = salient_slots(blocks)
    assert slots.tolist() == [[[0, 0, 0, 0], [0x55, 0x55, 0, 0]]]
    assert (blocks["header"] == 0x5555).all(), "the argument was changed"


def test_every_threshold_decodes_exactly():
    blocks = np.zeros((len(ALL_THRESHOLDS), 1), BLOCK_SPK4)
    blocks["header"][:, 0] = ALL_THRESHOLDS | 0x8000
    blocks["codes"] = 0xF1
    validate_weights(blocks)
    decoded = decode_weights(blocks)
    theta = ALL_THRESHOLDS.view(np.float16).astype(np.float64)
    assert np.array_equal(decoded[:, 0], theta) and np.array_equal(decoded[:, 32], 15 * theta)


@quick
@given(st.integers(0, 2**32))
def test_pack_is_the_inverse_of_unpack(seed):
    rng = np.random.default_rng(seed)
    blocks = random_weights(rng, 3, 2, not_rotated=seed & 1)
    values, theta = weight_values(blocks)
    packed = pack_weights(values, theta, blocks["header"][:, 0] & 15, rotated=not seed & 1)
    validate_weights(packed)
    again, theta_again = weight_values(packed)
    assert np.array_equal(again, values) and np.array_equal(theta_again, theta)
    # the only freedom is that a salient value may lie within the standard range
    assert np.array_equal(packed["header"][:, 0], blocks["header"][:, 0])


def test_pack_fills_the_slots_from_the_first_on():
    values = np.zeros((1, 192), int)
    values[0, [9, 40]] = 20, -20  # the first block: its two slots
    values[0, 64 + np.array([1, 5, 6, 63])] = -9, 8, 23, -24  # all four of the second
    values[0, 128 + 7] = 8  # one of the third
    blocks = pack_weights(values, 0.25, 8, rotated=False)
    assert blocks["header"][0, 0] == 0xB408
    assert salient_slots(blocks)[0].tolist() == [
        [0, 0, 0x40 | 9, 0x80 | 40],
        [0x80 | 1, 0x40 | 5, 0x40 | 6, 0x80 | 63],
        [0x40 | 7, 0, 0, 0],
    ]
    validate_weights(blocks)
    assert np.array_equal(weight_values(blocks)[0], values)


@pytest.mark.parametrize("block, limit", [(0, FIRST_BLOCK_SLOTS), (1, SALIENT_SLOTS), (2, SALIENT_SLOTS)])
def test_pack_takes_as_many_salient_weights_as_there_are_slots(block, limit):
    assert salient_limits(3)[block] == limit
    values = np.zeros((3, 192), int)
    values[1, block * 64 + 10 : block * 64 + 10 + limit] = 9
    assert np.array_equal(weight_values(pack_weights(values, 0.25, 8))[0], values)
    values[1, block * 64] = -9
    with pytest.raises(InputError, match="more than four weights outside the standard range, or the first"):
        pack_weights(values, 0.25, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"values": np.full((1, 64), 24)}, "outside the range"),
        ({"values": np.full((1, 64), 9)}, "more than"),
        ({"threshold": 0.3}, "grid"),
        ({"threshold": 0.0}, "grid"),
        ({"threshold": np.nan}, "grid"),
        ({"zero_point": 16}, "zero-point"),
        ({"zero_point": -1}, "zero-point"),
    ],
)
def test_pack_refuses(change, message):
    arguments = {"values": np.zeros((1, 64), int), "threshold": 0.25, "zero_point": 8}
    with pytest.raises(InputError, match=message):
        pack_weights(**{**arguments, **change})


# ---- weights: quantization


@quick
@given(arrays(usual_floats), st.booleans())
def test_standard_weights_err_by_half_a_threshold(w, rotated):
    blocks = encode_weights(w, rotated=rotated)
    validate_weights(blocks)
    values, theta = weight_values(blocks)
    z = (blocks["header"][:, :1] & 15).astype(int)
    inside = (values > -z) & (values < 15 - z)
    stored = rotate(w) if rotated else w
    error = np.abs(theta[:, None].astype(np.float64) * values - stored)
    # rint(w * (1 / theta)) may differ from the nearest by the rounding of its argument
    assert (error <= theta[:, None] * (0.5 + 2.0**-17))[inside].all()


@pytest.mark.parametrize("rotated", [True, False])
def test_uniform_weights_reach_the_theoretical_error(rotated):
    w = np.random.default_rng(0).uniform(-1, 1, (32, 512)).astype(F)
    error = decode_weights(encode_weights(w, rotated=rotated)) - w
    if rotated:  # normal then, where 4 bits with two extended codes leave about 1 % of the energy
        assert (error**2).mean() < 0.012 * (w**2).mean()
    else:  # 16 levels over an interval of 2: the error is uniform in a step of 2/15 or less
        assert (error**2).mean() < (2 / 15) ** 2 / 12 * 1.02
        assert (error**2).mean() > (2 / 16) ** 2 / 12 * 0.8


def test_salient_weights_pay():
    w = np.random.default_rng(0).standard_normal((4, 256)).astype(F)
    plain = ((decode_weights(encode_weights(w, rotated=False)) - w) ** 2).mean()
    w[:, [5, 100]] = 6
    blocks = encode_weights(w, rotated=False)
    assert (salient_slots(blocks)[:, [0, 1]] != 0).any(axis=-1).all()
    assert ((decode_weights(blocks) - w) ** 2).mean() < 1.3 * plain


def test_importance_moves_the_error():
    w = np.random.default_rng(1).standard_normal((8, 128)).astype(F)
    w[:, :64] *= 8
    importance = np.repeat(F([0.001, 1]), 64)
    error = np.abs(decode_weights(encode_weights(w, importance)) - w)
    error_even = np.abs(decode_weights(encode_weights(w)) - w)
    assert error[:, 64:].mean() < 0.8 * error_even[:, 64:].mean()


def test_zero_rows_and_leading_axes():
    w = np.random.default_rng(2).standard_normal((2, 3, 128)).astype(F)
    w[1, 1] = 0
    blocks = encode_weights(w)
    assert blocks.shape == (2, 3, 2)
    assert np.array_equal(blocks.reshape(6, 2), encode_weights(w.reshape(6, 128)))
    assert (decode_weights(blocks)[1, 1] == 0).all()
    assert encode_weights(w[0, 0]).shape == (2,)
    for encode, decode in ((encode_weights, decode_weights), (encode_activations, decode_activations)):
        assert encode(np.zeros((0, 128))).shape == (0, 2)
        assert decode(encode(np.zeros((0, 128)))).shape == (0, 128)


def test_many_rows_are_coded_like_few():
    w = np.random.default_rng(3).standard_normal((1100, 64)).astype(F)
    assert np.array_equal(encode_weights(w)[1020:1030], encode_weights(w[1020:1030]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad):
    w = np.zeros((3, 128), F)
    w[2, 70] = bad
    with pytest.raises(InputError, match="row 2, weight 70 is not finite"):
        encode_weights(w)


def test_weights_whose_rotation_overflows():
    w = np.zeros((1030, 64), F)
    w[1029] = FLT_MAX
    with pytest.raises(InputError, match="row 1029, weight 0 overflows"):
        encode_weights(w)
    validate_weights(encode_weights(w, rotated=False))


@pytest.mark.parametrize("importance", [np.ones(63), -np.ones(64), np.full(64, np.nan)])
def test_importance_that_does_not_fit(importance):
    with pytest.raises(InputError, match="importance"):
        encode_weights(np.zeros((1, 64)), importance)


@pytest.mark.parametrize("n_in", [0, 1, 63, 65, MAX_INPUTS + 64])
def test_row_lengths(n_in):
    for encode in (encode_weights, encode_activations):
        with pytest.raises(UnsupportedError, match=f"{n_in} inputs"):
            encode(np.zeros((1, n_in), F))


# ---- activations


def test_every_code_byte_and_mask_bit_at_every_position():
    blocks = np.zeros((256 * 2 * 2 * 16, 1), BLOCK_SPKA)
    byte, salient, fifth, zp = (
        a.ravel() for a in np.meshgrid(np.arange(256), [0, 1], [0, 1], np.arange(16), indexing="ij")
    )
    blocks["threshold"] = 1
    blocks["zero_point"][:, 0] = zp
    blocks["flags"] = 1
    for j in range(32):
        for half in (0, 32):
            bit = np.uint64(1) << np.uint64(j + half)
            blocks["codes"] = (zp | zp << 4)[:, None, None]
            blocks["codes"][:, 0, j] = byte
            blocks["salient_mask"][:, 0] = salient.astype(np.uint64) * bit
            blocks["fifth_bits"][:, 0] = (salient & fifth).astype(np.uint64) * bit
            expected = np.zeros((len(blocks), QK_SPK), int)
            expected[:, j] = byte % 16 - zp
            expected[:, j + 32] = byte // 16 - zp
            nibble = byte % 16 if half == 0 else byte // 16
            expected[:, j + half] = np.where(salient, nibble + 16 * fifth - 16, nibble - zp)
            fine, coarse, _, _ = activation_values(blocks)
            assert np.array_equal(fine, expected) and not coarse.any()
            blocks["coarse_mask"] = blocks["salient_mask"]
            blocks["salient_shift"][:, 0] = 3 * salient
            fine, coarse, _, _ = activation_values(blocks)
            is_salient = salient == 1
            assert np.array_equal(coarse[is_salient, j + half], expected[is_salient, j + half])
            assert (fine[is_salient, j + half] == 0).all() and not coarse[~is_salient].any()
            scaled = expected.copy()
            scaled[is_salient, j + half] *= 8
            assert np.array_equal(decode_activations(blocks), scaled)
            blocks["coarse_mask"] = blocks["salient_shift"] = 0
    validate_activations(blocks)


@quick
@given(arrays(usual_floats), st.floats(0.5, 7.375, width=32), st.booleans())
def test_activations_err_by_half_a_step(x, salience, rotated):
    blocks = encode_activations(x, salience, 0.5, 8, rotated)
    fine, coarse, step, shift = (a.astype(np.float64) for a in activation_values(blocks))
    stored = rotate(x) if rotated else x
    error = np.abs((fine + coarse * 2 ** shift[:, None]) - stored / step[:, None])
    unit = np.where(coarse != 0, 2 ** shift[:, None], 1)
    # a value beyond the range that went to its edge is nearer to it than to the next coarse code
    at_edge = (fine == -8) | (fine == 7)
    bound = 0.5 * np.where(at_edge, 2 ** np.maximum(shift, 1)[:, None], unit)
    assert (error <= bound * (1 + 1e-5) + 1e-5).all()


def test_types_of_unpacked_values():
    fine, coarse, step, shift = activation_values(encode_activations(np.ones((2, 64))))
    assert (fine.dtype, coarse.dtype, step.dtype, shift.dtype) == (np.int32, np.int32, np.float32, np.int32)
    values, theta = weight_values(encode_weights(np.ones((2, 64))))
    assert (values.dtype, theta.dtype) == (np.int8, np.float32)


def test_zeros_are_silent():
    blocks = encode_activations(np.zeros((1, 128)))
    assert blocks["threshold"][0, 0] == F(2.0**-100) and spike_train(blocks).spikes == 0
    assert np.array_equal(decode_activations(blocks), np.zeros((1, 128), F))


def test_below_the_smallest_step_nothing_fires():
    assert spike_train(encode_activations(np.full((1, 64), 2.0**-102), rotated=False)).spikes == 0
    assert spike_train(encode_activations(np.full((1, 64), 1e-44), rotated=False)).spikes == 0


def test_median_zero_takes_the_step_from_the_largest():
    x = np.zeros((1, 128), F)
    x[0, 100] = -7.5
    blocks = encode_activations(x, rotated=False)
    assert blocks["salient_shift"][0, 0] == 15
    np.testing.assert_allclose(decode_activations(blocks)[0, 100], -7.5, rtol=1e-6)
    assert spike_train(blocks).spikes == 1


@pytest.mark.parametrize("outlier", [1e3, -1e6, 1e20, 3e37])
def test_an_outlier_is_kept_within_its_coarse_step(outlier):
    x = np.random.default_rng(0).standard_normal((1, 256)).astype(F)
    x[0, 17] = outlier
    decoded = decode_activations(encode_activations(x, rotated=False))
    assert abs(decoded[0, 17] / outlier - 1) < 1 / 15


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "overflow"])
def test_a_token_without_finite_values_harms_no_other(bad, rotated):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((4, 192)).astype(F)
    weights = encode_weights(rng.standard_normal((5, 192)), rotated=rotated)
    good = matmul(weights, encode_activations(x, rotated=rotated))
    if bad == "overflow":
        x[2, 64:128] = FLT_MAX
    else:
        x[2, 100] = bad
    blocks = encode_activations(x, rotated=rotated)
    validate_activations(blocks)
    y = matmul(weights, blocks)
    if bad == "overflow" and not rotated:  # without rotation the largest float is a value like others
        assert np.isfinite(blocks["threshold"]).all()
    else:
        assert (blocks["threshold"][2].view(np.uint32) == 0x7FC00000).all()
        assert spike_train(blocks[2]).spikes == 0
        assert np.isnan(y[2]).all() and np.isnan(decode_activations(blocks)[2]).all()
    assert np.array_equal(np.delete(y, 2, axis=0), np.delete(good, 2, axis=0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"salience": 0},
        {"salience": 7.5},
        {"salience": 7.4999999999},
        {"salience": np.nan},
        {"silence": -0.1},
        {"silence": 4.1},
        {"silence": np.nan},
        {"zero_point": 16},
        {"zero_point": -1},
        {"zero_point": 2.5},
    ],
)
def test_encoder_settings_out_of_range(wrong):
    with pytest.raises(InputError, match="threshold|zero-point"):
        encode_activations(np.zeros((1, 64)), **wrong)


def test_silence_threshold_silences():
    x = np.random.default_rng(0).standard_normal((8, 256)).astype(F)
    spikes = [
        spike_train(encode_activations(x, silence=silence)).spikes for silence in (0.0, 0.5, 1.0, 2.0, 4.0)
    ]
    assert spikes[0] == spikes[1] > spikes[2] > spikes[3] > spikes[4] > 0


def test_no_arithmetic_warnings():
    x = np.array([[np.nan] * 64, [FLT_MAX] * 64, [1e-45] * 64, [0] * 64], F)
    with np.errstate(all="raise"):
        blocks = encode_activations(x)
        decode_activations(blocks)
        matmul(encode_weights(x[2:]), blocks)
        encode_weights(np.repeat(F([-FLT_MAX, FLT_MAX]), 32)[None], rotated=False)


# ---- spikes and potentials


@quick
@given(st.integers(0, 2**32))
def test_potentials_by_spikes_equal_the_dot_product(seed):
    rng = np.random.default_rng(seed)
    n_blocks = rng.integers(1, 5)
    weights = random_weights(rng, rng.integers(1, 6), n_blocks)
    activations = random_activations(rng, rng.integers(1, 4), n_blocks)
    validate_weights(weights)
    validate_activations(activations)
    fine, coarse, _, _ = (a.astype(object) for a in activation_values(activations))
    values = weight_values(weights)[0].astype(object)
    for compute in (potentials, potentials_by_spikes):
        n, s = compute(weights, activations)
        assert n.dtype == s.dtype == np.int32
        assert np.array_equal(n, fine @ values.T) and np.array_equal(s, coarse @ values.T)


@quick
@given(arrays(usual_floats), arrays(usual_floats))
def test_potentials_by_spikes_of_encoded_values(w, x):
    n_in = min(w.shape[1], x.shape[1])
    weights, activations = encode_weights(w[:, :n_in]), encode_activations(x[:, :n_in])
    assert np.array_equal(potentials(weights, activations), potentials_by_spikes(weights, activations))


def test_spike_times():
    blocks = random_activations(np.random.default_rng(0), 3, 4)
    fine, coarse, _, _ = activation_values(blocks)
    code = fine + coarse
    train = spike_train(blocks)
    assert np.array_equal(train.magnitude, np.abs(code)) and train.magnitude.max() == 16
    assert np.array_equal(train.polarity, np.sign(code))
    fires = code != 0
    assert np.array_equal(train.time[fires], 16 - np.abs(code)[fires])
    assert (train.time[~fires] == -1).all() and train.spikes == fires.sum()
    assert np.array_equal(train.coarse & fires, coarse != 0)


def test_the_largest_potential_is_exact_in_float32():
    n_blocks = MAX_INPUTS // QK_SPK
    assert 496 * MAX_INPUTS < 2**24 <= 496 * (MAX_INPUTS + QK_SPK)
    assert 496 * 4_329_604 < 2**31 <= 496 * 4_329_605
    weights = np.zeros((1, n_blocks), BLOCK_SPK4)
    weights["salient"] = [0x80, 0x81, 0x82, 0x83]
    weights["header"][:, 0], weights["salient"][:, 0, 2:] = 0xBC0F, [0x80, 0x81]
    activations = np.zeros((1, n_blocks), BLOCK_SPKA)
    activations["threshold"], activations["flags"] = 1, 1
    activations["salient_mask"] = 2**64 - 1  # all of code -16, fine
    fine, coarse = potentials(weights, activations)
    expected = 16 * (2 * 31 + 62 * 15 + (n_blocks - 1) * (4 * 31 + 60 * 15))
    assert fine[0, 0] == expected and coarse[0, 0] == 0
    assert matmul(weights, activations)[0, 0] == expected


def test_readout_is_float32_in_its_order():
    rng = np.random.default_rng(0)
    theta, step = rng.random(4).astype(F), rng.random(3).astype(F)
    fine, coarse = rng.integers(-(2**24), 2**24, (2, 3, 4))
    shift = np.array([0, 3, 15])
    y = readout(theta, step, fine, coarse, shift)
    for t in range(3):
        for r in range(4):
            assert y[t, r] == (theta[r] * step[t]) * (F(fine[t, r]) + F(coarse[t, r]) * F(2 ** shift[t]))
    assert y.dtype == np.float32


@quick
@given(st.integers(0, 2**32))
def test_the_layer_computes_the_product_of_what_is_decoded(seed):
    rng = np.random.default_rng(seed)
    weights = encode_weights(rng.standard_normal((4, 128)))
    activations = encode_activations(rng.standard_t(2, (3, 128)))
    x, w = decode_activations(activations).astype(np.float64), decode_weights(weights).astype(np.float64)
    bound = 1e-5 * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)[None]
    assert (np.abs(matmul(weights, activations) - x @ w.T) <= bound).all()


def test_accuracy_of_a_layer():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((64, 512)), rng.standard_t(4, (32, 512))
    y, exact = matmul(encode_weights(w), encode_activations(x)), x @ w.T
    assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.15


def test_mismatched_rotation_is_nan():
    x = np.ones((2, 64))
    rotated, straight = encode_weights(x), encode_weights(x, rotated=False)
    assert np.isnan(matmul(rotated, encode_activations(x, rotated=False))).all()
    assert np.isnan(matmul(straight, encode_activations(x))).all()
    assert np.isfinite(matmul(straight, encode_activations(x, rotated=False))).all()


def test_shapes_that_do_not_fit():
    with pytest.raises(InputError, match="do not fit"):
        matmul(encode_weights(np.ones((2, 64))), encode_activations(np.ones((2, 128))))


# ---- validation


def weight_mutations():
    def salient(*slots):
        def change(row):
            row["salient"][2] = slots

        return 2, change

    def in_first_block(*slots):
        def change(row):
            row["salient"][0, 2:] = slots

        return 0, change

    def header(change_header):
        def change(row):
            row["header"][0] = change_header(int(row["header"][0]))

        return 0, change

    yield "threshold is not finite", header(lambda h: h | 0x7C00)
    yield "threshold is not finite", header(lambda h: 0x7C00)
    yield "threshold is zero", header(lambda h: h & ~0x7FF0)
    for prefix in range(4):  # slots in use before the faulty one
        used = [0x40 | position for position in range(prefix)]
        yield "no valid extension", salient(*used, 0xC0 | 9, *[0] * (3 - prefix))
        yield "slot is not zero", salient(*used, 0x09, *[0] * (3 - prefix))
    for prefix in range(3):
        used = [0x40 | position for position in range(prefix)]
        yield "before a used one", salient(*used, 0, 0x49, *[0] * (2 - prefix))
        yield "not ascending", salient(*used, 0x45, 0x44, *[0] * (2 - prefix))
        yield "not ascending", salient(*used, 0x45, 0x85, *[0] * (2 - prefix))
    yield "before a used one", salient(0, 0, 0, 0x80)
    # of several faults the first rule is named, wherever it is broken
    yield "no valid extension", salient(0x45, 0x44, 0x01, 0xC0)
    yield "slot is not zero", salient(0x45, 0x44, 0, 0x01)
    yield "before a used one", salient(0x45, 0x44, 0, 0x46)
    yield "no valid extension", in_first_block(0xC1, 0)
    yield "no valid extension", in_first_block(0x41, 0xC2)
    yield "slot is not zero", in_first_block(0x01, 0)
    yield "slot is not zero", in_first_block(0x41, 0x3F)
    yield "before a used one", in_first_block(0, 0x41)
    yield "not ascending", in_first_block(0x45, 0x44)
    yield "rotation differs from the first row", header(lambda h: h ^ 0x8000)


@pytest.mark.parametrize("rule, place", list(weight_mutations()))
def test_invalid_weights_are_named(rule, place):
    block, mutate = place
    blocks = random_weights(np.random.default_rng(0), 6, 4)
    validate_weights(blocks)
    mutate(blocks[3])
    with pytest.raises(FormatError, match=f"^tensor 'blk.0.x', row 3, block {block}: .*{rule}") as caught:
        validate_weights(blocks, "blk.0.x")
    assert (caught.value.tensor, caught.value.row, caught.value.block) == ("blk.0.x", 3, block)
    assert caught.value.remedy and caught.value.exit_code == 3


def test_the_first_faulty_block_of_the_first_faulty_row_is_named():
    blocks = random_weights(np.random.default_rng(0), 6, 4)
    blocks["salient"][4, 1] = 0xC0
    blocks["salient"][2, 3] = 0x01
    blocks["header"][3, 0] = 0
    with pytest.raises(FormatError, match="row 2, block 3: unused salient slot is not zero"):
        validate_weights(blocks)


def test_rotation_must_be_uniform_over_a_tensor():
    blocks = random_weights(np.random.default_rng(0), 6, 4)
    blocks["header"][4, 0] |= 0x8000
    with pytest.raises(FormatError, match="row 4, block 0: rotation differs"):
        validate_weights(blocks)
    blocks["header"][4, 0] &= 0x7FFF
    blocks["salient"][4, 1:] = [0x83, 0, 0, 0]  # in other blocks the same bit is no rotation
    validate_weights(blocks)


def scalar_fault(slots) -> str | None:
    """The rules of section 8 for the slots of one block, one after the other."""
    used = [slot >> 6 != 0 for slot in slots]
    neighbours = [(slots[i], slots[i + 1], used[i], used[i + 1]) for i in range(len(slots) - 1)]
    if any(slot >> 6 == 3 for slot in slots):
        return "salient weight has no valid extension"
    if any(slot >> 6 == 0 and slot != 0 for slot in slots):
        return "unused salient slot is not zero"
    if any(not first and second for _, _, first, second in neighbours):
        return "unused salient slot before a used one"
    if any(a and b and x & 63 >= y & 63 for x, y, a, b in neighbours):
        return "salient positions are not ascending"
    return None


def check_faults(slots: np.ndarray, block: int) -> int:
    """Compares the faults of blocks with slots uint8[n, 2 or 4] to scalar_fault. How many have none."""
    blocks = np.zeros((len(slots), 2), BLOCK_SPK4)
    blocks["header"][:, 0] = 0x3C00
    blocks["salient"][:, block, -slots.shape[1] :] = slots
    expected = [scalar_fault(each) for each in slots.tolist()]
    valid = np.array([fault is None for fault in expected])
    validate_weights(blocks[valid])
    for i in np.flatnonzero(~valid):
        assert first_weight_fault(blocks[i : i + 1]) == (0, block, expected[i])
    return int(valid.sum())


def test_every_pair_of_slots_of_a_first_block_is_valid_or_rejected():
    both = np.arange(0x10000)
    n_valid = check_faults(np.stack([both & 255, both >> 8], axis=1).astype(np.uint8), block=0)
    assert n_valid == 1 + 128 + 4 * (64 * 63 // 2)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_pair_of_neighbouring_slots_is_valid_or_rejected(place):
    both = np.arange(0x10000)
    slots = np.zeros((len(both), 4), np.uint8)
    slots[:, :place] = [0x40, 0x81][:place]
    slots[:, place], slots[:, place + 1] = both & 255, both >> 8
    n_positions = 64 - place
    n_valid = check_faults(slots, block=1)
    assert n_valid == 1 + 2 * n_positions + 4 * (n_positions * (n_positions - 1) // 2)


def test_any_four_slots_are_valid_or_rejected():
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 256, (5000, 4), np.uint8)
    used = rng.integers(0x40, 0xC0, (5000, 4), np.uint8)
    nearly = np.take_along_axis(used, np.argsort(used & 63, axis=1), axis=1)  # ascending, but for equal ones
    nearly[np.arange(4) >= rng.integers(0, 5, 5000)[:, None]] = 0
    holes = np.where(rng.random((5000, 4)) < 0.2, 0, nearly).astype(np.uint8)
    n_valid = [check_faults(slots, block=1) for slots in (anything, used, nearly, holes)]
    assert n_valid[2] > 4000 and all(n_valid[i] < 5000 for i in range(4)) and n_valid[3] > 1000


def test_no_rule_is_for_the_header_in_other_blocks():
    blocks = np.zeros((1, 3), BLOCK_SPK4)
    blocks["header"][0, 0] = 0x3C00
    validate_weights(blocks)  # no threshold in blocks 1 and 2
    blocks["salient"][0, 1] = [0x40, 0x7C, 0, 0]  # as a header: not finite
    validate_weights(blocks)


def activation_mutations():
    def put(**fields):
        return lambda token: [token[2].__setitem__(name, value) for name, value in fields.items()]

    def whole(**fields):
        return lambda token: [token.__setitem__(name, value) for name, value in fields.items()]

    nan = np.uint32(0x7FC00000).view(np.float32)
    other_nan = np.uint32(0x7FC00001).view(np.float32)
    nothing = {"salient_mask": 0, "fifth_bits": 0, "coarse_mask": 0, "salient_shift": 0, "codes": 0x88}
    fires = [0x88] * 31 + [0x98]
    yield "reserved", 2, put(reserved=1)
    yield "reserved", 2, put(flags=2)
    yield "reserved", 2, put(flags=0x80)
    yield "zero-point is above", 2, put(zero_point=16)
    yield "shift is above", 2, put(salient_shift=16)
    yield "coarse value that is not salient", 2, put(salient_mask=0, fifth_bits=0, coarse_mask=1)
    yield "fifth bit", 2, put(salient_mask=2, coarse_mask=2, fifth_bits=1)
    yield "without a shift", 2, put(salient_shift=0)
    yield "not positive", 2, put(threshold=0)
    yield "not positive", 2, put(threshold=-1)
    yield "not positive", 2, put(threshold=-0.0)
    yield "not positive", 2, put(threshold=np.inf)
    yield "not positive", 0, whole(**{**nothing, "threshold": other_nan})
    yield "spike in a token", 0, whole(**{**nothing, "threshold": nan, "zero_point": 7})
    yield (
        "spike in a token",
        2,
        lambda t: (whole(**nothing, threshold=nan, zero_point=8)(t), put(codes=fires)(t)),
    )
    yield "spike in a token", 0, whole(**{**nothing, "threshold": nan, "zero_point": 8, "salient_shift": 1})
    yield (
        "spike in a token",
        2,
        lambda t: (whole(**nothing, threshold=nan, zero_point=8)(t), put(salient_mask=4)(t)),
    )
    yield "threshold differs", 2, put(threshold=3)
    yield "zero-point differs", 2, put(zero_point=9)
    yield "salient shift differs", 2, put(salient_shift=7)
    yield "flags differs", 2, put(flags=1)
    yield "without coarse", 0, whole(coarse_mask=0)


@pytest.mark.parametrize("rule, block, mutate", list(activation_mutations()))
def test_invalid_activations_are_named(rule, block, mutate):
    blocks = random_activations(np.random.default_rng(1), 5, 4)
    blocks["zero_point"][3], blocks["salient_shift"][3], blocks["threshold"][3] = 8, 5, 0.25
    validate_activations(blocks)
    mutate(blocks[3])
    with pytest.raises(FormatError, match=f"^tensor 'x', token 3, block {block}: .*{rule}") as caught:
        validate_activations(blocks, "x")
    assert (caught.value.tensor, caught.value.row, caught.value.block) == ("x", 3, block)


def test_tokens_may_differ_from_each_other():
    validate_activations(
        np.concatenate([random_activations(np.random.default_rng(0), 2, 3, r) for r in (0, 1)])
    )


@quick
@given(st.integers(0, 2**32), st.sampled_from([BLOCK_SPK4, BLOCK_SPKA]))
def test_random_bytes_decode_or_are_rejected(seed, dtype):
    raw = np.random.default_rng(seed).integers(0, 256, (4, 2 * dtype.itemsize), np.uint8)
    blocks = raw.view(dtype)
    validate, decode = (
        (validate_weights, decode_weights)
        if dtype is BLOCK_SPK4
        else (validate_activations, decode_activations)
    )
    try:
        validate(blocks)
    except FormatError as error:
        assert error.row is not None and error.block is not None
    assert decode(blocks).shape == (4, 128)  # also of data that was not validated, without an exception
