"""The simulated arithmetic: the reference's and the runtime's at W4A4, sensible at other widths."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import some_text

from spikequant_gguf import codec
from spikequant_gguf.converter import ConvertOptions, convert
from spikequant_gguf.converter.calibrated import CalibrationOptions, calibration
from spikequant_gguf.energy.counts import counting, read_counts, total
from spikequant_gguf.errors import InputError, SpikeQuantError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.format import TYPE_SPK4, blocks_to_bytes, salient_limits, salient_slots
from spikequant_gguf.ggml_api import mul_mat
from spikequant_gguf.probe import ProbedModel
from spikequant_gguf.simulate import packages
from spikequant_gguf.simulate.baselines import atom, round_to_nearest, spike_llm
from spikequant_gguf.simulate.encoder import SpikeEncoder, encode, rotate
from spikequant_gguf.simulate.layer import SpikeLinear, SpikeWeights
from spikequant_gguf.simulate.model import TorchModel, load_model
from spikequant_gguf.simulate.moments import collect_moments
from spikequant_gguf.simulate.quantizer import compensated_rounding, quantize
from spikequant_gguf.simulate.settings import SpikeSettings
from spikequant_gguf.texts import read_text

pytestmark = pytest.mark.usefixtures("runtime")

N_TOKENS = 96
N_SEQUENCES = 8
WIDTHS = range(1, 9)


class ExactCacheModel(Model):
    """Attends in float32, as torch does."""

    def _context_params(self):
        params = super()._context_params()
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0  # disabled
        return params


def some_sequences(runtime: Model) -> list[np.ndarray]:
    """Tokens of N_SEQUENCES contexts.

    Several: where an activation lies on the edge between two codes, the last bit of a sum of floats, which is
    not the same on all CPUs, decides for the rest of its context.
    """
    tokens = np.asarray(runtime.tokenize(some_text(3000).encode()))
    return np.split(tokens[: N_SEQUENCES * N_TOKENS], N_SEQUENCES)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def some_tokens(n: int = 60, n_in: int = 320) -> np.ndarray:
    """Activations of many sizes with outlier channels, and the edge cases of the encoder."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((n, n_in)) * np.exp(3 * rng.standard_normal((n, 1)))).astype(np.float32)
    x[:, 5] *= 50
    x[0] = 0
    x[1, 7] = np.nan
    x[2, 8] = np.inf
    x[3] = 1e-38
    x[4] = 1e-44
    x[5] = 3e38
    x[6, : n_in * 2 // 3] = 0
    return x


def correlated(n_in: int, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, weights and second moments of the inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(n_in) + 0.08 * torch.randn(n_in, n_in, generator=generator)
    x = torch.randn(2000, n_in, generator=generator) * (0.1 + 3 * torch.rand(n_in, generator=generator)) @ mix
    w = torch.randn(rows, n_in, generator=generator) * 0.05
    w[:, 3] *= 6
    return x, w, x.T @ x / len(x)


def output_error(weights: SpikeWeights, w: torch.Tensor, x: torch.Tensor) -> float:
    """Norm of the outputs' error over the norm of the outputs."""
    return float(torch.linalg.norm(x @ (weights.dequantized() - w).T) / torch.linalg.norm(x @ w.T))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def spike_file(
    request: pytest.FixtureRequest,
    tiny_model_factory: Callable[..., Path],
    tiny_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny model as SPK4: calibrated and smoothed, so that all tensors differ from the source's.

    Llama has its rows of queries and keys in another order, Qwen2 has biases.
    """
    source = tiny_model_factory(**({} if request.param == "llama" else {"architecture": request.param}))
    path = tmp_path_factory.mktemp("spike") / f"{request.param}-SPK4.gguf"
    options = CalibrationOptions(text=read_text(tiny_text), ctx=64, chunks=6, threads=2)
    # Quantized embeddings and outputs would make llama.cpp round activations, too.
    floats = ("token_embd=f32", "^output=f32")
    convert(source, path, ConvertOptions(tensor_types=floats), calibrate=calibration(options))
    return path


# ---- W4A4 equals the reference and the runtime


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(("salience", "silence"), [(2.3, 0.5), (1.1, 0.9), (5.0, 0.0), (0.3, 1.5)])
def test_codes_are_those_of_the_reference(rotated, salience, silence):
    x = some_tokens()
    blocks = codec.encode_activations(x, salience, silence, rotated=rotated)
    fine, coarse, step, shift = codec.activation_values(blocks)
    codes = encode(torch.from_numpy(x), SpikeSettings(salience=salience, silence=silence, rotated=rotated))
    assert np.array_equal(codes.fine.numpy(), fine)
    assert np.array_equal(codes.coarse.numpy(), coarse)
    assert np.array_equal(codes.step[:, 0].numpy().view(np.uint32), step.view(np.uint32))
    assert np.array_equal(codes.shift[:, 0].numpy(), shift)
    masks = np.ascontiguousarray(blocks["salient_mask"]).view(np.uint8)
    masks = np.unpackbits(masks, axis=1, bitorder="little")
    assert np.array_equal(codes.salient.numpy(), masks.astype(bool))
    assert np.array_equal(rotate(torch.from_numpy(x)).numpy(), codec.rotate(x), equal_nan=True)


def test_potentials_and_outputs_are_those_of_the_reference_and_the_runtime():
    x = some_tokens()
    w = np.random.default_rng(2).standard_normal((70, x.shape[1])).astype(np.float32)
    blocks = codec.encode_weights(w)
    weights = SpikeWeights.from_blocks(blocks)
    layer = SpikeLinear(weights, SpikeEncoder(SpikeSettings()), exact=True)
    fine, coarse = layer.potentials(layer.encoder(torch.from_numpy(x)))
    expected = codec.potentials(blocks, codec.encode_activations(x))
    assert np.array_equal(fine.numpy(), expected[0])
    assert np.array_equal(coarse.numpy(), expected[1])
    y = layer(torch.from_numpy(x)).numpy()
    assert np.array_equal(y, mul_mat(TYPE_SPK4, blocks_to_bytes(blocks), x), equal_nan=True)
    fast = SpikeLinear(weights, SpikeEncoder(SpikeSettings()))(torch.from_numpy(x)).numpy()
    finite = np.isfinite(y).all(axis=1)
    assert np.isnan(fast[1:3]).all()
    assert np.allclose(fast[finite], y[finite], rtol=1e-5)
    assert weights.salient == int((salient_slots(blocks) != 0).sum()) > 0


def test_logits_are_those_of_the_runtime(spike_file):
    with ExactCacheModel(spike_file, ctx_size=N_TOKENS) as runtime:
        sequences = some_sequences(runtime)
        expected = np.concatenate(
            [block.copy() for tokens in sequences for block in runtime.logits(tokens, 8)]
        )
    model = load_model(spike_file)
    found = np.concatenate([model.logits(tokens, first=8) for tokens in sequences])
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    assert np.median(difference) < 1e-5
    # Rounding of norms and attention differs in the last bit; an activation that it moves across the edge
    # between two codes changes its token, and those after it, by a whole step.
    assert np.mean(difference.max(axis=1) < 1e-3) > 0.8
    assert np.abs(expected).max() > 1 > difference.max()


def test_every_layer_of_a_model_computes_what_the_runtime_does(spike_file):
    """On inputs of the model itself, to the bit; queries and keys have their rows in another order."""
    model = load_model(spike_file)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    simulated = {name: model.simulated(name) for name in model.layers}
    for name, layer in simulated.items():
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0][0], y[0])}))
    model.logits(np.arange(40) + 260)
    assert len(seen) == 14
    data = np.fromfile(spike_file, np.uint8)
    for tensor in model.header.tensors:
        if tensor.type_id != TYPE_SPK4:
            continue
        rows = data[tensor.offset : tensor.offset + tensor.n_bytes].reshape(tensor.n_rows, -1)
        x, y = seen[tensor.name]
        settings = simulated[tensor.name].encoder.settings
        runtime = mul_mat(TYPE_SPK4, rows, x.numpy(), salience=settings.salience, silence=settings.silence)
        bias = simulated[tensor.name].bias
        if bias is not None:
            assert np.array_equal(y.numpy(), runtime + bias.numpy())
        elif "attn_q" in tensor.name or "attn_k" in tensor.name:
            assert np.array_equal(np.sort(y.numpy(), axis=1), np.sort(runtime, axis=1))
        else:
            assert np.array_equal(y.numpy(), runtime)


def test_spikes_are_counted_as_the_runtime_does(spike_file):
    with ExactCacheModel(spike_file, ctx_size=N_TOKENS) as runtime:
        sequences = some_sequences(runtime)
        with counting():
            for tokens in sequences:
                for _ in runtime.logits(tokens):
                    pass
        expected = total(read_counts())
    model = load_model(spike_file)
    for tokens in sequences:
        model.logits(tokens)
    counts = model.counts()
    for found, name in (
        (counts.spikes, "spikes"),
        (counts.rate_spikes, "rate_spikes"),
        (counts.salient, "salient"),
    ):
        assert found == pytest.approx(expected[name], rel=5e-4)
    assert counts.codes == expected["spikes"] + expected["silent"]
    assert counts.fired("ttfs") == counts.spikes < counts.rate_spikes == counts.fired("rate")
    model.reset_counts()
    assert model.counts().codes == 0


def test_a_model_without_spikes_is_refused(tiny_model_f32):
    with pytest.raises(InputError, match="no SPK4 tensors"):
        load_model(tiny_model_f32)


# ---- other widths and rules


@pytest.mark.parametrize("bits", WIDTHS)
def test_activation_codes_of_any_width(bits):
    x = torch.from_numpy(some_tokens()[7:])
    settings = SpikeSettings(activation_bits=bits)
    codes = encode(x, settings)
    standard = codes.fine[~codes.salient]
    assert standard.min() >= -(2 ** (bits - 1)) and standard.max() <= 2 ** (bits - 1) - 1
    for salient in (codes.fine[codes.salient], codes.coarse):
        assert salient.min() >= -(2**bits) and salient.max() <= 2**bits - 1
    assert not ((codes.fine != 0) & (codes.coarse != 0)).any()
    error = torch.linalg.norm(codes.values - rotate(x)) / torch.linalg.norm(x)
    assert error < {1: 1.0, 2: 0.6, 3: 0.3}.get(bits, 2.0 ** -(bits - 1))


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_potentials_are_exact_at_any_width(bits):
    x, w, moments = correlated(320)
    settings = SpikeSettings(weight_bits=bits, activation_bits=bits)
    layer = SpikeLinear(quantize(w, moments, settings), SpikeEncoder(settings), exact=True)
    codes = layer.encoder(x[:30])
    values = layer.weights.values.to(torch.int64)
    fine, coarse = layer.potentials(codes)
    assert torch.equal(fine, (codes.fine.to(torch.int64) @ values.T).float())
    assert torch.equal(coarse, (codes.coarse.to(torch.int64) @ values.T).float())


def test_rules_of_salience():
    x = torch.from_numpy(some_tokens(200)[7:])
    none = encode(x, SpikeSettings(salience=None))
    assert not none.salient.any() and not none.coarse.any()
    assert (none.fine.abs().amax(dim=1) >= 7).all()  # the largest value sets the step
    for share in (0.025, 0.1, 0.2):
        codes = encode(x, SpikeSettings(salience=None, top_share=share))
        measured = codes.salient.float().mean()
        assert 0.6 * share < measured <= share + 0.01
    shares = [encode(x, SpikeSettings(salience=c)).salient.float().mean() for c in (1.6, 2.3, 3.5)]
    assert shares == sorted(shares, reverse=True)
    clipped = encode(x, SpikeSettings(coarse_step=False))
    assert not clipped.coarse.any() and clipped.fine.max() == 15 and clipped.fine.min() == -16
    loud, quiet = (encode(x, SpikeSettings(silence=silence)) for silence in (0.0, 1.2))
    assert (quiet.units == 0).sum() > (loud.units == 0).sum()


def test_groups_have_steps_and_thresholds_of_their_own():
    x, w, moments = correlated(256)
    settings = SpikeSettings(weight_group=64, activation_group=64)
    weights = quantize(w, moments, settings)
    assert weights.threshold.shape == (len(w), 4)
    codes = encode(x[:20], settings)
    assert codes.step.shape == (20, 4)
    alone = encode(x[:20, 64:128].contiguous(), SpikeSettings())
    assert torch.equal(codes.fine[:, 64:128], alone.fine)
    y = SpikeLinear(weights, SpikeEncoder(settings))(x[:20])
    expected = codes.values.double() @ weights.stored().double().T
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert output_error(weights, w, x) < output_error(quantize(w, moments, SpikeSettings()), w, x)
    with pytest.raises(InputError, match="256 inputs are no whole number of groups of 192"):
        quantize(w, moments, SpikeSettings(weight_group=192))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"weight_bits": 0}, "weights of 0 bits"),
        ({"activation_bits": 9}, "activations of 9 bits"),
        ({"top_share": 0.1}, "exclude each other"),
        ({"salience": None, "top_share": 0.7}, "salient share of 0.7"),
        ({"salience": -1.0}, "not positive"),
        ({"silence": 9.0}, "silence threshold 9.0"),
        ({"weight_group": 100}, "groups of 100 inputs"),
        ({"salient_weights": -1}, "-1 salient weights"),
        ({"coding": "phase"}, "no coding 'phase'"),
    ],
)
def test_settings_out_of_range(wrong, problem):
    with pytest.raises(InputError, match=problem):
        SpikeSettings(**wrong)


# ---- quantizer


@pytest.mark.parametrize("rotated", [True, False])
def test_codes_at_four_bits_fit_the_format(rotated):
    x, w, moments = correlated(320)
    settings = SpikeSettings(rotated=rotated)
    weights = quantize(w, moments, settings)
    # Which zero-point a row has shows in its values: some code 0..15 range holds all but a few.
    limits = torch.from_numpy(salient_limits(5))
    for zero_point in range(16):
        codes = weights.values + zero_point
        inside = ((codes >= 0) & (codes <= 15)).view(len(w), -1, 64)
        fits = ((~inside).sum(dim=-1) <= limits).all(dim=1) & ((codes >= -16) & (codes <= 31)).all(dim=1)
        for row in torch.nonzero(fits)[:, 0].tolist():
            blocks = codec.pack_weights(
                weights.values[row].int().numpy(), weights.threshold[row, 0].numpy(), zero_point, rotated
            )[None]
            again = SpikeWeights.from_blocks(blocks)
            assert torch.equal(again.values[0], weights.values[row])
            assert torch.equal(again.dequantized()[0], weights.dequantized()[row])
            w[row] = torch.nan  # seen
    assert w.isnan().all()
    assert weights.salient > 0


@pytest.mark.parametrize("gptq", [True, False])
@pytest.mark.parametrize("most", [0, 1, 3, 4])
def test_a_block_has_no_more_salient_weights_than_it_may(most, gptq):
    _, w, moments = correlated(320)
    w = w + 0.3 * torch.from_numpy(np.random.default_rng(1).standard_t(2, w.shape).astype(np.float32))
    settings = SpikeSettings(salient_weights=most, weight_zero_point=False)
    weights = quantize(w, moments, settings, gptq=gptq)
    outside = ((weights.values < -8) | (weights.values > 7)).view(len(w), 5, 64).sum(dim=-1)
    assert outside.amax(dim=0).tolist() == [min(most, 2), *[most] * 4]
    assert weights.salient == int(outside.sum())


def test_compensation_beats_rounding_and_more_bits_beat_fewer():
    x, w, moments = correlated(192)
    rounded = quantize(w, moments, SpikeSettings(), gptq=False)
    errors = [
        output_error(quantize(w, moments, SpikeSettings(weight_bits=bits)), w, x) for bits in range(1, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.8 * output_error(rounded, w, x)
    assert errors[3] < output_error(quantize(w, moments, SpikeSettings(salient_weights=0)), w, x)
    assert errors[7] < 0.01
    symmetric = quantize(w, moments, SpikeSettings(weight_zero_point=False, salient_weights=0))
    assert symmetric.values.min() >= -8 and symmetric.values.max() <= 7
    unknown = quantize(w, None, SpikeSettings())
    assert output_error(unknown, w, x) < 0.2


def test_rounding_on_a_given_grid():
    x, w, moments = correlated(192)
    step = torch.full_like(w, 0.04)
    rounded = compensated_rounding(w, moments, step, torch.tensor(-8.0), torch.tensor(7.0))
    codes = rounded / step
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.min() > -8.5 and codes.max() < 7.5
    nearest = (w / step).round().clamp(-8, 7) * step
    assert torch.linalg.norm(x @ (rounded - w).T) < torch.linalg.norm(x @ (nearest - w).T)


def test_moments_are_those_of_the_runtime(tiny_model_f32, tiny_text):
    names = [f"blk.0.{part}.weight" for part in ("attn_q", "attn_output", "ffn_gate", "ffn_down")]
    model = TorchModel(tiny_model_f32)
    with ProbedModel(tiny_model_f32, names, ctx_size=64) as runtime:
        tokens = runtime.tokenize(tiny_text.read_bytes())[: 3 * 64].reshape(3, 64).copy()
        tokens[:, 0] = runtime.bos
        for part in tokens:
            for _ in runtime.logits(part, len(part) - 1):
                pass
        products = runtime.products
    found = collect_moments(model, names, list(tokens))
    for name in names:
        x = np.concatenate([product.x for product in products if product.name == name]).astype(np.float64)
        expected = x.T @ x / len(x)
        assert len(x) == 3 * 64
        assert np.allclose(found[name].numpy(), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


# ---- baselines


def test_baselines_keep_their_salient_channels_precise():
    x, w, moments = correlated(320)
    x[:, 9] *= 40  # an outlier channel
    moments = x.T @ x / len(x)
    exact = x @ w.T

    def error(layer: torch.nn.Module) -> float:
        return float(torch.linalg.norm(layer(x) - exact) / torch.linalg.norm(exact))

    plain = error(round_to_nearest(w, moments, None, 0))
    few, all_of_them = atom(w, moments, None, 1 / 32), atom(w, moments, None, 320)
    assert few.salient_share == 1 / 32
    assert error(all_of_them) < 0.05 < error(few) < plain
    spiking = spike_llm(w, moments, None, 0.1)
    assert spiking.salient_share == 0.1
    assert error(spiking) < plain
    bias = torch.arange(len(w), dtype=torch.float32)
    assert torch.allclose(atom(w, moments, bias, 0.1)(x), atom(w, moments, None, 0.1)(x) + bias, atol=1e-3)


# ---- packages


def test_importing_the_command_line_needs_no_torch():
    script = "import sys, spikequant_gguf.cli.app, spikequant_gguf.sweep; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ.copy()
    )
    assert result.stdout.strip() == "False"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(SpikeQuantError, match="needs the Python package torch") as error:
        packages.require_packages("torch", "numpy")
    assert error.value.remedy == "run pip install 'spikequant-gguf[convert]'"
