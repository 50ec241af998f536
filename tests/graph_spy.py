"""Records the spike products of a model while llama.cpp computes it: what goes in and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.ggml_api import TensorStruct, tensor_at, tensor_rows, tensor_values
from spikequant_gguf.watched import WatchedModel

__all__ = ["Product", "SpyModel"]

_WEIGHTS, _INPUT, _EXPERTS = 0, 1, 2


@dataclass(frozen=True)
class Product:
    """A matrix product with SPK4 weights.

    Attributes:
        weights: name of the weight tensor.
        x: float32[tokens, inputs], or float32[tokens, 1 or experts used, inputs].
        y: float32[tokens, outputs], or float32[tokens, experts used, outputs].
        experts: int32[tokens, experts used], or None if the weights are one matrix.
    """

    weights: str
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    experts: NDArray[np.int32] | None


class SpyModel(WatchedModel):
    """A model that keeps every spike product in `products`."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.products: list[Product] = []
        super().__init__(path, **options)

    def _on_node(self, tensor: TensorStruct, ask: bool) -> bool:
        if not tensor.src[_WEIGHTS] or tensor_at(tensor.src[_WEIGHTS]).type != TYPE_SPK4:
            return not ask
        if not ask:
            input_and_output = (tensor_at(tensor.src[_INPUT]), tensor)
            experts = None
            if tensor.src[_EXPERTS]:
                experts = tensor_values(tensor_at(tensor.src[_EXPERTS]))[0, 0].copy()
                x, y = (tensor_values(each)[0].copy() for each in input_and_output)
            else:
                x, y = (tensor_rows(each).copy() for each in input_and_output)
            self.products.append(Product(tensor_at(tensor.src[_WEIGHTS]).name.decode(), x, y, experts))
        return True
