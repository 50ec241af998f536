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
from .ggml_api import TensorStruct
from .native import bind, load

__all__ = ["LayerProduct", "ProbedModel"]

_TYPE_F32 = 0


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
        self._op_name = _op_names()
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
            operation = self._op_name(node.op)
            if operation == b"MUL_MAT_ID":
                raise UnsupportedError(f"'{name}' holds experts, whose inputs cannot be taken", None)
            if operation == b"MUL_MAT":
                x = TensorStruct.from_address(node.src[1])
                self.products.append(LayerProduct(name, _rows(x), _rows(node)))
        except Exception as error:  # must not pass through C; decode raises it
            self._fault = error
        return True


def _op_names() -> Any:
    base = load().base
    bind(base, {"ggml_op_name": (ctypes.c_char_p, (ctypes.c_int,))})
    return base.ggml_op_name


def _rows(tensor: TensorStruct) -> NDArray[np.float32]:
    """A float32 tensor's rows, copied: float32[rows, ne0]."""
    if tensor.type != _TYPE_F32 or tensor.nb[0] != 4:
        raise UnsupportedError(f"the values of '{tensor.name.decode()}' are not float32 in rows", None)
    shape = tuple(tensor.ne)[::-1]
    strides = tuple(tensor.nb)[::-1]
    size = 4 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * size).from_address(tensor.data)
    return np.ndarray(shape, np.float32, memory, strides=strides).reshape(-1, shape[-1]).copy()
