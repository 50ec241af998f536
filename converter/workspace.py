"""A folder for temporary files beside the output, removed whatever happens.

A conversion that was killed leaves its folder behind; the next one in the same place removes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spikequant_gguf.errors import OutputError

from .system import RENAMES_OPEN_FILES, try_lock

__all__ = ["workspace"]

_PREFIX = ".spikequant-"
_LOCK = "lock"


@contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`. Raises OutputError if it cannot be made."""
    _remove_abandoned(parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise OutputError(
            f"no temporary folder can be made in {parent}: {error.strerror}",
            "write to another folder with -o",
        ) from error
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try_lock(lock)
        yield folder
    finally:
        _remove(folder, lock)


def _remove_abandoned(parent: Path) -> None:
    """Removes the folders that nobody holds a lock on any more."""
    if not parent.is_dir():
        return
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR)
            if try_lock(lock):
                _remove(folder, lock)
            else:
                os.close(lock)


def _remove(folder: Path, lock: int) -> None:
    """Removes the folder while its lock is held, where an open file can be removed."""
    if not RENAMES_OPEN_FILES:
        os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)
    if RENAMES_OPEN_FILES:
        os.close(lock)
