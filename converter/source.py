"""Reads the model to convert from GGUF: tensors of any stock type, as float32 rows, piece by piece.

A checkpoint of Hugging Face becomes a GGUF file first, see checkpoint.py; so there is one reader for both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from spikequant_gguf.errors import InputError, UnsupportedError
from spikequant_gguf.format import TYPE_SPK4, TYPE_SPKA
from spikequant_gguf.gguf_header import GGUFHeader, MetadataValue, TensorInfo, read_header

from .metadata import RawMetadata, read_raw_metadata
from .system import BINARY, read_at

__all__ = ["Decoder", "Source", "SourceTensor", "gguf_files", "open_gguf"]

_F32, _F16, _BF16, _F64 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "F64"))
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# Most that one read() of Linux returns.
_READ_BYTES = 0x7FFFF000
_DAMAGED = "download or convert the model again"
_FOREIGN = {
    ".safetensors": "give the folder of the checkpoint, not one of its files",
    ".bin": "give a folder with safetensors, or a GGUF file; pickles can run any code and are not read",
}
_FOREIGN[".pt"] = _FOREIGN[".pth"] = _FOREIGN[".ckpt"] = _FOREIGN[".bin"]


class Decoder(Protocol):
    """Turns rows of a quantized type into numbers; runtime.native() is one."""

    def dequantize(self, type_id: int, data: NDArray[np.uint8], n_in: int) -> NDArray[np.float32]:
        """uint8[rows, row_bytes] of a ggml type as float32[rows, n_in]."""


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the source.

    Attributes:
        name: of the tensor.
        shape: as ggml counts dimensions: shape[0] inputs (the length of a row), shape[1] rows, then matrices.
        type: stored type.
        part: index of the file that holds it.
        offset: of its first byte in that file.
        n_bytes: size of its data.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    part: int
    offset: int
    n_bytes: int

    @property
    def n_in(self) -> int:
        """Values per row."""
        return self.shape[0]

    @property
    def n_weights(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def n_rows(self) -> int:
        """Rows of all matrices."""
        return self.n_weights // self.n_in

    @property
    def rows_per_matrix(self) -> int:
        """Rows of one expert, of the whole tensor if it is one matrix."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        return self.n_bytes // self.n_rows


