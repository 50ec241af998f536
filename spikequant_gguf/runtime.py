"""Find, check and load the patched llama-cpp-python.

The check happens before any model loads, because Python code and libraries that do not belong together crash
instead of failing. Nothing here needs llama_cpp at import time.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .errors import RuntimeMissingError
from .ggml_patch.cache import open_cache
from .ggml_patch.package import RUNTIME_MANIFEST, library_file, program_file
from .ggml_patch.upstream import load_releases, patch_id

if TYPE_CHECKING:
    from .native import NativeLibrary

__all__ = [
    "ABI",
    "RuntimeInfo",
    "converter_script",
    "find_runtime",
    "import_llama_cpp",
    "native",
    "require_runtime",
    "tool",
]

ABI = 1
"""Version of the C interface (`ggml_patch/spike/spike.h`) that this package is written for."""

_LIBRARY_PATH_VARIABLE = "LLAMA_CPP_LIB_PATH"
_BUILD = "run `spikequant build`"


@dataclass(frozen=True)
class RuntimeInfo:
    """What is installed, and what is wrong with it.

    ``patched`` is true if the libraries carry any SpikeQuant patch; ``problem`` is None if they can be used.
    ``kernel`` names the kernel of the CPU backend; ``build`` is the folder in the build cache.
    """

    llama_cpp_version: str | None
    library_dir: Path | None
    abi: int | None
    patch_id: str | None
    pin: str | None
    kernel: str | None
    patched: bool
    problem: str | None
    remedy: str | None
    build: Path | None = None

    def to_json(self) -> dict:
        """The facts as plain JSON types."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }


def find_runtime() -> RuntimeInfo:
    """Look at the llama-cpp-python of this environment without importing it; never raises for a bad one."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return _unusable("llama-cpp-python is not installed", _BUILD)
    package = Path(spec.origin).parent
    version = _python_version(package)
    configured = os.environ.get(_LIBRARY_PATH_VARIABLE)
    library_dir = Path(configured) if configured else package / "lib"
    base = library_dir / library_file("ggml-base")
    remedy = f"unset {_LIBRARY_PATH_VARIABLE}, or {_BUILD}" if configured else _BUILD
    if not base.is_file():
        return _unusable(
            f"llama-cpp-python {version} has no {base.name} in {library_dir}", remedy, version, library_dir
        )
    try:
        facts = _library_facts(library_dir)
    except OSError as error:
        return _unusable(
            f"the libraries of llama-cpp-python {version} cannot be loaded: {error}",
            remedy,
            version,
            library_dir,
        )
    abi, identity, pin, kernel = facts
    problem = _mismatch(version, abi, identity, pin)
    return RuntimeInfo(
        version,
        library_dir,
        abi,
        identity,
        pin,
        kernel,
        patched=abi is not None,
        problem=problem,
        remedy=remedy if problem else None,
        build=_build_folder(library_dir),
    )


def require_runtime() -> RuntimeInfo:
    """The runtime, if it is exactly the one that this package needs; else RuntimeMissingError says what is
    wrong.
    """
    info = find_runtime()
    if info.problem is not None:
        raise RuntimeMissingError(info.problem, info.remedy)
    return info


def import_llama_cpp() -> ModuleType:
    """The module llama_cpp, after checking that it is the patched one. Raises RuntimeMissingError."""
    require_runtime()
    return importlib.import_module("llama_cpp")


def native() -> NativeLibrary:
    """The libraries' own functions, see native.NativeLibrary. Raises RuntimeMissingError."""
    from .native import load  # native.py needs this module

    return load()


def tool(name: str) -> Path:
    """Path of a llama.cpp program from the same tree, one of compile.TOOLS.

    Raises RuntimeMissingError if the build cache does not hold it any more.
    """
    return _from_build(Path("bin") / program_file(name), name)


def converter_script() -> Path:
    """Path of convert_hf_to_gguf.py from the same tree, with conversion/ and gguf-py/ beside it. Raises as
    `tool`.
    """
    return _from_build(Path("converter") / "convert_hf_to_gguf.py", "llama.cpp's converter")


def _from_build(path: Path, what: str) -> Path:
    info = require_runtime()
    if info.build is None or not (info.build / path).is_file():
        place = info.build or open_cache().root
        neighbour = info.pin != load_releases()[0].version
        remedy = f"run `spikequant build --release {info.pin}`" if neighbour else _BUILD
        raise RuntimeMissingError(f"{what} is missing in the build cache ({place})", remedy)
    return info.build / path


def _build_folder(library_dir: Path) -> Path | None:
    """Folder of the build in the cache: as recorded, or by its key if the cache has moved."""
    try:
        manifest = json.loads((library_dir / RUNTIME_MANIFEST).read_text(encoding="utf-8"))
        recorded = manifest.get("build")
        if recorded is not None and Path(recorded).is_dir():
            return Path(recorded)
        return open_cache().build(manifest["key"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _python_version(package: Path) -> str | None:
    """Version of the Python files, which is what the ctypes structures follow."""
    try:
        text = (package / "__init__.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^__version__\s*=\s*[\"']([^\"']+)", text, re.MULTILINE)
    return found.group(1) if found else None


def _library_facts(library_dir: Path) -> tuple[int | None, str | None, str | None, str | None]:
    """(abi, patch id, pin, kernel) as the libraries report them; all None if they are unpatched."""
    base = ctypes.CDLL(str(library_dir / library_file("ggml-base")))
    if not hasattr(base, "spikequant_abi"):
        return None, None, None, None
    cpu = ctypes.CDLL(str(library_dir / library_file("ggml-cpu")))
    texts = []
    for library, name in (
        (base, "spikequant_patch_id"),
        (base, "spikequant_pin"),
        (cpu, "spikequant_kernel"),
    ):
        function = getattr(library, name, None)
        if function is not None:
            function.restype, function.argtypes = ctypes.c_char_p, ()
        texts.append(function().decode() if function is not None else None)
    return base.spikequant_abi(), *texts


def _mismatch(version: str | None, abi: int | None, identity: str | None, pin: str | None) -> str | None:
    """One sentence about what does not fit this package, naming both sides; None if everything fits."""
    releases = {upstream.version: upstream for upstream in load_releases()}
    if version not in releases:
        return (
            f"llama-cpp-python {version} is installed, but this package is made for {' or '.join(releases)}"
        )
    expected = patch_id(releases[version])
    if abi is None:
        return f"llama-cpp-python {version} is installed without the SpikeQuant patch {expected}"
    if abi != ABI:
        return f"the installed runtime has SpikeQuant ABI {abi}, but this package needs ABI {ABI}"
    if pin != version:
        return f"the libraries are built from llama-cpp-python {pin}, but its Python files are {version}"
    if identity != expected:
        return (
            f"the installed runtime is built from patch {identity}, but this package carries patch {expected}"
        )
    return None


def _unusable(
    problem: str, remedy: str, version: str | None = None, library_dir: Path | None = None
) -> RuntimeInfo:
    return RuntimeInfo(
        version, library_dir, None, None, None, None, patched=False, problem=problem, remedy=remedy
    )
