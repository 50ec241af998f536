"""SPK4 in NumPy: 4-bit weights with one threshold and zero-point per row and a few salient weights per block.

This is the normative definition; the C code gives the same bytes. All arithmetic is float32, in the order
written.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError
from .format import (
    BLOCK_SPK4,
    QK_SPK,
    SALIENT_SLOTS,
    SPK4_NOT_ROTATED,
    SPK4_THRESHOLD,
    SPK4_ZERO_POINT,
    check_inputs,
    salient_limits,
    salient_slots,
)
from .rotation import rotate

__all__ = [
    "decode_weights",
    "encode_weights",
    "pack_weights",
    "threshold_from_header",
    "threshold_on_grid",
    "threshold_to_header",
    "weight_values",
    "weights_rotated",
]

_F = np.float32
_SMALLEST_THRESHOLD = _F(2.0**-20)
_LARGEST_THRESHOLD = _F(65024.0)
_SMALLEST_NORMAL_F16 = _F(2.0**-14)
_EXTENSION = np.array([0, 16, -16, 0], np.int8)  # by bits 6-7 of a salient byte; 3 is rejected by validation

# Ranges of thresholds and zero-points that the search for a row's scale tries.
_SCALE_FACTORS = _F(1.08) - _F(0.04) * np.arange(20, dtype=_F)
_ZERO_POINT_STEPS = np.array([-1, 0, 1], _F)
_SEARCH_ROWS = 1024  # bounds the memory of the search


# ---- thresholds: f16 magnitudes with six mantissa bits


def threshold_on_grid(threshold: ArrayLike) -> NDArray[np.float32]:
    """The nearest threshold that a header can hold, ties to even; float32, any shape. NaN gives the least."""
    t = np.asarray(threshold, _F)
    t = np.where(t > _SMALLEST_THRESHOLD, t, _SMALLEST_THRESHOLD)
    t = np.minimum(t, _LARGEST_THRESHOLD).astype(_F)
    subnormal = np.rint(t * _F(2.0**20)) * _SMALLEST_THRESHOLD
    bits = t.view(np.uint32)  # a carry out of the mantissa moves into the exponent, as it should
    tie = (bits >> np.uint32(17)) & np.uint32(1)
    normal = ((bits + np.uint32(0xFFFF) + tie) & np.uint32(0xFFFE0000)).view(_F)
    return np.minimum(np.where(t < _SMALLEST_NORMAL_F16, subnormal, normal), _LARGEST_THRESHOLD)


def threshold_to_header(threshold: ArrayLike) -> NDArray[np.uint16]:
    """Header bits 14-4 of thresholds on the grid (see threshold_on_grid), as uint16."""
    return np.asarray(threshold, _F).astype(np.float16).view(np.uint16) & np.uint16(SPK4_THRESHOLD)


def threshold_from_header(header: ArrayLike) -> NDArray[np.float32]:
    """The thresholds of headers; infinite or NaN for headers that validation rejects."""
    bits = np.asarray(header, np.uint16) & np.uint16(SPK4_THRESHOLD)
    return bits.view(np.float16).astype(_F)


# ---- decoding


def weight_values(blocks: NDArray[np.void]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Unpacks blocks to integers and thresholds: the weight in the stored basis is threshold * value.

    Args:
        blocks: BLOCK_SPK4[..., n_blocks].

    Returns:
        int8[..., 64 n_blocks] values, code + extension - zero_point, in -31..31; and float32[...] thresholds.
    """
    codes = blocks["codes"]
    zero_point = (blocks["header"][..., 0] & SPK4_ZERO_POINT).astype(np.int8)
    values = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.int8) - zero_point[..., None, None]
    flat = values.reshape(-1, QK_SPK)
    each = np.arange(flat.shape[0])
    for salient in salient_slots(blocks).reshape(-1, SALIENT_SLOTS).T:
        flat[each, salient & 63] += _EXTENSION[salient >> 6]
    return (
        flat.reshape(*blocks.shape[:-1], blocks.shape[-1] * QK_SPK),
        threshold_from_header(blocks["header"][..., 0]),
    )


def weights_rotated(blocks: NDArray[np.void]) -> NDArray[np.bool_]:
    """Whether each row is stored in the rotated basis: bool[...] for BLOCK_SPK4[..., n_blocks]."""
    return (blocks["header"][..., 0] & SPK4_NOT_ROTATED) == 0


def decode_weights(blocks: NDArray[np.void]) -> NDArray[np.float32]:
    """Dequantizes BLOCK_SPK4[..., n_blocks] to float32[..., 64 n_blocks] in the model's basis."""
    values, threshold = weight_values(blocks)
    with np.errstate(all="ignore"):
        stored = threshold[..., None] * values.astype(_F)
    return np.where(weights_rotated(blocks)[..., None], rotate(stored), stored)


# ---- encoding


