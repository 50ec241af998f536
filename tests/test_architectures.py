"""Every architecture from a Hugging Face folder to spikes in llama-cpp-python: nothing permuted or skipped.

A chain of comparisons: transformers = llama.cpp with the float weights (to rounding), float weights = what
the spike model stores (to 4-bit rounding), every spike product = the NumPy reference (to the bit), and the
spike model = its dequantized version in llama.cpp (to the rounding of activations).
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, Architecture, write_checkpoint
from converter_server import ConverterServer
from gguf import GGMLQuantizationType as T
from graph_spy import SpyModel
from llama_tools import difference
from test_serving import serve

from spikequant_gguf import codec
from spikequant_gguf import format as f
from spikequant_gguf.converter import ConvertOptions, ConvertReport, checkpoint, convert
from spikequant_gguf.converter.calibrated import CalibrationOptions, calibration
from spikequant_gguf.converter.experts import RoutedModel, expert_tensors
from spikequant_gguf.dequantize import dequantize
from spikequant_gguf.errors import UnsupportedError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.format import TYPE_SPK4, blocks_from_bytes
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.runtime import converter_script, import_llama_cpp
from spikequant_gguf.simulate.checkpoint import simulate_checkpoint
from spikequant_gguf.texts import Text

pytestmark = pytest.mark.usefixtures("runtime")

TOKENS = 48
"""Longer than the windows of attention that some of the models have."""


@dataclass(frozen=True)
class Made:
    """A checkpoint and what became of it. ids: int32[TOKENS], a text for it."""

    architecture: Architecture
    model: Any
    ids: np.ndarray
    floats: Path
    spikes: Path
    report: ConvertReport


@pytest.fixture(scope="module")
def converter(runtime) -> Iterator[None]:
    """Makes conversions of checkpoints fast."""
    with ConverterServer(converter_script()) as server, pytest.MonkeyPatch.context() as patch:
        names = SimpleNamespace(**vars(checkpoint.subprocess) | {"Popen": server.popen})
        patch.setattr(checkpoint, "subprocess", names)
        yield


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request, converter, tiny_text, tmp_path_factory) -> Made:
    return make(ARCHITECTURES[request.param], tmp_path_factory.mktemp("made"), tiny_text.read_bytes())


def make(architecture: Architecture, folder: Path, text: bytes, **options: Any) -> Made:
    model = write_checkpoint(architecture, folder / "checkpoint", **options)
    floats = folder / "floats.gguf"
    collect = calibration(CalibrationOptions(text=Text("tiny", text, ""), ctx=64, chunks=6, threads=1))

    def calibrate(source: Any, planned: Any, progress: Any) -> Any:
        shutil.copy(source.paths[0], floats)
        return collect(source, planned, progress)

    report = convert(folder / "checkpoint", folder / "spikes.gguf", calibrate=calibrate)
    ids = np.random.default_rng(1).integers(5, 250, TOKENS).astype(np.int32)
    return Made(architecture, model, ids, floats, report.path, report)


class Embedder(Model):
    """A model that gives states instead of logits."""

    def _context_params(self) -> Any:
        params = super()._context_params()
        params.embeddings = True
        params.pooling_type = self.api.LLAMA_POOLING_TYPE_NONE
        return params

    def states(self, ids: np.ndarray) -> np.ndarray:
        """float32[tokens, n_embd]."""
        self.decode(ids, 0, 0)
        n_embd = self.api.llama_model_n_embd(self.handle)
        return np.ctypeslib.as_array(
            self.api.llama_get_embeddings(self.context), shape=(len(ids), n_embd)
        ).copy()


def outputs(made: Made, path: Path) -> np.ndarray:
    """What llama.cpp makes of the text: float32[tokens, n_vocab] or, of embeddings, [tokens, n_embd]."""
    if made.architecture.is_causal:
        with Model(path, ctx_size=64, threads=1) as model:
            return np.concatenate([block.copy() for block in model.logits(made.ids)])
    with Embedder(path, ctx_size=64, threads=1) as model:
        return model.states(made.ids)


def outputs_of_transformers(made: Made) -> np.ndarray:
    with torch.no_grad():
        found = made.model(torch.from_numpy(made.ids[None].astype(np.int64)))
    return (found.logits if made.architecture.is_causal else found.last_hidden_state)[0].numpy()


# Bounds on difference(); unrelated logits differ by 1.4.
_ROUNDING = 4e-3  # of the float model: 16-bit keys and values, tables of GELU
_WEIGHTS = 0.75
_ACTIVATIONS = 0.45
_BETWEEN_LAYERS = 2e-3  # norms, attention, activation functions: GELU comes from a table of 16 bits


def test_linear_layers_spike(made):
    names = {tensor.name: tensor for tensor in made.report.plan.tensors}
    assert made.report.plan.architecture == made.architecture.name
    assert len(made.report.plan.spiking) == made.architecture.spiking
    kept = [t.name for t in names.values() if len(t.shape) > 1 and not t.is_spiking]
    assert not [
        name for name in kept if not re.search(r"^(token_embd|output|position_embd|token_types)\.|_inp", name)
    ]
    assert not made.report.warnings


def test_gradients_are_measured(made):
    """Of all that predict the next token; from the checkpoint where transformers does not read the GGUF."""
    assert ("gradients of" in made.report.calibration) == made.architecture.is_causal


def test_float_model_is_that_of_transformers(made):
    assert difference(outputs(made, made.floats), outputs_of_transformers(made)) < _ROUNDING


def test_every_spike_product_is_that_of_the_reference(made):
    with SpyModel(made.spikes, ctx_size=64, threads=1) as model:
        model.decode(made.ids, 0, TOKENS if made.architecture.is_causal else 0)
        products = model.products
    blocks, settings = spike_blocks(made.spikes), encoder_settings(made.spikes)
    assert {product.weights for product in products} == set(blocks)
    assert len(products) == len(blocks)
    for product in products:
        weights, encoder = blocks[product.weights], settings.get(product.weights, {})
        if product.experts is None:
            expected = codec.matmul(weights[0], codec.encode_activations(product.x, **encoder))
            np.testing.assert_array_equal(product.y, expected, err_msg=product.weights)
            continue
        used = product.y.shape[1]
        x = np.broadcast_to(product.x, (len(product.x), used, product.x.shape[-1]))
        for slot in range(used):
            for expert in np.unique(product.experts[:, slot]):
                rows = product.experts[:, slot] == expert
                expected = codec.matmul(weights[expert], codec.encode_activations(x[rows, slot], **encoder))
                np.testing.assert_array_equal(product.y[rows, slot], expected, err_msg=product.weights)


def test_logits(made, tmp_path):
    """The spike model computes what its stored weights say, and these are the float model's."""
    floats, spikes = outputs(made, made.floats), outputs(made, made.spikes)
    dequantize(made.spikes, tmp_path / "f16.gguf", "f16")
    dequantized = outputs(made, tmp_path / "f16.gguf")
    assert difference(dequantized, floats) < _WEIGHTS
    assert difference(spikes, dequantized) < _ACTIVATIONS


