"""Builds the patched libraries for another system; compares them, in an emulator, with this machine's.

    python tests/cross_build.py aarch64 [--work FOLDER]     # ggml and the whole llama library
    python tests/cross_build.py windows [--work FOLDER]     # the kernels alone, then the DLLs of ggml

Takes some minutes, so it is no part of the tests; those of tests/test_native.py compile the kernels alone.
Needs a built runtime and, for aarch64, Debian's g++-aarch64-linux-gnu and qemu-user-static; for Windows
g++-mingw-w64-x86-64 and wine64. Codes and outputs of products must agree to the bit; the logits of a tiny
spike model, between whose layers other compilers round otherwise, to rounding. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import native_build
import numpy as np
from tiny_model import write_tiny_model

from spikequant_gguf.converter import ConvertOptions, convert
from spikequant_gguf.ggml_patch.apply import apply
from spikequant_gguf.ggml_patch.cache import open_cache
from spikequant_gguf.ggml_patch.fetch import find_sdist, unpack
from spikequant_gguf.ggml_patch.progress import SilentProgress
from spikequant_gguf.ggml_patch.toolchain import default_jobs, find_build_program, find_compiler
from spikequant_gguf.ggml_patch.upstream import load_upstream, patch_id
from spikequant_gguf.runtime import require_runtime

NATIVE = Path(__file__).parent / "native"
GGML = ("ggml", "ggml-cpu", "ggml-base")
N_TOKENS = 24
MOST_LOGIT_DIFFERENCE = 1e-3  # of the norm


@dataclass(frozen=True)
class Target:
    """A system to build for.

    Attributes:
        architecture: of its CPU.
        prefix: of its compilers' names.
        emulator: runs its programs.
        packages: of Debian, that hold both.
        kernels: to be compared; "" for the one that the library chooses.
        libraries: to build, in the order that a linker wants.
        settings: of CMake, besides those of all targets.
        flags: of the linker.
        environment: of the emulator.
    """

    architecture: str
    prefix: str
    emulator: str
    packages: str
    kernels: tuple[str, ...]
    libraries: tuple[str, ...]
    settings: dict[str, str]
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


TARGETS = {
    "aarch64": Target(
        "aarch64",
        "aarch64-linux-gnu",
        "qemu-aarch64-static",
        "g++-aarch64-linux-gnu qemu-user-static",
        ("neon", "plain-c"),
        ("llama", *GGML),
        {
            "CMAKE_SYSTEM_NAME": "Linux",
            "CMAKE_SYSTEM_PROCESSOR": "aarch64",
            "BUILD_SHARED_LIBS": "OFF",
        },
        ("-fopenmp", "-static"),
    ),
    # The DLLs of ggml are what our sources are in, and what they must export symbols from and to.
    "windows": Target(
        "x86_64",
        "x86_64-w64-mingw32",
        "wine",
        "g++-mingw-w64-x86-64-posix wine64",
        ("", "plain-c"),
        GGML,
        {
            "CMAKE_SYSTEM_NAME": "Windows",
            "CMAKE_SYSTEM_PROCESSOR": "AMD64",
            "BUILD_SHARED_LIBS": "ON",
            "GGML_OPENMP": "OFF",  # its threads are then ggml's own, as with Microsoft's compiler
            "CMAKE_SHARED_LINKER_FLAGS": "-static",
        },
        ("-static",),
        {"WINEDEBUG": "-all", "WINEARCH": "win64"},
    ),
}


def build(target: Target, work: Path) -> dict[str, Path]:
    """Libraries and programs of another system; the programs by their names."""
    upstream = load_upstream()
    tree = work / "tree"
    if not tree.is_dir():
        unpack(find_sdist(open_cache(), upstream, None, SilentProgress()), tree, upstream, SilentProgress())
    apply(tree)
    source, folder = tree / "vendor" / "llama.cpp", work / f"cmake-{target.prefix}"
    settings = target.settings | {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_C_COMPILER": f"{target.prefix}-gcc",
        "CMAKE_CXX_COMPILER": f"{target.prefix}-g++",
        "CMAKE_MAKE_PROGRAM": str(find_build_program("ninja")),
        "CMAKE_RUNTIME_OUTPUT_DIRECTORY": str(folder / "bin"),
        "CMAKE_ARCHIVE_OUTPUT_DIRECTORY": str(folder / "bin"),
        "GGML_NATIVE": "OFF",
        "GGML_CCACHE": "OFF",
        "LLAMA_BUILD_COMMON": "OFF",
        "LLAMA_BUILD_TOOLS": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_SERVER": "OFF",
        "LLAMA_CURL": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_COMMIT": upstream.llama_cpp_commit,
        "LLAMA_BUILD_NUMBER": "0",
        "SPIKEQUANT_PIN": upstream.version,
        "SPIKEQUANT_PATCH_ID": patch_id(upstream),
    }
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    cmake, ninja = find_build_program("cmake"), find_build_program("ninja")
    subprocess.run(
        [cmake, "-S", source, "-B", folder, "-G", "Ninja", *definitions], check=True, stdout=sys.stderr
    )
    compile_all = [ninja, "-C", folder, "-j", str(default_jobs()), *target.libraries]
    subprocess.run(compile_all, check=True, stdout=sys.stderr)
    found = [path for path in (folder / "bin").iterdir() if path.suffix == ".a"]
    archives = [
        next(path for path in found if path.name in (f"lib{name}.a", f"lib{name}.dll.a", f"{name}.dll.a"))
        for name in target.libraries
    ]
    programs = {}
    for name in programs_of(target):
        objects, programs[name] = folder / f"{name}.o", folder / "bin" / f"{name}.exe"
        compiler = [f"{target.prefix}-gcc", "-O2", *includes(tree), "-c", NATIVE / f"{name}.c", "-o", objects]
        subprocess.run(compiler, check=True)
        link = [f"{target.prefix}-g++", objects, *archives, *target.flags, "-o", programs[name]]
        subprocess.run(link, check=True, stderr=subprocess.DEVNULL)
    return programs


def build_for_host(target: Target, work: Path) -> dict[str, Path]:
    """The same programs for this machine, with the libraries of the runtime."""
    folder = require_runtime().library_dir
    programs = {}
    for name in programs_of(target):
        programs[name] = work / f"{name}-host"
        libraries = [f"-l{library}" for library in target.libraries]
        command = [find_compiler()[0], "-O2", *includes(work / "tree"), NATIVE / f"{name}.c", f"-L{folder}"]
        command += [*libraries, f"-Wl,-rpath,{folder}", "-o", programs[name]]
        subprocess.run(command, check=True)
    return programs


def programs_of(target: Target) -> list[str]:
    return ["check_ggml", *(["check_llama"] if "llama" in target.libraries else [])]


def includes(tree: Path) -> list[str]:
    source = tree / "vendor" / "llama.cpp"
    return [f"-I{source / 'ggml' / 'include'}", f"-I{source / 'include'}"]


def run(command: list[str | Path], kernel: str, **environment: str) -> str:
    environment = {**os.environ, **environment, "SPIKEQUANT_FORCE_ISA": kernel}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.replace("\r", "")


def compare_kernels(target: Target, work: Path) -> bool:
    """The kernels without ggml against plain C there, and the encoder's codes against those here."""
    settings = {name: value for name, value in target.settings.items() if name.startswith("CMAKE_SYSTEM")}
    settings |= {"CMAKE_C_COMPILER": f"{target.prefix}-gcc", "CMAKE_EXE_LINKER_FLAGS": "-static"}
    options = tuple(f"-D{name}={value}" for name, value in settings.items())
    foreign = native_build.Target(target.architecture, options, "", (target.emulator,))
    here = native_build.target_of(native_build.host_architecture())
    folders = {
        place: native_build.build(each, work / f"native-{each.architecture}-{place}")
        for place, each in (("there", foreign), ("here", here))
    }
    digests, sound = set(), True
    for place, runner in (("there", foreign.run), ("here", here.run)):
        for kernel in native_build.KERNELS[target.architecture if place == "there" else here.architecture]:
            if not native_build.cpu_runs(kernel):
                print(f"kernels {place}, {kernel}: NOT RUN, this CPU lacks it")
                continue
            suffix = ".exe" if place == "there" and target.emulator == "wine" else ""
            for name in ("check_kernels", "check_prompts"):
                text = run(
                    [*runner, folders[place] / f"{name}{suffix}", kernel], kernel, **target.environment
                )
                found = re.findall(r"^(\w+) (\d+) wrong (\d+) ?(.*)$", text, re.M)
                sound &= bool(found) and all(int(wrong) == 0 < int(number) for _, number, wrong, _ in found)
                digests |= {rest for subject, _, _, rest in found if subject == "encoder"}
                compared = ", ".join(f"{number} {subject}" for subject, number, _, _ in found)
                print(f"kernels {place}, {kernel}: {compared}")
    return sound and len(digests) == 1


