"""The inputs and outputs of linear layers as they occur, taken from the runtime while it reads a text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import UnsupportedError
from .evaluation import DEFAULT_CTX
from .ggml_api import TensorStruct, operation_number, tensor_at, tensor_rows
from .watched import WatchedModel

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


class ProbedModel(WatchedModel):
    """A model that keeps what goes into and comes out of some of its matrix products.

    Args:
        tensors: names of weight tensors.

    Attributes:
        products: in the order of the computation; empty it between texts.

    decode() raises UnsupportedError if a product is of a kind that cannot be kept.
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
        super().__init__(path, ctx_size=ctx_size, threads=threads)

    def _on_node(self, node: TensorStruct, ask: bool) -> bool:
        weights = tensor_at(node.src[0]) if node.src[0] else None
        if weights is None or weights.name not in self._probed:
            return not ask
        if ask:
            return True
        name = weights.name.decode()
        if node.op == operation_number("MUL_MAT_ID"):
            raise UnsupportedError(f"'{name}' holds experts, whose inputs cannot be taken", None)
        if node.op == operation_number("MUL_MAT"):
            x, y = (tensor_rows(each).copy() for each in (tensor_at(node.src[1]), node))
            self.products.append(LayerProduct(name, x, y))
        return True
