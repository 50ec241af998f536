"""What the simulated arithmetic can vary. The defaults are SPK4's: W4A4, rotated, salient at two steps."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..format import DEFAULT_SALIENCE, DEFAULT_SILENCE, MAX_SILENCE, QK_SPK, SALIENT_SLOTS

__all__ = ["CODINGS", "MAX_BITS", "SpikeSettings", "check_groups"]

MAX_BITS = 8
CODINGS = ("ttfs", "rate")


@dataclass(frozen=True)
class SpikeSettings:
    """The arithmetic of a spiking linear layer.

    Attributes:
        weight_bits: width of standard weight codes, 1 to 8; salient weights have one bit more.
        activation_bits: width of standard activation codes, 1 to 8; salient ones have one bit more.
        rotated: whether weights and inputs are rotated in blocks of 64.
        salience: threshold c; the step is c * MAD / ((2^bits - 1) / 2). None for no salient activations: the
            largest magnitude of a token then sets the step (or `top_share` does).
        top_share: instead of the MAD rule, this share of a token's activations, the largest, lies outside the
            standard range, 0 to 1.
        coarse_step: whether salient values too large for one bit more count steps of s * 2^k; else they clip.
        silence: threshold in steps; smaller values do not fire.
        activation_group: inputs that share a step; None: all of a token.
        weight_zero_point: whether rows have zero-points of their own; else all have 2^(bits - 1).
        salient_weights: per block of 64, at most; never more than 2 in the first block of a row, as in SPK4.
        weight_group: inputs that share a threshold and zero-point; None: whole rows, as in SPK4.
        coding: how codes become spikes: ``ttfs`` fires once per code, ``rate`` once per unit of its size.

    Raises:
        InputError: a value is out of range, or two do not go together.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    rotated: bool = True
    salience: float | None = DEFAULT_SALIENCE
    top_share: float | None = None
    coarse_step: bool = True
    silence: float = DEFAULT_SILENCE
    activation_group: int | None = None
    weight_zero_point: bool = True
    salient_weights: int = SALIENT_SLOTS
    weight_group: int | None = None
    coding: str = "ttfs"

    def __post_init__(self) -> None:
        for what, bits in (("weights", self.weight_bits), ("activations", self.activation_bits)):
            if not 1 <= bits <= MAX_BITS:
                raise InputError(f"{what} of {bits} bits cannot be simulated", f"use 1 to {MAX_BITS}")
        if self.salience is not None and not 0 < self.salience:
            raise InputError(f"salience threshold {self.salience} is not positive", "use about 2.3")
        if self.top_share is not None and not 0 <= self.top_share < 0.5:
            raise InputError(f"a salient share of {self.top_share} is not in 0..0.5", "use at most 0.2")
        if self.salience is not None and self.top_share is not None:
            raise InputError("a salience threshold and a top share exclude each other", "give one of them")
        if not 0 <= self.silence <= MAX_SILENCE:
            raise InputError(f"silence threshold {self.silence} is not in 0..{MAX_SILENCE:g}", "use 0.5")
        if not 0 <= self.salient_weights <= QK_SPK:
            raise InputError(f"{self.salient_weights} salient weights per block of {QK_SPK}", "use 0 to 64")
        for group in (self.weight_group, self.activation_group):
            if group is not None and (group < 1 or group % QK_SPK):
                raise InputError(f"groups of {group} inputs are no multiple of {QK_SPK}", "use 64 or 128")
        if self.coding not in CODINGS:
            raise InputError(f"there is no coding '{self.coding}'", f"use {' or '.join(CODINGS)}")

    @property
    def has_salience(self) -> bool:
        """Whether activations outside the standard range get another bit."""
        return self.salience is not None or bool(self.top_share)


def check_groups(n_in: int, group: int | None, rotated: bool) -> None:
    """Raises InputError unless n_in inputs are whole groups, and whole blocks if they are rotated."""
    for size, what in ((QK_SPK if rotated else 1, "rotated blocks"), (group or n_in, "groups")):
        if n_in == 0 or n_in % size:
            raise InputError(f"{n_in} inputs are no whole number of {what} of {size}", "choose another size")
