"""The blocks of finished tensors in a file: a conversion that was interrupted goes on from there.

The first line names what they depend on. Then a line per tensor, as in the other journal of a conversion
(journal.py), except that it tells its own offset, and after each the blocks. What is not whole, the last one
of an interrupted run, is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.errors import OutputError
from spikequant_gguf.format import BLOCK_SPK4

from .journal import TensorRecord, decode_line, encode_line

__all__ = ["LayerJournal"]


class LayerJournal:
    """A context manager; after it the file is still there, until delete().

    Args:
        path: of the file; None for a temporary one that goes with the process.
        inputs: what the blocks depend on. A file of other inputs is written anew.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path | None, inputs: Mapping[str, object]) -> None:
        self._path = path
        self._found: dict[str, TensorRecord] = {}
        head = encode_line({"fingerprint": dict(inputs)})
        try:
            self._file: IO[bytes] = TemporaryFile() if path is None else path.open("a+b")
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}", "choose another output folder") from error
        self._file.seek(0)
        if self._file.readline() == head:
            self._read_records()
        else:
            self._file.truncate(0)
            self._file.write(head)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __len__(self) -> int:
        return len(self._found)

    def add(self, name: str, blocks: NDArray[np.void]) -> None:
        """Appends BLOCK_SPK4[rows, n_blocks]."""
        data = np.ascontiguousarray(blocks).tobytes()
        digest = hashlib.sha256(data).hexdigest()
        try:
            self._file.seek(0, 2)
            record = TensorRecord(name, self._file.tell(), len(data), digest, {"rows": len(blocks)})
            self._file.write(encode_line(asdict(record)))
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._path}: {error.strerror or error}", "make room on the disk") from error
        self._found[name] = record

    def read(self, name: str) -> NDArray[np.void]:
        """BLOCK_SPK4[rows, n_blocks] of a tensor that is in here."""
        record = self._found[name]
        self._file.seek(record.offset)
        self._file.readline()
        data = self._file.read(record.n_bytes)
        return np.frombuffer(data, BLOCK_SPK4).reshape(int(record.details["rows"]), -1)

    def delete(self) -> None:
        """Removes the file."""
        self._file.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def __enter__(self) -> LayerJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read_records(self) -> None:
        while True:
            end = self._file.tell()
            try:
                record = TensorRecord(**decode_line(self._file.readline()))
                whole = hashlib.sha256(self._file.read(record.n_bytes)).hexdigest() == record.sha256
            except (ValueError, TypeError):
                whole = False
            if not whole or record.offset != end:
                self._file.truncate(end)
                return
            self._found[record.name] = record
