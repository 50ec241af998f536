"""Modelled energy of linear layers: numbers of operations times the energy of each. Nothing is measured here.

What each system does for a product of `rows` outputs and `inputs` inputs, per token:

spk4      the counted additions, shift-adds (as two additions) and readouts (three float multiplications, an
          addition, and an int32 multiplication for the zero-point). Nothing is dequantized.
fp16_mac  weights of 4 bits in blocks of 32 (4.5 bits each), turned into fp16 once per product, however many
          tokens share it (an offset and an fp16 multiplication each); one fp16 multiplication and addition
          per weight and token.
f16       the same with fp16 weights: nothing to dequantize, 16 bits to read.
q4_0, q4_k_m, and other types of llama.cpp: see stock.py; int8 multiplications, int32 additions.
w4a4      4-bit multiplication and int32 addition per weight, float scales per group of 128 (4.25 bits each).
rate      |q| additions per input and row instead of one; everything else as for spk4.
spikellm  a reading of SpikeLLM (Xing et al., arXiv 2407.04752), not its code: an input is one 4-bit integer
          spike, a salient one two of them; each of the four bit planes is a step in which the weights of set
          bits are added, half of the bits being set on average (an assumption: codes of an asymmetric range
          are not counted). Sums of the planes are shifted and added per output.

Sums are 32 bits wide in all of them (fp16 in fp16_mac and f16): cheaper ones would help every system.
Unpacking of nibbles is counted nowhere. Making the inputs is: see CODING.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .constants import Constants
from .counts import Counts
from .stock import STOCK, StockType, q4_k_m_types

__all__ = ["CODING", "SYSTEMS", "SystemEnergy", "by_kind", "layer_kind", "model_energy", "type_energy"]

CODING = {
    "f16": {"fp16_add": 1},  # rounding to fp16
    "integer": {"fp32_mul": 1, "fp32_add": 2},  # largest magnitude, scale, rounding
    # six additions of the rotation, largest magnitude, three comparisons for the median, silence, rounding
    "spikes": {"fp32_mul": 1, "fp32_add": 12},
}
"""Operations per input that make the coded inputs; `integer` is for all integer types."""

_GROUP = 128  # of w4a4
_PLANES = 4  # of spikellm
_PICOJOULES = Mapping[str, float]


@dataclass(frozen=True)
class SystemEnergy:
    """Picojoules per token of some linear layers.

    Attributes:
        arithmetic: products, sums, and the coding of inputs.
        dequantization: whatever offsets and scales of weights cost before the end of a sum.
        memory: weights, inputs and outputs, from and to DRAM.
    """

    system: str
    arithmetic: float
    dequantization: float
    memory: float

    @property
    def compute(self) -> float:
        """Arithmetic and dequantization."""
        return self.arithmetic + self.dequantization

    @property
    def total(self) -> float:
        """With memory."""
        return self.compute + self.memory

    def to_json(self) -> dict:
        return {
            "system": self.system,
            "pj_per_token": self.total,
            "arithmetic": self.arithmetic,
            "dequantization": self.dequantization,
            "memory": self.memory,
        }


def model_energy(counts: Sequence[Counts], tokens: int, constants: Constants) -> list[SystemEnergy]:
    """Every system's energy for the products that were counted while `tokens` tokens were computed."""
    mixture = q4_k_m_types([(count.name, count.n_inputs) for count in counts])
    return [
        _summed(system, [price(count, constants.pj, mixture[count.name]) for count in counts], tokens)
        for system, price in _PRICES.items()
    ]


def type_energy(
    counts: Sequence[Counts], tokens: int, constants: Constants, types: Mapping[str, str], system: str
) -> SystemEnergy:
    """Energy of a model of llama.cpp's own types, by tensor name. Raises KeyError for an unknown type."""
    prices = []
    for count in counts:
        kind = types[count.name].lower()
        if kind in ("f32", "f16", "bf16"):
            prices.append(_f16(count, constants.pj, kind))
        else:
            prices.append(_stock(count, constants.pj, STOCK[kind]))
    return _summed(system, prices, tokens)


