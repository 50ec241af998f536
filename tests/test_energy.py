"""Counters against NumPy on a real text, the operation model by hand, shapes, conditions, the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from disassembly import functions
from typer.testing import CliRunner

from spikequant_gguf.activations import activation_values, encode_activations, spike_train
from spikequant_gguf.cli import app
from spikequant_gguf.converter import ConvertOptions, convert
from spikequant_gguf.energy import (
    count_text,
    counting,
    energy,
    load_constants,
    read_counts,
    read_token_counts,
)
from spikequant_gguf.energy.comparison import compared_energies
from spikequant_gguf.energy.conditions import WANTED, conditions, ratio, sensitivity
from spikequant_gguf.energy.counts import Counts, total
from spikequant_gguf.energy.model import SYSTEMS, by_kind, layer_kind, model_energy, type_energy
from spikequant_gguf.energy.shares import counts_of_shape, shares, shares_by_kind
from spikequant_gguf.energy.stock import q4_k_m_types
from spikequant_gguf.errors import InputError
from spikequant_gguf.format import TYPE_SPK4
from spikequant_gguf.ggml_api import mul_mat
from spikequant_gguf.ggml_patch.package import library_file
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.inspect_file import inspect_file, type_name
from spikequant_gguf.native import load
from spikequant_gguf.probe import ProbedModel
from spikequant_gguf.shapes import SHAPES
from spikequant_gguf.texts import Text, default_evaluation_text, read_text

HOROWITZ = load_constants("horowitz-45nm")


def reference(blocks: np.ndarray, n_rows: int) -> dict[str, int]:
    """What spike-counters.h promises, from BLOCK_SPKA[tokens, n_blocks]."""
    tokens, n_blocks = blocks.shape
    train = spike_train(blocks)
    fine, coarse, _, shift = activation_values(blocks)
    salient = blocks["salient_mask"][..., None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    fires, salient = train.time >= 0, salient.astype(bool).reshape(tokens, -1)
    steps = np.abs(fine).max(axis=1).sum() + np.abs(coarse).max(axis=1).sum()
    read = n_rows * (2 + 4 * n_blocks) + tokens * (64 * n_blocks + 4 * n_rows)
    codes = train.spikes * n_rows // 2 if tokens == 1 else 64 * n_blocks * n_rows // 2
    return {
        "products": 1,
        "tokens": tokens,
        "spikes": train.spikes,
        "silent": fires.size - train.spikes,
        "salient": int(salient.sum()),
        "rate_spikes": int(np.abs(fine).sum() + (np.abs(coarse) << shift[:, None]).sum()),
        "adds": n_rows * int((fires & ~salient).sum() + steps),
        "shift_adds": n_rows * int((fires & salient).sum()),
        "readouts": n_rows * tokens,
        "bytes": read + codes,
    }


@pytest.fixture(scope="module")
def real_spk4(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2, rounded to the nearest: what fires does not depend on how weights were chosen."""
    path = tmp_path_factory.mktemp("energy") / "smollm2-SPK4.gguf"
    convert(smollm2, path, ConvertOptions(threads=2))
    return path


# ---- counters


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("buffer", ["CPU", "CPU_SPIKE"])
def test_counters_equal_numpy(runtime: object, tokens: int, buffer: str) -> None:
    rng = np.random.default_rng(tokens)
    library = load()
    weights = library.quantize(TYPE_SPK4, rng.standard_normal((96, 192)))
    x = rng.standard_t(3, (tokens, 192)).astype(np.float32)
    with counting():
        mul_mat(TYPE_SPK4, weights, x, buffer=buffer, threads=2)
        assert len(read_token_counts()) == 0  # not asked for
    mul_mat(TYPE_SPK4, weights, x, buffer=buffer)  # not counted
    (counts,) = read_counts()
    found = counts.to_json()
    expected = reference(library.encode_activations(x), 96)
    assert {key: found[key] for key in expected} == expected
    assert (counts.n_inputs, counts.n_rows) == (192, 96)