def test_weights_are_those_of_the_float_model(made, tmp_path):
    """Without smoothing, which changes them on purpose."""
    convert(made.floats, tmp_path / "plain.gguf")
    floats = {tensor.name: tensor.data for tensor in gguf.GGUFReader(made.floats).tensors}
    for name, matrices in spike_blocks(tmp_path / "plain.gguf").items():
        for number, blocks in enumerate(matrices):
            expected = floats[name].reshape(len(matrices), len(blocks), -1)[number]
            error = np.linalg.norm(codec.decode_weights(blocks) - expected) / np.linalg.norm(expected)
            assert error < 0.15, f"{name}: {error}"


class SpiedEmbedder(SpyModel, Embedder):
    """Both, with attention in float32, as torch has it."""

    def __init__(self, architecture: Architecture, path: Path) -> None:
        self._is_causal = architecture.is_causal
        super().__init__(path, ctx_size=64, threads=1)

    def _context_params(self) -> Any:
        params = super()._context_params()
        params.embeddings = not self._is_causal
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0  # disabled
        return params

    def outputs(self, ids: np.ndarray) -> np.ndarray:
        """float32[tokens, n_vocab], or float32[tokens, n_embd] of a model that embeds."""
        return self.decode(ids, 0, len(ids)).copy() if self._is_causal else self.states(ids)


