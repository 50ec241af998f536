"""Weights to integer codes of any bit width: GPTQ in the basis that is stored.

A study tool beside converter/calibrated.py: the same steps for other widths, groups and bases, vectorised
over rows. GPTQ: Frantar et al., arXiv:2210.17323; the descent that follows is the converter's.
"""

from __future__ import annotations

import torch

from ..format import FIRST_BLOCK_SLOTS, QK_SPK
from ..weights import threshold_on_grid
from .encoder import rotate
from .layer import SpikeWeights
from .settings import SpikeSettings, check_groups

__all__ = ["compensated_rounding", "quantize"]

_DAMPING = 0.01  # of the mean of the diagonal
_MULTIPLES = (1.0, 0.85, 0.7)  # of the threshold found for nearest rounding: GPTQ prefers finer ones
_FACTORS = 12
_SMALLEST_FACTOR = {1: 0.1, 2: 0.3}  # of the range of a row; few levels want a narrower one
_COLUMNS = 32  # of GPTQ at a time
_ROWS = 4096  # bounds memory


def quantize(
    weights: torch.Tensor, moments: torch.Tensor | None, settings: SpikeSettings, *, gptq: bool = True
) -> SpikeWeights:
    """Codes of least error of the outputs.

    Args:
        weights: float32[rows, n], in the model's basis.
        moments: mean of x xᵀ over inputs x of the layer, float32[n, n]; None if they are unknown.
        settings: those of weights and rotation are used.
        gptq: make later columns compensate for the errors of earlier ones; else each weight is rounded to the
            nearest code, with moments (if there are any) only in the choice of thresholds.

    Raises:
        InputError: n is not a whole number of blocks, or of groups.
    """
    check_groups(weights.shape[1], settings.weight_group, settings.rotated or settings.salient_weights > 0)
    n = weights.shape[1]
    if settings.rotated:
        weights = rotate(weights)
    hessian = torch.eye(n) if moments is None else moments
    if settings.rotated and moments is not None:
        hessian = rotate(rotate(hessian).T)
        hessian = (hessian + hessian.T) * 0.5
    hessian = _damped(hessian)
    parts = [
        _quantize_rows(weights[first : first + _ROWS], hessian, settings, gptq and moments is not None)
        for first in range(0, len(weights), _ROWS)
    ]
    values, thresholds, salients = zip(*parts, strict=True)
    return SpikeWeights(torch.cat(values), torch.cat(thresholds), settings.rotated, sum(salients))


def compensated_rounding(
    weights: torch.Tensor, moments: torch.Tensor, step: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
) -> torch.Tensor:
    """GPTQ on a given grid: multiples lo..hi of step. Returns weights on it, float32[rows, n].

    Args:
        weights: float32[rows, n], in the basis of the grid.
        moments: mean of x xᵀ over inputs in that basis, float32[n, n].
        step: float32[rows, n].
        lo, hi: float32[rows, n] or [n].
    """
    columns, steps = weights.T.contiguous(), step.T.contiguous()
    lo, hi = (bound.expand_as(weights).T.contiguous() for bound in (lo, hi))
    values, _ = _gptq(columns, _damped(moments), steps[:, None], lo, hi, torch.zeros_like(columns))
    return (values[:, 0] * steps).T.contiguous()


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    """With so much on the diagonal that the matrix is positive definite."""
    mean = hessian.diagonal().mean().clamp_min(1e-12)
    return hessian + torch.eye(len(hessian)) * (_DAMPING * mean)


