"""Calibration: moments of real inputs, scalings that change nothing, codes that lose less of the output."""

from __future__ import annotations

import mmap
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from spikequant_gguf import codec
from spikequant_gguf.converter import ConvertOptions, convert, estimate, graph_memory, lockstep
from spikequant_gguf.converter.calibrated import CalibrationOptions, calibration, quantize_calibrated
from spikequant_gguf.converter.estimate import Estimate, default_chunks, needed_memory
from spikequant_gguf.converter.inputs import SiteSurvey, moments, survey, token_weights
from spikequant_gguf.converter.layer_journal import LayerJournal
from spikequant_gguf.converter.lockstep import BatchModel, Lockstep, calibration_stretches
from spikequant_gguf.converter.presets import PRESETS
from spikequant_gguf.converter.smoothing import fold, scaling_factors
from spikequant_gguf.converter.source import open_gguf
from spikequant_gguf.converter.structure import Site, find_sites
from spikequant_gguf.errors import InputError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.format import BLOCK_SPK4
from spikequant_gguf.inspect_file import inspect_file
from spikequant_gguf.native import load
from spikequant_gguf.rotation import rotate
from spikequant_gguf.texts import Text, read_text
from spikequant_gguf.verify import verify_file

pytestmark = pytest.mark.usefixtures("runtime")

CTX, CHUNKS = 64, 6


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def sites_of(model: Path) -> dict[str, Site]:
    with open_gguf(model, load()) as source:
        spiking = [name for name in source.tensors if "blk." in name and source.tensors[name].n_rows > 1]
        found = find_sites(source.architecture, source.metadata, list(source.tensors), spiking)
    return {name: site for site in found for name in site.readers}


def stretches(model: Path, text: Path, chunks: int = CHUNKS) -> np.ndarray:
    with Model(model, ctx_size=CTX) as opened:
        return calibration_stretches(opened, read_text(text).data, text.name, CTX, chunks)


