"""A model that is followed node by node while the runtime computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .evaluation import DEFAULT_CTX, Model
from .ggml_api import TensorStruct, tensor_at

__all__ = ["WatchedModel"]


class WatchedModel(Model):
    """A base for models that look at the nodes of their graph. Arguments as of Model.

    A subclass says in _on_node what it wants. What is raised there must not pass through C: it ends the
    computation, and decode() raises it.
    """

    def __init__(self, path: str | Path, *, ctx_size: int = DEFAULT_CTX, threads: int | None = None) -> None:
        self._fault: BaseException | None = None
        super().__init__(path, ctx_size=ctx_size, threads=threads)

    def decode(self, *arguments: Any, **options: Any) -> NDArray[np.float32]:
        """As of Model. Raises whatever _on_node raised."""
        logits = super().decode(*arguments, **options)
        self._raise_fault()
        return logits

    def _on_node(self, node: TensorStruct, ask: bool) -> bool:
        """ggml_backend_sched_eval_callback: called before a node is computed, and after some of them.

        Args:
            node: of the graph, in the order of computation.
            ask: whether it is still to be computed. Then True makes the runtime stop after it and call again.

        Returns:
            Not ask where a node is of no interest; False afterwards ends the computation.
        """
        raise NotImplementedError

    def _raise_fault(self) -> None:
        """Raises what _on_node raised, if it did."""
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _context_params(self) -> Any:
        params = super()._context_params()
        kind = dict(type(params)._fields_)["cb_eval"]
        self._node_callback = kind(self._called)  # the runtime holds no reference
        params.cb_eval = self._node_callback
        return params

    def _called(self, address: Any, ask: bool, _user_data: Any) -> bool:
        try:
            return self._fault is None and self._on_node(tensor_at(address), ask)
        except BaseException as fault:  # ctypes would only print it
            self._fault = fault
            return False
