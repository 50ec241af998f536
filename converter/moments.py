"""Second moments of the inputs of linear layers, collected while the source model reads a text in llama.cpp.

Works for every architecture that llama.cpp runs: the runtime is asked for the second operand of each matrix
product whose weights are on the list. Sums are made by the runtime (spike-moments.cpp), in a fixed order.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.errors import InputError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.native import bind, load

__all__ = ["MomentStore", "Moments", "calibration_chunks"]

_FUNCTIONS = {
    "spike_moments_new": (
        ctypes.c_void_p,
        (
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_int,
            ctypes.c_bool,
            ctypes.c_int,
        ),
    ),
    "spike_moments_free": (None, (ctypes.c_void_p,)),
    "spike_moments_read": (None, (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)),
    "spike_moments_tokens": (ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int)),
}
_BYTES_PER_ENTRY = 8  # sums are kept in double precision


class Moments:
    """Collector for some weight tensors. A context manager; closing it frees its memory.

    Args:
        sizes: number of inputs by name of the weight tensor.
        threads: that add.
        diagonal: only the mean squares of the inputs, not their products with each other.
    """

    def __init__(self, sizes: Mapping[str, int], threads: int, diagonal: bool = False) -> None:
        self._library = load().cpu
        bind(self._library, _FUNCTIONS)
        self._index = {name: i for i, name in enumerate(sizes)}
        self._sizes = dict(sizes)
        self._diagonal = diagonal
        names = (ctypes.c_char_p * len(sizes))(*(name.encode() for name in sizes))
        numbers = (ctypes.c_int64 * len(sizes))(*sizes.values())
        self.handle = self._library.spike_moments_new(names, numbers, len(sizes), diagonal, threads)
        # Large, and held by a recipe that nobody closes.
        self._free = weakref.finalize(self, self._library.spike_moments_free, self.handle)

    def read(self, name: str) -> NDArray[np.float32] | None:
        """Mean of x xᵀ over the tokens, float32[n_in, n_in], or of x² alone, float32[n_in].

        None if the model never used the tensor in a plain matrix product.
        """
        index, n_in = self._index[name], self._sizes[name]
        tokens = self._library.spike_moments_tokens(self.handle, index)
        if tokens == 0:
            return None
        result = np.empty(n_in if self._diagonal else (n_in, n_in), np.float32)
        self._library.spike_moments_read(self.handle, index, result.ctypes.data)
        result /= np.float32(tokens)
        return result

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def __enter__(self) -> Moments:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._free()
        self.handle = None


class _CollectingModel(Model):
    """A model that shows a collector the inputs of its matrix products."""

    def __init__(self, path: Path, moments: Moments, ctx: int, threads: int) -> None:
        self._moments = moments
        super().__init__(path, ctx_size=ctx, threads=threads)

    def _context_params(self) -> Any:
        params = super()._context_params()
        kind = dict(type(params)._fields_)["cb_eval"]
        params.cb_eval = ctypes.cast(load().cpu.spike_moments_callback, kind)
        params.cb_eval_user_data = self._moments.handle
        return params


def calibration_chunks(
    model: Model, text: bytes, name: str, ctx: int, chunks: int
) -> list[NDArray[np.int32]]:
    """The first `chunks` stretches of `ctx` tokens of a text, each starting with BOS if the model wants that.

    Raises:
        InputError: the text has less than one of them.
    """
    tokens = model.tokenize(text)
    found = min(chunks, len(tokens) // ctx)
    if found == 0:
        raise InputError(
            f"the calibration text '{name}' has only {len(tokens)} tokens, less than one context of {ctx}",
            "give a longer text with --calibration",
        )
    parts = [tokens[i * ctx : (i + 1) * ctx].copy() for i in range(found)]
    if model.bos is not None:
        for part in parts:
            part[0] = model.bos
    return parts


class MomentStore:
    """Moments of any number of tensors, within a budget of memory: as many passes over the text as it takes.

    Args:
        model_path: GGUF file that llama.cpp can run.
        sizes: number of inputs by tensor, in the order in which they will be asked for.
        text: UTF-8 bytes to calibrate on, and its name for messages.
        ctx, chunks: tokens per stretch, and how many.
        threads: of the model and of the sums.
        budget: bytes that sums may take at a time.
        report: called with (chunks done, chunks in all, sums over all passes so far).
    """

    def __init__(
        self,
        model_path: Path,
        sizes: Mapping[str, int],
        text: bytes,
        text_name: str,
        *,
        ctx: int,
        chunks: int,
        threads: int,
        budget: int,
        report: Callable[[int, int], None],
    ) -> None:
        self._path = model_path
        self._sizes = dict(sizes)
        self._text, self._text_name = text, text_name
        self._ctx, self._chunks, self._threads, self._report = ctx, chunks, threads, report
        self._groups = _groups(sizes, budget)
        self._loaded: Moments | None = None
        self._done = 0
        # With one group everything is known after one pass; with several, the squares come first.
        self._passes = len(self._groups) + (len(self._groups) > 1)

    def diagonals(self) -> dict[str, NDArray[np.float32] | None]:
        """Mean squares of every tensor's inputs, float32[n_in]; None where there are no tokens."""
        if len(self._groups) == 1:
            moments = self._collect(self._groups[0])
            read = {name: moments.read(name) for name in self._sizes}
            return {name: None if matrix is None else np.diag(matrix).copy() for name, matrix in read.items()}
        with Moments(self._sizes, self._threads, diagonal=True) as moments:
            self._run(moments)
            return {name: moments.read(name) for name in self._sizes}

    def matrix(self, name: str) -> NDArray[np.float32] | None:
        """Mean of x xᵀ of a tensor's inputs, float32[n_in, n_in], or None."""
        group = next(group for group in self._groups if name in group)
        return self._collect(group).read(name)

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

    def _collect(self, group: Sequence[str]) -> Moments:
        if self._loaded is None or group[0] not in self._loaded:
            self.close()
            moments = Moments({name: self._sizes[name] for name in group}, self._threads)
            try:
                self._run(moments)
            except BaseException:
                moments.close()
                raise
            self._loaded = moments
        return self._loaded

    def _run(self, moments: Moments) -> None:
        with _CollectingModel(self._path, moments, self._ctx, self._threads) as model:
            parts = calibration_chunks(model, self._text, self._text_name, self._ctx, self._chunks)
            for part in parts:
                for _ in model.logits(part, len(part) - 1):
                    pass
                self._done += 1
                self._report(min(self._done, len(parts) * self._passes), len(parts) * self._passes)


def _groups(sizes: Mapping[str, int], budget: int) -> list[list[str]]:
    """Tensors in their order, cut where the budget is full. A single one may be larger than the budget."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, n_in in sizes.items():
        needed = n_in * n_in * _BYTES_PER_ENTRY
        if groups[-1] and used + needed > budget:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += needed
    return groups
