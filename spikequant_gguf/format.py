"""Identifiers, block layouts and metadata keys of the spike types. FORMAT.md is their specification."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UnsupportedError

__all__ = [
    "BLOCK_SPK4",
    "BLOCK_SPKA",
    "DEFAULT_SALIENCE",
    "DEFAULT_SILENCE",
    "DEFAULT_ZERO_POINT",
    "FIRST_BLOCK_SLOTS",
    "FORMAT_VERSION",
    "FTYPE_SPK4",
    "MAX_INPUTS",
    "MAX_SHIFT",
    "MAX_SILENCE",
    "QK_SPK",
    "SALIENCE_LIMIT",
    "SALIENT_SLOTS",
    "SPK4_NOT_ROTATED",
    "SPK4_THRESHOLD",
    "SPK4_ZERO_POINT",
    "SPKA_NOT_ROTATED",
    "TYPE_NAME",
    "TYPE_SPK4",
    "TYPE_SPKA",
    "blocks_from_bytes",
    "blocks_to_bytes",
    "check_inputs",
    "register_with_gguf",
    "salient_limits",
    "salient_slots",
    "salient_words",
]

FORMAT_VERSION = 2
TYPE_NAME = "spk4"

QK_SPK = 64
"""Inputs per block, which is also the size of the rotation."""

TYPE_SPK4 = 90
"""ggml type id of 4-bit spike weights."""
TYPE_SPKA = 91
"""ggml type id of spike-coded activations; a runtime type, never stored in a model file."""
FTYPE_SPK4 = 90
"""general.file_type of a model whose linear layers are mostly SPK4."""

BLOCK_SPK4 = np.dtype(
    {
        "names": ["header", "salient", "codes"],
        "formats": ["<u2", ("u1", 4), ("u1", 32)],
        "offsets": [0, 0, 4],
        "itemsize": 36,
    }
)
"""64 weights of one row, 36 bytes.

