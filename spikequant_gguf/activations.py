"""SPKA in NumPy: the activations of a token as signed spike codes on one step per token.

This is the normative definition; the C code gives the same bytes. All arithmetic is float32, in the order
written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError
from .format import (
    BLOCK_SPKA,
    DEFAULT_SALIENCE,
    DEFAULT_SILENCE,
    DEFAULT_ZERO_POINT,
    MAX_SHIFT,
    MAX_SILENCE,
    QK_SPK,
    SALIENCE_LIMIT,
    SPKA_NOT_ROTATED,
    check_inputs,
)
from .rotation import rotate

__all__ = [
    "SPIKE_STEPS",
    "SpikeTrain",
    "activation_values",
    "activations_rotated",
    "check_encoder",
    "decode_activations",
    "encode_activations",
    "spike_train",
]

_F = np.float32
_SMALLEST_STEP = _F(2.0**-100)  # below, everything is silence
_NAN = np.array(0x7FC00000, np.uint32).view(_F)[()]  # the step of a token that held NaN or infinity

SPIKE_STEPS = 16
"""Time steps of a spike train. A magnitude m fires at step 16 - m, so 16 fires first and 0 never."""


def check_encoder(salience: float, silence: float, zero_point: int = DEFAULT_ZERO_POINT) -> None:
    """Raises InputError unless 0 < salience < 7.5, 0 <= silence <= 4 and zero_point is one of 0..15."""
    if not 0 < _F(salience) < SALIENCE_LIMIT:
        raise InputError(
            f"salience threshold {salience} is not between 0 and {SALIENCE_LIMIT}", "use about 2.3"
        )
    if not 0 <= silence <= MAX_SILENCE:
        raise InputError(f"silence threshold {silence} is not in 0..{MAX_SILENCE:g}", "use about 0.5")
    if zero_point not in range(16):
        raise InputError(f"zero-point {zero_point} is not one of 0..15", "use 8")


def encode_activations(
    x: ArrayLike,
    salience: float = DEFAULT_SALIENCE,
    silence: float = DEFAULT_SILENCE,
    zero_point: int = DEFAULT_ZERO_POINT,
    rotated: bool = True,
) -> NDArray[np.void]:
    """Encodes each token's inputs as spikes.

    A token with a NaN or an infinity, or whose rotation overflows, becomes a NaN token: its threshold is NaN
    and nothing fires, so that its outputs, and no other token's, are NaN.

    Args:
        x: float[..., n_in], taken as float32; the last axis is one token.
        salience: c; the step is c / 7.5 times the median magnitude.
        silence: values of a magnitude below this many steps do not fire.
        zero_point: of the standard range -zero_point .. 15 - zero_point.
        rotated: whether to rotate the blocks first, as the weights' rows must then be.

    Returns:
        BLOCK_SPKA[..., n_in / 64].

    Raises:
        InputError: a parameter is out of range.
        UnsupportedError: n_in is not a multiple of 64, or too large.
    """
    check_encoder(salience, silence, zero_point)
    x = np.asarray(x, _F)
    if x.ndim == 0:
        raise InputError("activations need at least one dimension")
    n_in = x.shape[-1]
    check_inputs(n_in, "token")
    tokens = x.reshape(-1, n_in)
    with np.errstate(all="ignore"):
        blocks = _encode_tokens(tokens, _F(salience), _F(silence), int(zero_point), rotated)
    return blocks.reshape(*x.shape[:-1], n_in // QK_SPK)


def _encode_tokens(
    x: NDArray[np.float32], salience: np.float32, silence: np.float32, zero_point: int, rotated: bool
) -> NDArray[np.void]:
    n_in = x.shape[1]
    finite = np.isfinite(x).all(axis=1)
    if rotated:
        x = rotate(x)
        finite &= np.isfinite(x).all(axis=1)
    x = np.where(finite[:, None], x, _F(0))

    magnitude = np.abs(x)
    median = np.partition(magnitude, n_in // 2, axis=1)[:, n_in // 2]
    top = magnitude.max(axis=1)
    step = median * (salience / _F(7.5))
    step = np.maximum(step, (top * _F(2.0**-15)) / _F(15))  # a smaller one could not cover the largest value
    step = np.maximum(step, _SMALLEST_STEP)
    inverse = _F(1) / step

    u = x * inverse[:, None]
    q = np.where(np.abs(u) < silence, _F(0), np.rint(u))
    lo, hi = _F(-zero_point), _F(15 - zero_point)
    shift = _smallest_shift(top * inverse)[:, None]
    fine = (q >= -16) & (q <= 15)
    code = np.where(fine, q, np.clip(np.rint(u * np.ldexp(_F(1), -shift)), _F(-16), _F(15)))
    value = np.where(fine, code, code * np.ldexp(_F(1), shift))
    edge = np.clip(q, lo, hi)
    salient = (edge != q) & (np.abs(edge - u) > np.abs(value - u))
    coarse = salient & ~fine

    blocks = np.zeros((len(x), n_in // QK_SPK), BLOCK_SPKA)
    blocks["threshold"] = np.where(finite, step, _NAN)[:, None]
    blocks["zero_point"] = zero_point
    blocks["salient_shift"] = np.where(coarse.any(axis=1), shift[:, 0], 0)[:, None]
    blocks["flags"] = 0 if rotated else SPKA_NOT_ROTATED
    stored = np.where(salient, code + _F(16), edge + _F(zero_point)).astype(np.uint8)
    nibble = (stored & 15).reshape(*blocks.shape, QK_SPK)
    blocks["codes"] = nibble[..., :32] | nibble[..., 32:] << 4
    blocks["salient_mask"] = _mask(salient)
    blocks["coarse_mask"] = _mask(coarse)
    blocks["fifth_bits"] = _mask(salient & (stored >= 16))
    return blocks


def _smallest_shift(top: NDArray[np.float32]) -> NDArray[np.int32]:
    """The smallest k >= 1 for which rint(top * 2^-k) <= 15; top: the largest magnitudes, in steps."""
    shift = np.ones(top.shape, np.int32)
    for k in range(1, MAX_SHIFT):
        shift += (shift == k) & (np.rint(top * _F(2.0**-k)) > 15)
    return shift


def _mask(bits: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """bool[tokens, n_in] to uint64[tokens, n_in / 64], element i in bit i."""
    packed = np.packbits(bits.reshape(len(bits), bits.shape[1] // QK_SPK, QK_SPK), axis=-1, bitorder="little")
    return packed.view("<u8")[..., 0]


def _bits(mask: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """uint64[..., n_blocks] to bool[..., n_blocks, 64]."""
    octets = np.ascontiguousarray(mask, "<u8")[..., None].view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little").astype(bool)


# ---- decoding


def _codes(blocks: NDArray[np.void]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Signed codes int32[..., n_in], and which of them count coarse steps."""
    nibble = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=-1).astype(np.int32)
    zero_point = blocks["zero_point"].astype(np.int32)[..., None]
    salient = _bits(blocks["salient_mask"])
    fifth = _bits(blocks["fifth_bits"]).astype(np.int32)
    code = np.where(salient, nibble + 16 * fifth - 16, nibble - zero_point)
    shape = (*blocks.shape[:-1], blocks.shape[-1] * QK_SPK)
    return code.reshape(shape), _bits(blocks["coarse_mask"]).reshape(shape)


