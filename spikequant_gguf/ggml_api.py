"""Matrix products through ggml's public C interface, as a model's graph runs them.

For exactness tests and benchmarks: MUL_MAT and MUL_MAT_ID for any weight type, in the CPU backend's ordinary
buffer or in one of its extra buffer types (``CPU_SPIKE``, ``CPU_REPACK``, ...), with a number of threads.

    with MatMul(TYPE_SPK4, weights, n_inputs=576, n_tokens=8, buffer="CPU_SPIKE", threads=2) as product:
        product.set_input(x)        # float32[8, 576]
        seconds = product.compute()
        y = product.output()        # float32[8, n_outputs]
"""

from __future__ import annotations

import ctypes
import time
from ctypes import POINTER, c_bool, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError, UnsupportedError
from .native import NativeLibrary, bind, load

__all__ = [
    "MAX_COPIES",
    "MatMul",
    "TensorStruct",
    "buffer_types",
    "mul_mat",
    "mul_mat_id",
    "operation_number",
    "tensor_at",
    "tensor_rows",
    "tensor_values",
]

PLAIN_BUFFER = "CPU"
MAX_COPIES = 900  # each adds a node and two leafs to a graph that has room for 2048 of either
_TYPE_F32, _TYPE_I32 = 0, 26
_USAGE_WEIGHTS = 1
_STATUS_SUCCESS = 0
_MAX_OPERATIONS = 64  # fewer than ggml has: it does not check the number
_OBJECT_BYTES = 32  # struct ggml_object, which ggml_tensor_overhead counts beside the tensor


