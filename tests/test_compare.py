"""Divergence, speed, versions of a model, and the table made of them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_tools import run_llama_perplexity

from spikequant_gguf import InputError, OutputError, SpikeQuantError, UnsupportedError, models
from spikequant_gguf import speed as speed_module
from spikequant_gguf import variants as variants_module
from spikequant_gguf.console import to_json_text
from spikequant_gguf.divergence import divergence, token_divergences
from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.inspect_file import model_size, model_type
from spikequant_gguf.perplexity import perplexity
from spikequant_gguf.runtime import RuntimeInfo
from spikequant_gguf.speed import speed
from spikequant_gguf.texts import Text, default_calibration_text, default_evaluation_text
from spikequant_gguf.variants import Variants

compare = importlib.import_module("spikequant_gguf.compare")  # the name is the function's, too

ROW_KEYS = {
    *(
        "name",
        "file",
        "type",
        "bytes",
        "bits_per_weight",
        "ppl",
        "ppl_stderr",
        "kld",
        "kld_stderr",
        "same_top",
    ),
    *("prompt_tps", "decode_tps", "prompt_ratio", "decode_ratio", "energy"),
}

# ---- divergence


@settings(deadline=None, derandomize=True, max_examples=40)
@given(rows=st.integers(1, 40), vocabulary=st.integers(2, 200), scale=st.sampled_from([0.01, 2.0, 50.0]))
def test_divergence_is_that_of_the_definition(rows: int, vocabulary: int, scale: float) -> None:
    rng = np.random.default_rng(rows * 1000 + vocabulary)
    expected, logits = (rng.standard_normal((2, rows, vocabulary)) * scale).astype(np.float32)
    p, q = (np.exp(x.astype(np.longdouble) - x.max(1, keepdims=True)) for x in (expected, logits))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    values, same = token_divergences(expected, logits)
    np.testing.assert_allclose(values, (p * np.log(p / q)).sum(1).astype(float), rtol=1e-9, atol=1e-12)
    assert np.all(values >= 0)
    np.testing.assert_array_equal(same, expected.argmax(1) == logits.argmax(1))


def test_equal_logits_diverge_by_exactly_nothing() -> None:
    logits = (np.random.default_rng(0).standard_normal((50, 1000)) * 20).astype(np.float32)
    values, same = token_divergences(logits, logits.copy())
    assert np.all(values == 0)
    assert np.all(same)


def test_tokens_that_the_reference_excludes_add_nothing() -> None:
    expected = np.array([[-np.inf, 0.0, 1.0]], np.float32)
    values, _ = token_divergences(expected, np.array([[-np.inf, 0.0, 1.0]], np.float32))
    assert values[0] == 0
    values, _ = token_divergences(expected, np.array([[0.0, 0.0, 1.0]], np.float32))
    assert values[0] == pytest.approx(math.log((1 + 1 + math.e) / (1 + math.e)))


def test_model_against_itself_and_perplexities_of_one_pass(
    tiny_models: dict[str, Path], tiny_text: Path
) -> None:
    f16, q4 = tiny_models["f16"], tiny_models["q4_0"]
    result = divergence(f16, [f16, q4], tiny_text, ctx=1100, chunks=2, threads=2)
    itself, other = result.models
    assert (itself.kld, itself.kld_stderr, itself.same_top, itself.ppl_ratio) == (0, 0, 1, 1)
    assert other.kld is not None and other.kld > 1e-4
    for model, found in ((f16, result.reference), (q4, other)):
        alone = perplexity(model, tiny_text, ctx=1100, chunks=2, threads=2)
        assert (found.ppl, found.ppl_stderr) == pytest.approx((alone.ppl, alone.ppl_stderr), rel=1e-12)
        assert result.tokens == alone.tokens
    assert other.ppl_ratio == pytest.approx(other.ppl / result.reference.ppl, rel=1e-9)


def test_equal_to_llama_perplexity(tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path) -> None:
    base = str(tmp_path / "base.kld")
    common = ("-c", "128", "--kl-divergence-base", base)
    run_llama_perplexity("seconds per pass", tiny_models["f16"], tiny_text, "--chunks", "8", *common)
    ours = divergence(tiny_models["f16"], [tiny_models["q4_0"]], tiny_text, ctx=128, chunks=8, threads=2)
    number = r"\s*:?\s*([\d.]+) ± *([\d.]+)"
    arguments = (tiny_models["q4_0"], None, *common, "--kl-divergence")
    # the program keeps the reference's probabilities in 16 bits, so it is the less exact one
    found = run_llama_perplexity(rf"Mean +KLD{number}", *arguments)
    assert ours.models[0].kld == pytest.approx(float(found.group(1)), rel=0.02)
    assert ours.models[0].kld_stderr == pytest.approx(float(found.group(2)), rel=0.05)
    found = run_llama_perplexity(rf"Same top p{number}", *arguments)
    assert 100 * (ours.models[0].same_top or 0) == pytest.approx(float(found.group(1)), abs=0.5)
    assert 100 * (ours.models[0].same_top_stderr or 0) == pytest.approx(float(found.group(2)), abs=0.1)


def test_models_of_other_vocabularies_are_refused(
    runtime: RuntimeInfo, tiny_model_factory: Callable[..., Path], tiny_text: Path
) -> None:
    with pytest.raises(InputError, match="different vocabularies"):
        divergence(tiny_model_factory(), [tiny_model_factory(extra_pieces=7)], tiny_text, ctx=64)
    with pytest.raises(InputError, match="different vocabularies"):
        divergence(tiny_model_factory(), [tiny_model_factory(add_bos=False)], tiny_text, ctx=64)


# ---- speed


def test_speed_pairs_every_round_with_the_baseline(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine slows down fourfold after a while; ratios must not notice."""
    order = []

    def measured(model, prompt: int, decode: int):
        order.append(model.path)
        factor = 1.0 if len(order) <= 4 else 0.25
        own = 300.0 if model.path == tiny_models["spk4"] else 100.0
        return speed_module._Rates(own * factor, own * factor / 10)

    monkeypatch.setattr(speed_module, "_measure", measured)
    q4, spk4 = tiny_models["q4_0"], tiny_models["spk4"]
    result = speed([q4, spk4], q4, rounds=4, prompt=8, decode=2)
    assert order == [q4, spk4, spk4, q4, q4, spk4, spk4, q4]
    base, ours = result.models
    assert (base.prompt.ratio, base.prompt.tps, base.prompt.min_tps) == (1, 62.5, 25)
    assert (ours.prompt.ratio, ours.prompt.ratio_min, ours.prompt.ratio_max) == (3, 3, 3)
    assert ours.decode.ratio == pytest.approx(3)
    assert ours.prompt.stdev_tps > 0