class Source:
    """An open GGUF model of one or several files. A context manager.

    Attributes:
        paths: its files.
        checkpoint: folder of the Hugging Face checkpoint that it was made from, or None.
        metadata: values by key; those of the first file if there are several.
        tensors: by name, in the order of the files.
        alignment: of tensor data.
    """

    def __init__(
        self,
        paths: tuple[Path, ...],
        headers: tuple[GGUFHeader, ...],
        tensors: dict[str, SourceTensor],
        decoder: Decoder | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.paths = paths
        self.checkpoint = checkpoint
        self.metadata: Mapping[str, MetadataValue] = headers[0].metadata
        self.tensors: Mapping[str, SourceTensor] = MappingProxyType(tensors)
        self.alignment = headers[0].alignment
        self._decoder = decoder
        self._files: list[int] = []
        try:
            for path in paths:
                self._files.append(os.open(path, os.O_RDONLY | BINARY))
        except OSError as error:
            self.close()
            raise InputError(
                f"{path}: {error.strerror or error}", "check the path and its permissions"
            ) from error
        self._opened_as = self._fingerprint()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    @property
    def architecture(self) -> str:
        """general.architecture, for example ``llama``."""
        return str(self.metadata["general.architecture"])

    @cached_property
    def raw_metadata(self) -> RawMetadata:
        """The metadata as they stand in the (first) file."""
        return read_raw_metadata(self.paths[0], len(self.metadata))

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensor data."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    def read_raw(self, name: str, first_row: int = 0, n_rows: int | None = None) -> NDArray[np.uint8]:
        """Rows of a tensor as they are stored: uint8[rows, row_bytes]. Rows count over all matrices.

        May be called from several threads. Raises InputError if the file cannot be read any more.
        """
        tensor = self.tensors[name]
        n_rows = tensor.n_rows - first_row if n_rows is None else n_rows
        size, offset = n_rows * tensor.row_bytes, tensor.offset + first_row * tensor.row_bytes
        path = self.paths[tensor.part]
        pieces = []
        while size > 0:
            try:
                piece = read_at(self._files[tensor.part], min(size, _READ_BYTES), offset)
            except OSError as error:
                raise InputError(
                    f"{path}: tensor '{name}' cannot be read: {error.strerror or error}", "check the disk"
                ) from error
            if not piece:
                raise InputError(f"{path}: the file became shorter while it was read", "start again")
            pieces.append(piece)
            size, offset = size - len(piece), offset + len(piece)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return np.frombuffer(data, np.uint8).reshape(n_rows, tensor.row_bytes)

    def read_rows(self, name: str, first_row: int = 0, n_rows: int | None = None) -> NDArray[np.float32]:
        """Rows of a tensor as numbers: float32[rows, n_in], not writeable. Rows count over all matrices.

        Raises:
            InputError: the file cannot be read any more.
            UnsupportedError: the tensor's type cannot be turned into numbers.
        """
        return self.decode(name, self.read_raw(name, first_row, n_rows))

    def decode(self, name: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Stored rows of a tensor, uint8[rows, row_bytes], as numbers: float32[rows, n_in]."""
        tensor = self.tensors[name]
        if tensor.type == _F32:
            return raw.view("<f4")
        if tensor.type in (_F16, _F64):
            return raw.view("<f2" if tensor.type == _F16 else "<f8").astype(np.float32)
        if tensor.type == _BF16:
            return (raw.view("<u2").astype("<u4") << 16).view("<f4")
        if self._decoder is None:
            from spikequant_gguf.runtime import native  # loads libraries

            self._decoder = native()
        return self._decoder.dequantize(int(tensor.type), raw, tensor.n_in)

    def check_unchanged(self) -> None:
        """Raises InputError if a file has been written to since it was opened."""
        if self._fingerprint() != self._opened_as:
            raise InputError(
                f"{self.paths[0]}: the file changed while it was read", "start again when it is complete"
            )

    def _fingerprint(self) -> list[tuple[int, int, bool]]:
        states = []
        for path, file in zip(self.paths, self._files, strict=True):
            state = os.fstat(file)
            try:
                replaced = not os.path.samestat(state, os.stat(path))
            except OSError:
                replaced = True
            states.append((state.st_size, state.st_mtime_ns, replaced))
        return states


def open_gguf(path: Path, decoder: Decoder | None = None, checkpoint: Path | None = None) -> Source:
    """Opens a GGUF model, of several files if the name ends in ``-00001-of-00003.gguf`` or the like.

    Args:
        path: of the file, or of any of the files.
        decoder: for quantized types; None for the patched runtime, loaded when it is first needed.
        checkpoint: kept as Source.checkpoint.

    Raises:
        InputError: a file is missing, no little-endian GGUF, damaged, cut off, empty, or already SPK4.
        UnsupportedError: it holds no language model, or tensors of an unknown type.
    """
    _, paths = gguf_files(path)
    headers = tuple(_header(part) for part in paths)
    if len(paths) > 1:
        _check_parts(paths, headers)
    tensors: dict[str, SourceTensor] = {}
    for number, (part, header) in enumerate(zip(paths, headers, strict=True)):
        for tensor in _tensors(part, header, number):
            if tensor.name in tensors:
                raise InputError(f"{part}: tensor '{tensor.name}' is in another part, too", _DAMAGED)
            tensors[tensor.name] = tensor
    _check_model(paths[0], headers[0].metadata, tensors)
    return Source(paths, headers, tensors, decoder, checkpoint)


def _header(path: Path) -> GGUFHeader:
    if path.suffix in _FOREIGN and path.is_file():
        raise InputError(f"{path}: not a GGUF file", _FOREIGN[path.suffix])
    return read_header(path)


# ---- models in several files


def gguf_files(path: Path) -> tuple[str, tuple[Path, ...]]:
    """The name of a model and its files, all parts if `path` is one of them.

    Raises:
        InputError: a part is missing.
    """
    if not path.name or (path.exists() and not path.is_file()):
        raise InputError(f"'{path}' is no file", "give the path of a .gguf model")
    found = _SPLIT_NAME.search(path.name)
    if found is None or not path.is_file() or int(found.group(2)) == 0:
        return path.name, (path,)
    stem, count = path.name[: found.start()], int(found.group(2))
    paths = tuple(
        path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)
    )
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{path}: of the model's {count} files, {missing[0]}{more} missing",
            "put all parts into one folder",
        )
    return f"{stem}.gguf", paths


def _check_parts(paths: tuple[Path, ...], headers: tuple[GGUFHeader, ...]) -> None:
    n_tensors = sum(len(header.tensors) for header in headers)
    for number, (path, header) in enumerate(zip(paths, headers, strict=True)):
        stated = [header.metadata.get(key) for key in ("split.no", "split.count")]
        if stated != [number, len(paths)]:
            raise InputError(
                f"{path}: by its metadata split.no is {stated[0]} and split.count {stated[1]}, by its name "
                f"{number} and {len(paths)}",
                "give the parts the names that they were made with",
            )
    if headers[0].metadata.get("split.tensors.count", n_tensors) != n_tensors:
        raise InputError(
            f"{paths[0]}: all parts hold {n_tensors} tensors, which is not what split.tensors.count says",
            _DAMAGED,
        )


# ---- checks


def _tensors(path: Path, header: GGUFHeader, part: int) -> list[SourceTensor]:
    """The tensors of one file, each of a known type, within the file and apart from the others."""
    tensors = [_tensor(path, info, part) for info in header.tensors]
    end, before = header.data_offset, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset + tensor.n_bytes > header.file_bytes:
            raise InputError(
                f"{path}: the file is cut off: tensor '{tensor.name}' ends at byte "
                f"{tensor.offset + tensor.n_bytes} of {header.file_bytes}",
                _DAMAGED,
            )
        if tensor.offset < end:
            raise InputError(f"{path}: tensor '{tensor.name}' overlaps '{before}'", _DAMAGED)
        end, before = tensor.offset + tensor.n_bytes, tensor.name
    return tensors


def _tensor(path: Path, info: TensorInfo, part: int) -> SourceTensor:
    if not info.name:
        raise InputError(f"{path}: a tensor has no name", _DAMAGED)
    if 0 in info.shape:
        raise InputError(
            f"{path}: tensor '{info.name}' has no elements: its shape is {list(info.shape)}", _DAMAGED
        )
    if info.type_id in (TYPE_SPK4, TYPE_SPKA):
        raise InputError(
            f"{path}: the model is already SPK4 (tensor '{info.name}')",
            "convert from the original model, or run `spikequant dequantize` first",
        )
    kind = GGMLQuantizationType._value2member_map_.get(info.type_id)
    if kind is None:
        raise UnsupportedError(
            f"{path}: tensor '{info.name}' has the unknown type {info.type_id}",
            "convert from an F16 or BF16 model",
        )
    if info.n_bytes is None:
        raise InputError(
            f"{path}: rows of {info.shape[0]} values of tensor '{info.name}' do not fit its type {kind.name}",
            _DAMAGED,
        )
    return SourceTensor(info.name, info.shape, kind, part, info.offset, info.n_bytes)


def _check_model(path: Path, metadata: Mapping[str, MetadataValue], tensors: dict[str, SourceTensor]) -> None:
    kind = metadata.get("general.type", "model")
    architecture = metadata.get("general.architecture")
    whole = "give the file of the language model itself"
    if kind != "model":
        raise UnsupportedError(f"{path}: holds no model, but something of type '{kind}'", whole)
    if not isinstance(architecture, str) or not architecture:
        raise InputError(f"{path}: the metadata name no general.architecture", _DAMAGED)
    if architecture in ("clip", "imatrix", "controlvector"):
        raise UnsupportedError(f"{path}: holds no language model, but '{architecture}'", whole)
    count = metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1 and _SPLIT_NAME.search(path.name) is None:
        raise InputError(
            f"{path}: this is one of {count} parts of a model, but its name does not say so",
            f"name it ...-00001-of-{count:05d}.gguf, or merge the parts with `llama-gguf-split --merge`",
        )
    if not tensors:
        raise InputError(
            f"{path}: the file holds no tensors", "give a model with weights, not a vocabulary only"
        )
