"""Llama models of the usual shapes with random weights, for speed only: their text is noise.

A file is written tensor by tensor, so that it needs little memory. Of each matrix some rows are random and
quantized by ggml; the others repeat their bytes, which changes neither what is read nor what is computed.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType

from spikequant_gguf import format as spike_format
from spikequant_gguf.files import atomic_path
from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.ggml_patch.progress import Progress
from spikequant_gguf.native import load
from spikequant_gguf.shapes import SHAPES as DENSE_SHAPES
from spikequant_gguf.shapes import LlamaShape
from spikequant_gguf.variants import SPIKE_TYPE

__all__ = ["SHAPES", "TYPES", "file_bytes", "tensor_type", "write_model"]

SHAPES = DENSE_SHAPES | {
    "moe": LlamaShape(layers=8, width=2048, ff_width=5632, heads=32, kv_heads=4, experts=8, experts_used=2)
}
"""Dense ones, and a mixture of experts of TinyLlama's width."""

_DISTINCT_ROWS = 128
_CONTEXT = 2048
_T = GGMLQuantizationType


_FILE_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
}
_BULK = {"f16": _T.F16, "q8_0": _T.Q8_0, "q4_0": _T.Q4_0, "q4_k_m": _T.Q4_K, "iq4_xs": _T.IQ4_XS}
TYPES = (*_FILE_TYPES, SPIKE_TYPE)


def tensor_type(kind: str, name: str, shape: LlamaShape) -> GGMLQuantizationType:
    """Type of a matrix, as llama-quantize mixes them in a Llama model without an importance matrix."""
    if kind in ("f16", "q8_0"):
        return _BULK[kind]
    if name == "output":
        return _T.Q6_K
    if kind == SPIKE_TYPE:
        return _T.Q4_0 if name == "token_embd" else _T(TYPE_SPK4)
    layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
    eighth = shape.layers // 8
    if kind == "q4_k_m" and name.endswith(("attn_v", "ffn_down", "ffn_down_exps")):
        more = layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2
        return _T.Q6_K if more else _T.Q4_K
    if kind == "iq4_xs":
        first_down = name.endswith(("ffn_down", "ffn_down_exps")) and layer < eighth
        shared_v = name.endswith("attn_v") and shape.heads // shape.kv_heads >= 4
        return _T.Q5_K if first_down or shared_v else _T.IQ4_XS
    return _BULK[kind]


def file_bytes(kind: str, shape: LlamaShape) -> int:
    """Bytes of the matrices of a model."""
    native = load()
    return sum(
        rows * native.row_bytes(int(tensor_type(kind, name, shape)), inputs)
        for name, rows, inputs in shape.matrices()
    )


def write_model(path: Path, kind: str, shape: LlamaShape, progress: Progress) -> None:
    """Write a model of a type into a file, which appears when it is complete."""
    with atomic_path(path) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        _add_metadata(writer, kind, shape)
        norms = [
            "output_norm",
            *(f"blk.{i}.{n}" for i in range(shape.layers) for n in ("attn_norm", "ffn_norm")),
        ]
        routers = [f"blk.{i}.ffn_gate_inp" for i in range(shape.layers)] if shape.experts else []
        for name in norms:
            writer.add_tensor_info(f"{name}.weight", (shape.width,), np.dtype(np.float32), 4 * shape.width)
        for name in routers:
            size = (shape.experts, shape.width)
            writer.add_tensor_info(f"{name}.weight", size, np.dtype(np.float32), 4 * size[0] * size[1])
        native = load()
        for name, rows, inputs in shape.matrices():
            stored = tensor_type(kind, name, shape)
            row_bytes = native.row_bytes(int(stored), inputs)
            experts = (shape.experts, rows // shape.experts) if name.endswith("_exps") else (rows,)
            writer.add_tensor_info(
                f"{name}.weight",
                (*experts, row_bytes),
                np.dtype(np.uint8),
                rows * row_bytes,
                raw_dtype=stored,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _ in norms:
            writer.write_tensor_data(np.ones(shape.width, np.float32))
        rng = np.random.default_rng(0)
        for _ in routers:
            values = rng.standard_normal((shape.experts, shape.width)) / np.sqrt(shape.width)
            writer.write_tensor_data(values.astype(np.float32))
        rows_of: dict[tuple[int, int], np.ndarray] = {}
        matrices = shape.matrices()
        for done, (name, rows, inputs) in enumerate(matrices):
            key = (int(tensor_type(kind, name, shape)), inputs)
            if key not in rows_of:
                values = rng.standard_normal((_DISTINCT_ROWS, inputs)) / np.sqrt(inputs)
                rows_of[key] = native.quantize(key[0], values.astype(np.float32))
            writer.write_tensor_data(np.resize(rows_of[key], (rows, rows_of[key].shape[1])))
            progress.advance(done + 1, len(matrices))
        writer.close()


def _add_metadata(writer: gguf.GGUFWriter, kind: str, shape: LlamaShape) -> None:
    writer.add_name("random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ff_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    if kind == SPIKE_TYPE:
        writer.add_uint32("general.file_type", spike_format.FTYPE_SPK4)
        writer.add_uint32(spike_format.KEY_VERSION, spike_format.FORMAT_VERSION)
        writer.add_string(spike_format.KEY_TYPE_NAME, spike_format.TYPE_NAME)
        writer.add_float32(spike_format.KEY_SALIENCE_THRESHOLD, spike_format.DEFAULT_SALIENCE)
        writer.add_float32(spike_format.KEY_SILENCE_THRESHOLD, spike_format.DEFAULT_SILENCE)
    else:
        writer.add_file_type(_FILE_TYPES[kind])