def test_torch_simulates_the_runtime(made, tmp_path):
    """transformers' own module with simulated layers gives the runtime's logits.

    Each layer gets the runtime's input, once its own was compared with it: else a rounding that moves one
    activation across the edge between two codes would change, by a whole step, all that follows. So layers
    agree to the bit, and what lies between them to rounding, for every token.
    """
    spikes = tmp_path / "spikes.gguf"
    # Quantized embeddings and outputs would make llama.cpp round activations, too.
    present = {tensor.name for tensor in made.report.plan.tensors}
    floats = [f"^{name}.weight=f32" for name in ("token_embd", "output") if f"{name}.weight" in present]
    convert(made.floats, spikes, ConvertOptions(tensor_types=tuple(floats)))
    with SpiedEmbedder(made.architecture, spikes) as runtime:
        expected = runtime.outputs(made.ids)
        products = {product.weights: product for product in runtime.products}
    torch_made = replace(made, model=copy.deepcopy(made.model))
    layers = simulate_checkpoint(torch_made.model, made.floats, spikes)
    assert set(layers) == set(products) and len(layers) == made.architecture.spiking

    unforced = outputs_of_transformers(torch_made)
    assert difference(unforced, expected) < _ACTIVATIONS

    met = []
    for name, layer in layers.items():
        product, order = products[name], layer.order.numpy()

        def compare_input(module, given, product=product):
            x = given[0].numpy().reshape(product.x.shape)
            assert difference_of_inputs(x, product.x) < _BETWEEN_LAYERS, product.weights
            if product.experts is not None:
                np.testing.assert_array_equal(given[1].numpy(), product.experts)
            return torch.from_numpy(product.x).view(given[0].shape), *given[1:]

        def compare_output(module, given, y, product=product, order=order):
            bias = getattr(module, "bias", None)
            runtime_y = product.y[..., order] + (0 if bias is None else bias.numpy())
            np.testing.assert_array_equal(y.numpy().reshape(runtime_y.shape), runtime_y, product.weights)
            met.append(product.weights)

        layer.module.register_forward_pre_hook(compare_input)
        layer.module.register_forward_hook(compare_output)
    found = outputs_of_transformers(torch_made)
    assert sorted(met) == sorted(layers)
    assert difference(found, expected) < _BETWEEN_LAYERS


