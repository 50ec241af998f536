"""Physical limits of this machine: bytes read per second from memory, and bytes added per second.

Both by one loop of vector additions in C (limits.c), compiled for this CPU when a benchmark starts. Each
thread adds up its own data: a part of several last-level caches, or 16 KB that stay in the first-level cache.
The fastest of some passes counts: a limit is what the machine can do.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
import time
from ctypes import c_size_t, c_uint8, c_void_p
from pathlib import Path

import numpy as np

from spikequant_gguf.errors import SpikeQuantError
from spikequant_gguf.ggml_patch.toolchain import find_compiler

_SOURCE = Path(__file__).with_suffix(".c")
_ALIGNMENT = 64
_CACHED_BYTES = 16 << 10
_PASS_BYTES = 2 << 30  # additions in cache per pass and thread
_PASSES = 5


def measure_limits(threads: list[int], memory_bytes: int) -> list[dict]:
    """One row per number of threads: ``threads``, ``read_bytes_per_s``, ``byte_adds_per_s``.

    memory_bytes: that all threads together read in one pass. Raises SpikeQuantError if the loop does not
    compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        add = _compile(Path(folder))
        rows = []
        for n in threads:
            per_thread = max(1 << 20, memory_bytes // n // 4096 * 4096)
            rows.append(
                {
                    "threads": n,
                    "read_bytes_per_s": _rate(add, n, per_thread, 1),
                    "byte_adds_per_s": _rate(add, n, _CACHED_BYTES, _PASS_BYTES // _CACHED_BYTES),
                }
            )
        return rows


def _compile(folder: Path) -> ctypes._CFuncPtr:
    library = folder / "limits.so"
    compiler, _ = find_compiler()
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", _SOURCE, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SpikeQuantError(
            f"{_SOURCE.name} could not be compiled: {done.stderr.strip()[:200]}", "install GCC or clang"
        )
    add = ctypes.CDLL(str(library)).add_bytes
    add.argtypes, add.restype = (c_void_p, c_size_t, c_size_t), c_uint8
    return add


def _rate(add: ctypes._CFuncPtr, threads: int, size: int, repeats: int) -> float:
    """Bytes per second of all threads together; ctypes lets them run at the same time."""
    buffers = [np.ones(size + _ALIGNMENT, np.uint8) for _ in range(threads)]
    starts = [buffer.ctypes.data + -buffer.ctypes.data % _ALIGNMENT for buffer in buffers]
    best = 0.0
    for _ in range(_PASSES):
        workers = [threading.Thread(target=add, args=(start, size, repeats)) for start in starts]
        begun = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, threads * size * repeats / (time.perf_counter() - begun))
    return best
