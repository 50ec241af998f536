"""The functions of the patched libraries that Python needs, with checked arguments.

ggml ends the process on a wrong argument; so every call here checks types and shapes first.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import FormatError, InputError, UnsupportedError
from .format import BLOCK_SPK4, BLOCK_SPKA, QK_SPK, TYPE_SPK4, check_inputs
from .ggml_patch.package import library_file
from .runtime import require_runtime, tool

__all__ = ["NativeLibrary", "SpikeCounter", "SpikeTokenCounter", "load"]


class SpikeCounter(ctypes.Structure):
    """spike_counter of ggml_patch/spike/cpu/spike-counters.h."""

    _fields_ = [
        ("name", c_char * 64),
        ("n_inputs", c_int64),
        ("n_rows", c_int64),
        ("products", c_uint64),
        ("tokens", c_uint64),
        ("spikes", c_uint64),
        ("silent", c_uint64),
        ("salient", c_uint64),
        ("rate_spikes", c_uint64),
        ("adds", c_uint64),
        ("shift_adds", c_uint64),
        ("readouts", c_uint64),
        ("bytes", c_uint64),
    ]


class SpikeTokenCounter(ctypes.Structure):
    """spike_token_counter of ggml_patch/spike/cpu/spike-counters.h."""

    _fields_ = [
        ("counter", c_int64),
        ("token", c_int64),
        ("spikes", c_uint64),
        ("salient", c_uint64),
        ("rate_spikes", c_uint64),
        ("adds", c_uint64),
        ("shift_adds", c_uint64),
        ("bytes", c_uint64),
    ]


_STOCK = {
    "ggml-base": {
        "ggml_type_name": (c_char_p, (c_int,)),
        "ggml_blck_size": (c_int64, (c_int,)),
        "ggml_type_size": (c_size_t, (c_int,)),
        "ggml_quantize_requires_imatrix": (c_bool, (c_int,)),
        "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
        "ggml_validate_row_data": (c_bool, (c_int, c_void_p, c_size_t)),
        "ggml_get_type_traits": (c_void_p, (c_int,)),
    },
    "ggml-cpu": {"ggml_cpu_init": (None, ())},
}
_SPIKE = {
    "ggml-base": {
        "spikequant_abi": (c_int, ()),
        "spikequant_patch_id": (c_char_p, ()),
        "spikequant_pin": (c_char_p, ()),
        "spike_encode_activations": (None, (c_void_p, c_void_p, c_int64, c_float, c_float, c_int, c_int)),
        "dequantize_row_spka": (None, (c_void_p, c_void_p, c_int64)),
    },
    "ggml-cpu": {
        "spikequant_kernel": (c_char_p, ()),
        "spikequant_count": (None, (c_bool,)),
        "spikequant_counters_reset": (None, ()),
        "spikequant_counters": (c_int64, (POINTER(POINTER(SpikeCounter)),)),
        "spikequant_count_tokens": (None, (c_bool,)),
        "spikequant_token_counters": (c_int64, (POINTER(POINTER(SpikeTokenCounter)),)),
        "ggml_vec_dot_spk4_spka": (
            None,
            (c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_size_t, c_int),
        ),
    },
}
# Types that ggml computes with but has no quantizer for: Q8_1, Q8_K, the integers, F64 and SPKA.
_NO_QUANTIZER = frozenset((9, 15, 24, 25, 26, 27, 28, 91))
_TYPE_F32 = 0


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of the pinned ggml."""

    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", c_void_p),
    ]


