"""Registration of the spike types with the gguf package, whose type list is a closed enumeration."""

from __future__ import annotations

from enum import IntEnum

import gguf
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from .errors import UnsupportedError
from .format import (
    BLOCK_SPK4,
    BLOCK_SPKA,
    FTYPE_SPK4,
    QK_SPK,
    TYPE_SPK4,
    TYPE_SPKA,
    blocks_from_bytes,
    blocks_to_bytes,
)

__all__ = ["add_enum_member", "register"]


def add_enum_member(enum: type[IntEnum], name: str, value: int) -> IntEnum:
    """Adds a member to an existing enumeration; returns the one that is there already, if it is the same.

    Lookup by value, by name and by attribute, iteration, hashing and pickling then work as for any member.

    Raises:
        UnsupportedError: the name or the value belongs to another member.
    """
    by_value = enum._value2member_map_.get(value)
    by_name = enum._member_map_.get(name)
    if by_value is not None and by_value is by_name:
        return by_value
    if by_value is not None or by_name is not None:
        taken = by_value if by_value is not None else by_name
        raise UnsupportedError(
            f"gguf defines {enum.__name__}.{taken.name} = {int(taken)}, which collides with {name} = {value}",
            "install the version of gguf that this package names in its dependencies",
        )
    member = int.__new__(enum, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    hashable = getattr(enum, "_hashable_values_", None)  # Python 3.13 looks values up there, too
    if hashable is not None:
        hashable.append(value)
    return member


def register() -> None:
    """Adds SPK4 and SPKA to gguf's types, sizes, file types and dequantizers. Idempotent."""
    spk4 = add_enum_member(GGMLQuantizationType, "SPK4", TYPE_SPK4)
    spka = add_enum_member(GGMLQuantizationType, "SPKA", TYPE_SPKA)
    GGML_QUANT_SIZES[spk4] = (QK_SPK, BLOCK_SPK4.itemsize)
    GGML_QUANT_SIZES[spka] = (QK_SPK, BLOCK_SPKA.itemsize)
    add_enum_member(LlamaFileType, "MOSTLY_SPK4", FTYPE_SPK4)
    if spk4 not in quants._type_traits:
        _register_quantizer(spk4)


def _register_quantizer(spk4: IntEnum) -> None:
    base = getattr(quants, "__Quant", None)
    if base is None:
        raise UnsupportedError(
            f"gguf {getattr(gguf, '__version__', '')} has no place for another quantization type".replace(
                "  ", " "
            ),
            "install the version of gguf that this package names in its dependencies",
        )
    from .weights import decode_weights, encode_weights

    class SPK4(base, qtype=spk4):  # gguf's base class registers its subclasses
        # gguf hands over whole rows here, which the row's one threshold and zero-point need
        @classmethod
        def quantize_rows(cls, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
            return blocks_to_bytes(encode_weights(rows))

        @classmethod
        def dequantize_rows(cls, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
            return decode_weights(blocks_from_bytes(rows))

        @classmethod
        def quantize_blocks(cls, blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
            return cls.quantize_rows(blocks)

        @classmethod
        def dequantize_blocks(cls, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
            return cls.dequantize_rows(blocks)