def _quantize_rows(
    w: torch.Tensor, hessian: torch.Tensor, settings: SpikeSettings, gptq: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Values float32[rows, n], thresholds float32[rows, groups], number of salient weights."""
    rows, n = w.shape
    levels = 2.0**settings.weight_bits
    free = _largest(w, settings.salient_weights)
    threshold, zero_point = _search(w, free, hessian.diagonal(), settings)
    # From here on a column of weights is contiguous, because columns are treated one after the other.
    columns = w.T.contiguous()
    reach = levels * free.T.contiguous()
    group = n // threshold.shape[1]

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        """[rows, groups] as [n, rows], or as [1, rows] where there is one group."""
        return per_group.T.contiguous() if group == n else per_group.T.repeat_interleave(group, dim=0)

    lo = -spread(zero_point)
    hi = lo + (levels - 1)
    if not gptq:
        each = spread(threshold)
        values = _clamp((columns / each).round(), lo - reach, hi + reach)
    else:
        multiples = torch.tensor(_MULTIPLES)
        candidates = _on_grid(threshold[None] * multiples[:, None, None])
        values, loss = _gptq(columns, hessian, torch.stack([spread(c) for c in candidates], 1), lo, hi, reach)
        best = loss.argmin(dim=0)
        threshold = candidates[best, torch.arange(rows)]
        values = values[:, best, torch.arange(rows)]
        _descend(values, columns, hessian, spread(threshold), lo, hi, levels, settings.salient_weights)
        if group == n:  # the threshold of least loss for these values
            projected = hessian @ values
            fitted = (projected * columns).sum(dim=0) / (projected * values).sum(dim=0)
            threshold = _on_grid(torch.where(fitted > 0, fitted, threshold[:, 0])[:, None])
    salient = int(torch.count_nonzero((values < lo) | (values > hi)))
    return values.T.contiguous(), threshold, salient


def _largest(w: torch.Tensor, count: int) -> torch.Tensor:
    """Up to `count` weights of largest magnitude in each block of 64: bool[rows, n]."""
    if not count:
        return torch.zeros_like(w, dtype=torch.bool)
    blocks = w.view(len(w), -1, QK_SPK)
    chosen = torch.zeros_like(blocks, dtype=torch.bool)
    largest = blocks.abs().topk(count, dim=-1).indices
    chosen.scatter_(-1, largest, True)
    chosen[:, 0].scatter_(-1, largest[:, 0, _limit(count, 0) :], False)
    return chosen.view(w.shape)


def _limit(salient: int, block: int) -> int:
    """How many weights of a block of a row may be salient."""
    return min(salient, FIRST_BLOCK_SLOTS) if block == 0 else salient


def _search(
    w: torch.Tensor, free: torch.Tensor, importance: torch.Tensor, settings: SpikeSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds and zero-points float32[rows, groups] of least weighted error of nearest rounding."""
    group = settings.weight_group or w.shape[1]
    levels = 2.0**settings.weight_bits
    columns = w.view(len(w), -1, group)
    smallest = torch.where(free, torch.inf, w).view(columns.shape).amin(dim=-1)
    largest = torch.where(free, -torch.inf, w).view(columns.shape).amax(dim=-1)
    if settings.weight_zero_point:
        widest, middle = (largest - smallest) / (levels - 1), 0.5 * (smallest + largest)
    else:
        widest, middle = torch.maximum(largest, -smallest) / ((levels - 1) / 2), torch.zeros_like(largest)
    reach = (levels * free).view(columns.shape)
    weight = importance.view(-1, group)

    def error(threshold: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        lo = -zero_point[..., None]
        value = (columns / threshold[..., None]).round()
        value = _clamp(value, lo - reach, lo + (levels - 1) + reach)
        return ((value * threshold[..., None] - columns).square() * weight).sum(dim=-1)

    def centre(threshold: torch.Tensor) -> torch.Tensor:
        if not settings.weight_zero_point:
            return torch.full_like(threshold, levels / 2)
        return ((levels - 1) / 2 - middle / threshold).round().clamp(0, levels - 1)

    best = zero = least = torch.empty(0)
    for factor in torch.linspace(1.0, _SMALLEST_FACTOR.get(settings.weight_bits, 0.5), _FACTORS):
        threshold = _on_grid(widest * factor)
        found = error(threshold, centre(threshold))
        better = found < least if len(least) else torch.ones_like(found, dtype=torch.bool)
        least = torch.where(better, found, least) if len(least) else found
        best = torch.where(better, threshold, best) if len(best) else threshold
    zero = centre(best)
    if settings.weight_zero_point:
        for shift in (-1, 1):
            other = (centre(best) + shift).clamp(0, levels - 1)
            found = error(best, other)
            zero = torch.where(found < least, other, zero)
            least = torch.minimum(found, least)
    return best, zero


def _gptq(
    columns: torch.Tensor,
    hessian: torch.Tensor,
    threshold: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    reach: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds column after column, those of the largest inputs first; what is left takes over the error.

    Args:
        columns: float32[n, rows].
        threshold: float32[n or 1, candidates, rows].
        lo, hi: standard range, float32[n or 1, rows]. reach: how far it is exceeded, float32[n, rows].

    Returns:
        Values float32[n, candidates, rows] and losses float32[candidates, rows].
    """
    n, rows = columns.shape
    candidates = threshold.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = columns[order][:, None].expand(n, candidates, rows).reshape(n, -1)
    values = torch.empty(n, candidates, rows)
    loss = torch.zeros(candidates * rows)
    for first in range(0, n, _COLUMNS):
        last = min(first + _COLUMNS, n)
        part = left[first:last]
        errors = torch.empty_like(part)
        for i in range(last - first):
            place, scale = int(order[first + i]), upper[first + i, first + i]
            each = place if len(threshold) > 1 else 0
            wanted = part[i].view(candidates, rows)
            value = torch.div(wanted, threshold[each]).round_()
            value = _clamp(value, lo[each] - reach[place], hi[each] + reach[place])
            values[place] = value
            torch.sub(wanted, value.mul_(threshold[each]), out=errors[i].view(candidates, rows))
            errors[i] /= scale
            part[i + 1 :].addr_(upper[first + i, first + i + 1 : last], errors[i], alpha=-1)
        left[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
        loss += errors.square().sum(dim=0)
    return values, loss.view(candidates, rows)


def _descend(
    values: torch.Tensor,
    columns: torch.Tensor,
    hessian: torch.Tensor,
    threshold: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    levels: float,
    salient: int,
) -> None:
    """One sweep of coordinate descent, in place: each value moves to where the loss is least, others fixed.

    A block may have up to `salient` values outside the standard range (the first one fewer, see _limit),
    whichever want it first. Shapes as of _gptq, without candidates.
    """
    errors = values * threshold - columns
    several = len(threshold) > 1
    for first in range(0, len(columns), QK_SPK):
        block = slice(first, first + QK_SPK)
        gradient = hessian[block] @ errors
        within = hessian[block, block]
        outside = (values[block] < (lo[block] if several else lo)) | (
            values[block] > (hi[block] if several else hi)
        )
        used = outside.sum(dim=0)
        for i in range(len(gradient)):
            place = first + i
            each = place if several else 0
            step, low, high = threshold[each], lo[each], hi[each]
            old = values[place].clone()
            wanted = (old - gradient[i] / (within[i, i] * step)).round_()
            new = _clamp(wanted, low, high)
            if salient:
                room = used - outside[i].int() < _limit(salient, first // QK_SPK)
                new = torch.where(room, _clamp(wanted, low - levels, high + levels), new)
                used += ((new < low) | (new > high)).int() - outside[i].int()
            values[place] = new
            gradient[i + 1 :].addr_(within[i + 1 :, i], (new - old) * step)
        errors[block] = values[block] * (threshold[block] if several else threshold) - columns[block]


def _clamp(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
    return torch.minimum(torch.maximum(x, lo), hi)


def _on_grid(threshold: torch.Tensor) -> torch.Tensor:
    """The nearest thresholds that SPK4 can hold."""
    return torch.from_numpy(threshold_on_grid(threshold.numpy()))