def test_inputs_of_the_first_layer(tiny_model_f32, tiny_text):
    """They are known: the norm of the embeddings of the tokens read."""
    tokens = stretches(tiny_model_f32, tiny_text)
    weights = tensors_of(tiny_model_f32)
    x = weights["token_embd.weight"][tokens.reshape(-1)].astype(np.float64)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weights["blk.0.attn_norm.weight"]
    sites = sites_of(tiny_model_f32)
    found = survey(tiny_model_f32, tokens, sites, 2, lambda *_: None)
    assert set(found) == set(sites.values())
    first = found[sites["blk.0.attn_q.weight"]]
    assert np.allclose(first.mean_squares, (x**2).mean(axis=0), rtol=1e-4)
    assert np.allclose(first.sample, x[:: len(x) // 64][:64], rtol=1e-3, atol=1e-4)


def test_a_twin_with_the_same_weights_sees_the_same(tiny_model_f32, tiny_text):
    """Every site is met once, in order; products made elsewhere take the place of llama.cpp's."""
    tokens, sites, weights = (
        stretches(tiny_model_f32, tiny_text),
        sites_of(tiny_model_f32),
        tensors_of(tiny_model_f32),
    )
    met, distances, shapes = [], [], []

    def on_site(site: Site, x: np.ndarray, seen: np.ndarray) -> None:
        met.append(site)
        shapes.append(len(seen))
        distances.append(np.abs(x - seen).max() / np.abs(x).max())

    def product(name: str, x: np.ndarray, y: np.ndarray) -> None:
        y[...] = x @ weights[name].T

    with Lockstep(tiny_model_f32, stretches=len(tokens), ctx=CTX, threads=2, sites=sites) as both:
        both.run(tokens, on_site, product)
    assert len(met) == len(set(met)) and set(met) == set(sites.values())
    layers = [int(site.readers[0].split(".")[1]) for site in met]
    assert layers == sorted(layers)
    assert max(distances) < 1e-3  # keys and values are kept in half precision
    assert set(shapes[:-2]) == {tokens.size}


def test_an_error_in_a_layer_ends_the_run(tiny_model_f32, tiny_text):
    tokens, sites = stretches(tiny_model_f32, tiny_text, 2), sites_of(tiny_model_f32)

    def on_site(site: Site, x: np.ndarray, seen: np.ndarray) -> None:
        raise InputError("no")

    with Lockstep(tiny_model_f32, stretches=2, ctx=CTX, threads=1, sites=sites) as both:
        with pytest.raises(InputError, match="no"):
            both.run(tokens, on_site, lambda *_: None)


def test_the_memory_of_logits_comes_back_when_they_are_computed(tiny_model_f32, tiny_text):
    """A batch gives the memory back at its start; run to the end, it has the logits of a plain context."""
    tokens = stretches(tiny_model_f32, tiny_text, 1)
    options = {"stretches": 1, "ctx": CTX, "threads": 1, "names": {}}
    with BatchModel(tiny_model_f32, **options, on_input=lambda *_: None) as batch:
        batch.run(tokens)
        address = batch.api.llama_get_logits(batch.context)
        logits = np.ctypeslib.as_array(address, shape=(CTX // 4, batch.n_vocab)).copy()
    with Model(tiny_model_f32, ctx_size=CTX) as plain:
        expected = np.concatenate([block.copy() for block in plain.logits(tokens[0])])[3::4]
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()


def test_what_is_given_back_is_not_needed(tiny_model_f32, tiny_text, monkeypatch):
    """Every product has the same inputs and outputs to the bit, whether memory goes back or not."""
    tokens, given = stretches(tiny_model_f32, tiny_text), []

    def give_back(address: int, n_bytes: int) -> None:
        given.append(n_bytes)

    def products() -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found = {}
        sites = sites_of(tiny_model_f32)
        options = {"stretches": len(tokens), "ctx": CTX, "threads": 2, "names": sites}
        keep = lambda name, x, y: found.update({name: (x.copy(), y.copy())})  # noqa: E731
        with BatchModel(tiny_model_f32, **options, on_input=keep) as batch:
            batch.run(tokens)
        return found

    sparing = products()
    for module in (graph_memory, lockstep):
        monkeypatch.setattr(module, "give_back", give_back)
    generous = products()
    assert sum(given) > 10 * tokens.size * 64 * 4  # more than ten results of the hidden size
    assert sparing.keys() == generous.keys() == sites_of(tiny_model_f32).keys()
    for name in sparing:
        assert all(np.array_equal(a, b) for a, b in zip(sparing[name], generous[name], strict=True)), name


def test_pages_given_back_are_zeros():
    values = np.ones(1 << 20, np.uint8)
    graph_memory.give_back(values.ctypes.data + 1, values.nbytes - 2)
    page = mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED"):
        assert not values[page:-page].any()
    assert values[0] == values[-1] == 1


def test_chunks_depend_on_the_model(tiny_model_f32, monkeypatch):
    """Half as many until they fit; a small model reads what the preset wants."""
    with open_gguf(tiny_model_f32, load()) as source:
        names = list(sites_of(tiny_model_f32))
        for preset in PRESETS.values():
            assert default_chunks(source, names, 512, preset.chunks) == preset.chunks
        needed = [needed_memory(source, names, chunks * 512, 512) for chunks in (8, 16, 32)]
        assert needed == sorted(set(needed))
        monkeypatch.setattr(estimate, "DEFAULT_MEMORY", needed[1])
        assert default_chunks(source, names, 512, 64) == 16
        monkeypatch.setattr(estimate, "DEFAULT_MEMORY", 0)
        assert default_chunks(source, names, 512, 64) == 1


def test_moments():
    rng = np.random.default_rng(0)
    x, seen = rng.standard_normal((2, 5000, 128)).astype(np.float32)
    factors = rng.uniform(0.5, 2, 128).astype(np.float32)
    a, b = (rotate(values * factors).astype(np.float64) for values in (x, seen))
    results = [moments(x, seen, factors, load(), threads) for threads in (1, 3)]
    own, cross = results[0]
    assert own == pytest.approx(b.T @ b / len(b), abs=1e-4)  # inputs are rounded to 12 bits
    assert cross == pytest.approx(b.T @ (a - b) / len(b), abs=1e-4)
    assert np.array_equal(own, own.T)
    assert np.array_equal(own, results[1][0]) and np.array_equal(cross, results[1][1])


@pytest.mark.parametrize("tokens", [1, 2, 511, 513, 2049])
def test_moments_of_any_number_of_tokens(tokens):
    """Sums are taken of pairs, slices and slabs of tokens; channels may differ by any factor."""
    rng = np.random.default_rng(tokens)
    x, seen = (rng.standard_normal((2, tokens, 128)) * 10.0 ** rng.integers(-6, 6, 128)).astype(np.float32)
    seen[:, 64:] = 0
    b = rotate(seen).astype(np.float64) * token_weights(x)[:, None]
    own, _ = moments(x, seen, None, load(), 2)
    size = np.sqrt(np.diag(b.T @ b))
    assert np.all(np.abs(own * tokens - b.T @ b) <= 2e-3 * np.outer(size, size))


def test_moments_of_values_that_are_not_finite():
    x = np.ones((600, 64), np.float32)
    x[550, 3] = np.inf
    own, _ = moments(np.ones_like(x), x, None, load(), 1)
    assert not np.isfinite(own).any()


def test_massive_activations_do_not_take_over_the_moments():
    """One token 500 times as large as the others counts as one of ten times the usual energy."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3000, 64)).astype(np.float32)
    calm = token_weights(x)
    assert np.all(calm == 1)
    x[0] *= 500
    weights = token_weights(x)
    assert np.array_equal(weights[1:], calm[1:])
    energies = np.square(x * weights[:, None]).sum(axis=1)
    assert energies[0] == pytest.approx(10 * np.median(energies), rel=1e-3)
    own, _ = moments(x, x, None, load(), 2)
    assert own.trace() == pytest.approx(energies.mean(), rel=1e-3)
    assert SiteSurvey(x).mean_squares.sum() == pytest.approx(energies.mean(), rel=1e-3)


def test_a_text_too_short(tiny_model_f32):
    with Model(tiny_model_f32, ctx_size=CTX) as model:
        with pytest.raises(InputError, match=r"'short.txt' has only \d+ tokens, less than one context of 64"):
            calibration_stretches(model, b"a few words", "short.txt", CTX, 1)


def test_correction_makes_up_for_what_can_be_foreseen():
    """Inputs that arrive too small by a fifth: corrected weights give outputs nearer to the wanted ones."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4000, 128)).astype(np.float32)
    seen = 0.8 * x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    weights = rng.standard_normal((40, 128)).astype(np.float32)
    own, cross = moments(x, seen, None, load(), 2)
    losses = []
    for correction in (0.0, 0.5, 1.0):
        blocks = quantize_calibrated(
            load(), weights, own, cross, CalibrationOptions(correction=correction), 2
        )
        stored = codec.decode_weights(blocks)
        losses.append(np.square(x @ weights.T - seen @ stored.T).mean() / np.square(x @ weights.T).mean())
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 0.03 < losses[0]


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
    found = survey(
        tiny_model_f32, stretches(tiny_model_f32, tiny_text), sites_of(tiny_model_f32), 2, lambda *_: None
    )
    with open_gguf(tiny_model_f32, load()) as source:
        factors = {site: scaling_factors(site, facts.mean_squares, source) for site, facts in found.items()}
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


@pytest.mark.parametrize("pure", [False, True])
def test_calibrated_conversion(tiny_model_f32, small_text, tmp_path, pure):
    """Less output error than nearest rounding in every layer, valid data, and provenance in the metadata.

    With --pure in the model's output, too.
    """
    options = CalibrationOptions(small_text, ctx=CTX, chunks=CHUNKS, smoothing=False, correction=0.0)
    all_of_it = ConvertOptions(pure=pure)
    direct = convert(tiny_model_f32, tmp_path / "direct.gguf", all_of_it)
    report = convert(tiny_model_f32, tmp_path / "calibrated.gguf", all_of_it, calibrate=calibration(options))
    assert report.calibration.startswith("tiny.txt, sha256 ")
    assert direct.calibration == "none"
    assert verify_file(report.path).ok
    source = tensors_of(tiny_model_f32)
    stored = {path: tensors_of(path) for path in (direct.path, report.path)}
    seen: dict[Site, np.ndarray] = {}
    tokens, sites = stretches(tiny_model_f32, Path(small_text.file)), sites_of(tiny_model_f32)
    output = {"output.weight": Site("", ("output.weight",))} if pure else {}
    sites |= output
    with Lockstep(
        tiny_model_f32, stretches=len(tokens), ctx=CTX, threads=2, sites=sites, last=output
    ) as both:
        both.run(
            tokens,
            lambda site, x, _: seen.update({site: x.astype(np.float64)}),
            lambda name, x, y: np.matmul(x, source[name].T, out=y),
        )
    for name, site in sites.items():
        x = seen[site]
        errors = [
            output_error(
                source[name].astype(np.float64),
                stored[path][name].view(BLOCK_SPK4).reshape(len(source[name]), -1),
                x.T @ x,
            )
            for path in (direct.path, report.path)
        ]
        assert errors[1] < errors[0], name
    assert report.uncalibrated == (("token_embd.weight",) if pure else ())


def test_an_output_that_shares_the_embedding_is_calibrated(tiny_model_factory, small_text, tmp_path):
    options = CalibrationOptions(small_text, ctx=CTX, chunks=2)
    report = convert(
        tiny_model_factory(tied=True),
        tmp_path / "out.gguf",
        ConvertOptions(pure=True),
        calibrate=calibration(options),
    )
    assert report.uncalibrated == ()
    assert verify_file(report.path).ok


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(tiny_model_f32, small_text, tmp_path, preset):
    """The share of salient activations is what the preset wants, and it is in the file, layer by layer."""
    options = CalibrationOptions(small_text, preset, ctx=CTX, chunks=2)
    report = convert(tiny_model_f32, tmp_path / "out.gguf", calibrate=calibration(options))
    inspected = [t for t in inspect_file(report.path).tensors if t.type == "SPK4"]
    sizes = {site: tensor.shape[0] for tensor in inspected if (site := sites_of(tiny_model_f32)[tensor.name])}
    shares = {sites_of(tiny_model_f32)[tensor.name]: tensor.salient_input_share for tensor in inspected}
    average = sum(shares[site] * sizes[site] for site in sizes) / sum(sizes.values())
    wanted = PRESETS[preset].salient_share
    assert report.salient_input_share == pytest.approx(average, rel=1e-3)
    assert 0.7 * wanted < average <= wanted + 1e-3
    assert all((tensor.silence or 0.5) == pytest.approx(PRESETS[preset].silence) for tensor in inspected)
    assert (report.statistics[inspected[0].name].salient_weights > 0) == (PRESETS[preset].salient_weights > 0)


def test_no_such_preset():
    with pytest.raises(InputError, match="no preset 'quick'"):
        CalibrationOptions(preset="quick")


def test_an_interrupted_conversion_goes_on(tiny_model_f32, small_text, tmp_path):
    journal = tmp_path / "journal"
    options = CalibrationOptions(small_text, ctx=CTX, chunks=2, journal=journal)
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"

    def interrupt(stage: str, item: str | None, done: int, total: int) -> None:
        if stage == "calibrate" and item and item.startswith("blk.1."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model_f32, out, progress=interrupt, calibrate=calibration(options))
    assert not out.exists()
    assert journal.stat().st_size > 0
    with journal.open("ab") as file:
        file.write(b'{"name": "blk.1.ffn_down.weight", "rows": 1, "bytes": 36, "sha256": "0"}\nbroken')
    estimates: list[Estimate] = []
    resumed = replace(options, announce=estimates.append)
    convert(tiny_model_f32, out, calibrate=calibration(resumed))
    assert estimates[0].finished > 0
    assert not journal.exists()
    convert(tiny_model_f32, whole, calibrate=calibration(replace(options, journal=None)))
    assert out.read_bytes() == whole.read_bytes()


def test_a_journal_of_other_options_is_not_used(tmp_path):
    blocks = np.zeros((3, 2), BLOCK_SPK4)
    blocks["codes"] = 7
    with LayerJournal(tmp_path / "j", {"a": 1}) as journal:
        journal.add("x", blocks)
    with LayerJournal(tmp_path / "j", {"a": 1}) as journal:
        assert np.array_equal(journal.read("x"), blocks)
    with LayerJournal(tmp_path / "j", {"a": 2}) as journal:
        assert "x" not in journal


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
