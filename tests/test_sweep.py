"""`spikequant sweep`: its document, plots and tables, what is not measured twice, and what it shows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import vocabulary

from spikequant_gguf import sweep as sweep_package
from spikequant_gguf.converter import convert
from spikequant_gguf.errors import InputError, SpikeQuantError, UnsupportedError
from spikequant_gguf.journal import Journal
from spikequant_gguf.perplexity import perplexity
from spikequant_gguf.simulate import packages
from spikequant_gguf.simulate.settings import SpikeSettings
from spikequant_gguf.sweep import STUDIES, Method, SweepResult, plan_points, sweep
from spikequant_gguf.sweep.workbench import Workbench

pytestmark = pytest.mark.usefixtures("runtime")

CTX, CHUNKS, CALIBRATION_CHUNKS = 64, 4, 6
POINT_KEYS = {
    *("study", "name", "series", "weight_bits", "activation_bits", "salient_share", "silent_share"),
    *("salient_weight_share", "ppl", "ppl_stderr", "ppl_ratio", "ppl_ratio_stderr", "kld", "kld_stderr"),
    *("same_top", "spikes_per_token", "rate_spikes_per_token", "seconds", "settings"),
}


@pytest.fixture(scope="module", autouse=True)
def threads():
    """sweep() sets torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tiny_model_f32: Path, tiny_text: Path) -> Callable[..., SweepResult]:
    """A sweep of the tiny model with few chunks; the rest as of sweep()."""

    def sweep_tiny(folder: Path, **options: object) -> SweepResult:
        settings = {"chunks": CHUNKS, "ctx": CTX, "calibration_chunks": CALIBRATION_CHUNKS, "threads": 1}
        return sweep(tiny_model_f32, tiny_text, folder, calibration=tiny_text, **(settings | options))

    return sweep_tiny


@pytest.fixture(scope="module")
def everything(run: Callable[..., SweepResult], tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return run(tmp_path_factory.mktemp("everything"))


def named(result: SweepResult, study: str) -> dict[str, object]:
    return {point.name: point for point in result.points if point.study == study}


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", "from spikequant_gguf.cli import main; main()", "sweep"]
    words += map(str, arguments)
    return subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | environment)


# ---- the command


def test_document_plots_and_tables(tiny_model_f32, tiny_text, tmp_path):
    out = tmp_path / "study"
    arguments = [tiny_model_f32, "-f", tiny_text, "--calibration", tiny_text, "--quick", "-c", CTX, "-o", out]
    process = command(*arguments, "-t", 1, "--json")
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert json.loads((out / "sweep.json").read_text(encoding="utf-8")) == document
    assert all(set(point) == POINT_KEYS for point in document["points"])
    assert [point["study"] for point in document["points"]] == sorted(
        (point["study"] for point in document["points"]), key=STUDIES.index
    )
    assert document["reference"]["architecture"] == "llama"
    assert document["text"]["chunks"] == 2 and document["calibration"]["chunks"] == 4
    assert document["host"]["threads"] == 1
    name = tiny_model_f32.name
    assert document["command"] == (
        f"spikequant sweep {name} -f tiny.txt --calibration tiny.txt --what all --quick --chunks 2 "
        "--calibration-chunks 4 --ctx-size 64"
    )
    kinds = {"png": b"\x89PNG", "svg": b"<?xml"}
    plots = {f"sweep-{study}.{kind}" for study in STUDIES for kind in kinds}
    assert set(document["plots"]) == plots
    assert {path.name for path in out.iterdir()} == plots | {"sweep.json", "sweep-points.jsonl"}
    for plot in plots:
        assert (out / plot).read_bytes().startswith(kinds[plot[-3:]])
    assert "evaluate   ablations: no GPTQ (" in process.stderr

    table = command(*arguments, "-t", 1)
    assert table.returncode == 0, table.stderr
    assert "quantize" not in table.stderr
    for text in ("One part left out, W4A4", "no salient weights", "Atom, 128 channels", "× PPL", "W2A2"):
        assert text in table.stdout
    assert str(tmp_path) not in table.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "bits,colours"], "there is no study 'colours'"),
        (["--coding", "phase"], "there is no coding 'phase'"),
        (["--calibration", "missing.txt"], "cannot read the text missing.txt"),
        (["-c", "4096"], "needs 8192"),
    ],
)
def test_what_the_user_got_wrong(tiny_model_f32, tiny_text, tmp_path, arguments, message):
    process = command(tiny_model_f32, "-f", tiny_text, "-o", tmp_path / "out", *arguments)
    assert process.returncode != 0
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_spike_model_is_no_source(tiny_model_f32, tmp_path):
    spike_file = tmp_path / "tiny-SPK4.gguf"
    convert(tiny_model_f32, spike_file)
    with pytest.raises(UnsupportedError, match="is a spike model, and a sweep starts from floats"):
        sweep(spike_file, folder=tmp_path)


def test_a_checkpoint_is_converted_first(tiny_model_f32, tiny_text, tmp_path):
    import transformers

    folder = tmp_path / "Tiny-Checkpoint"
    place = {"gguf_file": tiny_model_f32.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_f32.parent, **place)
    model.hf_quantizer = None  # it would not save what it has dequantized
    del model.config.quantization_config
    model.save_pretrained(folder)
    write_tokenizer(folder)
    out = tmp_path / "out"
    chosen = ("--quick", "--what", "bits", "-c", CTX, "-t", 1)
    process = command(folder, "-f", tiny_text, *chosen, "-o", out, "--json")
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert document["reference"]["name"] == folder.name
    assert [point["name"] for point in document["points"]] == ["W2A2", "W3A3", "W4A4", "W5A5"]
    assert not list(out.glob("*.gguf")) and not list(out.glob(".spikequant*"))


