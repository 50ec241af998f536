"""What a partial output file holds: the fingerprint of its conversion, and every tensor that is complete.

The journal lies beside the partial file. A line is written when a tensor is on disk, so that the next run can
go on with what a stopped conversion left; it compares the fingerprint, and reads every tensor again before it
trusts a line. Each line starts with a check sum of the rest: a damaged one ends the journal there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .system import BINARY

__all__ = ["Fingerprint", "Journal", "TensorRecord", "decode_line", "encode_line", "write_all"]

Fingerprint = Mapping[str, str]
"""What the result of a conversion depends on: digests and facts by name."""

_CHECK_DIGITS = 16


@dataclass(frozen=True)
class TensorRecord:
    """What has been written of a tensor.

    Attributes:
        name: of the tensor.
        offset: of its data, from the start of the file.
        n_bytes: size of its data.
        sha256: of its data.
        details: what the writer wants to know of it when the conversion goes on.
    """

    name: str
    offset: int
    n_bytes: int
    sha256: str
    details: Mapping[str, float] = field(default_factory=dict)


class Journal:
    """The journal of one partial file, which its writer has locked. OSError from every method.

    Attributes:
        fingerprint: of the conversion that began the partial file; None if there is no journal of one.
        records: of its complete tensors, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint: Fingerprint | None = None
        self.records: list[TensorRecord] = []
        self._ends: list[int] = []  # of the lines: the fingerprint's, then those of the records
        self._file = -1

    def read(self) -> None:
        """Reads what a killed conversion left, as far as it is sound."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return
        end = 0
        for line in lines:
            end += len(line)
            try:
                entry = decode_line(line)
                if self.fingerprint is None:
                    self.fingerprint = {str(key): str(value) for key, value in entry["fingerprint"].items()}
                else:
                    self.records.append(TensorRecord(**entry))
            except (ValueError, TypeError, KeyError, AttributeError):
                return
            self._ends.append(end)

    def start(self, fingerprint: Fingerprint) -> None:
        """Begins a new journal, whatever there is."""
        self._open()
        os.ftruncate(self._file, 0)
        self.fingerprint, self.records, self._ends = dict(fingerprint), [], [0]
        self._append({"fingerprint": self.fingerprint})

    def go_on(self, n_records: int) -> None:
        """Keeps the first n_records of those that were read; more may follow."""
        self._open()
        del self.records[n_records:], self._ends[n_records + 1 :]
        os.ftruncate(self._file, self._ends[-1])
        os.lseek(self._file, 0, os.SEEK_END)

    def add(self, record: TensorRecord) -> None:
        """Writes a record, of data that are on disk already."""
        self._append(asdict(record))
        self.records.append(record)

    def delete(self) -> None:
        """Removes the journal if there is one."""
        self.close()
        with suppress(OSError):
            os.unlink(self.path)

    def close(self) -> None:
        if self._file >= 0:
            with suppress(OSError):
                os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)

    def _append(self, entry: Mapping[str, object]) -> None:
        write_all(self._file, encode_line(entry))
        os.fsync(self._file)


def write_all(file: int, data: bytes | memoryview) -> None:
    """os.write until everything is written. Raises OSError."""
    rest = memoryview(data)
    while rest:
        written = os.write(file, rest)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rest = rest[written:]


def encode_line(entry: Mapping[str, object]) -> bytes:
    """A line with its check sum."""
    text = json.dumps(entry).encode()
    return _check(text) + b" " + text + b"\n"


def decode_line(line: bytes) -> dict:
    """The entry of a line. Raises ValueError if it is damaged."""
    check, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or check != _check(text[:-1]):
        raise ValueError("a damaged line")
    return json.loads(text)


def _check(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_CHECK_DIGITS].encode()
