"""What the patched runtime counted, by weight tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from ..errors import UnsupportedError
from ..native import NativeLibrary, SpikeCounter, load

__all__ = ["Counts", "counting", "read_counts", "total"]

_SUMS = ("spikes", "silent", "salient", "rate_spikes", "adds", "shift_adds", "readouts", "bytes")


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
def counting(library: NativeLibrary | None = None) -> Iterator[None]:
    """Counts from zero inside the block; read_counts gives the sums after it, too."""
    cpu = (library or load()).cpu
    cpu.spikequant_counters_reset()
    cpu.spikequant_count(True)
    try:
        yield
    finally:
        cpu.spikequant_count(False)


def read_counts(library: NativeLibrary | None = None) -> list[Counts]:
    """Counts of every tensor since the last reset. Raises UnsupportedError if there were too many tensors."""
    table = ctypes.POINTER(SpikeCounter)()
    n = (library or load()).cpu.spikequant_counters(ctypes.byref(table))
    if n < 0:
        raise UnsupportedError("the model has more tensors than can be counted", "use a smaller model")
    names = [name for name, _ in SpikeCounter._fields_]
    rows = ({name: getattr(table[i], name) for name in names} for i in range(n))
    return [Counts(**row | {"name": row["name"].decode()}) for row in rows]


def total(counts: list[Counts]) -> dict[str, int]:
    """Sums over tensors."""
    return {name: sum(getattr(count, name) for count in counts) for name in _SUMS}
