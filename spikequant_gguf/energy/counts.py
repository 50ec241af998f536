"""What the patched runtime counted, by weight tensor and by token."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..native import NativeLibrary, SpikeCounter, SpikeTokenCounter, load

__all__ = ["TOKEN_COUNTS", "Counts", "counting", "read_counts", "read_token_counts", "total"]

_SUMS = ("spikes", "silent", "salient", "rate_spikes", "adds", "shift_adds", "readouts", "bytes")
TOKEN_COUNTS = np.dtype(SpikeTokenCounter)
"""One token in one tensor: ``counter``: index of the tensor in read_counts, ``token``: of its input."""


@dataclass(frozen=True)
class Counts:
    """Sums over all tokens of one weight tensor; ggml_patch/spike/cpu/spike-counters.h defines them."""

    name: str
    n_inputs: int
    n_rows: int
    products: int
    tokens: int
    spikes: int
    silent: int
    salient: int
    rate_spikes: int
    adds: int
    shift_adds: int
    readouts: int
    bytes: int

    def to_json(self) -> dict:
        return asdict(self)


@contextmanager
def counting(library: NativeLibrary | None = None, *, tokens: bool = False) -> Iterator[None]:
    """Counts from zero inside the block; read_counts gives the sums after it, too.

    tokens: keep single tokens as well; read_token_counts gives them before the block ends.
    """
    cpu = (library or load()).cpu
    cpu.spikequant_counters_reset()
    cpu.spikequant_count_tokens(tokens)
    cpu.spikequant_count(True)
    try:
        yield
    finally:
        cpu.spikequant_count(False)
        cpu.spikequant_count_tokens(False)


def read_counts(library: NativeLibrary | None = None) -> list[Counts]:
    """Counts of every tensor since the last reset. Raises UnsupportedError if there were too many tensors."""
    table = ctypes.POINTER(SpikeCounter)()
    n = (library or load()).cpu.spikequant_counters(ctypes.byref(table))
    if n < 0:
        raise UnsupportedError("the model has more tensors than can be counted", "use a smaller model")
    names = [name for name, _ in SpikeCounter._fields_]
    rows = ({name: getattr(table[i], name) for name in names} for i in range(n))
    return [Counts(**row | {"name": row["name"].decode()}) for row in rows]


def read_token_counts(library: NativeLibrary | None = None) -> NDArray[np.void]:
    """TOKEN_COUNTS[n] since counting began, in the order of the computation. Raises UnsupportedError."""
    table = ctypes.POINTER(SpikeTokenCounter)()
    n = (library or load()).cpu.spikequant_token_counters(ctypes.byref(table))
    if n < 0:
        raise UnsupportedError("there is no memory for counts of so many tokens", "count fewer at a time")
    if n == 0:
        return np.empty(0, TOKEN_COUNTS)
    address = ctypes.cast(table, ctypes.c_void_p).value
    rows = (SpikeTokenCounter * n).from_address(address)  # type: ignore[arg-type]
    return np.frombuffer(rows, TOKEN_COUNTS).copy()


def total(counts: Sequence[Counts]) -> dict[str, int]:
    """Sums over tensors."""
    return {name: sum(getattr(count, name) for count in counts) for name in _SUMS}
