"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError, OutputError

__all__ = ["atomic_path", "check_writable", "file_sha256"]

_CHUNK_BYTES = 1 << 20


def check_writable(path: Path, force: bool) -> None:
    """Raises OutputError if `path` exists and `force` is not set, or if its folder does not exist."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "give the path of a file with -o")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already", "give --force to replace it, or another path with -o")
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}", "create it, or give another path with -o")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end it is renamed to `path`, or after an error removed.

    Raises:
        OutputError: instead of any OSError in the block, with its reason.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space on that disk" if full else "check the folder and its permissions"
        raise OutputError(f"cannot write {path}: {error.strerror or error}", remedy) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def file_sha256(path: Path, advance: Callable[[int, int], None] | None = None) -> str:
    """sha256 of a file. advance: called with (bytes done, all bytes). Raises InputError."""
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                if advance is not None:
                    advance(file.tell(), size)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder durable, where the system can."""
    with suppress(OSError):  # not all systems can open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
