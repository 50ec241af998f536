"""Turns float32 rows into stored rows: SPK4 without calibration, and any type that ggml has a quantizer for.

Rows are independent of each other, so that threads may share them out in any way without changing the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.errors import InputError
from spikequant_gguf.format import BLOCK_SPK4, TYPE_SPK4, blocks_from_bytes, blocks_to_bytes, salient_slots

from .importance import Importance
from .recipe import TensorStatistics

__all__ = ["Backend", "DirectQuantizer", "Workers", "check_finite", "measure", "quantize_rows"]

_RESULT = TypeVar("_RESULT")
# Weights that one thread takes at a time: small enough that its arrays stay in the cache of a core.
_SLICE_WEIGHTS = 1 << 17


class Backend(Protocol):
    """What quantization needs of the runtime; runtime.native() is one."""

    def quantize(
        self, type_id: int, weights: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """float32[rows, n_in] as uint8[rows, row_bytes] of a ggml type; importance: float32[n_in]."""

    def dequantize(self, type_id: int, data: NDArray[np.uint8], n_in: int) -> NDArray[np.float32]:
        """uint8[rows, row_bytes] as float32[rows, n_in]."""

    def validate(self, type_id: int, data: NDArray[np.uint8]) -> bool:
        """False if a block of the data is invalid."""


class Workers:
    """Threads that share the rows of a slice. A context manager.

    Args:
        threads: number of them; None for one per core.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or _cores()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map_rows(
        self, function: Callable[[NDArray[np.float32]], _RESULT], rows: NDArray[np.float32]
    ) -> Iterator[_RESULT]:
        """function(rows[i:j]) for consecutive pieces, in their order."""
        step = max(1, _SLICE_WEIGHTS // rows.shape[1])
        pieces = [rows[start : start + step] for start in range(0, len(rows), step)]
        return (self._pool.map if self._pool is not None else map)(function, pieces)


class DirectQuantizer:
    """The TensorQuantizer without calibration: the reference search for threshold and zero-point of each row.

    Args:
        backend: does the work.
        workers: threads to use.
        importance: weights of the squared error per input, or None.
    """

    whole_matrices = False

    def __init__(self, backend: Backend, workers: Workers, importance: Importance | None = None) -> None:
        self._backend = backend
        self._workers = workers
        self._importance = importance

    def quantize(
        self, name: str, weights: NDArray[np.float32], matrix: int = 0
    ) -> tuple[NDArray[np.void], TensorStatistics]:
        importance = (
            self._importance.of(name, matrix, weights.shape[1]) if self._importance is not None else None
        )

        def piece(rows: NDArray[np.float32]) -> tuple[NDArray[np.void], TensorStatistics]:
            blocks = blocks_from_bytes(self._backend.quantize(TYPE_SPK4, rows, importance))
            return blocks, measure(rows, blocks, self._backend)

        results = list(self._workers.map_rows(piece, weights))
        statistics = sum((statistics for _, statistics in results), TensorStatistics())
        return np.concatenate([blocks for blocks, _ in results], dtype=BLOCK_SPK4), statistics


def measure(weights: NDArray[np.float32], blocks: NDArray[np.void], backend: Backend) -> TensorStatistics:
    """Statistics of BLOCK_SPK4[rows, n_blocks] that stand for float32[rows, n_in], weights of the model."""
    stored = backend.dequantize(TYPE_SPK4, blocks_to_bytes(blocks), weights.shape[1])
    # Row by row in float64: the sum is then the same however rows are shared out.
    return TensorStatistics(
        weights=weights.size,
        salient_weights=int(np.count_nonzero(salient_slots(blocks))),
        squared_error=float(np.square(stored - weights, dtype=np.float64).sum(axis=1).sum()),
        squared_norm=float(np.square(weights, dtype=np.float64).sum(axis=1).sum()),
    )


def quantize_rows(
    backend: Backend,
    workers: Workers,
    type_id: int,
    rows: NDArray[np.float32],
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """float32[rows, n_in] as uint8[rows, row_bytes] of a ggml type. InputError if a weight is too large."""

    def piece(part: NDArray[np.float32]) -> NDArray[np.uint8]:
        data = backend.quantize(type_id, part, importance)
        if not backend.validate(type_id, data):
            raise InputError(
                "weights are too large for the type", "choose another type, or check the source model"
            )
        return data

    return np.concatenate(list(workers.map_rows(piece, rows)))


def check_finite(name: str, rows: NDArray[np.float32], first_row: int) -> None:
    """Raises InputError if a weight is NaN or infinite. first_row: index of rows[0] in the tensor."""
    finite = np.isfinite(rows)
    if not finite.all():
        row, index = np.unravel_index(int(np.argmin(finite)), rows.shape)
        raise InputError(
            f"tensor '{name}', row {first_row + row}, weight {index} is not finite, but {rows[row, index]}",
            "the source model is damaged: download or make it again",
        )


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
