"""What systems do differently with open files: locks, reads at a place, renaming."""

from __future__ import annotations

import errno
import os
import threading

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

__all__ = ["BINARY", "RENAMES_OPEN_FILES", "read_at", "try_lock"]

BINARY: int = getattr(os, "O_BINARY", 0)
"""Flag of os.open without which Windows changes line ends."""

RENAMES_OPEN_FILES = os.name != "nt"
"""Whether a file that is open can be renamed and deleted."""

_LOCKED_BYTE = 1 << 62  # far behind the end: on Windows a locked byte cannot be read through another handle
_HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
_seeking = threading.Lock()


def try_lock(file: int) -> bool:
    """Locks an open file until it is closed; False if another process holds it.

    The system frees the lock when its holder dies. True, too, on a file system without locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            _lock_byte(file)
    except OSError as error:
        return error.errno not in _HELD
    return True


def read_at(file: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes from `offset` on, whatever other threads read meanwhile. Raises OSError."""
    if hasattr(os, "pread"):
        return os.pread(file, size, offset)
    return _seek_and_read(file, size, offset)


def _seek_and_read(file: int, size: int, offset: int) -> bytes:
    with _seeking:
        before = os.lseek(file, 0, os.SEEK_CUR)
        try:
            os.lseek(file, offset, os.SEEK_SET)
            return os.read(file, size)
        finally:
            os.lseek(file, before, os.SEEK_SET)


def _lock_byte(file: int) -> None:
    before = os.lseek(file, 0, os.SEEK_CUR)
    try:
        os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    finally:
        os.lseek(file, before, os.SEEK_SET)