@pytest.mark.parametrize("tokens", [1, 13])
def test_counters_of_a_real_text_equal_numpy_by_tensor_and_token(real_spk4: Path, tokens: int) -> None:
    """Every linear layer's real input, taken from the runtime and encoded again in NumPy."""
    encoder = {t.name: (t.salience or 2.3, t.silence or 0.5) for t in inspect_file(real_spk4).tensors}
    names = [each.name for each in read_header(real_spk4).tensors if each.type_id == TYPE_SPK4]
    with ProbedModel(real_spk4, names, ctx_size=16, threads=2) as model:
        ids = model.tokenize(default_evaluation_text().data[:500])[:tokens]
        with counting(tokens=True):
            model.decode(ids, 0, tokens)
            by_token = read_token_counts()
        found = {count.name: count for count in read_counts()}
        order = list(found)
        products = model.products
    assert set(found) == set(names) and len(products) == len(names)
    for product in products:
        blocks = encode_activations(product.x, *encoder[product.name])
        rows = product.y.shape[1]
        expected = reference(blocks, rows)
        counts = found[product.name].to_json()
        assert {key: counts[key] for key in expected} == expected, product.name
        mine = by_token[by_token["counter"] == order.index(product.name)]
        assert mine["token"].tolist() == list(range(tokens))
        for token, kept in enumerate(mine):
            single = reference(blocks[token : token + 1], rows)
            for key in ("spikes", "salient", "rate_spikes", "adds", "shift_adds"):
                assert kept[key] == single[key], (product.name, token, key)
        for key in ("spikes", "salient", "rate_spikes", "adds", "shift_adds"):
            assert mine[key].sum() == counts[key]


