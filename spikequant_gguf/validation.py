"""Which bit patterns of SPK4 and SPKA are valid. All others are rejected here, by tensor, row and block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError
from .format import (
    FIRST_BLOCK_SLOTS,
    MAX_SHIFT,
    SALIENT_SLOTS,
    SPK4_NOT_ROTATED,
    SPK4_THRESHOLD,
    SPKA_NOT_ROTATED,
    salient_words,
)

__all__ = ["RowFault", "first_weight_fault", "validate_activations", "validate_weights"]

RowFault = tuple[int, int, str]
"""Row, block and broken rule."""

_NAN_BITS = 0x7FC00000
_INFINITY_BITS = 0x7F800000

# Fault numbers of a weight block; 0 is none. Of several in one block the smallest is reported.
_WEIGHT_FAULTS = (
    "",
    "threshold is not finite",
    "threshold is zero",
    "salient weight has no valid extension",
    "unused salient slot is not zero",
    "unused salient slot before a used one",
    "salient positions are not ascending",
    "rotation differs from the first row",
)


def _first_rule(*broken: NDArray[np.bool_], start: int) -> NDArray[np.uint8]:
    """The number of the first broken rule of each element, counting from start; 0 where none is."""
    fault = np.zeros(broken[0].shape, np.uint8)
    for number, rule in reversed(list(enumerate(broken, start))):
        fault[rule] = number
    return fault


def _header_faults() -> NDArray[np.uint8]:
    header = np.arange(0x10000)
    return _first_rule(header & 0x7C00 == 0x7C00, header & SPK4_THRESHOLD == 0, start=1)


def _salient_faults() -> NDArray[np.uint8]:
    both = np.arange(0x10000)  # two slots, one after the other, as one little-endian number
    first, second = both & 0xFF, both >> 8
    return _first_rule(
        (first >> 6 == 3) | (second >> 6 == 3),
        ((first >> 6 == 0) & (first != 0)) | ((second >> 6 == 0) & (second != 0)),
        (first >> 6 == 0) & (second >> 6 != 0),
        (second >> 6 != 0) & (first & 63 >= second & 63),
        start=3,
    )


# Every rule is about the header or about two neighbouring slots: two tables hold them all.
_HEADER_FAULT = _header_faults()
_SALIENT_FAULT = _salient_faults()
_ROTATION_DIFFERS = 7

_NEAR = 1 << 14  # blocks whose slots stay in a processor's cache


def first_weight_fault(blocks: NDArray[np.void], rotation: int | None = None) -> RowFault | None:
    """The first fault in BLOCK_SPK4[rows, n_blocks], or None.

    Args:
        blocks: rows of one tensor.
        rotation: header & 0x8000 that the rows must have; None for that of the first row.
    """
    if blocks.size == 0:
        return None
    header = blocks["header"][:, 0]
    if rotation is None:
        rotation = int(header[0]) & SPK4_NOT_ROTATED
    of_header = _HEADER_FAULT[header]
    turned = header & SPK4_NOT_ROTATED != rotation
    words = salient_words(blocks)
    words[:, 0] >>= 8 * (SALIENT_SLOTS - FIRST_BLOCK_SLOTS)  # zeros in place of the header, behind the others
    if not (_any_slot_unsound(words) or of_header.any() or turned.any()):
        return None
    of_slots = np.stack([_SALIENT_FAULT[words >> 8 * k & 0xFFFF] for k in range(SALIENT_SLOTS - 1)], axis=-1)
    faults = np.zeros((*blocks.shape, of_slots.shape[-1] + 2), np.uint8)
    faults[..., :-2] = of_slots
    faults[:, 0, -2] = of_header
    faults[:, 0, -1] = _ROTATION_DIFFERS * turned
    least = np.where(faults == 0, len(_WEIGHT_FAULTS), faults).min(axis=-1)
    row, block = np.unravel_index(int(np.argmax(least < len(_WEIGHT_FAULTS))), least.shape)
    return int(row), int(block), _WEIGHT_FAULTS[least[row, block]]


def _any_slot_unsound(words: NDArray[np.uint32]) -> bool:
    """Whether a table entry of any block's slots is not 0."""
    flat = words.reshape(-1)
    return any(_some_unsound(flat[i : i + _NEAR]) for i in range(0, len(flat), _NEAR))


def _some_unsound(words: NDArray[np.uint32]) -> bool:
    """The same by operations on all slots of a block at once, as spike_slots_are_sound in spike.h."""
    high, ones = np.uint32(0x80808080), np.uint32(0x01010101)
    places = words & np.uint32(0x3F3F3F3F)
    used = words << 1
    invalid = words & used
    used |= words
    used &= high
    not_zero = (places + np.uint32(0x3F3F3F3F)) << 1
    not_zero &= ~used
    next_used = used >> 8
    ascending = (places >> 8 | high) - places - ones
    return bool(((invalid | not_zero | next_used & ~(used & ascending)) & high).any())


def validate_weights(blocks: NDArray[np.void], name: str = "weights") -> None:
    """Checks all rules of SPK4 for one tensor, BLOCK_SPK4[..., n_blocks].

    Raises:
        FormatError: names tensor, first faulty row (counted over all leading axes), its block and the rule.
    """
    fault = first_weight_fault(blocks.reshape(-1, blocks.shape[-1])) if blocks.size else None
    if fault is not None:
        row, block, reason = fault
        raise FormatError(reason, tensor=name, row=row, block=block)


def validate_activations(blocks: NDArray[np.void], name: str = "activations") -> None:
    """Checks all rules of SPKA for BLOCK_SPKA[..., n_blocks], each token by itself.

    Raises:
        FormatError: names tensor, first faulty token (counted over all leading axes), its block and the rule.
    """
    if blocks.size == 0:
        return
    blocks = blocks.reshape(-1, blocks.shape[-1])
    threshold = np.ascontiguousarray(blocks["threshold"]).view("<u4")
    zero_point, shift, flags = blocks["zero_point"], blocks["salient_shift"], blocks["flags"]
    salient, coarse = blocks["salient_mask"], blocks["coarse_mask"]
    silent_code = zero_point | zero_point << 4
    no_threshold = threshold == _NAN_BITS
    fires = (salient != 0) | (shift != 0) | (blocks["codes"] != silent_code[..., None]).any(axis=-1)
    uniform = {
        "threshold": threshold,
        "zero-point": zero_point,
        "salient shift": shift,
        "flags": flags,
    }
    rules = {
        "reserved bits are not zero": (blocks["reserved"] != 0) | (flags & ~np.uint8(SPKA_NOT_ROTATED) != 0),
        "zero-point is above 15": zero_point > 15,
        "salient shift is above 15": shift > MAX_SHIFT,
        "coarse value that is not salient": coarse & ~salient != 0,
        "fifth bit of a value that is not salient": blocks["fifth_bits"] & ~salient != 0,
        "coarse value without a shift": (coarse != 0) & (shift == 0),
        "spike in a token without a threshold": no_threshold & fires,
        "threshold is not positive and finite": ~no_threshold
        & ((threshold == 0) | (threshold >= _INFINITY_BITS)),
        **{
            f"{field} differs from the first block of its token": a != a[:, :1]
            for field, a in uniform.items()
        },
        "salient shift in a token without coarse values": (shift != 0) & (coarse == 0).all(axis=1)[:, None],
    }
    fault = _first_rule(*rules.values(), start=1)
    if fault.any():
        token, block = np.unravel_index(int(np.argmax(fault != 0)), fault.shape)
        reason = list(rules)[fault[token, block] - 1]
        raise FormatError(reason, tensor=name, row=int(token), block=int(block), row_word="token")