def pack_weights(
    values: ArrayLike, threshold: ArrayLike, zero_point: ArrayLike, rotated: bool = True
) -> NDArray[np.void]:
    """Packs integer weights, such as a calibrated quantizer finds, into blocks. Inverse of weight_values.

    Args:
        values: int[..., n_in] in -zero_point - 16 .. 31 - zero_point; per block of 64, at most four may lie
            outside the standard range -zero_point .. 15 - zero_point, and two of the first block.
        threshold: float[...], one per row, on the grid of threshold_on_grid.
        zero_point: int[...], one per row, 0..15.
        rotated: whether the values are in the rotated basis.

    Returns:
        BLOCK_SPK4[..., n_in / 64].

    Raises:
        InputError: something of that does not fit.
        UnsupportedError: n_in is not a multiple of 64, or too large.
    """
    values = np.asarray(values)
    rows = values.shape[:-1]
    check_inputs(values.shape[-1])
    threshold = np.broadcast_to(np.asarray(threshold, _F), rows)
    zero_point = np.broadcast_to(np.asarray(zero_point), rows).astype(np.int32)
    if not np.array_equal(threshold_on_grid(threshold), threshold):
        raise InputError("a row threshold is not on the grid of SPK4", "round it with threshold_on_grid")
    if ((zero_point < 0) | (zero_point > 15)).any():
        raise InputError("a row zero-point is outside 0..15")

    code = (
        values.astype(np.int32).reshape(*rows, values.shape[-1] // QK_SPK, QK_SPK)
        + zero_point[..., None, None]
    )
    if ((code < -16) | (code > 31)).any():
        raise InputError("a weight value is outside the range that a salient weight can hold")
    above, below = code > 15, code < 0
    outside = above | below
    limits = salient_limits(code.shape[-2])
    if (outside.sum(axis=-1) > limits).any():
        raise InputError(
            "a block has more than four weights outside the standard range, or the first one of a row more "
            "than two",
            "clamp the smaller ones",
        )

    blocks = np.zeros(code.shape[:-1], BLOCK_SPK4)
    nibble = (code - 16 * above + 16 * below).astype(np.uint8)
    blocks["codes"] = nibble[..., :32] | nibble[..., 32:] << 4
    # the n-th element outside, counted in ascending position, takes slot n of those that the block has
    place = np.cumsum(outside, axis=-1) + (SALIENT_SLOTS - 1 - limits)[:, None]
    salient_byte = (np.arange(QK_SPK) | np.where(above, 1, 2) << 6).astype(np.uint8)
    for slot in range(SALIENT_SLOTS):
        blocks["salient"][..., slot] = (salient_byte * (outside & (place == slot))).sum(
            axis=-1, dtype=np.uint8
        )
    header = threshold_to_header(threshold) | zero_point.astype(np.uint16)
    blocks["header"][..., 0] = header if rotated else header | np.uint16(SPK4_NOT_ROTATED)
    return blocks


def encode_weights(
    weights: ArrayLike, importance: ArrayLike | None = None, rotated: bool = True
) -> NDArray[np.void]:
    """Quantizes rows to SPK4 without calibration data: the reference quantizer.

    Per row it searches the threshold and zero-point of least squared error, weighted by importance.

    Args:
        weights: float[..., n_in], taken as float32.
        importance: float[n_in] >= 0, one weight of the squared error per input; None for all equal.
        rotated: whether to store the rows in the rotated basis.

    Returns:
        BLOCK_SPK4[..., n_in / 64].

    Raises:
        InputError: a weight is not finite (or overflows when rotated), or importance does not fit.
        UnsupportedError: n_in is not a multiple of 64, or too large.
    """
    weights = np.asarray(weights, _F)
    if weights.ndim == 0:
        raise InputError("weights need at least one dimension")
    n_in = weights.shape[-1]
    check_inputs(n_in)
    error_weight = _importance_per_input(importance, n_in, rotated)
    rows = weights.reshape(-1, n_in)
    _require_finite(rows, "is not finite")
    out = np.zeros((len(rows), n_in // QK_SPK), BLOCK_SPK4)
    for first in range(0, len(rows), _SEARCH_ROWS):
        part = rows[first : first + _SEARCH_ROWS]
        if rotated:
            part = rotate(part)
            _require_finite(part, "overflows when the block is rotated", first)
        out[first : first + len(part)] = _encode_rows(part, error_weight, rotated)
    return out.reshape(*weights.shape[:-1], n_in // QK_SPK)


def _require_finite(rows: NDArray[np.float32], problem: str, first_row: int = 0) -> None:
    bad = ~np.isfinite(rows)
    if bad.any():
        row, index = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise InputError(f"row {row + first_row}, weight {index} {problem}", "check the source model")


def _importance_per_input(importance: ArrayLike | None, n_in: int, rotated: bool) -> NDArray[np.float32]:
    if importance is None:
        return np.ones(n_in, _F)
    given = np.asarray(importance, _F)
    if given.shape != (n_in,):
        raise InputError(f"importance has shape {given.shape}, not ({n_in},)")
    if not (np.isfinite(given) & (given >= 0)).all():
        raise InputError("importance has a negative or non-finite value")
    if not rotated:
        return given
    # the rotation mixes the channels of a block evenly, and so their importance
    total = np.zeros(n_in // QK_SPK, _F)
    with np.errstate(all="ignore"):
        for i in range(QK_SPK):  # one by one: the order of the sum is part of the definition
            total += given[i::QK_SPK]
        return np.repeat(total * _F(1 / 64), QK_SPK)


def _encode_rows(w: NDArray[np.float32], importance: NDArray[np.float32], rotated: bool) -> NDArray[np.void]:
    """w: float32[rows, n_in] in the basis to store; importance: float32[n_in]."""
    blockwise = w.reshape(len(w), w.shape[1] // QK_SPK, QK_SPK)
    order = np.argsort(-np.abs(blockwise), axis=-1, kind="stable")  # ties: the lowest index first
    free = np.zeros(blockwise.shape, bool)
    np.put_along_axis(free, order[..., :SALIENT_SLOTS], _slot_exists(blockwise.shape[1]), axis=-1)
    with np.errstate(all="ignore"):
        threshold, zero_point = _search_scales(w, free.reshape(w.shape), importance)
        values = _choose_values(blockwise, threshold[:, None, None], zero_point[:, None, None])
    return pack_weights(values.reshape(w.shape), threshold, zero_point, rotated)


def _slot_exists(n_blocks: int) -> NDArray[np.bool_]:
    """bool[1, n_blocks, 4]: whether the block may have another salient weight after 0, 1, 2, 3."""
    return (np.arange(SALIENT_SLOTS) < salient_limits(n_blocks)[:, None])[None]


def _search_scales(
    w: NDArray[np.float32], free: NDArray[np.bool_], importance: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Threshold and zero-point of each row: the first of least error among 60 candidates."""
    smallest = np.where(free, _F(np.inf), w).min(axis=1)
    largest = np.where(free, _F(-np.inf), w).max(axis=1)
    widest = (largest - smallest) / _F(15)
    middle = _F(0.5) * (smallest + largest)

    # candidates x rows; the sums run over the inputs one by one, since their order is part of the definition
    threshold = threshold_on_grid(widest * _SCALE_FACTORS[:, None])
    inverse = _F(1) / threshold
    centre = np.rint(_F(7.5) - middle * inverse)
    zero_point = np.clip(centre[:, None] + _ZERO_POINT_STEPS[:, None], _F(0), _F(15))
    zero_point = zero_point.reshape(len(centre) * len(_ZERO_POINT_STEPS), len(w))
    threshold, inverse = (np.repeat(a, len(_ZERO_POINT_STEPS), axis=0) for a in (threshold, inverse))
    lo, hi = -zero_point, _F(15) - zero_point

    error = np.zeros_like(threshold)
    t, bound = np.empty_like(error), np.empty_like(error)
    columns, reach = np.ascontiguousarray(w.T), np.ascontiguousarray(_F(16) * free.T)
    for j in range(w.shape[1]):
        np.multiply(columns[j], inverse, out=t)
        np.rint(t, out=t)
        np.maximum(t, np.subtract(lo, reach[j], out=bound), out=t)
        np.minimum(t, np.add(hi, reach[j], out=bound), out=t)
        np.multiply(threshold, t, out=t)
        np.subtract(t, columns[j], out=t)
        np.multiply(t, t, out=t)
        np.multiply(t, importance[j], out=t)
        np.add(error, t, out=error)

    best = np.zeros(len(w), np.intp)
    least = error[0].copy()
    for candidate in range(1, len(error)):  # not argmin: an error can be NaN, and NaN is never better
        better = error[candidate] < least
        best[better] = candidate
        least[better] = error[candidate][better]
    rows = np.arange(len(w))
    return threshold[best, rows], zero_point[best, rows]


def _choose_values(
    w: NDArray[np.float32], threshold: NDArray[np.float32], zero_point: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Integer values of w, float32[rows, n_blocks, 64]. Those that gain most leave the standard range."""
    lo, hi = -zero_point, _F(15) - zero_point
    nearest = np.rint(w * (_F(1) / threshold))
    clamped = np.clip(nearest, lo, hi)
    extended = np.clip(nearest, lo - _F(16), hi + _F(16))
    error_clamped = threshold * clamped - w
    error_extended = threshold * extended - w
    gain = error_clamped * error_clamped - error_extended * error_extended
    gain = np.where((extended != clamped) & (gain > 0), gain, _F(0))  # a NaN gain is no gain
    chosen = np.argsort(-gain, axis=-1, kind="stable")[..., :SALIENT_SLOTS]
    values = clamped
    pick = (np.take_along_axis(gain, chosen, axis=-1) > 0) & _slot_exists(w.shape[1])
    np.put_along_axis(
        values,
        chosen,
        np.where(
            pick, np.take_along_axis(extended, chosen, axis=-1), np.take_along_axis(clamped, chosen, axis=-1)
        ),
        axis=-1,
    )
    return values
