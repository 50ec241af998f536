"""A linear layer of integrate-and-fire neurons in torch, for any bit width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import nn

from ..format import salient_slots
from ..weights import weight_values, weights_rotated
from .encoder import SpikeCodes, SpikeEncoder, rotate

__all__ = ["SpikeLinear", "SpikeWeights"]

_EXACT_F32 = 2**24


@dataclass(frozen=True)
class SpikeWeights:
    """Quantized weights of a layer.

    Attributes:
        values: float32[rows, n] of integers, code + extension - zero_point.
        threshold: float32[rows, groups]; a weight in the stored basis is threshold * value.
        rotated: whether the stored basis is the rotated one.
        salient: number of salient weights.
    """

    values: torch.Tensor
    threshold: torch.Tensor
    rotated: bool = True
    salient: int = 0

    @classmethod
    def from_blocks(cls, blocks: NDArray) -> SpikeWeights:
        """Those of BLOCK_SPK4[rows, n_blocks]."""
        values, threshold = weight_values(blocks)
        return cls(
            torch.from_numpy(values).float(),
            torch.from_numpy(threshold)[:, None],
            bool(weights_rotated(blocks).all()),
            int((salient_slots(blocks) != 0).sum()),
        )

    def stored(self) -> torch.Tensor:
        """Weights in the stored basis, float32[rows, n]."""
        grouped = self.values.view(*self.threshold.shape, -1)
        return (grouped * self.threshold[..., None]).view(self.values.shape)

    def dequantized(self) -> torch.Tensor:
        """Weights in the model's basis, float32[rows, n]."""
        return rotate(self.stored()) if self.rotated else self.stored()

    def rows(self, index: torch.Tensor | slice) -> SpikeWeights:
        """Some rows; the number of salient weights is shared out evenly."""
        values = self.values[index]
        share = round(self.salient * len(values) / max(len(self.values), 1))
        return SpikeWeights(values, self.threshold[index], self.rotated, share)


class SpikeLinear(nn.Module):
    """y = W x from spike codes; y = (threshold * step) * (N + S * 2^shift) with integer potentials N and S.

    Args:
        weights: of the layer.
        encoder: of its input, which layers with the same input share. Rotated as the weights are.
        bias: float32[rows], or None.
        exact: keep N and S apart, exact integers, as the runtime does; outputs then agree with it to the bit.
            Otherwise one product in float32 computes both, twice as fast.
    """

    def __init__(
        self,
        weights: SpikeWeights,
        encoder: SpikeEncoder,
        bias: torch.Tensor | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        if weights.rotated != encoder.settings.rotated:
            raise ValueError("weights and inputs must both be rotated or both not")
        self.weights, self.encoder, self.bias, self.exact = weights, encoder, bias, exact
        self.in_features, self.out_features = weights.values.shape[1], weights.values.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[..., n] to float32[..., rows]."""
        codes = self.encoder(x)
        if self.weights.threshold.shape[1] > 1 or codes.step.shape[1] > 1:
            y = codes.values @ self.weights.stored().T
        else:
            if self.exact:
                fine, coarse = self.potentials(codes)
                potential = fine + coarse * codes.power
            else:
                potential = codes.units @ self.weights.values.T
            y = (self.weights.threshold.T * codes.step) * potential
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def potentials(self, codes: SpikeCodes) -> tuple[torch.Tensor, torch.Tensor]:
        """N over fine codes and S over coarse ones: float32[tokens, rows], exact integers up to 2^24."""
        values, fine, coarse = self.weights.values, codes.fine, codes.coarse
        largest = max(float(fine.abs().amax()), float(coarse.abs().amax())) * float(values.abs().amax())
        if largest * values.shape[1] >= _EXACT_F32:  # partial sums might be rounded
            values, fine, coarse = values.double(), fine.double(), coarse.double()
        return (fine @ values.T).float(), (coarse @ values.T).float()

    def extra_repr(self) -> str:
        settings = self.encoder.settings
        return f"{self.in_features}, {self.out_features}, W{settings.weight_bits}A{settings.activation_bits}"
