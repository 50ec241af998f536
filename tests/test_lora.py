"""LoRA adapters at run time over spike weights: the float correction is added to what the neurons give."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_tools import difference

from spikequant_gguf.converter import convert
from spikequant_gguf.dequantize import dequantize

RANK, ALPHA = 4, 8.0
LAYERS = ("attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down")
PROMPT = b"it was the end of that which his neuron, was 1024 and for"


def factors(model: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B by the name of the weight, float32[RANK, inputs] and float32[outputs, RANK]."""
    rng = np.random.default_rng(7)
    found = {}
    for tensor in gguf.GGUFReader(model).tensors:
        if tensor.name.startswith("blk.") and tensor.name.split(".")[2] in LAYERS:
            n_in, n_out = (int(size) for size in tensor.shape)
            a = rng.standard_normal((RANK, n_in)) / np.sqrt(n_in)
            b = rng.standard_normal((n_out, RANK)) * 0.15
            found[tensor.name] = (a.astype(np.float32), b.astype(np.float32))
    return found


def write_adapter(path: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merge(model: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Adds the adapter to the float weights of a model, in place."""
    for tensor in gguf.GGUFReader(model, "r+").tensors:
        if tensor.name in pairs:
            a, b = pairs[tensor.name]
            tensor.data[:] = tensor.data + ALPHA / RANK * (b @ a)
            tensor.data.flush()
    return model


def logits(model: Path, adapter: Path | None = None, scale: float = 1.0) -> np.ndarray:
    from llama_cpp import Llama

    options = {} if adapter is None else {"lora_path": str(adapter), "lora_scale": scale}
    llama = Llama(str(model), n_ctx=64, n_threads=1, logits_all=True, verbose=False, **options)
    tokens = llama.tokenize(PROMPT)
    llama.eval(tokens)
    return llama.scores[: len(tokens)].copy()


@pytest.mark.usefixtures("runtime")
def test_adapter_over_spikes_is_the_merged_model(tiny_model_f32: Path, tmp_path: Path) -> None:
    spikes = convert(tiny_model_f32, tmp_path / "spk4.gguf").path
    pairs = factors(spikes)
    assert len(pairs) == 2 * len(LAYERS)
    adapter = write_adapter(tmp_path / "adapter.gguf", pairs)
    floats = tmp_path / "f16.gguf"
    dequantize(spikes, floats, "f16")

    base, adapted = logits(spikes), logits(spikes, adapter)
    base_of_floats = logits(floats)
    merged = logits(merge(floats, pairs))
    assert difference(adapted, merged) < 1.5 * difference(
        base, base_of_floats
    )  # activations are rounded in both
    assert difference(adapted, base) > 0.5
    np.testing.assert_array_equal(logits(spikes, adapter, scale=0.0), base)
