"""Activations to spike codes in torch, for any bit width. At 4 bits the codes are those of activations.py.

All arithmetic that SPKA defines is float32 in its order, so that codes, steps and shifts agree to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..format import MAX_SHIFT, QK_SPK
from .settings import SpikeSettings, check_groups

__all__ = ["SpikeCodes", "SpikeCounts", "SpikeEncoder", "encode", "rotate"]

_SMALLEST_STEP = 2.0**-100
_POWERS = torch.tensor([2.0**k for k in range(MAX_SHIFT + 1)])


def rotate(x: torch.Tensor) -> torch.Tensor:
    """The rotation of rotation.py, to the bit: float32[..., n] in and out, n a multiple of 64."""
    # As there, one column per block: each stage is a few operations on long contiguous vectors.
    columns = x.reshape(-1, QK_SPK).T.contiguous()
    for h in (1, 2, 4, 8, 16, 32):
        pairs = columns.view(QK_SPK // (2 * h), 2, h, -1)
        a, b = pairs[:, 0], pairs[:, 1]
        difference = a - b
        a += b
        b.copy_(difference)
    return (columns * 0.125).T.reshape(x.shape)


@dataclass(frozen=True)
class SpikeCodes:
    """Coded tokens. A group is all inputs of a token, unless the settings make it smaller.

    Attributes:
        fine: float32[tokens, n] of integers: codes that count steps s.
        coarse: float32[tokens, n] of integers: codes that count steps s * 2^shift. One of the two is 0.
        step: float32[tokens, groups] s; NaN for a token that holds NaN or infinity.
        shift: int64[tokens, groups] k; 0 in a group without coarse codes.
        salient: bool[tokens, n].
    """

    fine: torch.Tensor
    coarse: torch.Tensor
    step: torch.Tensor
    shift: torch.Tensor
    salient: torch.Tensor

    @cached_property
    def power(self) -> torch.Tensor:
        """2^shift as float32[tokens, groups]."""
        return _POWERS[self.shift]

    @cached_property
    def units(self) -> torch.Tensor:
        """Values in steps, float32[tokens, n]: fine + coarse * 2^shift, exact."""
        return self.fine + (_grouped(self.coarse, self.step) * self.power[..., None]).view(self.fine.shape)

    @cached_property
    def values(self) -> torch.Tensor:
        """Values in the stored basis, float32[tokens, n]."""
        return (_grouped(self.units, self.step) * self.step[..., None]).view(self.fine.shape)


@dataclass(frozen=True)
class SpikeCounts:
    """What fires, summed over tokens and products; counted as ggml_patch/spike/cpu/spike-counters.h does.

    Attributes:
        codes: number of activation codes.
        spikes: codes that are not 0; with time-to-first-spike coding each is one spike.
        rate_spikes: spikes of the same values with rate coding, one per step s of their size.
        salient: salient codes.
    """

    codes: int = 0
    spikes: int = 0
    rate_spikes: int = 0
    salient: int = 0

    def __add__(self, other: SpikeCounts) -> SpikeCounts:
        return SpikeCounts(
            self.codes + other.codes,
            self.spikes + other.spikes,
            self.rate_spikes + other.rate_spikes,
            self.salient + other.salient,
        )

    def fired(self, coding: str) -> int:
        """Spikes with a coding of settings.CODINGS."""
        return self.rate_spikes if coding == "rate" else self.spikes


def encode(x: torch.Tensor, settings: SpikeSettings) -> SpikeCodes:
    """Spike codes of tokens.

    With b bits the standard range is -2^(b-1) .. 2^(b-1) - 1. Values outside it are salient, unless the
    range's edge is as near: they get one bit more, fine if that suffices, else coarse.

    Args:
        x: float32[tokens, n], in the model's basis.
        settings: those of activations and rotation are used.

    Raises:
        InputError: n is not a whole number of blocks to rotate or of groups.
    """
    check_groups(x.shape[1], settings.activation_group, settings.rotated)
    finite = torch.isfinite(x).all(dim=-1)
    if settings.rotated:
        x = rotate(x)
        finite &= torch.isfinite(x).all(dim=-1)
    x = torch.where(finite[:, None], x, 0.0)
    n_groups = x.shape[1] // (settings.activation_group or x.shape[1])
    groups = x.reshape(len(x) * n_groups, -1)

    bits = settings.activation_bits
    half = (2**bits - 1) / 2  # steps from the middle of the standard range to its edges
    lo, hi = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    widest_lo, widest_hi = 2 * lo, 2 * hi + 1  # with one bit more
    magnitude = groups.abs()
    top = magnitude.amax(dim=-1)
    step = _step(magnitude, top, settings, half)
    step = torch.maximum(step, (top * 2.0**-15) / widest_hi)
    step = step.clamp_min(_SMALLEST_STEP)
    inverse = 1.0 / step

    u = groups * inverse[:, None]
    q = u.round()
    q[u.abs() < settings.silence] = 0.0
    fine = q.clamp(lo, hi)
    coarse, salient = torch.zeros_like(fine), torch.zeros_like(fine, dtype=torch.bool)
    shift = torch.zeros(len(groups), dtype=torch.int64)
    if settings.has_salience:
        # Few values lie outside the standard range; only they have a choice.
        outside = torch.nonzero(q != fine, as_tuple=True)
        at, code, edge = u[outside], q[outside], fine[outside]
        is_fine = (code >= widest_lo) & (code <= widest_hi)
        value = code.clamp(widest_lo, widest_hi)
        coarse_code = torch.zeros_like(value)
        smallest = _smallest_shift(top * inverse, widest_hi)
        if settings.coarse_step:
            power = _POWERS[smallest[outside[0]]]
            # a power of two: dividing by it is exact, as is multiplying
            coarse_code = torch.where(is_fine, 0.0, (at / power).round().clamp(widest_lo, widest_hi))
            value = torch.where(is_fine, value, coarse_code * power)
        chosen = (edge - at).abs() > (value - at).abs()
        is_coarse = chosen & ~is_fine & settings.coarse_step
        fine[outside] = torch.where(is_coarse, 0.0, torch.where(chosen, value, edge))
        coarse[outside] = torch.where(is_coarse, coarse_code, 0.0)
        salient[outside] = chosen
        with_coarse = outside[0][is_coarse]
        shift[with_coarse] = smallest[with_coarse]
    step = torch.where(finite[:, None], step.view(-1, n_groups), torch.nan)
    return SpikeCodes(
        fine.view(x.shape), coarse.view(x.shape), step, shift.view(-1, n_groups), salient.view(x.shape)
    )


class SpikeEncoder:
    """Encodes the input that several layers share, once. Counts what each of them is given to fire.

    Args:
        settings: of these layers.
    """

    def __init__(self, settings: SpikeSettings) -> None:
        self.settings = settings
        self.counts = SpikeCounts()
        self._input: torch.Tensor | None = None
        self._codes: SpikeCodes | None = None
        self._last = SpikeCounts()

    def __call__(self, x: torch.Tensor) -> SpikeCodes:
        """Codes of float32[..., n], its leading dimensions made one."""
        # Layers of one input are called with the same tensor, one after the other.
        if self._codes is None or x is not self._input:
            self._input, self._codes = x, encode(x.reshape(-1, x.shape[-1]), self.settings)
            self._last = _count(self._codes)
        self.counts += self._last
        return self._codes

    def forget_input(self) -> None:
        """Drops the last input and its codes: another tensor might get its place in memory."""
        self._input = self._codes = None

    def reset_counts(self) -> None:
        self.counts = SpikeCounts()


def _step(magnitude: torch.Tensor, top: torch.Tensor, settings: SpikeSettings, half: float) -> torch.Tensor:
    """The step of each group before its lower bounds; magnitude: float32[groups, n], top: its maxima."""
    n = magnitude.shape[1]
    if settings.salience is not None:
        return _of_rank(magnitude, n // 2) * (torch.tensor(settings.salience, dtype=torch.float32) / half)
    outside = round((settings.top_share or 0.0) * n)
    return (_of_rank(magnitude, n - 1 - outside) if outside else top) / half


def _of_rank(x: torch.Tensor, rank: int) -> torch.Tensor:
    """The element of a rank, counted from 0, in each row of float32[rows, n]."""
    return torch.from_numpy(np.partition(x.numpy(), rank, axis=1)[:, rank].copy())  # faster than kthvalue


def _smallest_shift(top: torch.Tensor, largest_code: float) -> torch.Tensor:
    """The smallest k >= 1 for which round(top * 2^-k) <= largest_code, at most 15; top in steps."""
    shift = torch.ones(top.shape, dtype=torch.int64)
    for k in range(1, MAX_SHIFT):
        shift += (shift == k) & ((top * 2.0**-k).round() > largest_code)
    return shift


def _grouped(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """[tokens, n] as [tokens, groups, n / groups]."""
    return x.view(*step.shape, -1)


def _count(codes: SpikeCodes) -> SpikeCounts:
    units = codes.units
    return SpikeCounts(
        codes=units.numel(),
        spikes=int(torch.count_nonzero(units)),
        rate_spikes=int(units.abs().sum(dtype=torch.float64)),
        salient=int(torch.count_nonzero(codes.salient)),
    )
