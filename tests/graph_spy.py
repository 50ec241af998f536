"""Records the spike products of a model while llama.cpp computes it: what goes in and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.evaluation import Model
from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.ggml_api import TensorStruct, tensor_values

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


class SpyModel(Model):
    """A Model that keeps every spike product in `products`."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.products: list[Product] = []
        super().__init__(path, **options)

    def _context_params(self) -> Any:
        params = super()._context_params()
        kind = dict(type(params)._fields_)["cb_eval"]
        self._callback = kind(self._look)  # must live as long as the context
        params.cb_eval = self._callback
        return params

    def _look(self, address: Any, ask: bool, _: Any) -> bool:
        tensor = _tensor(address)
        if not tensor.src[_WEIGHTS] or _tensor(tensor.src[_WEIGHTS]).type != TYPE_SPK4:
            return not ask
        if not ask:
            x, y = tensor_values(_tensor(tensor.src[_INPUT])).copy(), tensor_values(tensor).copy()
            experts = None
            if tensor.src[_EXPERTS]:
                experts = tensor_values(_tensor(tensor.src[_EXPERTS]))[0, 0].copy()
                x, y = x[0], y[0]
            else:
                x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            name = _tensor(tensor.src[_WEIGHTS]).name.decode()
            self.products.append(Product(name, x, y, experts))
        return True


def _tensor(address: Any) -> TensorStruct:
    return TensorStruct.from_address(getattr(address, "value", address))
