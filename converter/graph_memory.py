"""Gives memory of a llama.cpp graph back to the system as soon as nothing needs its contents any more.

A pass over a long text in one batch touches more than it needs at a time. llama.cpp clears the cache of keys
and values of all layers when a context is made, which touches every page of it. And a model that waits in the
middle of a layer keeps all results that it had before. A page that is given back takes no memory until it is
used again, and is zeros then, as it was when it was new.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress

from spikequant_gguf.errors import SpikeQuantError
from spikequant_gguf.ggml_api import TensorStruct, tensor_at

__all__ = ["GraphMemory", "give_back", "give_back_caches"]

_CACHES = (b"cache_k_", b"cache_v_")
_INPUT, _OUTPUT = 1, 2  # GGML_TENSOR_FLAG_INPUT, GGML_TENSOR_FLAG_OUTPUT

_Range = tuple[int, int]  # addresses, from the first to behind the last


class GraphMemory:
    """What the nodes of a graph need, known from having seen all of them once before they are computed.

    Weights are left alone. Views count as what they are views of.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # of the tensors of a graph in the order of appearance, by address
        self._uses: Counter[int] = Counter()  # by the number
        self._left: Counter[int] = Counter()
        self._live: dict[int, _Range] = {}
        self._dead: list[_Range] = []

    def look(self, nodes: Iterable[TensorStruct]) -> None:
        """To be called with all nodes of a graph that will be computed."""
        self._numbers.clear()
        self._uses = Counter(number for node in nodes for _, number in self._used(node))
        self._left = self._uses.copy()
        self._numbers.clear()
        self._live.clear()

    def used(self, node: TensorStruct) -> None:
        """To be called with each node of that graph, before it is computed.

        Raises:
            SpikeQuantError: the graph is not the one that look() has seen.
        """
        for tensor, number in self._used(node):
            if self._left[number] == 0:
                name = node.name.decode(errors="replace")
                raise SpikeQuantError(
                    f"'{name}': llama.cpp computes another graph than it had announced", "report this"
                )
            self._live[number] = _range(tensor)
            self._left[number] -= 1
            # What nothing else uses is a result of the whole graph.
            if self._left[number] == 0 and self._uses[number] > 1 and not tensor.flags & _OUTPUT:
                self._dead.append(self._live.pop(number))

    def give_back_dead(self, node: TensorStruct) -> None:
        """To be called when all nodes that used() was told of are computed, and with the last of them.

        What that one has read is still there.
        """
        read = [_range(tensor) for tensor, _ in self._used(node)]
        for start, end in _difference(self._dead, [*self._live.values(), *read]):
            give_back(start, end - start)
        self._dead = [each for each in self._dead if each in read]

    def _used(self, node: TensorStruct) -> Iterator[tuple[TensorStruct, int]]:
        """What a node writes and reads, each as often as it does, with its number."""
        own = ctypes.addressof(node)
        for address in (own, *node.src):
            if not address:
                continue
            root = tensor_at(address).view_src or address
            tensor = tensor_at(root)
            kept = root == own or tensor.flags & _INPUT or tensor.name.startswith(_CACHES)
            if kept or root in self._numbers:
                yield tensor, self._numbers.setdefault(root, len(self._numbers))


def give_back_caches(nodes: Iterable[TensorStruct]) -> None:
    """Gives the memory of all keys and values back. They are zeros afterwards."""
    for node in nodes:
        for address in (ctypes.addressof(node), *node.src):
            root = tensor_at(address).view_src if address else None
            if root and tensor_at(root).name.startswith(_CACHES):
                start, end = _range(tensor_at(root))
                give_back(start, end - start)


def give_back(address: int, n_bytes: int) -> None:
    """Frees the whole pages in some private memory. Where the system cannot do that, nothing happens."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + n_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        with suppress(OSError, AttributeError, TypeError):  # no POSIX
            advise, advice = ctypes.CDLL(None).madvise, mmap.MADV_DONTNEED
            advise(ctypes.c_void_p(first), ctypes.c_size_t(size), ctypes.c_int(advice))


def _range(tensor: TensorStruct) -> _Range:
    return tensor.data, tensor.data + tensor.ne[3] * tensor.nb[3]


def _difference(ranges: Iterable[_Range], others: Iterable[_Range]) -> Iterator[_Range]:
    """The parts of ranges that are in none of the others."""
    taken = sorted(others)
    for start, end in ranges:
        for other_start, other_end in taken:
            if other_start >= end:
                break
            if other_start > start:
                yield start, other_start
            start = max(start, other_end)
        if start < end:
            yield start, end