def test_counts_of_both_phases(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    result = energy(tiny_models["spk4"], tiny_text, tokens=64, threads=1, measuring=False)
    prompt, decode = result.phase("prompt"), result.phase("decode")
    for phase, products in ((prompt, 1), (decode, 64)):
        for count in phase.counts:
            assert (count.tokens, count.products) == (64, products)
            assert count.spikes + count.silent == count.tokens * count.n_inputs
        per_token = phase.per_token()
        assert len(per_token) == 64
        for name in ("spikes", "silent", "salient", "rate_spikes", "adds", "shift_adds", "readouts"):
            assert sum(token[name] for token in per_token) == total(phase.counts)[name]


def test_texts_longer_than_a_batch_keep_their_tokens_apart(
    tiny_models: dict[str, Path], tiny_text: Path
) -> None:
    counted, _ = count_text(tiny_models["spk4"], read_text(tiny_text), 600, ("prompt",), 2)
    counts, tokens = counted["prompt"]
    assert {count.products for count in counts} == {2}
    assert sorted(set(tokens["token"].tolist())) == list(range(600))
    assert len(tokens) == 600 * len(counts)


def test_no_spikes(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    with pytest.raises(InputError, match="no spike-coded tensors"):
        energy(tiny_models["q4_0"], tiny_text, tokens=16)


# ---- the model


COUNT = Counts("blk.0.attn_v.weight", 64, 32, 1, 1, 50, 14, 4, 200, 32 * 60, 32 * 4, 32, 1000)


def test_model_by_hand() -> None:
    rows = {row.system: row for row in model_energy([COUNT], 1, HOROWITZ)}
    assert tuple(rows) == SYSTEMS
    weights, coding = 64 * 32, 64 * (3.7 + 2 * 0.9)
    assert rows["f16"].arithmetic == pytest.approx(weights * 1.5 + 64 * 0.4)
    assert rows["f16"].memory == pytest.approx((weights * 16 + 64 * 16 + 32 * 32) * 20.3125)
    assert rows["fp16_mac"].arithmetic == rows["f16"].arithmetic
    assert rows["fp16_mac"].dequantization == pytest.approx(weights * (0.03 + 1.1))
    assert rows["q4_0"].arithmetic == pytest.approx(weights * 0.3 + coding)
    assert rows["q4_0"].dequantization == pytest.approx(weights * 0.03 + 64 * (2 * 3.7 + 0.9))
    # 64 inputs are no whole block of 256, and a single layer's value projection is one of the better ones
    assert rows["q4_k_m"].memory == pytest.approx((weights * 8.5 + 64 * 8.5 + 32 * 32) * 20.3125)
    assert rows["w4a4"].arithmetic == pytest.approx(weights * 0.15 + coding)
    assert rows["w4a4"].dequantization == pytest.approx(weights / 128 * (2 * 3.7 + 0.9))
    readouts, spikes = 32 * (3 * 3.7 + 0.9 + 3.1), 64 * (3.7 + 12 * 0.9)
    assert rows["spk4"].arithmetic == pytest.approx((32 * 60 + 2 * 32 * 4) * 0.1 + readouts + spikes)
    assert rows["spk4"].dequantization == 0
    assert rows["spk4"].memory == pytest.approx(8000 * 20.3125)
    assert rows["rate"].arithmetic == pytest.approx(200 * 32 * 0.1 + readouts + spikes)
    planes = (64 + 4) * 2 * 32 + 16 * 32
    assert rows["spikellm"].arithmetic == pytest.approx(planes * 0.1 + 32 * (2 * 3.7 + 3.1) + coding)


def test_weights_of_a_prompt_are_read_and_dequantized_once() -> None:
    """Of eight tokens in one batch, against the same one by one: only what is done per product differs."""
    together = replace(COUNT, tokens=8, products=1)
    apart = replace(COUNT, tokens=8, products=8)
    one = {row.system: row for row in model_energy([together], 8, HOROWITZ)}
    eight = {row.system: row for row in model_energy([apart], 8, HOROWITZ)}
    assert eight["fp16_mac"].dequantization == pytest.approx(8 * one["fp16_mac"].dequantization)
    assert eight["q4_0"].dequantization == pytest.approx(one["q4_0"].dequantization)
    assert eight["q4_0"].memory > one["q4_0"].memory
    assert eight["q4_0"].arithmetic == one["q4_0"].arithmetic


def test_types_of_a_super_block() -> None:
    count = replace(COUNT, name="x", n_inputs=256, n_rows=1, silent=206)
    prices = {
        kind: type_energy([count], 1, HOROWITZ, {"x": kind}, kind).dequantization for kind in ("q4_k", "q6_k")
    }
    assert prices["q4_k"] == pytest.approx(8 * 2 * (3.1 + 0.1) + 4 * 3.7 + 2 * 0.9)
    assert prices["q6_k"] == pytest.approx(256 * 0.03 + 16 * (3.1 + 0.1) + 2 * 3.7 + 0.9)
    with pytest.raises(KeyError):
        type_energy([count], 1, HOROWITZ, {"x": "iq1_s"}, "x")


def test_mixture_is_that_of_llama_quantize(smollm2: Path, quantized: object, tiny_models: object) -> None:
    made = read_header(quantized(quantized(smollm2, "F16"), "Q4_K_M"))  # type: ignore[operator]
    linear = [each for each in made.tensors if each.name.startswith("blk.") and len(each.shape) == 2]
    expected = {each.name: type_name(each.type_id).lower() for each in linear}
    assert len(expected) == 210
    assert q4_k_m_types([(each.name, each.shape[0]) for each in linear]) == expected


def test_figures_of_smollm2_and_of_a_7b_shape(real_spk4: Path) -> None:
    """Without memory; what memory makes of them is reported, and no goal."""
    for shape in (None, "7b"):
        text = default_evaluation_text()
        result = energy(real_spk4, text, tokens=16, shape=shape, threads=1, measuring=False)
        assert (result.assumption is None) == (shape is None)
        for phase in result.phases:
            assert phase.rows[0].dequantization == 0
            for system, wanted in WANTED.items():
                assert phase.ratio(system) >= wanted
                assert 1 < phase.ratio(system, memory=True) < phase.ratio(system)
            assert phase.spike_ratio >= 3


def test_constants(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "a"\nprocess = "b"\ncitation = "c"\n[pj]\nint8_add = -1\n', encoding="utf-8")
    with pytest.raises(InputError, match="int4_mul"):
        load_constants(str(path))
    path.write_text('base = "jouppi-7nm"\nname = "mine"\n[pj]\nint8_mul = 0.5\n', encoding="utf-8")
    mine = load_constants(str(path))
    assert (mine.name, mine.process) == ("mine", "7 nm")
    assert (mine.pj["int8_mul"], mine.pj["fp32_mul"]) == (0.5, 1.31)
    path.write_text('base = "jouppi-7nm"\n[pj]\nint9_mul = 0.5\n', encoding="utf-8")
    with pytest.raises(InputError, match="int9_mul"):
        load_constants(str(path))
    path.write_text(f'base = "{path.name}"\n', encoding="utf-8")
    with pytest.raises(InputError, match="base"):
        load_constants(str(path))
    assert load_constants("jouppi-7nm-hbm2").pj["dram_bit"] == pytest.approx(350 / 64)
    assert mine.with_dram_bit(4).pj["dram_bit"] == 4
    with pytest.raises(InputError):
        mine.with_dram_bit(-1)


# ---- shares, shapes, conditions


@pytest.fixture(scope="module")
def tiny_counts(tiny_models: dict[str, Path], tiny_text: Path) -> dict[str, list[Counts]]:
    counted, _ = count_text(tiny_models["spk4"], read_text(tiny_text), 64)
    return {phase: counts for phase, (counts, _) in counted.items()}


@pytest.mark.parametrize("phase", ["prompt", "decode"])
def test_shares_give_back_the_counts(tiny_counts: dict[str, list[Counts]], phase: str) -> None:
    for count in tiny_counts[phase]:
        again = shares([count]).counts(count.name, count.n_inputs, count.n_rows, 64, count.products)
        for name, value in count.to_json().items():
            # bytes of single tokens are rounded down token by token
            assert again.to_json()[name] == (value if name != "bytes" else pytest.approx(value, abs=64)), name


def test_shape_of_7b(tiny_counts: dict[str, list[Counts]]) -> None:
    measured = shares_by_kind(tiny_counts["prompt"])
    counts = counts_of_shape(SHAPES["7b"], measured, 64, 1)
    assert sum(count.n_inputs * count.n_rows for count in counts) == 6_476_005_376
    kinds = by_kind(counts)
    assert {kind: len(group) for kind, group in kinds.items()} == dict.fromkeys(measured, 32)
    for kind, group in kinds.items():
        assert shares(group).silent == pytest.approx(measured[kind].silent, rel=1e-3)
    del measured["ffn_up"]
    with pytest.raises(InputError, match="ffn_up"):
        counts_of_shape(SHAPES["7b"], measured, 64, 1)


def test_conditions_are_where_the_model_says(tiny_counts: dict[str, list[Counts]]) -> None:
    counts = tiny_counts["prompt"]
    average = shares(counts)
    found = {(each.system, each.quantity): each for each in conditions(counts, 64, HOROWITZ)}
    for system, wanted in WANTED.items():
        at = found[system, "energy of an int32 addition"]
        assert at.limit is not None
        for factor, holds in ((0.999, True), (1.001, False)):
            scaled = HOROWITZ.scaled("int32_add", factor * at.limit / HOROWITZ.pj["int32_add"])
            assert (ratio(model_energy(counts, 64, scaled), system) >= wanted) is holds
        rows = found[system, "outputs per input"].limit
        assert rows is not None
        for n_rows, holds in ((int(rows), True), (int(rows) - 1, False)):
            layer = [average.counts("layer", 4096, n_rows, 64, 1)]
            assert (ratio(model_energy(layer, 64, HOROWITZ), system) >= wanted) is holds
    assert found["fp16_mac", "as counted"].holds


def test_sensitivity_names_every_constant_and_set(tiny_counts: dict[str, list[Counts]]) -> None:
    found = {each["varied"]: each["ratios"] for each in sensitivity(tiny_counts["prompt"], 64, HOROWITZ)}
    assert len(found) == 2 * len(HOROWITZ.pj) + 3
    now = ratio(model_energy(tiny_counts["prompt"], 64, HOROWITZ), "fp16_mac")
    assert found["int32_add × 2"]["fp16_mac"] < now < found["int32_add × 0.5"]["fp16_mac"]
    assert found["dram_bit × 2"]["fp16_mac"] == now == found["horowitz-45nm"]["fp16_mac"]


def test_layer_kinds() -> None:
    assert layer_kind("blk.12.ffn_down.weight") == "ffn_down"
    assert layer_kind("output.weight") == "output"


# ---- comparison and command


def test_energies_of_a_comparison(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    headers = {path: read_header(path) for path in tiny_models.values()}
    text = read_text(tiny_text)
    found = compared_energies(headers, text, largest_tokens=64, baseline=tiny_models["q4_0"], threads=1)
    spk4, q4_0, f16 = (found[tiny_models[kind]] for kind in ("spk4", "q4_0", "f16"))
    phase = energy(
        tiny_models["spk4"], text, tokens=64, phases=["prompt"], measuring=False, threads=1
    ).phases[0]
    rows = {row.system: row for row in phase.rows}
    for row, system in ((spk4, "spk4"), (q4_0, "q4_0"), (f16, "f16")):
        assert row["method"] == "op_model"
        assert row["pj_per_token"] == pytest.approx(rows[system].total)
    assert q4_0["ratio"] == 1
    assert spk4["compute_ratio"] > 1.5 > 1 > f16["compute_ratio"]


def test_a_type_without_a_model_says_so(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_models["q4_0"]
    header = read_header(path)
    odd = replace(header, tensors=tuple(replace(each, type_id=19) for each in header.tensors))  # IQ1_S
    text = Text("none", b"", "")
    (found,) = compared_energies({path: odd}, text, largest_tokens=8, baseline=None).values()
    assert found["method"] == "unavailable" and "IQ1_S" in found["reason"]
    assert found["pj_per_token"] is None and found["ratio"] is None


def test_command(tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path) -> None:
    arguments = ["energy", str(tiny_models["spk4"]), "-f", str(tiny_text), "--tokens", "32"]
    arguments += ["--powercap", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["system"] for row in document["rows"]] == list(SYSTEMS)
    assert set(document["rows"][0]) >= {"pj_per_token", "arithmetic", "dequantization", "memory"}
    assert set(document["counts"]) >= {
        *("spikes", "silent", "salient", "adds", "shift_adds", "readouts", "bytes")
    }
    for measured in document["measured"]:
        if measured["method"] == "unavailable":  # wherever perf has no energy events
            assert measured["joules_per_token"] is None and measured["stdev"] is None
            assert measured["reason"]
    shown = CliRunner().invoke(app, [*arguments, "--no-measure", "--decode"])
    assert shown.exit_code == 0, shown.output
    assert "Decode, 32 tokens one by one" in shown.stdout and "Prompt" not in shown.stdout
    assert "Measured: unavailable" in shown.stdout
    assert "2014" in shown.stdout  # the source of the constants


def test_counters_cost_one_test_per_product_when_off(runtime: object) -> None:
    """Products ask once, in one thread; the kernels and the encoder never do."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("there is no objdump to look at the machine code with")
    library = load().library_dir / library_file("ggml-cpu")
    found = functions(objdump, library)
    asking = {
        name: sum("<spike_counting" in each for each in instructions)
        for name, instructions, _ in found
        if any("<spike_counting" in each for each in instructions) and name != "spike_counting@plt"
    }
    assert asking and all("spike::" in name for name in asking), asking
    assert sum(asking.values()) == 2  # plain products and those routed to experts
    (own,) = (instructions for name, instructions, _ in found if name == "spike_counting")
    assert (
        len([each for each in own if not each.startswith(("nop", "cs nop", "endbr", "xchg", "data16"))]) <= 2
    )
