"""Lay out a finished build: the Python package with its libraries, a wheel of it, the tools, llama.cpp's
converter.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from spikequant_gguf.errors import BuildError

from .cache import link_or_copy
from .upstream import Upstream

RUNTIME_MANIFEST = "spikequant.json"
_CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a wheel of the same files is the same file


def library_file(name: str) -> str:
    """File name of a shared library on this system, for example ``libggml-base.so``."""
    if sys.platform == "win32":
        return f"{name}.dll"
    return f"lib{name}.dylib" if sys.platform == "darwin" else f"lib{name}.so"


def program_file(tool: str) -> str:
    """File name of a program on this system, for example ``llama-bench.exe``."""
    return f"{tool}.exe" if sys.platform == "win32" else tool


def stage(tree: Path, binaries: Path, target: Path, tools: tuple[str, ...], upstream: Upstream) -> None:
    """Fill ``target`` with ``python/`` (importable by PYTHONPATH), ``bin/`` and ``converter/``."""
    package = target / "python" / "llama_cpp"
    shutil.copytree(tree / "llama_cpp", package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (package / "lib").mkdir()
    for library in _shared_libraries(binaries):
        if _belongs_to_package(library.name):
            shutil.copy2(library, package / "lib" / library.name)
            if tools:
                link_or_copy(package / "lib" / library.name, target / "bin" / library.name)
        elif tools:
            (target / "bin").mkdir(exist_ok=True)
            shutil.copy2(library, target / "bin" / library.name)
    for tool in tools:
        shutil.copy2(binaries / program_file(tool), target / "bin" / program_file(tool))
    if tools:
        for name in _CONVERTER:
            source = tree / "vendor" / "llama.cpp" / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            (target / "converter").mkdir(exist_ok=True)
            copy(source, target / "converter" / name)
    _write_metadata(tree, target / "python", upstream)


def write_wheel(python: Path, target: Path, upstream: Upstream) -> Path:
    """Zip ``python/`` into an installable wheel in ``target``; returns its path."""
    name = upstream.sdist.removesuffix(".tar.gz")
    info = f"{name}.dist-info"
    files = {
        path.relative_to(python).as_posix(): path for path in sorted(python.rglob("*")) if path.is_file()
    }
    files = {name: path for name, path in files.items() if "__pycache__" not in name}
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    wheel = target / f"{name}-{_wheel_tag()}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry_name, path in files.items():
            content = path.read_bytes()
            _add(archive, entry_name, content, executable=path.suffix in (".so", ".dylib", ".dll"))
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.writerow((entry_name, f"sha256={digest}", len(content)))
        rows.writerow((f"{info}/RECORD", "", ""))
        _add(archive, f"{info}/RECORD", record.getvalue().encode(), executable=False)
    return wheel


def install_wheel(wheel: Path) -> None:
    """Install into the running environment, replacing any llama-cpp-python there. Raises BuildError if pip
    fails.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--force-reinstall",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        reason = next((line for line in lines if line.lower().startswith("error")), lines[-1])
        raise BuildError(
            f"cannot install {wheel.name}: {reason.removeprefix('ERROR: ')}",
            "use a virtual environment that you can write to, with pip in it",
        )


def write_runtime_manifest(python: Path, manifest: dict) -> None:
    """Leave beside the libraries what they were built from, with their sha256."""
    folder = python / "llama_cpp" / "lib"
    libraries = {
        path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != RUNTIME_MANIFEST
    }
    text = json.dumps(manifest | {"libraries": libraries}, indent=1) + "\n"
    (folder / RUNTIME_MANIFEST).write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _shared_libraries(binaries: Path) -> list[Path]:
    suffix = Path(library_file("x")).suffix
    return sorted(path for path in binaries.iterdir() if path.suffix == suffix and not path.is_symlink())


def _belongs_to_package(name: str) -> bool:
    """True for llama, mtmd, ggml and every ggml backend (Metal is a default on macOS); not for the tools' own
    parts.
    """
    stem = Path(name).stem.removeprefix("lib")
    return stem in ("llama", "mtmd", "ggml") or stem.startswith("ggml-")


def _write_metadata(tree: Path, python: Path, upstream: Upstream) -> None:
    info = python / f"{upstream.sdist.removesuffix('.tar.gz')}.dist-info"
    (info / "licenses").mkdir(parents=True)
    shutil.copy2(tree / "PKG-INFO", info / "METADATA")
    shutil.copy2(tree / "LICENSE.md", info / "licenses" / "LICENSE.md")
    shutil.copy2(tree / "vendor" / "llama.cpp" / "LICENSE", info / "licenses" / "LICENSE-llama.cpp")
    text = f"Wheel-Version: 1.0\nGenerator: spikequant-gguf\nRoot-Is-Purelib: false\nTag: {_wheel_tag()}\n"
    (info / "WHEEL").write_text(text, encoding="utf-8")


def _wheel_tag() -> str:
    system = sysconfig.get_platform()
    if sys.platform == "darwin":
        # For this macOS and processor, though the interpreter may be for older ones and for both.
        system = f"macosx_{platform.mac_ver()[0].partition('.')[0]}_0_{platform.machine()}"
    return "py3-none-" + re.sub(r"[-.]", "_", system)


def _add(archive: zipfile.ZipFile, name: str, content: bytes, executable: bool) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (0o755 if executable else 0o644) << 16
    archive.writestr(entry, content)
