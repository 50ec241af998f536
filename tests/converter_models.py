"""Small models and a quantization backend in NumPy, for the tests of the converter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants

from spikequant_gguf.codec import decode_weights, encode_weights, validate_weights
from spikequant_gguf.errors import FormatError
from spikequant_gguf.format import TYPE_SPK4, blocks_from_bytes, blocks_to_bytes
from spikequant_gguf.gguf_header import read_header

METADATA: dict[str, Any] = {
    "general.name": "Tiny Test",
    "general.file_type": 1,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ü"],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.5, -3.0],
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
    "llama.block_count": 1,
    "llama.rope.freq_base": 10000.0,
}


class NumpyBackend:
    """Stands for the runtime: SPK4 by the NumPy reference, other types by the gguf package."""

    def quantize(self, type_id, weights, importance=None):
        if type_id == TYPE_SPK4:
            return blocks_to_bytes(encode_weights(weights, importance))
        return np.ascontiguousarray(quants.quantize(np.ascontiguousarray(weights), T(type_id))).view(np.uint8)

    def dequantize(self, type_id, data, n_in):
        if type_id == TYPE_SPK4:
            return decode_weights(blocks_from_bytes(data))
        return quants.dequantize(data, T(type_id)).reshape(len(data), n_in)

    def validate(self, type_id, data):
        if type_id == TYPE_SPK4:
            try:
                validate_weights(blocks_from_bytes(data))
            except FormatError:
                return False
        return True


def normal(*shape: int, seed: int = 0, scale: float = 0.05) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def llama_tensors(
    n_embd: int = 64, n_ff: int = 128, n_vocab: int = 32, tied: bool = True, n_layers: int = 1
) -> dict:
    """Tensors of a Llama model in NumPy order, float32."""
    tensors = {"token_embd.weight": normal(n_vocab, n_embd)}
    for layer in range(n_layers):
        shapes = {
            "attn_norm": (n_embd,),
            "attn_q": (n_embd, n_embd),
            "attn_k": (n_embd, n_embd),
            "attn_v": (n_embd, n_embd),
            "attn_output": (n_embd, n_embd),
            "ffn_norm": (n_embd,),
            "ffn_gate": (n_ff, n_embd),
            "ffn_up": (n_ff, n_embd),
            "ffn_down": (n_embd, n_ff),
        }
        for number, (name, shape) in enumerate(shapes.items(), 10 * layer + 1):
            tensors[f"blk.{layer}.{name}.weight"] = normal(*shape, seed=number) + (len(shape) == 1)
    tensors["output_norm.weight"] = normal(n_embd, seed=99) + 1
    if not tied:
        tensors["output.weight"] = normal(n_vocab, n_embd, seed=98)
    return tensors


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    kind: T | None = None,
    metadata: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    alignment: int | None = None,
) -> Path:
    """Writes a model. Matrices get the type `kind` if it is given; vectors stay float32."""
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in (METADATA if metadata is None else metadata).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, data in tensors.items():
        if kind is not None and data.ndim > 1 and data.dtype == np.float32:
            writer.add_tensor(name, quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(path: Path) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Type, shape and bytes of each tensor of a GGUF file, by name in the file's order."""
    data = path.read_bytes()
    return {
        tensor.name: (tensor.type_id, tensor.shape, data[tensor.offset : tensor.offset + tensor.n_bytes])
        for tensor in read_header(path).tensors
    }
