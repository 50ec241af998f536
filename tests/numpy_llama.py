"""A Llama model in NumPy: linear layers from the codec, to the bit; the rest in float32 as in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.codec import encode_activations, matmul
from spikequant_gguf.format import TYPE_SPK4, blocks_from_bytes
from spikequant_gguf.gguf_header import read_header

Floats = NDArray[np.float32]


class NumpyLlama:
    """Reads a file whose matrices are SPK4 or F32. Tokens are given one by one; it remembers those before.

    noise: relative, on everything that is not a linear layer; to see whether the last bits matter.
    """

    def __init__(self, path: Path, noise: float = 0.0, seed: int = 0) -> None:
        self._noise, self._random = noise, np.random.default_rng(seed)
        header = read_header(path)
        data = path.read_bytes()
        self._tensors: dict[str, NDArray] = {}
        for tensor in header.tensors:
            raw = np.frombuffer(data, np.uint8, tensor.n_bytes, tensor.offset)
            if tensor.type_id == TYPE_SPK4:
                self._tensors[tensor.name] = blocks_from_bytes(raw.reshape(tensor.n_rows, -1))
            else:
                assert tensor.type_id == 0, f"{tensor.name} is neither SPK4 nor F32"
                self._tensors[tensor.name] = raw.view("<f4").reshape(tensor.shape[::-1])
        self._layers = int(header.metadata["llama.block_count"])
        self._heads = int(header.metadata["llama.attention.head_count"])
        self._kv_heads = int(header.metadata["llama.attention.head_count_kv"])
        self._epsilon = np.float32(header.metadata["llama.attention.layer_norm_rms_epsilon"])
        self._keys: list[list[Floats]] = [[] for _ in range(self._layers)]
        self._values: list[list[Floats]] = [[] for _ in range(self._layers)]

    def next_logits(self, token: int) -> Floats:
        """float32[vocabulary] after one more token."""
        x = self._tensors["token_embd.weight"][token]
        for layer in range(self._layers):
            block = f"blk.{layer}"
            x = x + self._attention(layer, self._norm(f"{block}.attn_norm", x))
            y = self._norm(f"{block}.ffn_norm", x)
            gate, up = self._linear(f"{block}.ffn_gate", y), self._linear(f"{block}.ffn_up", y)
            x = x + self._linear(f"{block}.ffn_down", gate / (1 + np.exp(-gate)) * up)
        return self._linear("output", self._norm("output_norm", x))

    def _attention(self, layer: int, x: Floats) -> Floats:
        keys, values = self._keys[layer], self._values[layer]
        query, key, value = (self._linear(f"blk.{layer}.attn_{name}", x) for name in "qkv")
        width = len(query) // self._heads
        query = _rotated(query.reshape(self._heads, width), len(keys))
        keys.append(_rotated(key.reshape(self._kv_heads, width), len(keys)))
        values.append(value.reshape(self._kv_heads, width))
        group = self._heads // self._kv_heads
        every_key = np.repeat(np.stack(keys, 1), group, axis=0)  # [head, position, width]
        every_value = np.repeat(np.stack(values, 1), group, axis=0)
        scores = np.einsum("hw,hpw->hp", query, every_key) / np.float32(np.sqrt(width))
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return self._linear(f"blk.{layer}.attn_output", np.einsum("hp,hpw->hw", weights, every_value).ravel())

    def _norm(self, name: str, x: Floats) -> Floats:
        scale = np.float32(1 / np.sqrt(np.square(x, dtype=np.float64).mean() + self._epsilon))
        y = x * scale * self._tensors[f"{name}.weight"]
        if self._noise:
            y *= (1 + self._noise * self._random.standard_normal(len(y))).astype(np.float32)
        return y

    def _linear(self, name: str, x: Floats) -> Floats:
        weights = self._tensors[f"{name}.weight"]
        if weights.dtype == np.float32:
            return weights @ x
        return matmul(weights, encode_activations(x[None]))[0]


def _rotated(heads: Floats, position: int) -> Floats:
    """Rotary embedding of neighbouring pairs."""
    width = heads.shape[1]
    angle = position * 10000.0 ** (-np.arange(0, width, 2) / width)
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    even, odd = heads[:, 0::2], heads[:, 1::2]
    return np.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=2).reshape(heads.shape)


def greedy(model: NumpyLlama, prompt: list[int], n_tokens: int) -> list[int]:
    """The most likely tokens after a prompt."""
    for token in prompt:
        logits = model.next_logits(token)
    tokens = []
    for _ in range(n_tokens):
        tokens.append(int(np.argmax(logits)))
        logits = model.next_logits(tokens[-1])
    return tokens