def compare_products(target: Target, programs: dict[str, Path], host: dict[str, Path]) -> bool:
    """Codes and outputs of the other system against this machine's, which must be the same bytes."""
    found = {("here", kernel): run([host["check_ggml"]], kernel) for kernel in ("", "plain-c")}
    for kernel in target.kernels:
        command = [target.emulator, programs["check_ggml"]]
        found["there", kernel] = run(command, kernel, **target.environment)
    for (place, kernel), text in found.items():
        print(f"products {place}, {kernel or 'best kernel'}:\n{text}", end="")
    return len(set(found.values())) == 1


def compare_models(target: Target, programs: dict[str, Path], host: dict[str, Path], work: Path) -> bool:
    """Logits and greedy tokens of a tiny spike model."""
    model = work / "tiny-SPK4.gguf"
    if not model.is_file():
        floats = write_tiny_model(work / "tiny-F32.gguf")
        convert(floats, model, ConvertOptions(tensor_types=("token_embd=f32", "^output=f32")))
    commands: dict[str, list[str | Path]] = {
        "here": [host["check_llama"], model, str(N_TOKENS)],
        "there": [target.emulator, programs["check_llama"], model, str(N_TOKENS)],
    }
    logits, tokens = {}, {}
    for place, command in commands.items():
        lines = dict(line.split(" ", 1) for line in run(command, "", **target.environment).splitlines())
        logits[place], tokens[place] = np.array(lines["logits"].split(), float), lines["tokens"]
        print(f"tokens {place}: {tokens[place]}")
    difference = np.linalg.norm(logits["there"] - logits["here"]) / np.linalg.norm(logits["here"])
    print(f"logits differ by {difference:.1e} of their norm")
    return tokens["here"] == tokens["there"] and difference < MOST_LOGIT_DIFFERENCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--work", type=Path, help="folder to keep tree and objects in")
    options = parser.parse_args()
    target = TARGETS[options.target]
    missing = [name for name in (f"{target.prefix}-g++", target.emulator) if shutil.which(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing; on Debian: apt install {target.packages}")
        return 1
    with tempfile.TemporaryDirectory(prefix="spikequant-") as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target = replace(target, environment=target.environment | {"WINEPREFIX": str(work / "wine")})
        same = compare_kernels(target, work)
        programs, host = build(target, work), build_for_host(target, work)
        same &= compare_products(target, programs, host)
        if "check_llama" in programs:
            same &= compare_models(target, programs, host, work)
    print("the same" if same else "NOT the same")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