def layer_kind(name: str) -> str:
    """What a tensor does in its block: ``attn_q`` of ``blk.3.attn_q.weight``."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def by_kind(counts: Sequence[Counts]) -> dict[str, list[Counts]]:
    """Counts by kind of layer, in the order of the model."""
    groups: dict[str, list[Counts]] = {}
    for count in counts:
        groups.setdefault(layer_kind(count.name), []).append(count)
    return groups


# ---- prices of one tensor: (arithmetic, dequantization, memory) in picojoules for all its tokens

_Price = tuple[float, float, float]


def _summed(system: str, prices: Sequence[_Price], tokens: int) -> SystemEnergy:
    return SystemEnergy(system, *(sum(price[part] for price in prices) / tokens for part in range(3)))


def _inputs(count: Counts) -> int:
    return count.tokens * count.n_inputs


def _weights(count: Counts) -> int:
    """Pairs of a weight and an input."""
    return _inputs(count) * count.n_rows


def _coding(count: Counts, pj: _PICOJOULES, kind: str) -> float:
    return _inputs(count) * sum(number * pj[operation] for operation, number in CODING[kind].items())


def _memory(count: Counts, pj: _PICOJOULES, weight_bits: float, input_bits: float) -> float:
    """Weights once per product, inputs and float outputs once per token."""
    weights = count.products * count.n_inputs * count.n_rows * weight_bits
    return (weights + count.tokens * (count.n_inputs * input_bits + 32 * count.n_rows)) * pj["dram_bit"]


def _spiking(count: Counts, pj: _PICOJOULES, additions: float) -> _Price:
    readout = count.readouts * (3 * pj["fp32_mul"] + pj["fp32_add"] + pj["int32_mul"])
    arithmetic = _coding(count, pj, "spikes") + readout + additions * pj["int32_add"]
    return arithmetic, 0.0, 8.0 * count.bytes * pj["dram_bit"]


def _spk4(count: Counts, pj: _PICOJOULES, _mixed: str) -> _Price:
    return _spiking(count, pj, count.adds + 2 * count.shift_adds)


def _rate(count: Counts, pj: _PICOJOULES, _mixed: str) -> _Price:
    return _spiking(count, pj, count.rate_spikes * count.n_rows)


def _spikellm(count: Counts, pj: _PICOJOULES, _mixed: str) -> _Price:
    spikes = _inputs(count) + count.salient
    additions = spikes * _PLANES / 2 * count.n_rows + 2 * 2 * _PLANES * count.readouts
    arithmetic = (
        _coding(count, pj, "integer")
        + additions * pj["int32_add"]
        + count.readouts * (2 * pj["fp32_mul"] + pj["int32_mul"])
    )
    memory = _memory(count, pj, 4.0, 4.0 * spikes / max(1, _inputs(count)))
    return arithmetic, 0.0, memory


def _f16(count: Counts, pj: _PICOJOULES, kind: str) -> _Price:
    arithmetic = _coding(count, pj, "f16") + _weights(count) * (pj["fp16_mul"] + pj["fp16_add"])
    return arithmetic, 0.0, _memory(count, pj, 32.0 if kind == "f32" else 16.0, 16.0)


def _fp16_mac(count: Counts, pj: _PICOJOULES, _mixed: str) -> _Price:
    arithmetic = _coding(count, pj, "f16") + _weights(count) * (pj["fp16_mul"] + pj["fp16_add"])
    stored = count.products * count.n_inputs * count.n_rows
    return arithmetic, stored * (pj["int8_add"] + pj["fp16_mul"]), _memory(count, pj, 4.5, 16.0)


def _stock(count: Counts, pj: _PICOJOULES, kind: StockType) -> _Price:
    arithmetic = _coding(count, pj, "integer") + _weights(count) * (pj["int8_mul"] + pj["int32_add"])
    per_weight = pj["int8_add"] if kind.offset else 0.0
    per_weight += (kind.block_mul * pj["fp32_mul"] + kind.block_add * pj["fp32_add"]) / kind.block
    if kind.sub_block:
        per_weight += kind.sub_scales * (pj["int32_mul"] + pj["int32_add"]) / kind.sub_block
    return arithmetic, _weights(count) * per_weight, _memory(count, pj, kind.bits, kind.input_bits)


def _w4a4(count: Counts, pj: _PICOJOULES, _mixed: str) -> _Price:
    arithmetic = _coding(count, pj, "integer") + _weights(count) * (pj["int4_mul"] + pj["int32_add"])
    scales = _weights(count) * (2 * pj["fp32_mul"] + pj["fp32_add"]) / _GROUP
    return arithmetic, scales, _memory(count, pj, 4.25, 4.25)


_PRICES: dict[str, Callable[[Counts, _PICOJOULES, str], _Price]] = {
    "spk4": _spk4,
    "fp16_mac": _fp16_mac,
    "f16": lambda count, pj, _mixed: _f16(count, pj, "f16"),
    "q4_0": lambda count, pj, _mixed: _stock(count, pj, STOCK["q4_0"]),
    "q4_k_m": lambda count, pj, mixed: _stock(count, pj, STOCK[mixed]),
    "w4a4": _w4a4,
    "rate": _rate,
    "spikellm": _spikellm,
}
SYSTEMS = tuple(_PRICES)
