"""Kernels and encoder compiled without ggml (tests/native), for this machine or for aarch64."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from spikequant_gguf.ggml_patch.toolchain import cpu_features, find_toolchain

SOURCE = Path(__file__).parent / "native"
DEBIAN_PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static"
KERNELS = {"x86_64": ("plain-c", "avx2", "avx512"), "aarch64": ("plain-c", "neon")}
_NEEDED = {"avx2": ("avx2",), "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512vbmi2")}


def host_architecture() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def cpu_runs(kernel: str) -> bool:
    """Whether this CPU has what an x86 kernel needs; others always run."""
    present = {feature.replace("_", "") for feature in cpu_features()}
    return present.issuperset(_NEEDED.get(kernel, ()))


@dataclass(frozen=True)
class Target:
    """Programs that compile, disassemble and run for an architecture."""

    architecture: str
    cmake_options: tuple[str, ...]
    objdump: str
    run: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        """Names of programs that are not installed."""
        compiler = [option.partition("=")[2] for option in self.cmake_options if "COMPILER=" in option]
        return [name for name in (*compiler, self.objdump, *self.run[:1]) if shutil.which(name) is None]


@cache
def target_of(architecture: str) -> Target:
    """This machine's own programs, or Debian's cross compiler and emulator for aarch64."""
    if architecture in (host_architecture(), "host"):
        return Target(architecture, (), "objdump", ())
    prefix = "aarch64-linux-gnu"
    emulators = ("qemu-aarch64-static", "qemu-aarch64")
    emulator = next((name for name in emulators if shutil.which(name)), emulators[0])
    options = (
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_C_COMPILER={prefix}-gcc",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    return Target("aarch64", options, f"{prefix}-objdump", (emulator,))


def build(
    target: Target,
    folder: Path,
    sanitizers: str = "",
    *,
    source: Path = SOURCE,
    options: tuple[str, ...] = (),
) -> Path:
    """Compile into the folder, with the flags of a release; returns the folder. Fails with the compiler's
    words. sanitizers: as the compiler's -fsanitize takes them. options: more of them for CMake.
    """
    tools = find_toolchain()
    settings = [
        f"-DCMAKE_MAKE_PROGRAM={tools.ninja}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DSANITIZE={sanitizers}",
        *target.cmake_options,
        *options,
    ]
    for command in (
        [tools.cmake, "-S", source, "-B", folder, "-G", "Ninja", *settings],
        [tools.cmake, "--build", folder],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder
