"""Published ways to compute with 4-bit weights and activations, for comparison in the same harness.

They follow the papers in their arithmetic; what a paper learns by gradient descent is replaced by what this
package has (GPTQ, smoothing of channels), so that the methods differ in their arithmetic only. Weights and
inputs are rounded to their grids and multiplied as floats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .quantizer import compensated_rounding

__all__ = ["BASELINES", "RoundedLinear", "atom", "round_to_nearest", "spike_llm"]

_ATOM_GROUP = 128
_ATOM_WEIGHT_CLIP, _ATOM_INPUT_CLIP = 0.85, 0.9
_ATOM_BITS, _ATOM_OUTLIER_BITS = 4, 8

InputQuantizer = Callable[[torch.Tensor], torch.Tensor]
"""float32[tokens, n] to the values on its grid, of the same shape."""


class RoundedLinear(nn.Module):
    """y = W Q(x).

    Args:
        weights: float32[rows, n], on their grid.
        quantizer: Q.
        bias: float32[rows], or None.
        salient_share: share of inputs that have more bits than the others.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        quantizer: InputQuantizer,
        bias: torch.Tensor | None = None,
        salient_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.weights, self.quantizer, self.bias, self.salient_share = weights, quantizer, bias, salient_share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.quantizer(x.reshape(-1, x.shape[-1])) @ self.weights.T
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


def round_to_nearest(
    weights: torch.Tensor, moments: torch.Tensor, bias: torch.Tensor | None, share: float
) -> RoundedLinear:
    """Rows of weights and tokens of inputs on 16 levels between their extremes. Arguments as of atom."""
    return RoundedLinear(_min_max(weights, 16), lambda x: _min_max(x, 16), bias)


def atom(
    weights: torch.Tensor, moments: torch.Tensor, bias: torch.Tensor | None, share: float
) -> RoundedLinear:
    """Atom (Zhao et al., arXiv:2310.19102): outlier channels in 8 bits, others in groups of 128 in 4.

    The channels of largest mean square are the outliers; the others keep their order and form groups, each
    with a symmetric step of its own, clipped at 0.85 (weights) or 0.9 (inputs) of the largest magnitude. The
    paper takes 128 of 4,096 channels or more; its quantized KV cache is left out.

    Args:
        weights: float32[rows, n].
        moments: mean of x xᵀ over inputs, float32[n, n].
        bias: of the layer.
        share: of channels that are outliers, rounded to whole ones; or, if above 1, how many.
    """
    n = weights.shape[1]
    count = min(round(share) if share > 1 else round(share * n), n)
    order = moments.diagonal().argsort(stable=True)
    is_outlier = torch.zeros(n, dtype=torch.bool)
    is_outlier[order[n - count :]] = True
    parts = [*torch.nonzero(~is_outlier)[:, 0].split(_ATOM_GROUP), torch.nonzero(is_outlier)[:, 0]]
    parts = [part for part in parts if len(part)]

    def steps(x: torch.Tensor, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and largest code of each value, float32[..., n] and float32[n]."""
        step, largest = torch.empty_like(x), torch.empty(n)
        for part in parts:
            outlier = bool(is_outlier[part[0]])
            code = 2.0 ** ((_ATOM_OUTLIER_BITS if outlier else _ATOM_BITS) - 1) - 1
            reach = x[:, part].abs().amax(dim=-1, keepdim=True) * (1.0 if outlier else clip)
            step[:, part], largest[part] = (reach / code).clamp_min(1e-20).expand(-1, len(part)), code
        return step, largest

    def quantizer(x: torch.Tensor) -> torch.Tensor:
        step, largest = steps(x, _ATOM_INPUT_CLIP)
        return torch.maximum(torch.minimum((x / step).round(), largest), -largest - 1) * step

    step, largest = steps(weights, _ATOM_WEIGHT_CLIP)
    rounded = compensated_rounding(weights, moments, step, -largest - 1, largest)
    return RoundedLinear(rounded, quantizer, bias, count / n)


def spike_llm(
    weights: torch.Tensor, moments: torch.Tensor, bias: torch.Tensor | None, share: float
) -> RoundedLinear:
    """SpikeLLM (Xing et al., arXiv:2407.04752): salient channels spike in two steps, the others in one.

    A step carries one of 16 levels, so that two steps are one bit more; the range is that between a token's
    extremes. The saliency of an input channel is the first-order term x · ∂/∂x of the layer's output energy,
    meaned over calibration. The paper learns clipping and scaling; here weights get GPTQ on rows and the
    layer may have been smoothed. Arguments as of atom.
    """
    n = weights.shape[1]
    count = round(share * n)
    saliency = ((weights.T @ weights) * moments).sum(dim=1)  # mean of x_j (Wᵀ W x)_j
    salient = torch.zeros(n, dtype=torch.bool)
    salient[saliency.argsort(descending=True, stable=True)[:count]] = True

    def quantizer(x: torch.Tensor) -> torch.Tensor:
        return torch.where(salient, _min_max(x, 32), _min_max(x, 16))

    lowest, highest = weights.amin(dim=1, keepdim=True), weights.amax(dim=1, keepdim=True)
    step = ((highest - lowest) / 15).clamp_min(1e-20)
    zero_point = (-lowest / step).round()
    rounded = compensated_rounding(
        weights, moments, *(each.expand_as(weights) for each in (step, -zero_point, 15 - zero_point))
    )
    return RoundedLinear(rounded, quantizer, bias, count / n)


BASELINES = {"round to nearest": round_to_nearest, "Atom": atom, "SpikeLLM": spike_llm}


def _min_max(x: torch.Tensor, levels: int) -> torch.Tensor:
    """Each row of float32[rows, n] on equal levels between its extremes, one of them 0."""
    lowest, highest = x.amin(dim=-1, keepdim=True).clamp_max(0.0), x.amax(dim=-1, keepdim=True).clamp_min(0.0)
    step = ((highest - lowest) / (levels - 1)).clamp_min(1e-20)
    zero_point = (-lowest / step).round()
    return ((x / step).round() + zero_point).clamp(0, levels - 1).sub(zero_point) * step
