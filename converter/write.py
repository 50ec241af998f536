"""Writes a GGUF file that exists under its name only when it is complete.

    out.gguf.partial            zeros where the header will be, then tensor after tensor
    out.gguf.partial.journal    what is complete of it: name, place and sha256 of each tensor
                                header, fsync, everything read again and compared
    out.gguf                    by renaming; then the folder is synchronized, and the journal removed

A conversion that was killed, interrupted or refused by the system leaves a partial file that no reader takes
for a model, and the same conversion goes on with it. Other errors remove it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from spikequant_gguf.errors import InputError, OutputError, SpikeQuantError
from spikequant_gguf.files import check_writable
from spikequant_gguf.format import BLOCK_SPK4, SPK4_NOT_ROTATED, TYPE_SPK4
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.validation import first_weight_fault

from .fingerprint import DIFFERENCES
from .journal import Fingerprint, Journal, TensorRecord, write_all
from .metadata import RawMetadata, encode_string
from .progress import RESUME, VERIFY, Progress, no_progress
from .system import BINARY, RENAMES_OPEN_FILES, read_at, try_lock

__all__ = ["Layout", "OutputFile", "OutputTensor", "TensorRecord", "check_output", "check_space"]

_MAGIC_AND_VERSION = b"GGUF" + (3).to_bytes(4, "little")
_PARTIAL_SUFFIX = ".partial"
_JOURNAL_SUFFIX = ".journal"
_READ_BYTES = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the file to write. shape: as ggml counts dimensions, inputs first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def n_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape, dtype=object)) // block * size


class Layout:
    """Where everything goes: header, then tensors, each at a multiple of the alignment.

    The header's size must be known before the first tensor is written. So metadata that are not known yet
    must be given with placeholders of the same size.

    Attributes:
        tensors: in their order in the file.
        offsets: of their data, from the start of the file.
        header_bytes: size of the header with its padding.
        file_bytes: size of the whole file.
    """

    def __init__(self, metadata: RawMetadata, tensors: Sequence[OutputTensor], alignment: int) -> None:
        self.tensors = tuple(tensors)
        self.alignment = alignment
        relative, at = [], 0
        for tensor in self.tensors:
            relative.append(at)
            at += self._padded(tensor.n_bytes)
        self._relative = relative
        self.header_bytes = len(self.header(metadata))
        self.offsets = tuple(self.header_bytes + offset for offset in relative)
        self.file_bytes = self.header_bytes + at

    def header(self, metadata: RawMetadata) -> bytes:
        """The header with these metadata, padded."""
        parts = [
            _MAGIC_AND_VERSION,
            len(self.tensors).to_bytes(8, "little"),
            len(metadata).to_bytes(8, "little"),
        ]
        for key, value in metadata.items():
            parts += [encode_string(key), value]
        for tensor, offset in zip(self.tensors, self._relative, strict=True):
            parts += [
                encode_string(tensor.name),
                len(tensor.shape).to_bytes(4, "little"),
                *(size.to_bytes(8, "little") for size in tensor.shape),
                int(tensor.type).to_bytes(4, "little"),
                offset.to_bytes(8, "little"),
            ]
        data = b"".join(parts)
        return data.ljust(self._padded(len(data)), b"\0")

    def padding(self, tensor: OutputTensor) -> bytes:
        """Zeros after the tensor's data."""
        return bytes(self._padded(tensor.n_bytes) - tensor.n_bytes)

    def _padded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment


def check_output(path: Path, force: bool, sources: Iterable[Path] = ()) -> None:
    """Checks before any work is done that a file can be written there.

    Raises:
        OutputError: it exists and force is not set, it or its partial file is one of the sources, or its
            folder does not exist or is not writable.
    """
    another = "give another output path with -o"
    try:
        for source in sources:
            for target in (path, _partial(path)):
                if target.exists() and source.exists() and os.path.samefile(target, source):
                    raise OutputError(f"{target} is the source itself", another)
        check_writable(path, force)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"the folder {path.parent} is not writable", another)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", another) from error


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises OutputError unless the disk of the folder has room for n_bytes."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OutputError(
            f"not enough space in {folder}: {_size(n_bytes)} are needed and {_size(free)} are free",
            "free space on that disk, or write to another one with -o",
        )


