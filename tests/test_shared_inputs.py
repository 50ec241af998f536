"""Products of one input share its spikes in a run of a graph, and only while that input stays as it is."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_void_p

import numpy as np
import pytest

from spikequant_gguf import codec
from spikequant_gguf.format import TYPE_SPK4, blocks_to_bytes
from spikequant_gguf.ggml_api import PLAIN_BUFFER, MatMul, TensorStruct
from spikequant_gguf.native import load

pytestmark = pytest.mark.usefixtures("runtime")

INPUTS, ROWS = 320, (130, 300, 64)
SALIENCE = 3.1  # of the last matrix
SCALE = 0.37


class Layer(MatMul):
    """In this order: A x, a norm of it, B x, C x with settings of its own, A x, x scaled in place, A x."""

    def _build(self, type_id, packed, n_inputs, n_tokens, buffer, *settings_of_one_product):
        ggml, base = self._ggml, load().base
        for name, arguments in {
            "ggml_rms_norm": (c_void_p, c_void_p, c_float),
            "ggml_scale_inplace": (c_void_p, c_void_p, c_float),
        }.items():
            getattr(base, name).restype, getattr(base, name).argtypes = c_void_p, arguments
        of_weights, of_graph = self._context(len(ROWS)), self._context(12, graph=True)
        self._n_experts = 1
        weights = [ggml.new_tensor_2d(of_weights, type_id, n_inputs, rows) for rows in ROWS]
        pair = (c_float * 2)(SALIENCE, 0.0)
        ctypes.memmove(TensorStruct.from_address(weights[-1]).op_params, pair, ctypes.sizeof(pair))
        self._input_shape = (n_tokens, n_inputs)
        x = ggml.new_tensor_2d(of_graph, 0, n_inputs, n_tokens)
        self._inputs, self._ids = [x], None
        first = ggml.mul_mat(of_graph, weights[0], x)
        nodes = [first, base.ggml_rms_norm(of_graph, first, 1e-5)]
        nodes += [ggml.mul_mat(of_graph, weights[i], x) for i in (1, 2, 0)]
        nodes.append(base.ggml_scale_inplace(of_graph, x, SCALE))
        nodes.append(ggml.mul_mat(of_graph, weights[0], x))
        self._allocate(of_weights, ggml.buffer_types[buffer])
        at = 0
        for tensor, rows in zip(weights, ROWS, strict=True):
            part = np.ascontiguousarray(packed[0, at : at + rows])
            ggml.backend_tensor_set(tensor, part.ctypes.data, 0, part.nbytes)
            at += rows
        self._allocate(of_graph, ggml.buffer_types[PLAIN_BUFFER])
        self._graph = ggml.new_graph(of_graph)
        for node in nodes:
            ggml.build_forward_expand(self._graph, node)
        self._products = [nodes[i] for i in (0, 2, 3, 4, 6)]

    def outputs(self) -> list[np.ndarray]:
        found = []
        for tensor, rows in zip(self._products, [ROWS[i] for i in (0, 1, 2, 0, 0)], strict=True):
            y = np.empty((self._input_shape[0], rows), np.float32)
            self._ggml.backend_tensor_get(tensor, y.ctypes.data, 0, y.nbytes)
            found.append(y)
        return found


@pytest.mark.parametrize("buffer", ["CPU", "CPU_SPIKE"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_products_of_one_input(buffer, threads, tokens):
    rng = np.random.default_rng(tokens)
    matrices = [codec.encode_weights(rng.standard_normal((r, INPUTS)).astype(np.float32)) for r in ROWS]
    packed = np.concatenate([blocks_to_bytes(m).reshape(len(m), -1) for m in matrices])
    a, b, c = matrices
    with Layer(TYPE_SPK4, packed, INPUTS, tokens, buffer=buffer, threads=threads) as layer:
        for _ in range(3):  # the same addresses in every run, with other contents
            x = (rng.standard_normal((tokens, INPUTS)) ** 3).astype(np.float32)
            layer.set_input(x)
            layer.compute()
            plain, scaled = codec.encode_activations(x), codec.encode_activations(x * np.float32(SCALE))
            own = codec.encode_activations(x, salience=np.float32(SALIENCE))
            expected = [
                *(codec.matmul(a, plain), codec.matmul(b, plain), codec.matmul(c, own)),
                *(codec.matmul(a, plain), codec.matmul(a, scaled)),
            ]
            assert all(map(np.array_equal, layer.outputs(), expected))
