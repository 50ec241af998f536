"""Gradients: they foretell the divergence of small errors, of every row, and rows make up for each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spikequant_gguf import codec
from spikequant_gguf.converter import ConvertOptions, calibrated, convert, sensitivity
from spikequant_gguf.converter.calibrated import CalibrationOptions, calibration, quantize_calibrated
from spikequant_gguf.converter.estimate import DEFAULT_MEMORY, Estimate
from spikequant_gguf.converter.sensitivity import Cost, GradientModel, Sensitivity, sensitivity_cost
from spikequant_gguf.converter.source import open_gguf
from spikequant_gguf.errors import SpikeQuantError, UnsupportedError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.native import load
from spikequant_gguf.rotation import rotate
from spikequant_gguf.simulate import checkpoint, packages
from spikequant_gguf.simulate.model import TorchModel
from spikequant_gguf.texts import read_text

pytestmark = pytest.mark.usefixtures("runtime")

CTX, CHUNKS = 64, 12
QUERY, KEY, VALUE, DOWN = (f"blk.0.{part}.weight" for part in ("attn_q", "attn_k", "attn_v", "ffn_down"))


def measured(path: Path, tokens: np.ndarray, threads: int = 2) -> Sensitivity:
    with Model(path, ctx_size=CTX) as model:
        expected = model.decode(tokens[0], 0, CTX).copy()
    with open_gguf(path, load()) as source:
        names = [name for name in source.tensors if name.startswith("blk.") and "norm" not in name]
        return GradientModel(source, names, tokens[0], expected).measure(tokens, threads, lambda *_: None)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(260, 400, (CHUNKS, CTX)).astype(np.int32)


@pytest.fixture(scope="module")
def found(tiny_model_f32, tokens) -> Sensitivity:
    return measured(tiny_model_f32, tokens)


def divergence(model: TorchModel, other: TorchModel, tokens: np.ndarray) -> float:
    """Mean KL divergence of other from model over all tokens but the first of each text."""
    total = 0.0
    for text in tokens:
        wanted, got = (torch.from_numpy(m.logits(text, 1)).double().log_softmax(-1) for m in (model, other))
        total += float((wanted.exp() * (wanted - got)).sum(-1).mean())
    return total / len(tokens)


@pytest.mark.parametrize("name", [QUERY, KEY, VALUE, DOWN])
def test_they_foretell_the_divergence(tiny_model_f32, tokens, found, name, monkeypatch):
    """Errors of some rows of the tensor, as GGUF counts them; torch has queries and keys in another order."""
    monkeypatch.setattr(sensitivity, "_LARGEST", np.inf)  # bounds make it smaller
    outputs = measured(tiny_model_f32, tokens).outputs(name)
    exact, changed = TorchModel(tiny_model_f32), TorchModel(tiny_model_f32)
    inputs: list[torch.Tensor] = []
    layer = exact.layers[name]
    handle = layer.register_forward_hook(lambda _, x, y: inputs.append(x[0][0, 1:].clone()))
    for text in tokens:
        exact.logits(text)
    handle.remove()
    x = torch.cat(inputs).numpy()
    with open_gguf(tiny_model_f32, load()) as source:
        weights = source.read_rows(name, 0, source.tensors[name].n_rows)
    for rows in (slice(0, 8), slice(5, 40)):
        error = np.zeros_like(weights)
        error[rows] = 0.02 * np.random.default_rng(1).standard_normal(error[rows].shape)
        places = {row.tobytes(): i for i, row in enumerate(weights)}
        order = [places[row.tobytes()] for row in layer.weight.numpy()]
        changed.change({name: torch.from_numpy((weights + error)[order])})
        e = x @ error.T
        foretold = 0.5 * np.einsum("ti,ij,tj->", e, outputs, e) / len(e)
        assert foretold == pytest.approx(divergence(exact, changed, tokens), rel=0.3), rows
        changed.restore()


def test_moments_are_moments(tiny_model_f32, found):
    with open_gguf(tiny_model_f32, load()) as source:
        for name, tensor in source.tensors.items():
            if not name.startswith("blk.") or "norm" in name:
                assert found.outputs(name) is None and found.inputs(name) is None and name not in found
                continue
            outputs, inputs = found.outputs(name), found.inputs(name)
            assert outputs.shape == (tensor.n_rows,) * 2 and inputs.shape == (tensor.n_in,)
            assert np.allclose(outputs, outputs.T) and (inputs > 0).all(), name
            assert np.linalg.eigvalsh(outputs.astype(np.float64)).min() > -1e-5 * np.trace(outputs), name


def test_threads_do_not_change_them(tiny_model_f32, tokens, found):
    for threads in (1, 3):
        other = measured(tiny_model_f32, tokens, threads)
        for name in (QUERY, KEY, VALUE, DOWN):
            assert other.outputs(name).tobytes() == found.outputs(name).tobytes()
            assert other.inputs(name).tobytes() == found.inputs(name).tobytes()


def test_a_fault_in_one_thread_ends_all(tiny_model_f32, tokens, monkeypatch):
    whole = sensitivity._backward

    def fail(model: torch.nn.Module, text: np.ndarray, seed: int) -> None:
        if seed == 2:
            raise MemoryError("no more")
        whole(model, text, seed)

    monkeypatch.setattr(sensitivity, "_backward", fail)
    with pytest.raises(MemoryError, match="no more"):
        measured(tiny_model_f32, tokens, 3)


def test_sums_are_ordered_and_may_have_gaps():
    """Terms that come out of order wait; a number without a term holds nothing up."""
    sums = sensitivity._OrderedSums([("a", ""), ("b", "")])
    big, small = torch.tensor(2.0**24), torch.tensor(1.0)
    with ThreadPoolExecutor(3) as pool:
        late = [pool.submit(sums.add, ("a", ""), number, small.clone()) for number in (3, 1)]
        sums.finish(2)
        assert not any(task.done() for task in late)
        sums.add(("a", ""), 0, big.clone())
        for task in late:
            task.result(timeout=60)
    for number in (0, 1, 3):
        sums.finish(number)
    sums.add(("b", ""), 4, small.clone())
    assert sums.values[("a", "")] == 2.0**24  # in single precision, one after the other
    assert sums.values[("b", "")] == 1


def test_a_layer_that_has_no_rows_of_the_tensor(tiny_model_f32, tokens, found, monkeypatch):
    """Its outputs are unknown, its inputs are not."""
    whole = checkpoint.row_order

    def row_order(original: torch.Tensor, wanted: torch.Tensor, name: str) -> torch.Tensor:
        return whole(original + (name == QUERY), wanted, name)

    monkeypatch.setattr(checkpoint, "row_order", row_order)
    other = measured(tiny_model_f32, tokens)
    assert other.outputs(QUERY) is None and other.inputs(QUERY).tobytes() == found.inputs(QUERY).tobytes()
    assert other.outputs(KEY).tobytes() == found.outputs(KEY).tobytes()


def test_without_torch(tiny_model_f32, tokens, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(SpikeQuantError) as caught:
        measured(tiny_model_f32, tokens)
    assert caught.value.message == "this needs the Python package torch and transformers"
    assert caught.value.remedy.endswith("[convert]', or give --no-sensitivity")


def test_another_model_is_found_out(tiny_model_factory, tokens):
    """If torch computes something else than llama.cpp, gradients say nothing."""
    model = TorchModel(tiny_model_factory(seed=1))._model
    with Model(tiny_model_factory(seed=2), ctx_size=CTX) as other:
        logits = other.decode(tokens[0], 0, CTX).copy()
    with pytest.raises(UnsupportedError, match="other outputs"):
        sensitivity._check_same_model(model, tokens[0], 30 * logits)
    with pytest.raises(UnsupportedError, match="other outputs"):
        sensitivity._check_same_model(model, tokens[0], logits[:, :-1])


def loss(weights: np.ndarray, blocks: np.ndarray, own: np.ndarray, outputs: np.ndarray) -> float:
    error = rotate(codec.decode_weights(blocks) - weights).astype(np.float64)
    return float(np.einsum("ri,ij,sj,rs->", error, own, error, outputs, optimize=True))


@pytest.fixture(scope="module")
def layer() -> SimpleNamespace:
    """Weights, and moments of inputs and of gradients with a few strong directions."""
    rng = np.random.default_rng(3)

    def moments(n: int) -> np.ndarray:
        x = rng.standard_normal((4 * n, n)) * np.exp(rng.standard_normal(n))
        return ((x @ rng.standard_normal((n, n))).T @ (x @ np.eye(n)) / len(x)).astype(np.float32)

    def symmetric(n: int) -> np.ndarray:
        mixed = rng.standard_normal((n, n)) * np.exp(-np.arange(n) / (n / 6))
        return (mixed @ mixed.T / n + 0.01 * np.eye(n)).astype(np.float32)

    return SimpleNamespace(
        weights=rng.standard_normal((100, 128)).astype(np.float32),
        own=symmetric(128),
        cross=0.05 * moments(128),
        outputs=symmetric(100),
    )


@pytest.mark.parametrize("correction", [0.0, 0.25])
def test_rows_make_up_for_each_other(layer, correction):
    options = CalibrationOptions(output_damping=0.01, correction=correction)
    cross = layer.cross if correction else None
    library = load()
    alone, together = (
        quantize_calibrated(library, layer.weights, layer.own, cross, options, 2, outputs=outputs)
        for outputs in (None, layer.outputs)
    )
    losses = [loss(layer.weights, blocks, layer.own, layer.outputs) for blocks in (alone, together)]
    if correction == 0.0:
        assert losses[1] < 0.7 * losses[0]
    identity = np.eye(100, dtype=np.float32)
    assert loss(layer.weights, alone, layer.own, identity) < loss(
        layer.weights, together, layer.own, identity
    )


def test_rows_that_have_nothing_in_common(layer):
    """Each is quantized as if it were alone: for moments without covariances, and if no output matters."""
    library, options = load(), CalibrationOptions()
    alone = quantize_calibrated(library, layer.weights, layer.own, layer.cross, options, 2)
    for outputs in (np.diag(np.arange(1.0, 101.0, dtype=np.float32)), np.zeros((100, 100), np.float32)):
        found = quantize_calibrated(
            library, layer.weights, layer.own, layer.cross, options, 2, outputs=outputs
        )
        assert found.tobytes() == alone.tobytes()


def test_threads_do_not_change_codes(layer):
    library, options = load(), CalibrationOptions()
    files = {
        quantize_calibrated(
            library, layer.weights, layer.own, layer.cross, options, threads, outputs=layer.outputs
        ).tobytes()
        for threads in (1, 2, 3, 8)
    }
    assert len(files) == 1


def test_what_is_left_out(tiny_model_f32, tiny_text, tmp_path, monkeypatch):
    """Too large a model, or one that transformers cannot read: said beforehand; an error if asked for."""
    said: list[Estimate] = []
    options = CalibrationOptions(read_text(tiny_text), ctx=CTX, chunks=2, announce=said.append)

    def made(**changes: object) -> tuple[bytes, str]:
        report = convert(
            tiny_model_f32,
            tmp_path / "out.gguf",
            ConvertOptions(force=True),
            calibrate=calibration(replace(options, **changes)),
        )
        return report.path.read_bytes(), report.calibration

    with_them, text = made()
    assert text.endswith("chunks of 64 tokens, gradients of 1") and not said[-1].without_sensitivity
    without, text = made(sensitivity=False)
    assert text.endswith("chunks of 64 tokens") and without != with_them
    assert not said[-1].without_sensitivity

    def refuse(*_: object) -> None:
        raise UnsupportedError("transformers does not know it")

    monkeypatch.setattr(sensitivity, "_load", refuse)
    _, text = made()
    assert text.endswith("chunks of 64 tokens")
    assert said[-1].sentence(2).endswith("without sensitivities of layers: transformers does not know it")
    with pytest.raises(SpikeQuantError, match="does not know"):
        made(sensitivity=True)
    monkeypatch.setattr(calibrated, "sensitivity_cost", lambda *_: Cost(DEFAULT_MEMORY, 1, 0.0))
    made()
    assert "without sensitivities of layers: 10 GB would be needed" in said[-1].sentence(2)


def test_what_no_calibration_reaches_is_quantized_without(tiny_model_f32, tiny_text, tmp_path):
    """As embeddings, with --pure."""
    report = convert(
        tiny_model_f32,
        tmp_path / "out.gguf",
        ConvertOptions(pure=True),
        calibrate=calibration(CalibrationOptions(read_text(tiny_text), ctx=CTX, chunks=2)),
    )
    assert "gradients of" in report.calibration
    assert report.uncalibrated == ("token_embd.weight",)


def test_cost(tiny_model_f32, tiny_model_factory):
    def cost(path: Path, ctx: int = CTX) -> Cost:
        with open_gguf(path, load()) as source:
            return sensitivity_cost(
                source, [name for name in source.tensors if ".ffn_" in name and "norm" not in name], ctx
            )

    small, wide, long = (
        cost(tiny_model_f32),
        cost(tiny_model_factory(n_ff=512)),
        cost(tiny_model_f32, 2 * CTX),
    )
    assert wide.fixed - small.fixed == 4 * 2 * (3 * 128 * 256 + 2 * (512**2 - 256**2))
    assert long.per_worker == 2 * small.per_worker and wide.per_worker > small.per_worker
    assert wide.products - small.products == 2 * (2 * 3 * 128 * 256 + 2 * (512**2 - 256**2))
    assert small.memory(3) == small.fixed + 3 * small.per_worker
    assert [small.workers(threads, 10**10) for threads in (1, 2, 8)] == [1, 2, 4]
    assert small.workers(8, small.memory(2)) == 2 and small.workers(8, 0) == 1