def test_speed_of_real_models(tiny_models: dict[str, Path]) -> None:
    result = speed(list(tiny_models.values()), tiny_models["q4_0"], prompt=600, decode=5, rounds=2, threads=1)
    assert [each.model for each in result.models] == [str(path) for path in tiny_models.values()]
    for each in result.models:
        assert each.prompt.tps > each.prompt.min_tps * 0.999 > 0
        assert each.decode.ratio > 0
    assert result.threads == 1
    alone = speed([tiny_models["f16"]], prompt=0, decode=3, rounds=1)
    assert alone.models[0].prompt is None
    assert alone.models[0].decode.ratio is None
    only_baseline = speed([tiny_models["q4_0"]], tiny_models["q4_0"], prompt=16, decode=0, rounds=2)
    assert only_baseline.models[0].prompt.ratio == 1


def test_speed_of_nothing_is_refused(tiny_model_f32: Path) -> None:
    for arguments in ({"rounds": 0}, {"prompt": 0, "decode": 0}, {"prompt": -1}):
        with pytest.raises(InputError, match="nothing to measure"):
            speed([tiny_model_f32], **arguments)


# ---- versions of a model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for models of its own; builds stay where they are."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(variants_module, "models_folder", lambda: folder)
    return folder


def test_versions_are_made_once(
    runtime: RuntimeInfo, tiny_model_f32: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Variants(tiny_model_f32, threads=1)
    paths = {kind: first.make(kind) for kind in ("f16", "q4_0", "spk4")}
    for kind, path in paths.items():
        assert model_type(read_header(path)) == kind
        assert path.name.startswith(f"tiny-0-{kind.upper()}-")
    assert not list(cache.rglob("*.partial"))

    monkeypatch.setattr(variants_module.subprocess, "Popen", None)
    monkeypatch.setattr(Variants, "_convert", None)
    again = Variants(tiny_model_f32, threads=2)
    assert {kind: again.make(kind.upper()) for kind in paths} == paths


def test_versions_depend_on_source_importance_calibration_and_converter(
    runtime: RuntimeInfo,
    tiny_model_factory: Callable[..., Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imatrix = tmp_path / "some.imatrix"
    imatrix.write_bytes(b"importance")
    plain = Variants(tiny_model_factory(), threads=1)
    other = Variants(tiny_model_factory(seed=1), threads=1)
    weighted = Variants(tiny_model_factory(), imatrix=imatrix, threads=1)
    assert plain._folder == weighted._folder != other._folder
    assert plain._settings("q4_0") != weighted._settings("q4_0")
    assert plain._settings("f16") == weighted._settings("f16")
    shorter = Variants(tiny_model_factory(), calibration_chunks=2, threads=1)
    assert plain._settings("q4_0") == shorter._settings("q4_0")
    assert plain._settings("spk4") != shorter._settings("spk4")
    before = plain._settings("spk4")
    monkeypatch.setattr(variants_module, "_converter_digest", lambda: "changed")
    assert plain._settings("spk4") != before


def test_a_pure_version_has_no_other_matrices(
    runtime: RuntimeInfo, tiny_model_factory: Callable[..., Path], cache: Path
) -> None:
    version = Variants(tiny_model_factory(), calibration_chunks=1, threads=1).make("spk4-pure")
    assert {tensor.type_id for tensor in read_header(version).tensors if len(tensor.shape) == 2} == {TYPE_SPK4}


def test_float_source_is_its_own_version(
    runtime: RuntimeInfo, tiny_model_factory: Callable[..., Path], cache: Path
) -> None:
    source = tiny_model_factory(dtype=np.float16)
    assert Variants(source, threads=1).make("f16") == source
    assert not list(cache.rglob("*.gguf"))


def test_versions_that_cannot_be_made(
    tiny_models: dict[str, Path], tiny_model_f32: Path, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a folder"):
        Variants(tmp_path, threads=1)
    with pytest.raises(UnsupportedError, match="is a spike model"):
        Variants(tiny_models["spk4"], threads=1)
    with pytest.raises(InputError, match="no type 'q4_9'"):
        Variants(tiny_model_f32, threads=1).make("q4_9")
    with pytest.raises(SpikeQuantError, match="llama-quantize could not make IQ2_XXS"):
        Variants(tiny_model_f32, threads=1).make("iq2_xxs")  # needs an importance matrix
    with pytest.raises(InputError, match="cannot read"):
        Variants(tiny_model_f32, imatrix=tmp_path / "missing", threads=1)
    assert not list(cache.rglob("*IQ2*.gguf"))


def test_interrupted_quantization_leaves_nothing(
    runtime: RuntimeInfo, tiny_model_f32: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting:
        def step(self, name: str, detail: str = "") -> None:
            pass

        def advance(self, done: int, total: int) -> None:
            if done > 3 and total < 100:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Variants(tiny_model_f32, threads=1, progress=Interrupting()).make("f16")
    assert not list(cache.rglob("*.gguf*"))


def test_full_disk_is_an_output_error(
    runtime: RuntimeInfo, tiny_model_f32: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Variants, origin: Path, out: Path, kind: str) -> None:
        out.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Variants, "_quantize", full)
    with pytest.raises(OutputError, match="No space left"):
        Variants(tiny_model_f32, threads=1).make("f16")
    assert not list(cache.rglob("*.gguf*"))


# ---- the table


def test_comparison_of_types(
    runtime: RuntimeInfo,
    tiny_model_f32: Path,
    quantized: Callable[[Path, str], Path],
    cache: Path,
    tiny_text: Path,
) -> None:
    source = quantized(tiny_model_f32, "Q4_1")
    result = compare.compare_types(
        source,
        ["spk4", "Q4_0", " f16 "],
        tiny_text,
        ctx=128,
        chunks=3,
        rounds=2,
        prompt=16,
        decode=4,
        threads=1,
    )
    document = json.loads(to_json_text(result.to_json()))
    assert document["reference"] == "F16"
    assert document["text"]["file"] == str(tiny_text)
    assert (document["text"]["chunks"], document["text"]["ctx"]) == (3, 128)
    assert (document["host"]["threads"], document["host"]["kernel"]) == (1, runtime.kernel)
    assert any("Q4_1" in note and "grid" in note for note in document["notes"])
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["F16", "SPK4", "Q4_0"]
    for row in rows.values():
        assert set(row) >= ROW_KEYS
        assert row["energy"]["method"] == "op_model" and row["energy"]["pj_per_token"] > 0
        assert row["bytes"] == Path(row["file"]).stat().st_size
        assert row["prompt_tps"] > 0 and row["decode_tps"] > 0 and row["decode_ratio"] > 0
    assert (rows["F16"]["kld"], rows["F16"]["same_top"]) == (0, 1)
    assert rows["Q4_0"]["prompt_ratio"] == rows["Q4_0"]["decode_ratio"] == 1
    assert 0 < rows["SPK4"]["kld"] < 2
    header = read_header(rows["Q4_0"]["file"])
    weights = sum(math.prod(tensor.shape) for tensor in header.tensors)
    bits = 8 * sum(tensor.n_bytes for tensor in header.tensors) / weights
    assert rows["Q4_0"]["bits_per_weight"] == pytest.approx(bits)
    assert model_size(rows["Q4_0"]["file"]).parameters == weights


def test_comparison_of_files(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    spk4, f16 = tiny_models["spk4"], tiny_models["f16"]
    result = compare.compare(
        [spk4, f16, spk4], tiny_text, ctx=64, chunks=2, rounds=1, prompt=8, decode=2, threads=1
    )
    assert [row.name for row in result.rows] == [f16.stem, spk4.stem]
    assert result.reference == f16.stem
    assert all(row.prompt_ratio is None and row.prompt_tps for row in result.rows)
    assert any("no relative speeds" in note for note in result.notes)

    quick = compare.compare([tiny_models["q4_0"], spk4], tiny_text, reference=f16, ctx=64, chunks=2, rounds=0)
    assert [row.type for row in quick.rows] == ["f16", "q4_0", "spk4"]
    assert all(row.prompt_tps is None for row in quick.rows)
    assert not quick.notes
    with pytest.raises(InputError, match="at least two"):
        compare.compare([f16], tiny_text)
    with pytest.raises(InputError, match="no models"):
        compare.compare([], tiny_text)


def test_models_that_do_not_fit_side_by_side_give_the_same(
    tiny_models: dict[str, Path], tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = compare.divergence

    def counted(reference, others, *arguments, **options):
        calls.append(len(others))
        return original(reference, others, *arguments, **options)

    monkeypatch.setattr(compare, "divergence", counted)
    tables = []
    for memory in (1 << 40, 1000):
        monkeypatch.setattr(compare, "available_memory", lambda memory=memory: memory)
        tables.append(compare.compare(list(tiny_models.values()), tiny_text, ctx=64, chunks=2, rounds=0).rows)
    assert calls == [3, 1, 1, 1]
    assert tables[0] == tables[1]


def test_calibration_on_a_like_text_is_noted(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPIKEQUANT_DATA", raising=False)
    evaluated, calibrated = default_evaluation_text(), default_calibration_text()
    header = read_header(tiny_models["spk4"])
    spiking = dataclasses.replace(
        header, metadata=header.metadata | {"spikequant.calibration": f"{calibrated.name}, 32 chunks"}
    )
    other = Text("wiki.test.raw", b"", "", "wiki.test.raw")
    (like,) = compare._calibration_notes([header, spiking, spiking], evaluated)
    (unlike,) = compare._calibration_notes([spiking], other)
    assert "favours" in like and calibrated.name in like
    assert "favours" not in unlike and calibrated.name in unlike
    assert compare._calibration_notes([header], evaluated) == []


def test_reference_is_the_float_model_else_the_largest(tiny_models: dict[str, Path]) -> None:
    choose = compare._choose_reference
    assert choose([tiny_models["q4_0"], tiny_models["f16"]]) == tiny_models["f16"]
    assert choose([tiny_models["q4_0"], tiny_models["q8_0"]]) == tiny_models["q8_0"]


def test_same_names_get_their_folders() -> None:
    assert compare._file_names([Path("a/m.gguf"), Path("b/m.gguf")]) == ["a/m.gguf", "b/m.gguf"]


def test_split_model_counts_all_parts(tmp_path: Path, tiny_model_f32: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(tiny_model_f32.read_bytes())
    with pytest.raises(InputError, match="00002-of-00002.gguf is missing"):
        model_size(first)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(tiny_model_f32.read_bytes())
    assert model_size(first).parameters == 2 * model_size(tiny_model_f32).parameters


def test_models_folder_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKEQUANT_CACHE", str(tmp_path / "c"))
    assert models.models_folder() == tmp_path / "c" / "models"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPIKEQUANT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError):
        models.models_folder()
