"""Calibration: moments of real inputs, scalings that change nothing, codes that lose less of the output."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from spikequant_gguf import codec
from spikequant_gguf.converter import ConvertOptions, convert
from spikequant_gguf.converter.calibrated import CalibrationOptions, calibration
from spikequant_gguf.converter.moments import MomentStore
from spikequant_gguf.converter.smoothing import fold, scaling_factors
from spikequant_gguf.converter.source import open_gguf
from spikequant_gguf.converter.structure import Site, find_sites
from spikequant_gguf.errors import InputError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.format import BLOCK_SPK4
from spikequant_gguf.native import load
from spikequant_gguf.texts import Text, read_text

pytestmark = pytest.mark.usefixtures("runtime")

CTX, CHUNKS = 64, 6


def store(
    model: Path, text: Path, sizes: dict[str, int], budget: int = 1 << 30, threads: int = 2
) -> MomentStore:
    return MomentStore(
        model,
        sizes,
        read_text(text).data,
        text.name,
        ctx=CTX,
        chunks=CHUNKS,
        threads=threads,
        budget=budget,
        report=lambda done, total: None,
    )


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_moments_of_the_first_layer(tiny_model_f32, tiny_text):
    """Its input is known: the norm of the embeddings of the tokens read."""
    with Model(tiny_model_f32, ctx_size=CTX) as model:
        tokens = model.tokenize(read_text(tiny_text).data)[: CTX * CHUNKS].reshape(CHUNKS, CTX).copy()
        tokens[:, 0] = model.bos
    weights = tensors_of(tiny_model_f32)
    x = weights["token_embd.weight"][tokens.reshape(-1)].astype(np.float64)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weights["blk.0.attn_norm.weight"]
    name = "blk.0.attn_q.weight"
    found = store(tiny_model_f32, tiny_text, {name: x.shape[1]})
    expected = x.T @ x / len(x)
    assert np.allclose(found.matrix(name), expected, rtol=1e-4, atol=1e-5)
    assert np.allclose(found.diagonals()[name], np.diag(expected), rtol=1e-4)
    found.close()


def test_moments_in_several_passes(tiny_model_f32, tiny_text):
    sizes = {f"blk.{layer}.ffn_down.weight": 256 for layer in range(2)} | {"blk.1.attn_q.weight": 128}
    once = store(tiny_model_f32, tiny_text, sizes)
    often = store(tiny_model_f32, tiny_text, sizes, budget=1, threads=3)
    for name in sizes:
        assert np.array_equal(once.matrix(name), often.matrix(name))
        assert np.allclose(once.diagonals()[name], often.diagonals()[name], rtol=1e-5)
    once.close()
    often.close()


def test_a_text_too_short(tiny_model_f32):
    short = MomentStore(
        tiny_model_f32,
        {"blk.0.attn_q.weight": 128},
        b"a few words",
        "short.txt",
        ctx=CTX,
        chunks=1,
        threads=1,
        budget=1,
        report=lambda done, total: None,
    )
    with pytest.raises(InputError, match=r"'short.txt' has only \d+ tokens, less than one context of 64"):
        short.diagonals()


def test_sites_share_inputs_and_know_their_writers(tiny_model_f32):
    with open_gguf(tiny_model_f32, load()) as source:
        spiking = [name for name in source.tensors if "blk." in name and source.tensors[name].n_rows > 1]
        sites = find_sites(source.architecture, source.metadata, list(source.tensors), spiking)
    assert sorted(name for site in sites for name in site.readers) == sorted(spiking)
    by_kind = {site.kind: site for site in sites if site.readers[0].startswith("blk.0.")}
    assert by_kind["attention input"].gains == ("blk.0.attn_norm.weight",)
    assert by_kind["attention output"] == Site(
        "attention output", ("blk.0.attn_output.weight",), writers=("blk.0.attn_v.weight",), heads=(2, 2)
    )
    assert by_kind["down projection"].writers == ("blk.0.ffn_up.weight",)
    unknown = find_sites("mamba", {}, spiking, spiking)
    assert [site.readers for site in unknown] == [(name,) for name in spiking]
    assert not any(site.can_scale for site in unknown)


class ExactCacheModel(Model):
    """Attends in float32: scaled values would be rounded differently in float16."""

    def _context_params(self):
        params = super()._context_params()
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0  # disabled
        return params


def test_scaling_changes_nothing(tiny_model_f32, tiny_text, tmp_path):
    """The folded model is the same function: its float32 logits agree to rounding."""
    with open_gguf(tiny_model_f32, load()) as source:
        spiking = [name for name in source.tensors if "blk." in name and source.tensors[name].n_rows > 1]
        sites = find_sites(source.architecture, source.metadata, list(source.tensors), spiking)
        squares = store(
            tiny_model_f32, tiny_text, {s.readers[0]: source.tensors[s.readers[0]].n_in for s in sites}
        )
        factors = {
            site: scaling_factors(site, squares.diagonals()[site.readers[0]], source) for site in sites
        }
        squares.close()
    assert all(factor is not None and np.ptp(factor) > 0.1 for factor in factors.values())
    folded = tmp_path / "folded.gguf"
    shutil.copy(tiny_model_f32, folded)
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folded, "r+").tensors}
    for name, scaling in fold(factors).items():
        data = written[name]
        data[...] = scaling(np.array(data).reshape(-1, data.shape[-1]), 0).reshape(data.shape)
    for data in written.values():
        data.flush() if hasattr(data, "flush") else None
    tokens = np.arange(3, 50)
    logits = []
    for path in (tiny_model_f32, folded):
        with ExactCacheModel(path, ctx_size=CTX) as model:
            logits.append(np.concatenate([block.copy() for block in model.logits(tokens)]))
    assert np.abs(logits[0] - logits[1]).max() < 1e-5 * np.abs(logits[0]).max()


@pytest.fixture(scope="module")
def small_text(tiny_text) -> Text:
    return read_text(tiny_text)


def output_error(weights: np.ndarray, blocks: np.ndarray, moments: np.ndarray) -> float:
    error = codec.decode_weights(blocks).astype(np.float64) - weights
    return float(
        np.einsum("ri,ij,rj->", error, moments, error) / np.einsum("ri,ij,rj->", weights, moments, weights)
    )


def test_calibrated_conversion(tiny_model_f32, small_text, tmp_path):
    """Less output error than nearest rounding in every layer, valid data, and provenance in the metadata."""
    options = CalibrationOptions(small_text, ctx=CTX, chunks=CHUNKS, smoothing=False)
    direct = convert(tiny_model_f32, tmp_path / "direct.gguf")
    report = convert(tiny_model_f32, tmp_path / "calibrated.gguf", calibrate=calibration(options))
    assert report.calibration.startswith("tiny.txt, sha256 ")
    assert direct.calibration == "none"
    source = tensors_of(tiny_model_f32)
    stored = {path: tensors_of(path) for path in (direct.path, report.path)}
    sizes = {tensor.name: tensor.shape[0] for tensor in report.plan.spiking}
    moments = store(tiny_model_f32, Path(small_text.file), sizes)
    for name in sizes:
        h = moments.matrix(name).astype(np.float64)
        errors = [
            output_error(
                source[name].astype(np.float64),
                stored[path][name].view(BLOCK_SPK4).reshape(len(source[name]), -1),
                h,
            )
            for path in (direct.path, report.path)
        ]
        assert errors[1] < errors[0], name
    moments.close()


@pytest.mark.parametrize("smoothing", [False, True])
def test_threads_do_not_change_the_file(tiny_model_f32, small_text, tmp_path, smoothing):
    files = []
    for threads in (1, 2, 3):
        options = CalibrationOptions(small_text, ctx=CTX, chunks=2, threads=threads, smoothing=smoothing)
        out = tmp_path / "same.gguf"
        convert(
            tiny_model_f32, out, ConvertOptions(threads=threads, force=True), calibrate=calibration(options)
        )
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]


def test_memory_does_not_change_the_file(tiny_model_f32, small_text, tmp_path):
    files = []
    for memory in (1, 1 << 30):
        options = CalibrationOptions(small_text, ctx=CTX, chunks=2, memory=memory, smoothing=False)
        out = tmp_path / "same.gguf"
        convert(tiny_model_f32, out, ConvertOptions(force=True), calibrate=calibration(options))
        files.append(out.read_bytes())
    assert files[0] == files[1]
