"""What llama.cpp computes per weight for its own types, read off its dot products (ggml-cpu/quants.c).

All of them multiply integers and add them up in 32 bits. What turns those sums back into floats is
dequantization: an offset or a table look-up per weight (counted as an 8-bit addition), integer scales of
sub-blocks, float scales of blocks. Kernels for some CPUs do more of the same (for instance a multiplication
by the sub-scale in every lane); the least that any of them must do is counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["STOCK", "StockType", "q4_k_m_types"]


@dataclass(frozen=True)
class StockType:
    """One block type.

    Attributes:
        bits: per weight.
        input_bits: per input, in the type that it is computed with.
        offset: whether each weight's code needs an offset or a look-up before it is multiplied.
        block: weights that share float scales, for `block_mul` multiplications and `block_add` additions.
        sub_block: weights that share `sub_scales` integer scales; 0 for none.
    """

    bits: float
    input_bits: float
    offset: bool
    block: int
    block_mul: int
    block_add: int
    sub_block: int = 0
    sub_scales: int = 0


_Q8_0, _Q8_1, _Q8_K = 8.5, 9.0, 9.125

STOCK = {
    "q4_0": StockType(4.5, _Q8_0, True, 32, 2, 1),
    "q4_1": StockType(5.0, _Q8_1, False, 32, 3, 2),
    "q5_0": StockType(5.5, _Q8_0, True, 32, 2, 1),
    "q5_1": StockType(6.0, _Q8_1, False, 32, 3, 2),
    "q8_0": StockType(8.5, _Q8_0, False, 32, 2, 1),
    "iq4_nl": StockType(4.5, _Q8_0, True, 32, 2, 1),
    "iq4_xs": StockType(4.25, _Q8_K, True, 256, 2, 1, 32, 1),
    "q2_k": StockType(2.625, _Q8_K, False, 256, 4, 2, 16, 2),
    "q3_k": StockType(3.4375, _Q8_K, True, 256, 2, 1, 16, 1),
    "q4_k": StockType(4.5, _Q8_K, False, 256, 4, 2, 32, 2),
    "q5_k": StockType(5.5, _Q8_K, False, 256, 4, 2, 32, 2),
    "q6_k": StockType(6.5625, _Q8_K, True, 256, 2, 1, 16, 1),
}
"""By type name in lower case."""

_SUPER_BLOCK = 256
_FALLBACKS = {"q4_k": "q5_0", "q6_k": "q8_0"}


def q4_k_m_types(tensors: list[tuple[str, int]]) -> dict[str, str]:
    """The mixture of types that llama-quantize gives a Llama model as Q4_K_M, without an importance matrix.

    Value and down projections of some layers get six bits; rows that are no whole blocks of 256 a smaller
    block type of more bits.

    Args:
        tensors: (name, number of inputs) of the linear layers.
    """
    layers = [int(found[1]) for name, _ in tensors if (found := re.match(r"blk\.(\d+)\.", name))]
    n_layers = max(layers, default=-1) + 1
    types = {}
    for name, n_inputs in tensors:
        kind = "q4_k"
        found = re.match(r"blk\.(\d+)\.(attn_v|ffn_down)\b", name)
        if found and _more_bits(int(found[1]), n_layers):
            kind = "q6_k"
        types[name] = kind if n_inputs % _SUPER_BLOCK == 0 else _FALLBACKS[kind]
    return types


def _more_bits(layer: int, n_layers: int) -> bool:
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