def activation_values(
    blocks: NDArray[np.void],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    """Unpacks blocks to integers; the activation is step * (fine + coarse * 2^shift), one of the two being 0.

    Args:
        blocks: BLOCK_SPKA[..., n_blocks].

    Returns:
        int32[..., 64 n_blocks] fine, the same of coarse; float32[...] step, NaN for a NaN token; int32[...]
        shift.
    """
    code, coarse = _codes(blocks)
    return (
        np.where(coarse, 0, code),
        np.where(coarse, code, 0),
        blocks["threshold"][..., 0].astype(_F),
        blocks["salient_shift"][..., 0].astype(np.int32),
    )


def activations_rotated(blocks: NDArray[np.void]) -> NDArray[np.bool_]:
    """Whether each token is in the rotated basis: bool[...] for BLOCK_SPKA[..., n_blocks]."""
    return (blocks["flags"][..., 0] & SPKA_NOT_ROTATED) == 0


def decode_activations(blocks: NDArray[np.void]) -> NDArray[np.float32]:
    """Dequantizes BLOCK_SPKA[..., n_blocks] to float32[..., 64 n_blocks] in the model's basis."""
    fine, coarse, step, shift = activation_values(blocks)
    with np.errstate(all="ignore"):
        stored = step[..., None] * (fine + (coarse << shift[..., None])).astype(_F)
    return np.where(activations_rotated(blocks)[..., None], rotate(stored), stored)


# ---- spike times


@dataclass(frozen=True)
class SpikeTrain:
    """Time-to-first-spike code of activations: each input fires at most once, the larger the earlier.

    Attributes:
        time: int8[..., n_in], 0..15; -1 for a silent input, which never fires.
        polarity: int8[..., n_in], +1 excitatory, -1 inhibitory, 0 silent.
        magnitude: uint8[..., n_in], 0..16; time = 16 - magnitude.
        coarse: bool[..., n_in], whether the magnitude counts steps of s * 2^shift instead of s.
    """

    time: NDArray[np.int8]
    polarity: NDArray[np.int8]
    magnitude: NDArray[np.uint8]
    coarse: NDArray[np.bool_]

    @property
    def spikes(self) -> int:
        """Number of spikes."""
        return int(np.count_nonzero(self.time >= 0))


def spike_train(blocks: NDArray[np.void]) -> SpikeTrain:
    """The spikes of BLOCK_SPKA[..., n_blocks]."""
    code, coarse = _codes(blocks)
    magnitude = np.abs(code)
    time = np.where(code == 0, -1, SPIKE_STEPS - magnitude)
    return SpikeTrain(time.astype(np.int8), np.sign(code).astype(np.int8), magnitude.astype(np.uint8), coarse)
