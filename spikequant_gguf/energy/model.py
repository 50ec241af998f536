"""Modelled energy of linear layers: numbers of operations times the energy of each. Nothing is measured here.

What each system does for one product of `rows` outputs and `inputs` inputs, per token:

fp16_mac  one fp16 multiplication and addition per weight.
q4_0      int8 multiplication and int32 addition per weight; per block of 32 the scales' product, its
          application and a float addition, and per weight the subtraction of 8.
q4_k      the same; per 32 weights two int32 multiplications and additions for the sub-scale and the minimum,
          per 256 four float multiplications and two additions.
w4a4      int8 multiplication and int32 addition per weight, float scales per group of 128.
rate      |q| additions per input and row instead of one; readout as for spk4.
spk4      the counted additions, shift-adds (as two additions) and readouts (three float multiplications,
          an addition, and an int32 multiplication for the zero-point).

Sums are int32 in all of them, fp16_mac's are fp16. Making the integer inputs is counted: two float operations
per input and eight for spk4 and rate, whose inputs are also rotated.
"""

from __future__ import annotations

from dataclasses import dataclass

from .constants import Constants
from .counts import Counts

__all__ = ["SYSTEMS", "SystemEnergy", "model_energy"]

SYSTEMS = ("spk4", "fp16_mac", "q4_0", "q4_k", "w4a4", "rate")
_WEIGHT_BITS = {"fp16_mac": 16.0, "q4_0": 4.5, "q4_k": 4.5, "w4a4": 4.25, "rate": 4.5}
_INPUT_BITS = {"fp16_mac": 16.0, "q4_0": 8.5, "q4_k": 9.125, "w4a4": 4.25, "rate": 8.0}


@dataclass(frozen=True)
class SystemEnergy:
    """Picojoules per token of all linear layers."""

    system: str
    arithmetic: float
    dequantization: float
    memory: float

    @property
    def compute(self) -> float:
        """Arithmetic and dequantization."""
        return self.arithmetic + self.dequantization

    def to_json(self) -> dict:
        return {
            "system": self.system,
            "pj_per_token": self.compute + self.memory,
            "arithmetic": self.arithmetic,
            "dequantization": self.dequantization,
            "memory": self.memory,
        }


def model_energy(counts: list[Counts], tokens: int, constants: Constants) -> list[SystemEnergy]:
    """Every system's energy for the products that were counted while `tokens` tokens were computed."""
    return [
        SystemEnergy(
            system,
            sum(_arithmetic(system, count, constants.pj) for count in counts) / tokens,
            sum(_dequantization(system, count, constants.pj) for count in counts) / tokens,
            sum(_bits(system, count) for count in counts) * constants.pj["dram_bit"] / tokens,
        )
        for system in SYSTEMS
    ]


def _arithmetic(system: str, count: Counts, pj: dict[str, float]) -> float:
    inputs = count.tokens * count.n_inputs
    if system == "fp16_mac":
        return inputs * count.n_rows * (pj["fp16_mul"] + pj["fp16_add"])
    coding = inputs * (pj["fp32_mul"] + pj["fp32_add"])
    if system not in ("spk4", "rate"):
        return coding + inputs * count.n_rows * (pj["int8_mul"] + pj["int32_add"])
    coding += inputs * 6 * pj["fp32_add"]
    readout = count.readouts * (3 * pj["fp32_mul"] + pj["fp32_add"] + pj["int32_mul"])
    adds = count.adds + 2 * count.shift_adds if system == "spk4" else count.rate_spikes * count.n_rows
    return coding + readout + adds * pj["int32_add"]


def _dequantization(system: str, count: Counts, pj: dict[str, float]) -> float:
    weights = count.tokens * count.n_inputs * count.n_rows
    scale = 2 * pj["fp32_mul"] + pj["fp32_add"]
    if system == "q4_0":
        return weights * (pj["int8_add"] + scale / 32)
    if system == "q4_k":
        sub_scales = 2 * (pj["int32_mul"] + pj["int32_add"]) / 32
        return weights * (sub_scales + 2 * scale / 256)
    return weights * scale / 128 if system == "w4a4" else 0.0


def _bits(system: str, count: Counts) -> float:
    if system == "spk4":
        return 8.0 * count.bytes
    weights = count.products * count.n_inputs * count.n_rows * _WEIGHT_BITS[system]
    return weights + count.tokens * (count.n_inputs * _INPUT_BITS[system] + 32 * count.n_rows)
