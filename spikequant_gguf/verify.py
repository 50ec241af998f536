"""Checks a whole GGUF file: bounds and data of every tensor, and the spike metadata.

Of SPK4 every rule of the format is checked; floats, and the scales of the usual stock types, must be finite.
The file is read in pieces, once, and never mapped: one that becomes shorter meanwhile is an error, no crash.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from .errors import FormatError, InputError, SpikeQuantError
from .format import (
    BLOCK_SPK4,
    FORMAT_VERSION,
    KEY_ENCODER_SALIENCE,
    KEY_ENCODER_SILENCE,
    KEY_ENCODER_TENSORS,
    KEY_SALIENCE_THRESHOLD,
    KEY_SILENCE_THRESHOLD,
    KEY_STATISTICS_RELATIVE_ERROR,
    KEY_STATISTICS_SALIENT_WEIGHT_SHARE,
    KEY_STATISTICS_TENSORS,
    KEY_TYPE_NAME,
    KEY_VERSION,
    MAX_SILENCE,
    QK_SPK,
    SALIENCE_LIMIT,
    SPK4_NOT_ROTATED,
    TYPE_NAME,
    TYPE_SPK4,
    TYPE_SPKA,
    check_inputs,
    salient_slots,
)
from .gguf_header import GGUFHeader, TensorInfo, read_header
from .validation import first_weight_fault

__all__ = ["Fault", "TensorReport", "VerifyReport", "verify_file"]

_CHUNK_BYTES = 1 << 20  # stays in the cache of a core
_T = GGMLQuantizationType

# Exponent bits of floats; all of them set is infinity or NaN.
_F16_EXPONENT, _BF16_EXPONENT, _F32_EXPONENT = 0x7C00, 0x7F80, 0x7F800000
_FLOATS = {
    _T.F32: ("<u4", _F32_EXPONENT),
    _T.F16: ("<u2", _F16_EXPONENT),
    _T.BF16: ("<u2", _BF16_EXPONENT),
}
# Places of the f16 scales in a block of a stock type: ggml-common.h of the pinned ggml.
_SCALES = {
    **dict.fromkeys((_T.Q4_0, _T.Q5_0, _T.Q8_0, _T.IQ4_NL, _T.IQ4_XS), (0,)),
    **dict.fromkeys((_T.Q4_1, _T.Q5_1, _T.Q4_K, _T.Q5_K), (0, 2)),
    _T.Q2_K: (80, 82),
    _T.Q3_K: (108,),
    _T.Q6_K: (208,),
}


@dataclass(frozen=True)
class Fault:
    """One broken rule, and where: tensor, row and block as far as they apply. Rows count over all axes."""

    reason: str
    tensor: str | None = None
    row: int | None = None
    block: int | None = None

    def error(self) -> FormatError:
        """This fault as an exception."""
        return FormatError(self.reason, tensor=self.tensor, row=self.row, block=self.block)

    def __str__(self) -> str:
        return self.error().message


@dataclass(frozen=True)
class TensorReport:
    """What was found in one SPK4 tensor.

    Attributes:
        name: of the tensor.
        rows: over all its matrices.
        inputs: length of a row.
        bytes: size of the data.
        rotated: whether it is stored in the rotated basis.
        salient_weights: salient weights in it.
    """

    name: str
    rows: int
    inputs: int
    bytes: int
    rotated: bool
    salient_weights: int


@dataclass(frozen=True)
class VerifyReport:
    """The result of verify_file.

    Attributes:
        path: of the file.
        file_bytes: its size.
        version: of the spike format, as the metadata say; None if they do not.
        tensors: the SPK4 tensors without fault.
        other_tensors: number of tensors of other types.
        faults: the first fault of every faulty tensor, and those of the metadata; empty if the file is valid.
        warnings: what is odd, but allowed.
        seconds: time taken.
    """

    path: str
    file_bytes: int
    version: int | None
    tensors: tuple[TensorReport, ...]
    other_tensors: int
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not self.faults

    def raise_if_faulty(self) -> None:
        """Raises FormatError for the first fault, if there is one."""
        if self.faults:
            raise self.faults[0].error()


def verify_file(path: str | Path) -> VerifyReport:
    """Checks a GGUF file.

    Raises:
        InputError: the file cannot be read, is no GGUF file, or its header is damaged. All else is reported.
    """
    started = time.perf_counter()
    header = read_header(path)
    of_version = _version_fault(header)
    faults: list[Fault] = [of_version] if of_version else []
    warnings: list[str] = []
    out_of_bounds = list(_check_bounds(header, warnings))
    faults += out_of_bounds
    unreadable = {fault.tensor for fault in out_of_bounds}

    reports: list[TensorReport] = []
    spiking = [tensor for tensor in header.tensors if tensor.type_id == TYPE_SPK4]
    with _Data(Path(path)) as data:
        for tensor in header.tensors:
            if tensor.name in unreadable or (of_version and tensor.type_id == TYPE_SPK4):
                continue
            found = _check_spikes(tensor, data) if tensor.type_id == TYPE_SPK4 else _check_stock(tensor, data)
            if isinstance(found, Fault):
                faults.append(found)
            elif found is not None:
                reports.append(found)
    faults += _check_metadata(header, {tensor.name for tensor in spiking}, warnings)
    version = header.metadata.get(KEY_VERSION)
    return VerifyReport(
        path=str(path),
        file_bytes=header.file_bytes,
        version=version if type(version) is int else None,
        tensors=tuple(reports),
        other_tensors=len(header.tensors) - len(spiking),
        faults=tuple(faults),
        warnings=tuple(warnings),
        seconds=time.perf_counter() - started,
    )


def _version_fault(header: GGUFHeader) -> Fault | None:
    """What is wrong with the version of the spike format; its rules do not hold for data of another one."""
    version = header.metadata.get(KEY_VERSION, FORMAT_VERSION)
    if type(version) is int and version == FORMAT_VERSION:
        return None
    return Fault(
        f"{KEY_VERSION} is {version}, and this program knows version {FORMAT_VERSION}: "
        "convert the model again with this program"
    )


# ---- tensors


def _check_bounds(header: GGUFHeader, warnings: list[str]) -> Iterator[Fault]:
    """Faults of type, dimensions and place of every tensor, at most one for each."""
    end, before = header.data_offset, None
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        reason = _shape_fault(tensor)
        if reason is None and tensor.n_bytes is None:
            warnings.append(
                f"tensor '{tensor.name}' has the unknown type {tensor.type_id}; its size was not checked"
            )
            continue
        if reason is None and (tensor.offset - header.data_offset) % header.alignment != 0:
            reason = f"data starts at byte {tensor.offset}, which is not aligned to {header.alignment}"
        if reason is None and tensor.offset + tensor.n_bytes > header.file_bytes:
            reason = (
                f"data ends at byte {tensor.offset + tensor.n_bytes}, but the file has {header.file_bytes}: "
                "it is cut off"
            )
        if reason is None and tensor.offset < end:
            reason = f"data overlaps tensor '{before}'"
        if reason is not None:
            yield Fault(reason, tensor.name)
        else:
            end, before = tensor.offset + tensor.n_bytes, tensor.name


def _shape_fault(tensor: TensorInfo) -> str | None:
    if tensor.type_id == TYPE_SPKA:
        return "SPKA is a type of activations at run time and cannot be stored in a model"
    if tensor.type_id == TYPE_SPK4:
        if 0 in tensor.shape:
            return "SPK4 tensor without elements"
        try:
            check_inputs(tensor.shape[0])
        except SpikeQuantError as error:
            return error.message
    return None


def _check_spikes(tensor: TensorInfo, data: _Data) -> TensorReport | Fault:
    n_blocks = tensor.shape[0] // QK_SPK
    row_bytes = n_blocks * BLOCK_SPK4.itemsize
    rotation: int | None = None
    salient_weights = 0
    for first, rows in data.pieces(tensor.offset, tensor.n_rows * row_bytes, row_bytes):
        blocks = rows.view(BLOCK_SPK4)
        if rotation is None:
            rotation = int(blocks["header"][0, 0]) & SPK4_NOT_ROTATED
        fault = first_weight_fault(blocks, rotation)
        if fault is not None:
            row, block, reason = fault
            return Fault(reason, tensor.name, first + row, block)
        salient_weights += int(np.count_nonzero(salient_slots(blocks)))
    return TensorReport(
        tensor.name, tensor.n_rows, tensor.shape[0], tensor.n_rows * row_bytes, rotation == 0, salient_weights
    )


def _check_stock(tensor: TensorInfo, data: _Data) -> Fault | None:
    kind = _T._value2member_map_.get(tensor.type_id)
    if not tensor.n_bytes or (kind not in _FLOATS and kind not in _SCALES):
        return None
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    for first, blocks in data.pieces(tensor.offset, tensor.n_bytes, block_bytes):
        if kind in _FLOATS:
            dtype, exponent = _FLOATS[kind]
            values = blocks.view(dtype)
        else:
            exponent = _F16_EXPONENT
            values = blocks.view("<u2")[:, [place // 2 for place in _SCALES[kind]]]
        infinite = (values & exponent == exponent).any(axis=1)
        if infinite.any():
            row, index = divmod(first + int(np.argmax(infinite)), tensor.shape[0] // per_block)
            if kind in _FLOATS:
                return Fault(f"value {index} is not finite", tensor.name, row)
            return Fault("a scale is not finite", tensor.name, row, index)
    return None


class _Data:
    """Reads tensor data in pieces that stay in the cache. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = np.empty(0, np.uint8)

    def __enter__(self) -> _Data:
        self._file = self._path.open("rb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def pieces(self, offset: int, n_bytes: int, unit_bytes: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Index of a first row or block, and uint8[n, unit_bytes], which the next piece overwrites."""
        n_units = n_bytes // unit_bytes
        step = max(1, _CHUNK_BYTES // unit_bytes)
        for first in range(0, n_units, step):
            count = min(step, n_units - first)
            yield first, self._read(offset + first * unit_bytes, count * unit_bytes).reshape(count, -1)

    def _read(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        if len(self._buffer) < n_bytes:
            self._buffer = np.empty(n_bytes, np.uint8)
        wanted = memoryview(self._buffer)[:n_bytes]
        try:
            self._file.seek(offset)
            while wanted:
                n_read = self._file.readinto(wanted)
                if not n_read:
                    raise InputError(
                        f"{self._path}: the file became shorter while it was read", "start again"
                    )
                wanted = wanted[n_read:]
        except OSError as error:
            raise InputError(f"{self._path}: {error.strerror or error}", "check the disk") from error
        return self._buffer[:n_bytes]


# ---- metadata


def _check_metadata(header: GGUFHeader, spiking: set[str], warnings: list[str]) -> Iterator[Fault]:
    metadata = header.metadata
    if not spiking:
        warnings.append("the file holds no SPK4 tensor")
    if spiking and KEY_VERSION not in metadata:
        warnings.append(f"{KEY_VERSION} is missing; taken as {FORMAT_VERSION}")
    type_name = metadata.get(KEY_TYPE_NAME, TYPE_NAME)
    if not isinstance(type_name, str) or type_name != TYPE_NAME:
        yield Fault(f"{KEY_TYPE_NAME} is not '{TYPE_NAME}'")
    for key, valid, allowed in (
        (KEY_SALIENCE_THRESHOLD, _salience_valid, f"between 0 and {SALIENCE_LIMIT}"),
        (KEY_SILENCE_THRESHOLD, _silence_valid, f"in 0..{MAX_SILENCE:g}"),
    ):
        value = metadata.get(key)
        if value is not None and not (isinstance(value, float) and valid(np.float32(value))):
            yield Fault(f"{key} is {value}, not a number {allowed}")

    # a model split into several files keeps its metadata in the first one
    parts = metadata.get("split.count")
    known = None if type(parts) is int and parts > 1 else spiking
    yield from _check_parallel(
        metadata,
        known,
        KEY_ENCODER_TENSORS,
        {
            KEY_ENCODER_SALIENCE: (
                lambda a: (a == 0) | _salience_valid(a),
                f"between 0 and {SALIENCE_LIMIT}",
            ),
            KEY_ENCODER_SILENCE: (_silence_valid, f"in 0..{MAX_SILENCE:g}"),
        },
    )
    yield from _check_parallel(
        metadata,
        known,
        KEY_STATISTICS_TENSORS,
        {
            KEY_STATISTICS_SALIENT_WEIGHT_SHARE: (lambda a: (a >= 0) & (a <= 1), "in 0..1"),
            KEY_STATISTICS_RELATIVE_ERROR: (
                lambda a: np.isfinite(a) & (a >= 0),
                "a finite number, 0 or more",
            ),
        },
    )


def _salience_valid(value: NDArray[np.float32] | np.float32) -> NDArray[np.bool_] | np.bool_:
    return (value > 0) & (value < SALIENCE_LIMIT)


def _silence_valid(value: NDArray[np.float32] | np.float32) -> NDArray[np.bool_] | np.bool_:
    return (value >= 0) & (value <= MAX_SILENCE)


def _check_parallel(metadata: dict, known: set[str] | None, names_key: str, columns: dict) -> Iterator[Fault]:
    """An array of tensor names and arrays of float32 as long, one value per name."""
    names = metadata.get(names_key)
    present = [key for key in columns if key in metadata]
    if names is None:
        for key in present:
            yield Fault(f"{key} is there without {names_key}")
        return
    if not isinstance(names, list):
        if isinstance(names, np.ndarray) and names.size == 0:
            names = []
        else:
            yield Fault(f"{names_key} is not an array of strings")
            return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield Fault(f"{names_key} lists it twice", name)
        elif known is not None and name not in known:
            yield Fault(f"{names_key} lists it, but the file has no such SPK4 tensor", name)
        seen.add(name)
    for key, (valid, allowed) in columns.items():
        values = metadata.get(key)
        if not isinstance(values, np.ndarray) or values.dtype != np.float32:
            yield Fault(f"{key} is {'missing' if values is None else 'not an array of float32'}")
        elif len(values) != len(names):
            yield Fault(f"{key} has {len(values)} values for {len(names)} names in {names_key}")
        else:
            for name, value in zip(names, values, strict=True):
                if not valid(value):
                    yield Fault(f"{key} is {value}, not {allowed}", name)