class OutputFile:
    """A GGUF file in the making. A context manager: it claims the name, and what is left at the end is either
    the complete file, or a partial one that the same conversion can go on with, or nothing.

    Args:
        path: final name.
        force: whether to replace a file of that name.
        sources: files that must not be overwritten.

    Attributes:
        records: of the tensors that are written.
        n_resumed: number of tensors that a stopped conversion had written.

    Raises:
        OutputError: from every method, for any reason that the system gives; on entry also if another process
            is writing this file.
    """

    def __init__(self, path: Path, force: bool = False, sources: Iterable[Path] = ()) -> None:
        self.path = path
        self.records: list[TensorRecord] = []
        self.n_resumed = 0
        self._force = force
        self._sources = tuple(sources)
        self._partial = _partial(path)
        self._journal = Journal(self._partial.with_name(self._partial.name + _JOURNAL_SUFFIX))
        self._layout: Layout | None = None
        self._resumable = False
        self._file = -1

    def __enter__(self) -> OutputFile:
        if not self._partial.exists():
            self._journal.delete()  # of a writer that was killed when all was done
        check_output(self.path, self._force, self._sources)
        try:
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
            self._lock()
            self._journal.read()
        except (OSError, SpikeQuantError) as error:
            self._close()
            raise self._error(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file < 0:
            return
        stopped = isinstance(error, (KeyboardInterrupt, OutputError))
        untouched = self._layout is None and os.fstat(self._file).st_size > 0
        if untouched or (stopped and self._resumable and self.records):
            self._close()
        else:
            self._discard()

    def check_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Raises OutputError if a partial file is there that was begun otherwise. Parts of one will do."""
        begun = self._journal.fingerprint
        for part, value in fingerprint.items() if begun is not None and self._journal.records else ():
            if begun.get(part) != value:
                raise OutputError(
                    f"{self._partial} was begun with {DIFFERENCES[part]}",
                    "finish it with the source and the options of then, or give --no-resume to start over",
                )

    def check_room(self, n_bytes: int) -> None:
        """Raises OutputError unless the disk has room for a file of n_bytes."""
        check_space(self.path.parent, n_bytes - os.fstat(self._file).st_size)

    def begin(
        self, layout: Layout, fingerprint: Fingerprint | None = None, progress: Progress = no_progress
    ) -> None:
        """States what will be written. Afterwards `records` names the tensors that are there already.

        Args:
            layout: of the file.
            fingerprint: of this conversion, whose partial file is gone on with, and kept if it is stopped;
                None to start over and keep nothing.
            progress: receives what is read again.

        Raises:
            OutputError: the partial file was begun otherwise, or there is no room.
        """
        if fingerprint is not None:
            self.check_fingerprint(fingerprint)
        self._layout = layout
        try:
            self.records = self._sound_records(progress) if fingerprint is not None else []
            self.n_resumed = len(self.records)
            end = self._start_of(self.n_resumed)
            self.check_room(layout.file_bytes)
            if fingerprint is None:
                self._journal.delete()
            elif self.records:
                self._journal.go_on(len(self.records))
            else:
                self._journal.start(fingerprint)
            self._resumable = fingerprint is not None
            os.ftruncate(self._file, end)
            os.lseek(self._file, 0, os.SEEK_SET)
            write_all(self._file, bytes(layout.header_bytes))
            os.lseek(self._file, end, os.SEEK_SET)
        except OSError as error:
            raise self._error(error) from error

    def write_tensor(
        self,
        chunks: Iterable[bytes | NDArray[np.uint8]],
        details: Callable[[], Mapping[str, float]] = dict,
    ) -> TensorRecord:
        """Writes the data of the next tensor, given in pieces. Raises ValueError if their size is wrong.

        details: called after the last piece; the record keeps its result.
        """
        layout, number = self._begun(), len(self.records)
        tensor = layout.tensors[number]
        digest, n_bytes = hashlib.sha256(), 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            self._append(view)
            n_bytes += len(view)
        if n_bytes != tensor.n_bytes:
            raise ValueError(f"tensor '{tensor.name}' has {n_bytes} bytes of data, not {tensor.n_bytes}")
        self._append(layout.padding(tensor))
        record = TensorRecord(
            tensor.name, layout.offsets[number], n_bytes, digest.hexdigest(), dict(details())
        )
        if self._resumable:
            try:
                _sync_data(self._file)
                self._journal.add(record)
            except OSError as error:
                raise self._error(error) from error
        self.records.append(record)
        return record

    def commit(self, metadata: RawMetadata, progress: Progress = no_progress) -> None:
        """Writes the header, checks everything on disk and gives the file its name.

        Raises:
            ValueError: tensors are missing, or the metadata have not the size that the layout was made with.
            OutputError: the system refuses, or what is read back is not what was written.
        """
        layout = self._begun()
        if len(self.records) != len(layout.tensors):
            raise ValueError(f"{len(self.records)} of {len(layout.tensors)} tensors are written")
        header = layout.header(metadata)
        if len(header) != layout.header_bytes:
            raise ValueError(f"the header has {len(header)} bytes, and {layout.header_bytes} are reserved")
        try:
            os.lseek(self._file, 0, os.SEEK_SET)
            self._append(header)
            os.fsync(self._file)
            try:
                self._verify(header, progress)
            except OutputError:
                self._resumable = False  # what is damaged is not kept
                raise
            check_output(self.path, self._force)  # another program may have made it meanwhile
            if not RENAMES_OPEN_FILES:
                self._close()
            os.replace(self._partial, self.path)
        except OSError as error:
            raise self._error(error) from error
        self._close()
        _sync_folder(self.path.parent)
        self._journal.delete()

    # ---- going on

    def _sound_records(self, progress: Progress) -> list[TensorRecord]:
        """Those records of the journal whose tensors are in the partial file, up to the first that is not."""
        layout, sound = self._begun(), []
        known = self._journal.records[: len(layout.tensors)]
        self._forget_cached()
        done, total = 0, sum(record.n_bytes for record in known)
        for tensor, offset, record in zip(layout.tensors, layout.offsets, known, strict=False):
            place = (record.name, record.offset, record.n_bytes)
            if place != (tensor.name, offset, tensor.n_bytes) or not self._tensor_is_intact(tensor, record):
                break
            sound.append(record)
            done += record.n_bytes
            progress(RESUME, record.name, done, total)
        return sound

    def _start_of(self, number: int) -> int:
        """Where the data of a tensor start; after the last one the end of the file."""
        layout = self._begun()
        return layout.offsets[number] if number < len(layout.offsets) else layout.file_bytes

    def _begun(self) -> Layout:
        if self._layout is None:
            raise ValueError("nothing can be written before begin()")
        return self._layout

    # ---- reading back

    def _verify(self, header: bytes, progress: Progress) -> None:
        problem = OutputError(
            f"{self._partial}: what was read back is not what was written",
            "check the disk, then convert again",
        )
        layout = self._begun()
        self._forget_cached()
        if os.fstat(self._file).st_size != layout.file_bytes or read_at(self._file, len(header), 0) != header:
            raise problem
        try:
            found = read_header(self._partial)
        except InputError as error:
            raise problem from error
        places = tuple((tensor.name, tensor.offset, tensor.n_bytes) for tensor in found.tensors)
        if places != tuple((record.name, record.offset, record.n_bytes) for record in self.records):
            raise problem
        done, total = 0, sum(record.n_bytes for record in self.records)
        for tensor, record in zip(layout.tensors, self.records, strict=True):
            if not self._tensor_is_intact(tensor, record):
                raise problem
            done += record.n_bytes
            progress(VERIFY, record.name, done, total)

    def _tensor_is_intact(self, tensor: OutputTensor, record: TensorRecord) -> bool:
        """Compares the sha256, and checks the rules of SPK4."""
        row_bytes = record.n_bytes // (int(np.prod(tensor.shape[1:], dtype=object)) or 1)
        step = max(1, _READ_BYTES // row_bytes) * row_bytes
        digest, rotation = hashlib.sha256(), None
        for start in range(0, record.n_bytes, step):
            size = min(step, record.n_bytes - start)
            data = read_at(self._file, size, record.offset + start)
            digest.update(data)
            if len(data) != size:
                return False
            if tensor.type == TYPE_SPK4:
                blocks = np.frombuffer(data, BLOCK_SPK4).reshape(-1, row_bytes // BLOCK_SPK4.itemsize)
                if rotation is None:
                    rotation = int(blocks["header"][0, 0]) & SPK4_NOT_ROTATED
                if first_weight_fault(blocks, rotation) is not None:
                    return False
        return digest.hexdigest() == record.sha256

    def _forget_cached(self) -> None:
        """Makes the next reads come from the disk, where the system allows it."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    # ---- the file itself

    def _append(self, data: bytes | memoryview) -> None:
        try:
            write_all(self._file, data)
        except OSError as error:
            raise self._error(error) from error

    def _lock(self) -> None:
        """Refuses a second writer of the same file."""
        if not try_lock(self._file):
            raise self._busy()
        # The other writer may have renamed what we opened just before it let go.
        try:
            same = os.path.samestat(os.fstat(self._file), os.stat(self._partial))
        except FileNotFoundError:
            same = False
        if not same:
            raise self._busy()

    def _busy(self) -> OutputError:
        return OutputError(
            f"another process is writing {self.path}", "wait for it, or give another path with -o"
        )

    def _error(self, error: Exception) -> SpikeQuantError:
        if isinstance(error, SpikeQuantError):
            return error
        again = "run the same command again, which goes on where this one stopped"
        kept = self._resumable and len(self.records) > 0
        if isinstance(error, OSError) and error.errno in _FULL:
            return OutputError(
                f"cannot write {self.path}: the disk is full",
                f"free space on that disk and {again}"
                if kept
                else "free space on that disk, or write to another with -o",
            )
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "check the folder and its permissions"
        return OutputError(
            f"cannot write {self.path}: {reason}", f"{remedy}, then {again}" if kept else remedy
        )

    def _discard(self) -> None:
        if not RENAMES_OPEN_FILES:
            self._close()
        with suppress(OSError):
            os.unlink(self._partial)  # while it is still locked, where that is possible
        self._journal.delete()
        self._close()

    def _close(self) -> None:
        self._journal.close()
        if self._file >= 0:
            with suppress(OSError):
                os.close(self._file)
            self._file = -1


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL_SUFFIX)


def _sync_data(file: int) -> None:
    """Waits until what was written is on disk."""
    getattr(os, "fdatasync", os.fsync)(file)


def _sync_folder(folder: Path) -> None:
    """Makes the renaming durable. Best effort: the file itself is complete already."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
