"""Facts about this machine that a measured figure needs beside it."""

from __future__ import annotations

import os
import platform
import re
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from . import __version__
from .ggml_patch.toolchain import cpu_features
from .runtime import find_runtime

__all__ = ["HostFacts", "available_memory", "default_threads", "host_facts"]

_CPUS = Path("/sys/devices/system/cpu")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class HostFacts:
    """The machine and the programs on it.

    Attributes:
        cpu: model name.
        cores: physical cores that this process may use.
        features: SIMD features, as the system names them.
        os: name and release.
        python: version.
        spikequant: version of this package.
        llama_cpp: version of llama-cpp-python; None without one.
        kernel: that computes spike products; None without the patched runtime.
    """

    cpu: str
    machine: str
    cores: int
    features: tuple[str, ...]
    os: str
    python: str
    spikequant: str
    llama_cpp: str | None
    kernel: str | None

    def to_json(self) -> dict:
        """The facts as plain JSON types."""
        return asdict(self) | {"features": list(self.features)}


def host_facts() -> HostFacts:
    """What is known about this machine; unknown parts say so and raise nothing."""
    runtime = find_runtime()
    return HostFacts(
        cpu=_cpu_name(),
        machine=platform.machine(),
        cores=default_threads(),
        features=tuple(cpu_features()),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        spikequant=__version__,
        llama_cpp=runtime.llama_cpp_version,
        kernel=runtime.kernel,
    )


def default_threads() -> int:
    """Physical cores that this process may use, at least 1: the number of threads that computes fastest.

    CPU affinity and the CPU quota of a container count; hyper-threads of one core count once.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        siblings = str(cpu)
        with suppress(OSError):
            siblings = (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
        cores.add(siblings)
    limit = len(cores)
    with suppress(OSError, ValueError):
        quota, period = _CPU_QUOTA.read_text(encoding="ascii").split()
        limit = min(limit, -(-int(quota) // int(period)))  # "max" is no number: no quota
    return max(1, limit)


def available_memory() -> int | None:
    """Bytes of memory that can be taken without swapping; None where the system does not tell."""
    with suppress(OSError):
        found = re.search(
            r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.M
        )
        if found:
            return int(found.group(1)) * 1024
    return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        with suppress(OSError):
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            found = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", text, re.M)
            if found:
                return found.group(1).strip()
    return platform.processor() or platform.machine() or "unknown"