The header of a row takes the place of two salient slots of its first block: it is `blocks["header"][..., 0]`,
and other blocks have none. `salient_slots(blocks)` has the slots without it. NumPy no longer overlaps the
fields when it joins arrays, unless told so: `np.concatenate(parts, dtype=BLOCK_SPK4)`.
"""

BLOCK_SPKA = np.dtype(
    [
        ("threshold", "<f4"),
        ("zero_point", "u1"),
        ("salient_shift", "u1"),
        ("flags", "u1"),
        ("reserved", "u1"),
        ("salient_mask", "<u8"),
        ("codes", "u1", 32),
        ("fifth_bits", "<u8"),
        ("coarse_mask", "<u8"),
    ]
)
"""64 activations of one token, 64 bytes."""

SALIENT_SLOTS = 4
"""Salient weights per block, at most."""
FIRST_BLOCK_SLOTS = 2
"""Salient weights of the first block of a row, at most: the header is in place of the others."""
SPK4_NOT_ROTATED = 0x8000
SPK4_THRESHOLD = 0x7FF0
SPK4_ZERO_POINT = 0x000F
SPKA_NOT_ROTATED = 0x01

MAX_SHIFT = 15
"""Largest salient_shift."""

MAX_INPUTS = 33_792
"""Largest row: the greatest multiple of 64 for which every potential is exact as a float32 (496 n < 2^24)."""

DEFAULT_SALIENCE = 2.3
"""Salience threshold c: the step is c * MAD / 7.5."""
SALIENCE_LIMIT = 7.5
"""c is above 0 and below this."""
DEFAULT_SILENCE = 0.5
"""Silence threshold, in steps."""
MAX_SILENCE = 4.0
DEFAULT_ZERO_POINT = 8
"""Zero-point of activations."""

# Keys of the GGUF metadata.
KEY_VERSION = "spikequant.version"
KEY_TYPE_NAME = "spikequant.type_name"
KEY_SALIENCE_THRESHOLD = "spikequant.salience_threshold"
KEY_SILENCE_THRESHOLD = "spikequant.silence_threshold"
KEY_CALIBRATION = "spikequant.calibration"
KEY_SOURCE = "spikequant.source"
KEY_SOURCE_SHA256 = "spikequant.source_sha256"
KEY_COMMAND = "spikequant.command"
KEY_ENCODER_TENSORS = "spikequant.encoder.tensors"
KEY_ENCODER_SALIENCE = "spikequant.encoder.salience"
KEY_ENCODER_SILENCE = "spikequant.encoder.silence"
KEY_STATISTICS_TENSORS = "spikequant.statistics.tensors"
KEY_STATISTICS_SALIENT_WEIGHT_SHARE = "spikequant.statistics.salient_weight_share"
KEY_STATISTICS_SALIENT_INPUT_SHARE = "spikequant.statistics.salient_input_share"
KEY_STATISTICS_RELATIVE_ERROR = "spikequant.statistics.relative_error"

__all__ += [name for name in dir() if name.startswith("KEY_")]


def check_inputs(n_in: int, what: str = "row") -> None:
    """Raises UnsupportedError unless a row of n_in inputs can be spike-coded."""
    if n_in == 0 or n_in % QK_SPK != 0:
        raise UnsupportedError(
            f"{what} has {n_in} inputs, which is not a positive multiple of {QK_SPK}",
            "keep this tensor in another type",
        )
    if n_in > MAX_INPUTS:
        raise UnsupportedError(
            f"{what} has {n_in} inputs, more than the {MAX_INPUTS} for which potentials are exact",
            "keep this tensor in another type",
        )


def blocks_from_bytes(raw: NDArray[np.uint8] | bytes, dtype: np.dtype = BLOCK_SPK4) -> NDArray[np.void]:
    """Views bytes as blocks, without a copy where the bytes are contiguous.

    Args:
        raw: uint8[..., row_bytes], as gguf.GGUFReader gives tensors, or bytes (one row).
        dtype: BLOCK_SPK4 or BLOCK_SPKA.

    Returns:
        dtype[..., row_bytes / dtype.itemsize].

    Raises:
        FormatError: row_bytes is not a multiple of the block size.
    """
    array = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else np.asarray(raw)
    if array.dtype != np.uint8:
        raise FormatError(
            f"block data has dtype {array.dtype}, not uint8", "pass the raw bytes of the tensor"
        )
    if array.shape[-1] % dtype.itemsize != 0:
        raise FormatError(
            f"a row of {array.shape[-1]} bytes is not a whole number of {dtype.itemsize}-byte blocks"
        )
    return np.ascontiguousarray(array).view(dtype)


def blocks_to_bytes(blocks: NDArray[np.void]) -> NDArray[np.uint8]:
    """The bytes of blocks[..., n_blocks] as uint8[..., row_bytes], which gguf.GGUFWriter.add_tensor takes."""
    if blocks.dtype.names == BLOCK_SPK4.names:
        blocks = blocks.astype(BLOCK_SPK4, copy=False)  # NumPy may have joined them to wider ones
    return np.ascontiguousarray(blocks).view(np.uint8)


def salient_slots(blocks: NDArray[np.void]) -> NDArray[np.uint8]:
    """The salient slots of whole rows: uint8[..., n_blocks, 4], a copy with zeros where the header is.

    Args:
        blocks: BLOCK_SPK4[..., n_blocks].
    """
    return salient_words(blocks)[..., None].view(np.uint8)


def salient_words(blocks: NDArray[np.void]) -> NDArray[np.uint32]:
    """salient_slots of each block as one number, the first slot lowest: uint32[..., n_blocks]."""
    bytes_of = np.ascontiguousarray(blocks.astype(BLOCK_SPK4, copy=False))
    width = BLOCK_SPK4.itemsize // 4  # NumPy would copy the slots as bytes, one by one
    words = bytes_of.view("<u4").reshape(*blocks.shape, width)[..., 0].copy()
    words[..., 0] &= np.uint32(0xFFFFFFFF << 8 * (SALIENT_SLOTS - FIRST_BLOCK_SLOTS) & 0xFFFFFFFF)
    return words


def salient_limits(n_blocks: int) -> NDArray[np.intp]:
    """How many weights of each block of a row may be salient: intp[n_blocks]."""
    limits = np.full(n_blocks, SALIENT_SLOTS)
    limits[0] = FIRST_BLOCK_SLOTS
    return limits


def register_with_gguf() -> None:
    """Teaches the gguf package the types SPK4 and SPKA. Idempotent; `import spikequant_gguf` calls it."""
    from .gguf_types import register

    register()
