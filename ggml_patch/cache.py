"""Where builds live, and the key that decides whether one can be used again.

    sdist/                       the downloaded source package
    work/<variant>-<settings>/   unpacked tree and CMake folder; removed after a build unless asked otherwise
    builds/<key>/                finished: python/ (importable package and wheel contents), wheel, bin/,
    converter/

A build's ``build.json`` is written before its folder gets its final name; so a folder below ``builds/`` is
complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from spikequant_gguf.errors import OutputError

CACHE_VARIABLE = "SPIKEQUANT_CACHE"
MANIFEST = "build.json"


@dataclass(frozen=True)
class Cache:
    """The folders of one cache root."""

    root: Path

    @property
    def sdists(self) -> Path:
        return self.root / "sdist"

    def work(self, name: str) -> Path:
        return self.root / "work" / name

    def build(self, key: str) -> Path:
        return self.root / "builds" / key

    def finished(self, key: str) -> dict | None:
        """Manifest of the finished build with this key, or None."""
        try:
            return json.loads((self.build(key) / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def builds(self) -> list[dict]:
        """Manifests of all finished builds, newest first."""
        found = []
        for file in (self.root / "builds").glob(f"*/{MANIFEST}"):
            manifest = self.finished(file.parent.name)
            if manifest is not None:
                found.append((file.stat().st_mtime, manifest))
        return [manifest for _, manifest in sorted(found, key=lambda entry: entry[0], reverse=True)]

    def size(self) -> int:
        """Bytes used on disk, each hard-linked file counted once."""
        sizes = {}
        for folder, _, files in os.walk(self.root):
            for name in files:
                try:
                    status = os.lstat(os.path.join(folder, name))
                except FileNotFoundError:
                    continue
                sizes[(status.st_dev, status.st_ino or (folder, name))] = status.st_size
        return sum(sizes.values())

    @contextmanager
    def lock(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the cache; calls ``waiting`` once if another build holds it. Freed by the system if we die."""
        make_folder(self.root)
        lock = filelock.FileLock(self.root / "lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def open_cache() -> Cache:
    """The cache at ``$SPIKEQUANT_CACHE``, else in the user's cache folder. Creates nothing."""
    configured = os.environ.get(CACHE_VARIABLE)
    root = (
        Path(configured).expanduser()
        if configured
        else Path(platformdirs.user_cache_dir("spikequant-gguf", False))
    )
    return Cache(root.absolute())


def make_folder(path: Path) -> Path:
    """Create a folder with its parents. Raises OutputError with the reason if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create {path}: {error.strerror}",
            f"set {CACHE_VARIABLE} to a folder that can be written",
        ) from error
    return path


def remove_folder(path: Path) -> None:
    """Delete a folder and everything in it; a missing one is fine."""
    if path.exists():
        shutil.rmtree(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard link, or a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def short_hash(*parts: str) -> str:
    """16 hex digits that identify these strings in this order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
