"""Builds the whole patched ggml for aarch64 and compares it, in an emulator, with this machine's runtime.

    python tests/cross_ggml.py [--work FOLDER]

Takes some minutes, so it is no part of the tests; those of tests/test_native.py compile the kernels alone.
Needs Debian's g++-aarch64-linux-gnu and qemu-user-static, and a built runtime. Exit status 1 if codes or
outputs differ in a bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from spikequant_gguf.ggml_patch.apply import apply
from spikequant_gguf.ggml_patch.cache import open_cache
from spikequant_gguf.ggml_patch.fetch import find_sdist, unpack
from spikequant_gguf.ggml_patch.progress import SilentProgress
from spikequant_gguf.ggml_patch.toolchain import find_build_program, find_compiler
from spikequant_gguf.ggml_patch.upstream import load_upstream, patch_id
from spikequant_gguf.runtime import require_runtime

PROGRAM = Path(__file__).parent / "native" / "check_ggml.c"
PREFIX = "aarch64-linux-gnu"
LIBRARIES = ("ggml", "ggml-cpu", "ggml-base")
KERNELS = {"aarch64": ("neon", "plain-c"), "host": ("", "plain-c")}


def build_for_aarch64(work: Path) -> Path:
    """The program for aarch64, linked statically."""
    upstream = load_upstream()
    tree = work / "tree"
    if not tree.is_dir():
        unpack(find_sdist(open_cache(), upstream, None, SilentProgress()), tree, upstream, SilentProgress())
    apply(tree)
    source, build = tree / "vendor" / "llama.cpp" / "ggml", work / "cmake"
    (source / "ggml.pc.in").touch()  # left out of the source package, and of no use here
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": f"{PREFIX}-gcc",
        "CMAKE_CXX_COMPILER": f"{PREFIX}-g++",
        "CMAKE_MAKE_PROGRAM": str(find_build_program("ninja")),
        "BUILD_SHARED_LIBS": "OFF",
        "GGML_NATIVE": "OFF",
        "GGML_BUILD_TESTS": "OFF",
        "GGML_BUILD_EXAMPLES": "OFF",
        "SPIKEQUANT_PIN": upstream.version,
        "SPIKEQUANT_PATCH_ID": patch_id(upstream),
    }
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    cmake = find_build_program("cmake")
    subprocess.run(
        [cmake, "-S", source, "-B", build, "-G", "Ninja", *definitions], check=True, stdout=sys.stderr
    )
    subprocess.run([find_build_program("ninja"), "-C", build, *LIBRARIES], check=True, stdout=sys.stderr)
    archives = [build / "src" / f"lib{name}.a" for name in LIBRARIES]
    objects, program = work / "check.o", work / "check-aarch64"
    include = f"-I{source / 'include'}"
    subprocess.run([f"{PREFIX}-gcc", "-O2", include, "-c", PROGRAM, "-o", objects], check=True)
    link = [f"{PREFIX}-g++", objects, *archives, "-fopenmp", "-static", "-o", program]
    subprocess.run(link, check=True, stderr=subprocess.DEVNULL)
    return program


def build_for_host(work: Path) -> Path:
    """The program for this machine, with the libraries of the runtime."""
    folder = require_runtime().library_dir
    program = work / "check-host"
    include = work / "tree" / "vendor" / "llama.cpp" / "ggml" / "include"
    libraries = [f"-l{name}" for name in LIBRARIES]
    command = [find_compiler()[0], "-O2", f"-I{include}", PROGRAM, f"-L{folder}", *libraries]
    subprocess.run([*command, f"-Wl,-rpath,{folder}", "-o", program], check=True)
    return program


def run(command: list[str | Path], kernel: str) -> str:
    environment = {**os.environ, "SPIKEQUANT_FORCE_ISA": kernel}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder to keep tree and objects in")
    options = parser.parse_args()
    missing = [name for name in (f"{PREFIX}-g++", "qemu-aarch64-static") if shutil.which(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing; on Debian: apt install g++-{PREFIX} qemu-user-static")
        return 1
    with tempfile.TemporaryDirectory(prefix="spikequant-") as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        commands = {
            "aarch64": ["qemu-aarch64-static", build_for_aarch64(work)],
            "host": [build_for_host(work)],
        }
        found = {
            (name, kernel): run(command, kernel)
            for name, command in commands.items()
            for kernel in KERNELS[name]
        }
    for (name, kernel), text in found.items():
        print(f"{name} {kernel or 'best kernel'}\n{text}", end="")
    return 0 if len(set(found.values())) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