class NativeLibrary:
    """libggml-base and libggml-cpu of one folder; the copies that llama_cpp uses if it is the installed one.

    An unpatched folder serves, too, for comparisons: ``patched`` is False then, and everything about spikes
    is missing. Two folders cannot share a process, because libraries of the same name are loaded once. Arrays
    must not be changed by other threads during a call; calls themselves may run in parallel.
    """

    def __init__(self, library_dir: Path) -> None:
        self.library_dir = library_dir
        self.base, self.cpu = (ctypes.CDLL(str(library_dir / library_file(name))) for name in _STOCK)
        self.patched = hasattr(self.base, "spikequant_abi")
        for symbols in (_STOCK, _SPIKE) if self.patched else (_STOCK,):
            for library, functions in zip((self.base, self.cpu), symbols.values(), strict=True):
                bind(library, functions)
        self.cpu.ggml_cpu_init()  # fills the f16 tables that some kernels read

    @property
    def abi(self) -> int:
        return self.base.spikequant_abi()

    @property
    def patch_id(self) -> str:
        return self.base.spikequant_patch_id().decode()

    @property
    def pin(self) -> str:
        return self.base.spikequant_pin().decode()

    @property
    def kernel(self) -> str:
        """Name of the kernel that spike products use on this CPU, for example ``plain-c``."""
        return self.cpu.spikequant_kernel().decode()

    def type_name(self, type_id: int) -> str:
        """ggml's name of a tensor type. Raises UnsupportedError for an id that is not one."""
        # Beyond the last type ggml says "NONE"; gaps have no name and removed types no block size.
        name = self.base.ggml_type_name(type_id) if type_id >= 0 else None
        if not name or name == b"NONE" or self.base.ggml_blck_size(type_id) <= 0:
            raise UnsupportedError(f"this runtime has no tensor type {type_id}", "update spikequant-gguf")
        return name.decode()

    def row_bytes(self, type_id: int, n_in: int) -> int:
        """Bytes of a row of ``n_in`` values. UnsupportedError if blocks do not divide it."""
        name = self.type_name(type_id)
        block = self.base.ggml_blck_size(type_id)
        if n_in <= 0 or n_in % block:
            raise UnsupportedError(
                f"a row of {n_in} values does not fit type {name}, whose blocks have {block}",
                "keep this tensor in another type",
            )
        return n_in // block * self.base.ggml_type_size(type_id)

    def quantize(
        self, type_id: int, weights: ArrayLike, importance: ArrayLike | None = None
    ) -> NDArray[np.uint8]:
        """Quantize float32 ``weights[rows, n_in]`` with ggml's own quantizer; returns ``uint8[rows,
        row_bytes]``.

        importance: float32 ``[n_in]``, weights of the squared error per input. Raises InputError for wrong
        shapes or weights that are not finite, UnsupportedError if the type has no quantizer or needs an
        importance.
        """
        rows = _matrix(weights, "weights")
        row_bytes = self.row_bytes(type_id, rows.shape[1])
        name = self.type_name(type_id)
        if type_id in _NO_QUANTIZER:
            raise UnsupportedError(f"ggml has no quantizer for type {name}", "choose another type")
        if type_id == TYPE_SPK4:
            check_inputs(rows.shape[1], "the weight matrix")
        if type_id != _TYPE_F32:
            _check_finite(rows)
        factors = None
        if importance is not None:
            factors = np.ascontiguousarray(importance, dtype=np.float32)
            if factors.shape != (rows.shape[1],) or not np.all(np.isfinite(factors)) or np.any(factors < 0):
                raise InputError(
                    f"importance must be {rows.shape[1]} finite numbers, none negative",
                    "give one value per input channel",
                )
        elif self.base.ggml_quantize_requires_imatrix(type_id):
            raise UnsupportedError(
                f"type {name} needs an importance matrix", "give one, or choose another type"
            )
        out = np.empty((rows.shape[0], row_bytes), np.uint8)
        written = self.base.ggml_quantize_chunk(
            type_id,
            rows.ctypes.data,
            out.ctypes.data,
            0,
            *rows.shape,
            None if factors is None else factors.ctypes.data,
        )
        if written != out.nbytes:
            raise UnsupportedError(f"ggml wrote {written} of {out.nbytes} bytes of type {name}", None)
        return out

    def dequantize(self, type_id: int, data: NDArray[np.uint8], n_in: int) -> NDArray[np.float32]:
        """Values of quantized rows ``uint8[rows, row_bytes]`` as ``float32[rows, n_in]``."""
        rows = self._rows(type_id, data, n_in)
        out = np.empty((rows.shape[0], n_in), np.float32)
        if type_id == _TYPE_F32:
            return rows.view(np.float32).reshape(out.shape).copy()
        traits = _TypeTraits.from_address(self.base.ggml_get_type_traits(type_id))
        if not traits.to_float:
            raise UnsupportedError(
                f"ggml cannot dequantize type {self.type_name(type_id)}", "choose another type"
            )
        for source, target in zip(rows, out, strict=True):
            traits.to_float(source.ctypes.data, target.ctypes.data, n_in)
        return out

    def encode_activations(
        self,
        x: ArrayLike,
        salience: float = 2.3,
        silence: float = 0.5,
        zero_point: int = 8,
        rotated: bool = True,
    ) -> NDArray[np.void]:
        """Spike-code float32 tokens ``x[tokens, n_in]``; returns BLOCK_SPKA ``[tokens, n_in / 64]``."""
        tokens = _matrix(x, "activations")
        check_inputs(tokens.shape[1], "the activation")
        blocks = np.zeros((tokens.shape[0], tokens.shape[1] // QK_SPK), BLOCK_SPKA)
        for token, target in zip(tokens, blocks, strict=True):
            self.base.spike_encode_activations(
                token.ctypes.data,
                target.ctypes.data,
                tokens.shape[1],
                salience,
                silence,
                zero_point,
                int(rotated),
            )
        return blocks

    def decode_activations(self, blocks: NDArray[np.void]) -> NDArray[np.float32]:
        """Values of BLOCK_SPKA ``[tokens, n_blocks]`` as ``float32[tokens, n_blocks * 64]``."""
        tokens = _blocks(blocks, BLOCK_SPKA, "activations")
        out = np.empty((tokens.shape[0], tokens.shape[1] * QK_SPK), np.float32)
        for source, target in zip(tokens, out, strict=True):
            self.base.dequantize_row_spka(source.ctypes.data, target.ctypes.data, out.shape[1])
        return out

    def vec_dot(self, weights: NDArray[np.void], activations: NDArray[np.void]) -> NDArray[np.float32]:
        """Every row of BLOCK_SPK4 ``[rows, n_blocks]`` times every token of BLOCK_SPKA ``[tokens,
        n_blocks]``.

        Returns ``float32[tokens, rows]``, computed by ggml_vec_dot_spk4_spka one pair at a time.
        """
        rows, tokens = (
            _blocks(weights, BLOCK_SPK4, "weights"),
            _blocks(activations, BLOCK_SPKA, "activations"),
        )
        if rows.shape[1] != tokens.shape[1]:
            raise InputError(
                f"weights have {rows.shape[1]} blocks per row, activations {tokens.shape[1]}",
                "give both with the same number of inputs",
            )
        out = np.empty((tokens.shape[0], rows.shape[0]), np.float32)
        n_in = rows.shape[1] * QK_SPK
        dot = self.cpu.ggml_vec_dot_spk4_spka
        base, step = out.ctypes.data, out.itemsize
        for t, token in enumerate(tokens):
            for r, row in enumerate(rows):
                dot(n_in, base + (t * len(rows) + r) * step, 0, row.ctypes.data, 0, token.ctypes.data, 0, 1)
        return out

    def validate(self, type_id: int, data: NDArray[np.uint8] | bytes) -> bool:
        """ggml_validate_row_data: False if a block is invalid. It knows no rows; validate_weights checks
        those, too.
        """
        self.type_name(type_id)
        raw = (
            np.frombuffer(data, np.uint8)
            if isinstance(data, bytes)
            else np.ascontiguousarray(data).view(np.uint8)
        )
        return bool(self.base.ggml_validate_row_data(type_id, raw.ctypes.data, raw.nbytes))

    def tool(self, name: str) -> Path:
        """Path of a llama.cpp program from the same tree, see runtime.tool."""
        return tool(name)

    def _rows(self, type_id: int, data: NDArray[np.uint8], n_in: int) -> NDArray[np.uint8]:
        row_bytes = self.row_bytes(type_id, n_in)
        rows = np.ascontiguousarray(data, dtype=np.uint8)
        if rows.ndim != 2 or rows.shape[1] != row_bytes:
            raise FormatError(
                f"{self.type_name(type_id)} rows of {n_in} values have {row_bytes} bytes each, "
                f"but the data has shape {rows.shape}"
            )
        return rows


def bind(library: ctypes.CDLL, functions: dict[str, tuple]) -> None:
    """Give functions of a library their (result, arguments) types; a missing one raises AttributeError."""
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def load() -> NativeLibrary:
    """The libraries of the checked runtime, loaded once. Raises RuntimeMissingError."""
    return _load(cast(Path, require_runtime().library_dir))  # a runtime without problems has a folder


@cache
def _load(library_dir: Path) -> NativeLibrary:
    return NativeLibrary(library_dir)


def _matrix(values: ArrayLike, what: str) -> NDArray[np.float32]:
    matrix = np.ascontiguousarray(values, dtype=np.float32)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(f"{what} must be a matrix, but have shape {matrix.shape}", "give [rows, inputs]")
    return matrix


def _check_finite(rows: NDArray[np.float32]) -> None:
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        raise InputError(f"weight {bad[0][1]} of row {bad[0][0]} is not finite", "repair the source model")


def _blocks(blocks: NDArray[np.void], dtype: np.dtype, what: str) -> NDArray[np.void]:
    found = np.ascontiguousarray(blocks)
    if found.dtype != dtype or found.ndim != 2 or 0 in found.shape:
        raise InputError(
            f"{what} must be a matrix of blocks, but have shape {found.shape} and type {found.dtype}",
            "give [rows, blocks] as the codec makes them",
        )
    return found
