"""The inputs and outputs of linear layers as they occur, taken from the runtime while it reads a text."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UnsupportedError
from .evaluation import DEFAULT_CTX, Model
from .ggml_api import TensorStruct, operation_number, tensor_values

__all__ = ["LayerProduct", "ProbedModel"]


@dataclass(frozen=True)
class LayerProduct:
    """One product of a weight matrix, as computed.

    Attributes:
        name: of the weight tensor.
        x: float32[tokens, n_in], its input.
        y: float32[tokens, rows], what the runtime made of it.
    """

    name: str
    x: NDArray[np.float32]
    y: NDArray[np.float32]


class ProbedModel(Model):
    """A model that keeps what goes into and comes out of some of its matrix products.

    Args:
        tensors: names of weight tensors.

    Attributes:
        products: in the order of the computation; empty it between texts.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Collection[str],
        *,
        ctx_size: int = DEFAULT_CTX,
        threads: int | None = None,
    ) -> None:
        self.products: list[LayerProduct] = []
        self._probed = {name.encode() for name in tensors}
        self._fault: Exception | None = None
        super().__init__(path, ctx_size=ctx_size, threads=threads)

    def decode(self, *arguments: Any, **options: Any) -> NDArray[np.float32]:
        """As of Model. Raises UnsupportedError if a product is of a kind that cannot be kept."""
        logits = super().decode(*arguments, **options)
        if self._fault is not None:
            raise self._fault
        return logits

    def _context_params(self) -> Any:
        params = super()._context_params()
        kind = dict(type(params)._fields_)["cb_eval"]
        self._callback = kind(self._on_node)  # the runtime holds no reference
        params.cb_eval = self._callback
        return params

    def _on_node(self, address: Any, ask: bool, _user_data: Any) -> bool:
        """ggml calls it before a node (ask: shall it stop after this one?) and after one where it stopped."""
        try:
            node = TensorStruct.from_address(ctypes.cast(address, ctypes.c_void_p).value or 0)
            weights = TensorStruct.from_address(node.src[0]) if node.src[0] else None
            if weights is None or weights.name not in self._probed:
                return not ask
            if ask:
                return True
            name = weights.name.decode()
            if node.op == operation_number("MUL_MAT_ID"):
                raise UnsupportedError(f"'{name}' holds experts, whose inputs cannot be taken", None)
            if node.op == operation_number("MUL_MAT"):
                x, y = (tensor_values(each) for each in (TensorStruct.from_address(node.src[1]), node))
                rows = (each.reshape(-1, each.shape[-1]).copy() for each in (x, y))
                self.products.append(LayerProduct(name, *rows))
        except Exception as error:  # must not pass through C; decode raises it
            self._fault = error
        return True
