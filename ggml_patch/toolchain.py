"""Find compiler, CMake and Ninja, and describe what a native build depends on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from spikequant_gguf.errors import BuildError

_MINIMUM_CMAKE = (3, 21)  # the pinned source package's cmake_minimum_required
_SIMD_FLAG = re.compile(
    r"(s?sse|avx|fma|f16c|bmi|amx|gfni|vaes|vpclmul|asimd|neon|sve|sme(\d|$)|i8mm|bf16|fphp)"
)
_BYTES_PER_JOB = 1_500_000_000  # what the largest C++ files of llama.cpp take to compile


@dataclass(frozen=True)
class Toolchain:
    """Programs of a build. ``compiler`` is the first line that the C compiler says about itself."""

    cc: Path
    cxx: Path
    cmake: Path
    ninja: Path
    compiler: str


def find_toolchain() -> Toolchain:
    """Find everything a build needs. Raises BuildError naming the first missing program and how to get it."""
    cc, cxx = find_compiler()
    cmake = find_build_program("cmake")
    version = tuple(int(number) for number in re.findall(r"\d+", version_line(cmake))[:2])
    if version < _MINIMUM_CMAKE:
        raise BuildError(f"{cmake} is too old: {version_line(cmake)}", "run `pip install --upgrade cmake`")
    return Toolchain(cc, cxx, cmake, find_build_program("ninja"), version_line(cc))


def find_compiler() -> tuple[Path, Path]:
    """C and C++ compiler: ``$CC`` and ``$CXX`` if set, else the system's. Raises BuildError if one is
    missing.
    """
    return (
        _first("CC", ("cc", "gcc", "clang", "cl"), "C"),
        _first("CXX", ("c++", "g++", "clang++", "cl"), "C++"),
    )


def find_build_program(name: str) -> Path:
    """``cmake`` or ``ninja``: from this Python environment, where they are dependencies, else from PATH."""
    for folder in (sysconfig.get_path("scripts"), None):
        found = shutil.which(name, path=folder)
        if found:
            return Path(found)
    raise BuildError(f"{name} is missing", f"run `pip install {name}`")


def version_line(program: Path) -> str:
    """First line of ``program --version``; empty if it says nothing."""
    result = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return next(iter((result.stdout or result.stderr).splitlines()), "").strip()


def cpu_features() -> list[str]:
    """SIMD features of this CPU as the system names them, sorted; empty where the system does not tell."""
    try:
        if sys.platform == "darwin":
            keys = ("machdep.cpu.features", "machdep.cpu.leaf7_features", "hw.optional.arm")
            text = subprocess.run(["sysctl", *keys], capture_output=True, text=True, check=False).stdout
        else:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            text = next((line for line in lines if re.match(r"flags|Features", line)), "")
    except OSError:
        return []
    return sorted({flag for flag in re.split(r"[\s:]+", text.lower()) if _SIMD_FLAG.match(flag)})


def host_fingerprint(native: bool) -> str:
    """What a build depends on besides its settings: system and CPU kind, and for a native build the CPU's
    features.
    """
    features = " ".join(cpu_features()) if native else ""
    return f"{sys.platform} {platform.machine()} {features}".strip()


def default_jobs() -> int:
    """Compile jobs: one per usable CPU, fewer if memory is short."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return usable
    return max(1, min(usable, memory // _BYTES_PER_JOB))


def _first(variable: str, names: tuple[str, ...], language: str) -> Path:
    configured = os.environ.get(variable)
    for name in (configured,) if configured else names:
        found = shutil.which(name)
        if found:
            return Path(found)
    if configured:
        raise BuildError(
            f"{variable} names the {language} compiler {configured}, which does not exist",
            f"correct or unset {variable}",
        )
    raise BuildError(
        f"no {language} compiler found", _COMPILER_REMEDY.get(sys.platform, _COMPILER_REMEDY["linux"])
    )


_COMPILER_REMEDY = {
    "linux": "install gcc and g++, on Debian or Ubuntu with `sudo apt install build-essential`",
    "darwin": "run `xcode-select --install`",
    "win32": "install the C++ build tools of Visual Studio and use their developer prompt",
}
