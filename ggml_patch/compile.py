"""Configure and compile the unpacked tree: one CMake project for the libraries and the tools."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from spikequant_gguf.errors import BuildError

from .cache import make_folder, remove_folder
from .progress import Progress
from .toolchain import Toolchain
from .upstream import Upstream

TOOLS = (
    *("llama-quantize", "llama-perplexity", "llama-bench", "llama-imatrix"),
    *("llama-gguf-split", "ggml-rpc-server"),
)
_LIBRARY_TARGETS = ("llama", "mtmd")


@dataclass(frozen=True)
class Variant:
    """What to compile. ``patch_id`` is None for the unpatched build, which has only the llama library.
    ``library_only``: without llama.cpp's programs, for a wheel to hand on.
    """

    patch_id: str | None
    portable: bool
    library_only: bool = False

    @property
    def name(self) -> str:
        """``patched`` or ``unpatched``: part of folder names."""
        return "unpatched" if self.patch_id is None else "patched"

    @property
    def tools(self) -> tuple[str, ...]:
        return () if self.patch_id is None or self.library_only else TOOLS

    @property
    def targets(self) -> tuple[str, ...]:
        return ("llama",) if self.patch_id is None else (*_LIBRARY_TARGETS, *self.tools)

    def settings(self, upstream: Upstream) -> dict[str, str]:
        """CMake cache variables, without paths and without the patch id: part of the key of a build."""
        patched = self.patch_id is not None
        # Layers on other machines: a small library, which does nothing until a server is named.
        remote = {"GGML_RPC": "ON", "GGML_RPC_RDMA": "OFF"} if patched else {}
        return remote | {
            "CMAKE_BUILD_TYPE": "Release",
            # One file per library, named as it is linked and as Python loads it. With libggml.so and
            # libggml.so.0 side by side a process would hold two copies with two backend registries.
            "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
            "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
            "GGML_NATIVE": "OFF" if self.portable else "ON",
            "GGML_CCACHE": "OFF",
            "LLAMA_BUILD": "ON",
            # libmtmd comes from vendor/llama.cpp/tools; LLAVA_BUILD would define it a second time.
            "LLAVA_BUILD": "OFF",
            "LLAMA_BUILD_TOOLS": "ON" if patched else "OFF",
            "LLAMA_TOOLS_INSTALL": "OFF",
            "LLAMA_BUILD_TESTS": "OFF",
            "LLAMA_BUILD_EXAMPLES": "OFF",
            "LLAMA_BUILD_SERVER": "OFF",
            "LLAMA_CURL": "OFF",
            "LLAMA_OPENSSL": "OFF",
            # Otherwise CMake asks git, which may answer for a repository around the cache.
            "LLAMA_BUILD_COMMIT": upstream.llama_cpp_commit,
            "LLAMA_BUILD_NUMBER": "0",
        }


def compile_tree(
    tree: Path,
    folder: Path,
    variant: Variant,
    upstream: Upstream,
    toolchain: Toolchain,
    jobs: int,
    progress: Progress,
) -> Path:
    """Compile ``tree`` in ``folder``; returns the folder that holds libraries and programs.

    An interrupted compilation goes on where it stopped. Raises BuildError with the first compiler error.
    """
    _forget_other_place(folder, tree)
    make_folder(folder)
    log = folder.with_name(folder.name + ".log")
    with log.open("w", encoding="utf-8", buffering=1) as record:
        progress.step("configure", f"{toolchain.compiler}, {'portable' if variant.portable else 'native'}")
        _run(_configure_command(tree, folder, variant, upstream, toolchain), record, log, progress)
        progress.step("compile", "libraries and tools" if variant.tools else "llama library")
        command = [str(toolchain.ninja), "-C", str(folder), "-j", str(jobs), *variant.targets]
        _run(command, record, log, progress)
    return folder / "bin"


def _forget_other_place(folder: Path, tree: Path) -> None:
    """Removes what CMake left there if the cache has moved since: it refuses to go on elsewhere."""
    try:
        text = (folder / "CMakeCache.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    found = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", text, re.MULTILINE)
    if found is None or Path(found.group(1)) != tree:
        remove_folder(folder)


def _configure_command(
    tree: Path, folder: Path, variant: Variant, upstream: Upstream, toolchain: Toolchain
) -> list[str]:
    settings = (
        variant.settings(upstream)
        | _system_settings(toolchain)
        | {
            "CMAKE_C_COMPILER": str(toolchain.cc),
            "CMAKE_CXX_COMPILER": str(toolchain.cxx),
            "CMAKE_MAKE_PROGRAM": str(toolchain.ninja),
            # Only names an install destination; nothing is installed by CMake.
            "SKBUILD_PLATLIB_DIR": str(folder / "platlib"),
        }
    )
    if variant.patch_id is not None:
        settings |= {"SPIKEQUANT_PATCH_ID": variant.patch_id, "SPIKEQUANT_PIN": upstream.version}
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    return [str(toolchain.cmake), "-S", str(tree), "-B", str(folder), "-G", "Ninja", *definitions]


def _system_settings(toolchain: Toolchain) -> dict[str, str]:
    """What a system's linker wants besides: GCC's own DLLs are on few Windows machines, and CMake knows
    relative places of libraries (CMAKE_BUILD_RPATH_USE_ORIGIN) for ELF alone.
    """
    flags = ""
    if sys.platform == "win32" and re.search(r"\bgcc|\(GCC\)|mingw", toolchain.compiler, re.I):
        flags = "-static"
    elif sys.platform == "darwin":
        flags = "-Wl,-rpath,@loader_path"
    if not flags:
        return {}
    flags = f"{flags} {os.environ.get('LDFLAGS', '')}".strip()
    return {"CMAKE_SHARED_LINKER_FLAGS": flags, "CMAKE_EXE_LINKER_FLAGS": flags}


def _run(command: list[str], record: object, log: Path, progress: Progress) -> None:
    """Run a build program, its output in the log; ninja's counter becomes progress."""
    environment = os.environ | {"NINJA_STATUS": "[%f/%t] "}
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as process:
        try:
            for line in process.stdout or ():
                record.write(line)
                lines.append(line.rstrip())
                if counted := re.match(r"\[(\d+)/(\d+)\] ", line):
                    progress.advance(int(counted.group(1)), int(counted.group(2)))
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        program = Path(command[0]).name
        raise BuildError(f"{program} failed: {_first_error(lines)}", f"the whole output is in {log}")


def _first_error(lines: list[str]) -> str:
    """The line that says what went wrong: of a compiler, of CMake (which breaks its sentences), or the last
    one.
    """
    for at, line in enumerate(lines):
        if re.search(r"\berror\b[: ]", line, re.IGNORECASE) and not line.startswith(("[", "FAILED")):
            following = next((text.strip() for text in lines[at + 1 :] if text.strip()), "")
            return f"{line} {following}" if line.startswith("CMake Error") else line
    return next((line for line in reversed(lines) if line), "no output")