def difference_of_inputs(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_simulation_refuses_weights_that_are_not_the_checkpoints(made, tmp_path):
    if made.architecture.name != "llama":
        return
    torch_model = copy.deepcopy(made.model)
    with torch.no_grad():
        next(m for m in torch_model.modules() if isinstance(m, torch.nn.Linear)).weight[0, 0] += 1
    with pytest.raises(UnsupportedError, match=r"changes the weights of 'blk\.0\.attn_q\.weight'"):
        simulate_checkpoint(torch_model, made.floats, made.spikes)


def test_calibration_reaches_everything(made):
    assert made.report.uncalibrated == ()
    assert made.report.to_json()["uncalibrated"] == []


def test_calibrated_experts_have_better_outputs(made, tiny_text, tmp_path):
    """For the tokens that are routed to them, against rounding each weight to the nearest."""
    names = expert_tensors(made.report.plan)
    assert bool(names) == ("Moe" in made.architecture.model or "Mixtral" in made.architecture.model)
    if not names:
        return
    nearest = tmp_path / "nearest.gguf"
    convert(made.floats, nearest)
    floats = {tensor.name: tensor.data for tensor in gguf.GGUFReader(made.floats).tensors}
    calibrated, rounded = spike_blocks(made.spikes), spike_blocks(nearest)
    errors = {name: np.zeros(2) for name in names}

    def look(name: str, x: np.ndarray, experts: np.ndarray) -> None:
        inputs = np.broadcast_to(x, (*experts.shape, x.shape[-1]))
        for expert in np.unique(experts):
            seen, exact = inputs[experts == expert], floats[name][expert]
            for i, blocks in enumerate((calibrated, rounded)):
                wrong = codec.decode_weights(blocks[name][expert]) - exact
                errors[name][i] += np.square(seen @ wrong.T).sum()

    with RoutedModel(made.floats, 4, 64, 1, names, look) as model:
        text = model.tokenize(tiny_text.read_bytes())[-4 * 64 :]  # not what was calibrated on
        model.run(text.reshape(4, 64))
    ratios = {name: found / direct for name, (found, direct) in errors.items()}
    # Of the last layer a quarter of the tokens is computed, some 50 for each expert: too few to gain much.
    assert np.mean(list(ratios.values())) < 0.8 and max(ratios.values()) < 1.05, ratios


def test_rows_that_do_not_fit_fall_back_with_a_word(converter, tiny_text, tmp_path):
    """Hidden size 96: only the down projections, of 192 inputs, have whole blocks of 64."""
    llama = ARCHITECTURES["Llama"]
    made = make(
        llama, tmp_path, tiny_text.read_bytes(), hidden_size=96, num_attention_heads=3, num_key_value_heads=3
    )
    assert [tensor.name for tensor in made.report.plan.spiking] == [
        f"blk.{i}.ffn_down.weight" for i in (0, 1)
    ]
    (query,) = (t for t in made.report.plan.tensors if t.name == "blk.0.attn_q.weight")
    assert query.target_type == T.Q4_0
    assert query.reason == "rows of 96 weights are no multiple of SPK4's 64"
    spikes = outputs(made, made.spikes)
    assert difference(spikes, outputs(made, made.floats)) < _WEIGHTS + _ACTIVATIONS


def test_sentences_are_embedded_by_the_server(converter, tmp_path):
    """A checkpoint as sentence-transformers keeps it, asked by OpenAI's client: the library's own vectors."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(ARCHITECTURES["BERT"], folder)
    (folder / "1_Pooling").mkdir()
    modules = [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    path = convert(folder, tmp_path / "bert-SPK4.gguf").path

    texts = ["it was the end", "the beginning of a neuron", "it was the end"]
    llama = import_llama_cpp().Llama(str(path), embedding=True, n_ctx=64, n_threads=1, verbose=False)
    expected = np.array([entry["embedding"] for entry in llama.create_embedding(texts)["data"]])
    llama.close()
    with Embedder(path, ctx_size=64, threads=1) as model:
        mean = model.states(model.tokenize(texts[0].encode())).mean(axis=0)
    options = ("--model", str(path), "--model_alias", "bert", "--embedding", "true", "--n_ctx", "64")
    for client in serve(*options):
        answer = client.embeddings.create(model="bert", input=texts)
        found = np.array([entry.embedding for entry in answer.data])
    assert found.shape == (3, 128)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(found[0] - mean) < 0.1 * np.linalg.norm(mean), "not the mean over the tokens"
    assert np.linalg.norm(found[0] - found[1]) > 0.05 * np.linalg.norm(found[0])


def test_a_wrong_permutation_is_noticed(converter, tiny_text, tmp_path):
    """The bounds above are worth something: two heads of one query matrix that change places pass none."""
    made = make(ARCHITECTURES["Qwen2"], tmp_path, tiny_text.read_bytes())
    swapped = tmp_path / "swapped.gguf"
    shutil.copy(made.floats, swapped)
    (tensor,) = (t for t in gguf.GGUFReader(swapped, "r+").tensors if t.name == "blk.0.attn_q.weight")
    heads = tensor.data.reshape(4, -1)
    heads[[0, 1]] = heads[[1, 0]]
    tensor.data.flush()
    assert difference(outputs(made, swapped), outputs_of_transformers(made)) > 10 * _ROUNDING


def encoder_settings(path: Path) -> dict[str, dict[str, float]]:
    """Thresholds of the layers that do not use the defaults."""
    metadata = read_header(path).metadata
    found = {}
    for index, name in enumerate(metadata.get(f.KEY_ENCODER_TENSORS, [])):
        salience = float(metadata[f.KEY_ENCODER_SALIENCE][index]) or f.DEFAULT_SALIENCE
        silence = float(metadata[f.KEY_ENCODER_SILENCE][index]) or f.DEFAULT_SILENCE
        found[name] = {"salience": salience, "silence": silence}
    return found


def spike_blocks(path: Path) -> dict[str, np.ndarray]:
    """BLOCK_SPK4[matrices, rows, blocks] of each spiking tensor."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == TYPE_SPK4:
            data = np.asarray(tensor.data)
            blocks = blocks_from_bytes(data.reshape(-1, data.shape[-1]))
            found[tensor.name] = blocks.reshape(-1, int(tensor.shape[1]), blocks.shape[-1])
    return found