def write_tokenizer(folder: Path) -> None:
    """The tiny model's vocabulary as a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2 as pieces

    model = pieces.ModelProto()
    for piece, score, kind in vocabulary():
        model.pieces.add(piece=piece, score=score, type=int(kind))
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def test_without_torch_one_sentence(tiny_model_f32, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(SpikeQuantError, match="this needs the Python package transformers") as error:
        sweep(tiny_model_f32, tiny_text, tmp_path)
    assert "pip install" in error.value.remedy


# ---- restart


def test_finished_points_are_not_measured_again(run, tmp_path, monkeypatch):
    measure = Workbench.measure
    measured: list[str] = []

    def interrupted(self: Workbench, method: Method, title: str) -> dict:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(title)
        return measure(self, method, title)

    monkeypatch.setattr(Workbench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, what=["bits"], quick=True)
    assert sorted(path.name for path in tmp_path.glob("scratch-*/*")) == ["logits.npy", "moments.npy"]
    monkeypatch.setattr(Workbench, "measure", lambda *given: measured.append(given[2]) or measure(*given))
    bits = run(tmp_path, what=["bits"], quick=True)
    assert measured == [f"bits: W{bits}A{bits} ({n + 1} of 4)" for n, bits in enumerate((2, 3, 4, 5))]
    assert not list(tmp_path.glob("scratch-*"))

    # Another study joins them; the method that both have is measured once.
    both = run(tmp_path, what="baselines", quick=True)
    assert [title.split(":")[0] for title in measured[4:]] == ["baselines", "baselines"]
    assert [point for point in both.points if point.study == "bits"] == list(bits.points)
    assert named(both, "baselines")["SpikeQuant"].kld == named(both, "bits")["W4A4"].kld

    # Nothing is left to do: the model is not even loaded.
    monkeypatch.setattr(Workbench, "__init__", lambda *given: pytest.fail("loaded"))
    assert run(tmp_path, what="bits", quick=True).points == both.points
    with pytest.raises(pytest.fail.Exception):
        run(tmp_path, what="bits", quick=True, chunks=CHUNKS - 1)


def test_a_journal_of_something_else_is_begun_anew(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert Journal(path, "a").rows("case", lambda: [{"x": 1}]) == [{"x": 1}]
    again = Journal(path, "a")
    assert "case" in again and again["case"] == [{"x": 1}]
    assert "case" not in Journal(path, "b")


# ---- what it shows


def test_the_reference_is_the_runtimes_float_model(everything, tiny_model_f32, tiny_text):
    expected = perplexity(tiny_model_f32, tiny_text, ctx=CTX, chunks=CHUNKS)
    assert math.isclose(everything.reference["ppl"], expected.ppl, rel_tol=1e-3)
    assert math.isclose(everything.reference["ppl_stderr"], expected.ppl_stderr, rel_tol=1e-2)


def test_every_study_has_its_points(everything):
    assert [(point.study, point.name) for point in everything.points] == [
        (point.study, point.name) for point in plan_points()
    ]
    full = ("W4A4", "c = 2.3", "all parts", "SpikeQuant")
    assert len({point.kld for point in everything.points if point.name in full}) == 1
    for point in everything.points:
        assert point.kld > 0 and math.isfinite(point.ppl)
        assert point.settings["weight_bits"] == point.weight_bits


def test_fewer_bits_diverge_more(everything):
    klds = [point.kld for point in everything.points if point.study == "bits"]
    assert klds == sorted(klds, reverse=True)
    assert klds[1] > 5 * klds[3] > 15 * klds[5]
    silent = [point.silent_share for point in everything.points if point.study == "bits"]
    assert silent == sorted(silent, reverse=True)


def test_salience_and_parts_are_worth_something(everything):
    salience, ablations = named(everything, "salience"), named(everything, "ablations")
    assert salience["top 0 %"].salient_share == 0
    assert salience["top 10 %"].kld < salience["top 2.5 %"].kld < salience["top 0 %"].kld
    shares = [point.salient_share for point in salience.values() if point.series == "threshold"]
    assert shares == sorted(shares)
    full = ablations["all parts"].kld
    for worse in ("no salience", "no coarse step", "no GPTQ", "symmetric"):
        assert ablations[worse].kld > full, worse
    assert ablations["no salient weights"].salient_weight_share == 0
    assert 0 < ablations["all parts"].salient_weight_share < 4 / 64
    baselines = named(everything, "baselines")
    assert baselines["round to nearest"].kld > baselines["SpikeLLM, 10 % of channels"].kld > full
    assert baselines["round to nearest"].spikes_per_token is None


def test_rate_coding_computes_the_same_with_more_spikes(run, everything, tmp_path):
    point = named(run(tmp_path, what="bits", quick=True, coding="rate"), "bits")["W3A3"]
    ttfs = named(everything, "bits")["W3A3"]
    assert (point.kld, point.ppl) == (ttfs.kld, ttfs.ppl)
    assert point.spikes_per_token == ttfs.rate_spikes_per_token > ttfs.spikes_per_token


def test_studies_are_chosen_by_name():
    assert {point.study for point in plan_points(["bits", "salience"])} == {"bits", "salience"}
    assert len(plan_points(quick=True)) < len(plan_points()) / 2
    assert sweep_package.Method(SpikeSettings()).weights_key() == Method().weights_key()
    with pytest.raises(InputError, match="choose from all|there is no study"):
        plan_points("everything")