class TensorStruct(ctypes.Structure):
    """struct ggml_tensor of the pinned ggml; its size is checked before the first use."""

    _fields_ = [
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    ]


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_BASE = {
    "ggml_op_name": (c_char_p, (c_int,)),
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead": (c_size_t, ()),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_new_tensor_3d": (c_void_p, (c_void_p, c_int, c_int64, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_mul_mat_id": (c_void_p, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_buffer_set_usage": (None, (c_void_p, c_int)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_dev_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_free": (None, (c_void_p,)),
}
_CPU = {
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_set_use_ref": (None, (c_void_p, c_bool)),
}


class _Ggml:
    """Typed functions of libggml-base and libggml-cpu, and the CPU backend's buffer types by name."""

    def __init__(self, native: NativeLibrary) -> None:
        self.native = native
        for library, functions in ((native.base, _BASE), (native.cpu, _CPU)):
            bind(library, functions)
            for name in functions:
                setattr(self, name.removeprefix("ggml_"), getattr(library, name))
        if self.tensor_overhead() != ctypes.sizeof(TensorStruct) + _OBJECT_BYTES:
            raise UnsupportedError(
                "struct ggml_tensor of this runtime is not the pinned one", "run `spikequant build`"
            )
        registry = self.backend_cpu_reg()
        self.device = self.backend_reg_dev_get(registry, 0)
        self.buffer_types = {PLAIN_BUFFER: self.backend_dev_buffer_type(self.device)}
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
            for kind in _null_terminated(extra):
                self.buffer_types[self.backend_buft_name(kind).decode()] = kind


class MatMul:
    """One matrix product of fixed shape; weights are set once, inputs as often as wanted. Close it after use.

    weights: ``uint8[n_outputs, row_bytes]``, or ``uint8[n_experts, n_outputs, row_bytes]`` for a product
    routed to experts (MUL_MAT_ID, ``experts_used`` per token). The input is ``float32[n_tokens, n_inputs]``;
    routed, it may also be ``float32[n_tokens, experts_used, n_inputs]`` if ``input_per_expert``. salience,
    silence: the tensor's own encoder settings, 0 for the defaults (SPK4 only). use_reference: compute without
    the optimized kernels. copies: of weights and input, whose products follow each other in one graph like a
    model's layers; a routed product has one, and there may be MAX_COPIES. shared_weights: the copies are of
    the input only. Raises UnsupportedError if this CPU's buffer type does not take such a product.
    """

    def __init__(
        self,
        type_id: int,
        weights: NDArray[np.uint8],
        n_inputs: int,
        n_tokens: int,
        *,
        buffer: str = PLAIN_BUFFER,
        threads: int = 1,
        experts_used: int | None = None,
        input_per_expert: bool = False,
        salience: float = 0.0,
        silence: float = 0.0,
        use_reference: bool = False,
        copies: int = 1,
        shared_weights: bool = False,
        library: NativeLibrary | None = None,
    ) -> None:
        self._ggml = ggml = _ggml(library or load())
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self._backend = None
        packed = _check_weights(ggml.native, type_id, weights, n_inputs, routed=experts_used is not None)
        if (
            n_tokens < 1
            or threads < 1
            or (experts_used is not None and not 1 <= experts_used <= packed.shape[0])
        ):
            raise InputError(
                "tokens, threads and experts used must be positive, and there must be that many experts",
                "correct the arguments",
            )
        if not 1 <= copies <= (MAX_COPIES if experts_used is None else 1):
            raise InputError(f"there can be no {copies} copies of this product", f"ask for 1 to {MAX_COPIES}")
        if buffer not in ggml.buffer_types:
            raise UnsupportedError(
                f"this CPU has no buffer type {buffer}", f"choose one of {', '.join(ggml.buffer_types)}"
            )
        try:
            self._build(
                type_id,
                packed,
                n_inputs,
                n_tokens,
                buffer,
                experts_used,
                input_per_expert,
                (salience, silence),
                copies,
                shared_weights,
            )
            self._backend = ggml.backend_cpu_init()
            ggml.backend_cpu_set_n_threads(self._backend, threads)
            ggml.backend_cpu_set_use_ref(self._backend, use_reference)
        except BaseException:
            self.close()
            raise

    def set_input(self, x: ArrayLike, ids: ArrayLike | None = None) -> None:
        """Give the activations, and for a routed product the experts ``int32[n_tokens, experts_used]`` of
        each token. With one more dimension in front each copy has its own, else all copies have the same.
        """
        values = np.ascontiguousarray(x, np.float32)
        of_copies = (len(self._inputs), *self._input_shape)
        if values.shape not in (self._input_shape, of_copies):
            raise InputError(
                f"the input has shape {values.shape}, not {self._input_shape}", "correct the shape"
            )
        if (ids is None) != (self._ids is None):
            raise InputError(
                "expert ids belong to a routed product, and only to it", "give ids or leave them out"
            )
        if ids is not None:
            chosen = np.ascontiguousarray(ids, np.int32)
            shape = self._output_shape[:-1]
            if chosen.shape != shape or chosen.min() < 0 or chosen.max() >= self._n_experts:
                raise InputError(
                    f"expert ids must be {shape} numbers below {self._n_experts}", "correct the ids"
                )
            self._ggml.backend_tensor_set(self._ids, chosen.ctypes.data, 0, chosen.nbytes)
        for tensor, own in zip(self._inputs, np.broadcast_to(values, of_copies), strict=True):
            self._ggml.backend_tensor_set(tensor, own.ctypes.data, 0, own.nbytes)

    def compute(self) -> float:
        """Run the product, or all copies of it; returns seconds of wall time."""
        begun = time.perf_counter()
        status = self._ggml.backend_graph_compute(self._backend, self._graph)
        seconds = time.perf_counter() - begun
        if status != _STATUS_SUCCESS:
            raise UnsupportedError(
                f"ggml could not compute the product (status {status})", "use smaller matrices"
            )
        return seconds

    def output(self) -> NDArray[np.float32]:
        """Result of the last compute, of the last copy: ``float32[n_tokens, n_outputs]`` or ``[n_tokens,
        experts_used, n_outputs]``.
        """
        result = np.empty(self._output_shape, np.float32)
        self._ggml.backend_tensor_get(self._result, result.ctypes.data, 0, result.nbytes)
        return result

    def weight_bytes(self) -> NDArray[np.uint8]:
        """The weights as the buffer gives them back: the bytes that were set, however it keeps them."""
        packed = np.empty(self._weights_shape, np.uint8)
        self._ggml.backend_tensor_get(self._weights, packed.ctypes.data, 0, packed.nbytes)
        return packed

    def close(self) -> None:
        """Free everything; the object cannot be used afterwards."""
        if self._backend:
            self._ggml.backend_free(self._backend)
        for buffer in self._buffers:
            self._ggml.backend_buffer_free(buffer)
        for context in self._contexts:
            self._ggml.free(context)
        self._backend, self._buffers, self._contexts = None, [], []

    def __enter__(self) -> MatMul:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(
        self,
        type_id: int,
        packed: NDArray[np.uint8],
        n_inputs: int,
        n_tokens: int,
        buffer: str,
        experts_used: int | None,
        input_per_expert: bool,
        settings: tuple[float, float],
        copies: int,
        shared_weights: bool,
    ) -> None:
        ggml = self._ggml
        self._n_experts, n_outputs, _ = packed.shape
        self._weights_shape = packed.shape if experts_used else packed.shape[1:]
        of_weights, of_graph = self._context(copies), self._context(4 * copies, graph=True)
        self._ids = None
        if experts_used is None:
            self._input_shape, self._output_shape = (n_tokens, n_inputs), (n_tokens, n_outputs)
            matrices = [
                ggml.new_tensor_2d(of_weights, type_id, n_inputs, n_outputs)
                for _ in range(1 if shared_weights else copies)
            ]
            self._inputs = [
                ggml.new_tensor_2d(of_graph, _TYPE_F32, n_inputs, n_tokens) for _ in range(copies)
            ]
            results = [
                ggml.mul_mat(of_graph, matrices[i % len(matrices)], x) for i, x in enumerate(self._inputs)
            ]
        else:
            matrices = [ggml.new_tensor_3d(of_weights, type_id, n_inputs, n_outputs, self._n_experts)]
            inputs = experts_used if input_per_expert else 1
            self._input_shape = (n_tokens, inputs, n_inputs) if input_per_expert else (n_tokens, n_inputs)
            self._output_shape = (n_tokens, experts_used, n_outputs)
            self._inputs = [ggml.new_tensor_3d(of_graph, _TYPE_F32, n_inputs, inputs, n_tokens)]
            self._ids = ggml.new_tensor_2d(of_graph, _TYPE_I32, experts_used, n_tokens)
            results = [ggml.mul_mat_id(of_graph, matrices[0], self._inputs[0], self._ids)]
        self._weights, self._result = matrices[-1], results[-1]
        for matrix in matrices:
            # The model loader keeps encoder settings here: a weight tensor has no use for its parameters.
            parameters = TensorStruct.from_address(matrix).op_params
            ctypes.memmove(parameters, (c_float * 2)(*settings), ctypes.sizeof(c_float) * 2)

        weights_buffer = self._allocate(of_weights, ggml.buffer_types[buffer])
        ggml.backend_buffer_set_usage(weights_buffer, _USAGE_WEIGHTS)
        # Asked before the weights are set: an extra buffer type fails hard on tensors that it does not take.
        if not ggml.backend_dev_supports_op(ggml.device, self._result):
            raise UnsupportedError(
                f"buffer type {buffer} takes no such product of {ggml.native.type_name(type_id)} weights",
                "choose another buffer type",
            )
        for matrix in matrices:
            ggml.backend_tensor_set(matrix, packed.ctypes.data, 0, packed.nbytes)
        self._allocate(of_graph, ggml.buffer_types[PLAIN_BUFFER])
        self._graph = ggml.new_graph(of_graph)
        for result in results:
            ggml.build_forward_expand(self._graph, result)

    def _context(self, tensors: int, graph: bool = False) -> int:
        size = tensors * self._ggml.tensor_overhead() + (self._ggml.graph_overhead() if graph else 0)
        context = self._ggml.init(_InitParams(size, None, True))
        if not context:
            raise UnsupportedError("ggml could not make a context", "free memory")
        self._contexts.append(context)
        return context

    def _allocate(self, context: int, kind: int) -> int:
        buffer = self._ggml.backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise UnsupportedError("ggml could not allocate the matrices", "use smaller ones")
        self._buffers.append(buffer)
        return buffer


def mul_mat(type_id: int, weights: NDArray[np.uint8], x: ArrayLike, **options: object) -> NDArray[np.float32]:
    """``x[n_tokens, n_inputs]`` times the rows of ``weights[n_outputs, row_bytes]``: ``float32[n_tokens,
    n_outputs]``.

    options as of MatMul: buffer, threads, salience, silence, use_reference.
    """
    values = np.atleast_2d(np.asarray(x, np.float32))
    with MatMul(type_id, weights, values.shape[-1], values.shape[0], **options) as product:
        product.set_input(values)
        product.compute()
        return product.output()


def mul_mat_id(
    type_id: int, weights: NDArray[np.uint8], x: ArrayLike, ids: ArrayLike, **options: object
) -> NDArray[np.float32]:
    """Product routed to experts: ``weights[n_experts, n_outputs, row_bytes]``, ``ids[n_tokens,
    experts_used]``.

    x: ``[n_tokens, n_inputs]``, the same for all experts of a token, or ``[n_tokens, experts_used,
    n_inputs]``. Returns ``float32[n_tokens, experts_used, n_outputs]``. options as of MatMul.
    """
    values, chosen = np.asarray(x, np.float32), np.asarray(ids, np.int32)
    if values.ndim not in (2, 3) or chosen.ndim != 2:
        raise InputError(
            f"input of shape {values.shape} and ids of shape {chosen.shape} make no routed product",
            "give [n_tokens, n_inputs] and [n_tokens, experts_used]",
        )
    with MatMul(
        type_id,
        weights,
        values.shape[-1],
        values.shape[0],
        experts_used=chosen.shape[1],
        input_per_expert=values.ndim == 3,
        **options,
    ) as product:
        product.set_input(values, chosen)
        product.compute()
        return product.output()


@cache
def operation_number(name: str) -> int:
    """The number of an operation in the `op` of a TensorStruct, for example of "MUL_MAT".

    Raises UnsupportedError if the installed ggml has none of that name.
    """
    op_name = _ggml(load()).op_name
    for number in range(_MAX_OPERATIONS):
        if op_name(number) == name.encode():
            return number
    raise UnsupportedError(f"this ggml has no operation {name}", "run `spikequant build`")


def tensor_values(tensor: TensorStruct) -> NDArray[np.float32] | NDArray[np.int32]:
    """A view of a tensor's values, float32 or int32, its dimensions in NumPy's order (ggml's reversed).

    Raises UnsupportedError for tensors of other types.
    """
    dtypes = {_TYPE_F32: np.float32, _TYPE_I32: np.int32}
    if tensor.type not in dtypes:
        raise UnsupportedError(f"the values of '{tensor.name.decode()}' are neither float32 nor int32", None)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    n_bytes = 4 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (c_char * n_bytes).from_address(tensor.data)
    return np.ndarray(shape, dtypes[tensor.type], memory, strides=strides)


def tensor_at(address: Any) -> TensorStruct:
    """The tensor at an address: of a node as ggml gives it to a callback, or in a tensor's `src`."""
    return TensorStruct.from_address(getattr(address, "value", address))


def tensor_rows(tensor: TensorStruct) -> NDArray[np.float32] | NDArray[np.int32]:
    """A tensor's values as [rows, columns], all dimensions but ggml's first in one; a view if contiguous.

    Raises UnsupportedError as tensor_values.
    """
    values = tensor_values(tensor)
    return values.reshape(-1, values.shape[-1])


def buffer_types(library: NativeLibrary | None = None) -> list[str]:
    """Names of the buffer types that the CPU backend offers here; ``CPU`` is the ordinary one."""
    return list(_ggml(library or load()).buffer_types)


@cache
def _ggml(library: NativeLibrary) -> _Ggml:
    return _Ggml(library)


def _null_terminated(array: object) -> list[int]:
    found = []
    while array[len(found)]:
        found.append(array[len(found)])
    return found


def _check_weights(
    native: NativeLibrary, type_id: int, weights: NDArray[np.uint8], n_inputs: int, routed: bool
) -> NDArray[np.uint8]:
    """The weights as ``[n_experts, n_outputs, row_bytes]``; a plain matrix counts as one expert."""
    packed = np.ascontiguousarray(weights)
    row_bytes = native.row_bytes(type_id, n_inputs)
    dimensions = 3 if routed else 2
    if (
        packed.dtype != np.uint8
        or packed.ndim != dimensions
        or packed.shape[-1] != row_bytes
        or 0 in packed.shape
    ):
        raise InputError(
            f"weights of {n_inputs} inputs in type {native.type_name(type_id)} need {row_bytes} bytes per "
            f"row, but have shape {packed.shape} and type {packed.dtype}",
            "quantize them again",
        )
    return packed if routed else packed[None]
