"""Mixtures of experts of integrate-and-fire neurons in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .layer import SpikeLinear

__all__ = ["SpikeExperts", "SpikeRouted"]


class SpikeRouted(nn.Module):
    """Products that choose a matrix for each token, as llama.cpp's MUL_MAT_ID.

    Args:
        matrices: one SpikeLinear per expert.
    """

    def __init__(self, matrices: Sequence[SpikeLinear]) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(matrices)

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """float32[tokens, 1 or used, n] and int64[tokens, used] to float32[tokens, used, rows]."""
        x = x.expand(*experts.shape, x.shape[-1])
        rows = self.matrices[0].out_features
        y = torch.empty(*experts.shape, rows)
        for expert in experts.unique():
            chosen = experts == expert
            y[chosen] = self.matrices[expert](x[chosen])
        return y


class SpikeExperts(nn.Module):
    """In the place of transformers' modules of experts, with parameters ``gate_up_proj`` and ``down_proj``.

    Args:
        gate, up, down: the three matrices of every expert.
        activation: between them.
    """

    def __init__(self, gate: SpikeRouted, up: SpikeRouted, down: SpikeRouted, activation: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """float32[tokens, n], int64[tokens, used] and float32[tokens, used] to float32[tokens, n]."""
        x = hidden_states[:, None]
        inner = self.activation(self.gate(x, top_k_index)) * self.up(x, top_k_index)
        return (self.down(inner, top_k_index) * top_k_weights[..., None]).sum(dim=1)
