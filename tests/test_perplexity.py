"""Perplexity: its arithmetic, its protocol, and agreement with llama-perplexity of the same tree."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_tools import run_llama_perplexity
from tiny_model import BOS

from spikequant_gguf import FormatError, InputError, RuntimeMissingError, UnsupportedError, evaluation
from spikequant_gguf import runtime as runtime_module
from spikequant_gguf.evaluation import Model, plan_chunks, text_tokens
from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.perplexity import MeanAndError, perplexity, token_losses
from spikequant_gguf.runtime import RuntimeInfo
from spikequant_gguf.texts import read_text

# Rounding of attention differs with how many chunks llama-perplexity computes at once; quantizing activations
# makes more of it.
TOLERANCE = {"f16": 2e-5, "q8_0": 5e-4, "q4_0": 5e-4, "spk4": 5e-4}

# ---- arithmetic


@settings(deadline=None, derandomize=True, max_examples=50)
@given(rows=st.integers(1, 70), vocabulary=st.integers(2, 300), scale=st.sampled_from([0.1, 3.0, 80.0]))
def test_losses_are_those_of_float64(rows: int, vocabulary: int, scale: float) -> None:
    rng = np.random.default_rng(rows * 1000 + vocabulary)
    logits = (rng.standard_normal((rows, vocabulary)) * scale).astype(np.float32)
    targets = rng.integers(0, vocabulary, rows).astype(np.int32)
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    expected = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(rows), targets]
    np.testing.assert_allclose(token_losses(logits, targets), expected, rtol=1e-6, atol=2e-6)


def test_losses_leave_the_logits_alone() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    before = logits.copy()
    token_losses(logits, np.zeros(3, np.int32))
    np.testing.assert_array_equal(logits, before)


def test_losses_of_extreme_logits() -> None:
    huge = np.float32(3e38)
    logits = np.array([[huge, 0, -huge], [-np.inf, 0, 0], [np.nan, 0, 0]], np.float32)
    losses = token_losses(logits, np.array([0, 1, 1], np.int32))
    assert losses[0] == 0
    assert losses[1] == pytest.approx(math.log(2))
    assert math.isnan(losses[2])


def test_mean_and_error_are_those_of_all_values_at_once() -> None:
    values = np.random.default_rng(0).exponential(3.0, 1000)
    sums = MeanAndError()
    for part in np.split(values, [1, 10, 500]):
        sums.add(part)
    assert sums.mean == pytest.approx(values.mean(), rel=1e-12)
    assert sums.error == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), rel=1e-9)


def test_error_of_equal_values_is_zero_and_of_one_value_unknown() -> None:
    sums = MeanAndError()
    sums.add(np.full(1, 0.1))
    assert math.isnan(sums.error)
    sums.add(np.full(99, 0.1))
    assert sums.error == pytest.approx(0.0, abs=1e-9)


# ---- protocol


def test_chunks_are_consecutive_and_begin_with_bos() -> None:
    tokens = np.arange(100, 135, dtype=np.int32)
    plan = plan_chunks(tokens, 10, None, BOS)
    assert [chunk.index for chunk in plan] == [0, 1, 2]
    assert all(chunk.tokens[0] == BOS for chunk in plan)
    np.testing.assert_array_equal(plan[1].tokens[1:], tokens[11:20])
    assert plan[1].first == 5
    np.testing.assert_array_equal(plan[1].targets, tokens[16:20])  # what follows positions 5 to 8
    assert tokens[10] == 110, "the text itself must stay as it is"


def test_chunks_of_a_model_without_bos_are_the_text() -> None:
    tokens = np.arange(40, dtype=np.int32)
    plan = plan_chunks(tokens, 11, 2, None)
    assert len(plan) == 2
    np.testing.assert_array_equal(plan[0].tokens, tokens[:11])
    assert (plan[0].first, len(plan[0].targets)) == (5, 5)


def test_logits_do_not_depend_on_how_a_chunk_is_cut(runtime: RuntimeInfo, tiny_model_f32: Path) -> None:
    tokens = np.random.default_rng(0).integers(3, 300, 700).astype(np.int32)
    with Model(tiny_model_f32, ctx_size=1024, threads=1) as model:
        blocks = [block.copy() for block in model.logits(tokens, first=350)]
        assert [len(block) for block in blocks] == [162, 188]  # 512 tokens are computed at once
        model.clear()
        single = []
        for position, token in enumerate(tokens[:360]):
            found = model.decode([token], position, outputs=int(position >= 350))
            if position >= 350:
                single.append(found[0].copy())
    # one token or many at once are rounded differently; another position would change logits by about 1
    np.testing.assert_allclose(blocks[0][:10], single, rtol=0, atol=0.1)


def test_decode_checks_its_arguments(runtime: RuntimeInfo, tiny_model_f32: Path) -> None:
    with Model(tiny_model_f32, ctx_size=16) as model:
        for tokens, position, outputs in (([], 0, 0), ([5] * 17, 0, 1), ([5], 16, 1), ([5], 0, 2)):
            with pytest.raises(InputError):
                model.decode(tokens, position, outputs)


# ---- agreement with the program


def binary_perplexity(model: Path, text: Path, *options: str) -> tuple[float, float]:
    """What llama-perplexity prints: perplexity and its error."""
    output = run_llama_perplexity(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", model, text, *options)
    return float(output.group(1)), float(output.group(2))


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "spk4"])
@pytest.mark.parametrize("ctx", [64, 512, 1100])
def test_equal_to_llama_perplexity(
    tiny_models: dict[str, Path], tiny_text: Path, kind: str, ctx: int
) -> None:
    ppl, error = binary_perplexity(tiny_models[kind], tiny_text, "-c", str(ctx), "--chunks", "5")
    result = perplexity(tiny_models[kind], tiny_text, ctx=ctx, chunks=5, threads=2)
    assert result.chunks == 5
    assert result.tokens == 5 * (ctx - ctx // 2 - 1)
    assert result.ppl == pytest.approx(ppl, rel=TOLERANCE[kind])
    assert result.ppl_stderr == pytest.approx(error, rel=20 * TOLERANCE[kind], abs=1e-5)
    assert result.running[-1] == result.ppl


def test_equal_to_llama_perplexity_over_a_whole_text_and_without_bos(
    tiny_model_factory, tiny_text: Path, runtime: RuntimeInfo
) -> None:
    plain, without = tiny_model_factory(), tiny_model_factory(add_bos=False)
    found = {}
    for model in (plain, without):
        ppl, _ = binary_perplexity(model, tiny_text, "-c", "256")
        result = perplexity(model, tiny_text, ctx=256)
        assert result.ppl == pytest.approx(ppl, rel=TOLERANCE["f16"])
        found[model] = result.ppl
    assert found[plain] != pytest.approx(found[without], rel=1e-4), "BOS must make a difference here"


def test_spike_products_give_the_same_on_any_number_of_threads(
    tiny_models: dict[str, Path], tiny_text: Path
) -> None:
    results = [
        perplexity(tiny_models["spk4"], tiny_text, ctx=128, chunks=2, threads=n).ppl for n in (1, 2, 3)
    ]
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert results[2] == pytest.approx(results[0], rel=1e-6)


def test_result_names_its_text_and_conditions(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    seen = []

    class Recorder:
        def step(self, name: str, detail: str = "") -> None:
            seen.append(name)

        def advance(self, done: int, total: int) -> None:
            seen.append((done, total))

        def note(self, text: str) -> None:
            seen.append(text)

    document = perplexity(
        tiny_models["f16"], tiny_text, ctx=64, chunks=2, threads=1, progress=Recorder()
    ).to_json()
    assert seen == ["load", "evaluate", (1, 2), (2, 2)]
    assert document["text"] == read_text(tiny_text).to_json() | {"ctx": 64, "chunks": 2}
    assert document["threads"] == 1
    assert document["host"]["kernel"]


# ---- bad input


def test_bad_texts_and_arguments(runtime: RuntimeInfo, tiny_model_f32: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the of and")
    with pytest.raises(InputError, match=r"'short.txt' has only \d+ tokens.* needs 1024"):
        perplexity(tiny_model_f32, short)
    with pytest.raises(InputError, match="too small"):
        perplexity(tiny_model_f32, short, ctx=4)
    with pytest.raises(InputError, match="number of chunks"):
        perplexity(tiny_model_f32, short, chunks=0)
    with pytest.raises(InputError, match="must be positive"):
        perplexity(tiny_model_f32, short, threads=0)


def test_missing_and_damaged_models(tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.gguf"):
        perplexity(tmp_path / "nowhere.gguf", tiny_text)
    with pytest.raises(InputError, match="not a GGUF file"):
        perplexity(tiny_text, tiny_text)

    whole = tiny_models["spk4"].read_bytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole[:-5000])
    with pytest.raises(InputError, match="cut off"):
        perplexity(damaged, tiny_text)

    tensor = next(t for t in read_header(tiny_models["spk4"]).tensors if t.type_id == TYPE_SPK4)
    broken = bytearray(whole)
    broken[tensor.offset : tensor.offset + 2] = b"\xff\x7f"  # a threshold that is not finite
    damaged.write_bytes(broken)
    with pytest.raises(FormatError, match=rf"damaged.gguf: tensor '{tensor.name}', row 0, block 0"):
        perplexity(damaged, tiny_text)


def test_reason_of_llama_cpp_is_part_of_the_message(
    runtime: RuntimeInfo, tiny_model_f32: Path, tiny_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(tiny_model_f32.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(InputError, match=r"cannot load the model: .*blk\.1\.attn_q\.weight"):
        perplexity(strange, tiny_text)
    captured = capfd.readouterr()
    assert captured.out == captured.err == "", "llama.cpp's log must be silent"


def test_encoders_have_no_perplexity(
    runtime: RuntimeInfo, tiny_model_f32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model(tiny_model_f32) as model:
        monkeypatch.setattr(model.api, "llama_model_has_encoder", lambda handle: True)
        with pytest.raises(UnsupportedError, match="does not predict"):
            text_tokens(model, b"the " * 2000, "text", 64)


def test_without_a_runtime_the_remedy_is_to_build_it(
    tiny_model_f32: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = RuntimeInfo(None, None, None, None, None, None, False, "llama-cpp-python is not installed", "x")

    def require() -> RuntimeInfo:
        raise RuntimeMissingError(missing.problem or "", "run `spikequant build`")

    monkeypatch.setattr(runtime_module, "require_runtime", require)
    monkeypatch.setattr(runtime_module, "find_runtime", lambda: missing)
    evaluation._llama.cache_clear()
    with pytest.raises(RuntimeMissingError) as caught:
        perplexity(tiny_model_f32, tiny_text)
    assert caught.value.remedy == "run `spikequant build`"
