"""Second moments of the inputs of linear layers, collected by hooks while the model reads a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .model import TorchModel

__all__ = ["collect_moments"]


def collect_moments(
    model: TorchModel,
    names: Sequence[str],
    chunks: Sequence[NDArray[np.int32]],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, torch.Tensor]:
    """Mean of x xᵀ over all tokens: float32[n, n] by layer.

    Args:
        names: of layers of the model, which must be as it was read.
        chunks: int32[tokens] each, read one by one from an empty context.
        advance: called with chunks done and in all.
    """
    sums = {name: torch.zeros(2 * (model.layers[name].in_features,)) for name in names}
    tokens = sum(len(chunk) for chunk in chunks)

    def add(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name].addmm_(x.T, x)

        return hook

    handles = [model.layers[name].register_forward_pre_hook(add(name)) for name in names]
    try:
        for done, chunk in enumerate(chunks):
            model.logits(chunk, first=len(chunk) - 1)
            advance(done + 1, len(chunks))
    finally:
        for handle in handles:
            handle.remove()
    for matrix in sums.values():
        matrix /= tokens
    return sums
