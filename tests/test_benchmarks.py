"""The benchmarks, run as a user would with tiny settings: their documents, and no slow paths."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from spikequant_gguf import SpikeQuantError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.ggml_patch.progress import SilentProgress
from spikequant_gguf.host import host_facts
from spikequant_gguf.texts import DATA_VARIABLE

pytestmark = pytest.mark.usefixtures("runtime")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MATMUL_KEYS = {"rows", "inputs", "tokens", "threads", "type", "path", "isa", "gproducts_per_s", "ratio_q4_0"}
ACCURACY_KEYS = {
    "model",
    "text",
    "name",
    "type",
    "bytes",
    "bits_per_weight",
    "ppl",
    "ppl_stderr",
    "kld",
    "same_top",
}
TINY_MATMUL = ("--shapes", "1024x576,1024x512", "--tokens", "9", "-r", "2", "--sample-ms", "1")


def run_script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def document_of(name: str, results: Path, *arguments: object, **environment: str) -> dict:
    """The document on stdout, which is also in the folder of results, beside its plot and nothing else."""
    process = run_script(name, *arguments, "--json", "--results", results, **environment)
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    (file,) = results.glob("*.json")
    assert json.loads(file.read_text(encoding="utf-8")) == document
    plots = [] if name == "accuracy" else [file.with_suffix(".png")]
    assert sorted(results.iterdir()) == sorted([file, *plots])
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert document["benchmark"] == name
    assert document["host"]["cpu"] and document["host"]["kernel"]
    return document


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which versions of tiny models are kept away from the user's cache."""
    return {"SPIKEQUANT_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the scripts share, imported as they do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("common")


@pytest.fixture
def random_models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("random_models")


def test_matmul(tmp_path: Path) -> None:
    document = document_of("matmul", tmp_path, *TINY_MATMUL, "--types", "spk4,q4_k,f16", "-t", "1,2")
    rows = document["rows"]
    kinds = {512: ["q4_0", "spk4", "q4_k", "f16"], 576: ["q4_0", "spk4", "f16"]}
    expected = [(i, t, kind) for i in (576, 512) for t in (1, 2) for kind in kinds[i]]
    assert [(row["inputs"], row["threads"], row["type"]) for row in rows] == expected
    assert any("Q4_K" in note for note in document["notes"]), "its blocks do not divide 576"
    for row in rows:
        assert row.keys() >= MATMUL_KEYS
        assert (row["rows"], row["tokens"], row["weights_from"]) == (1024, 9, "cache")
        assert 0 < row["seconds_min"] <= row["seconds"] and math.isfinite(row["gproducts_per_s"])
        assert row["ratio_q4_0_min"] <= row["ratio_q4_0"] <= row["ratio_q4_0_max"]
        if row["type"] == "spk4":
            assert (row["path"], row["isa"]) == ("CPU_SPIKE", document["host"]["kernel"])
            assert row["silent_share"] == pytest.approx(0.15, abs=0.05) and row["salient_share"] > 0
            assert row["add_share"] > 0 and row["read_share"] is None
        if row["type"] == "q4_0":
            assert row["ratio_q4_0"] == 1 and row["silent_share"] is None
            assert row["path"] == "CPU_REPACK" or "avx2" not in document["host"]["features"]


def test_matmul_takes_weights_from_memory_for_one_token_or_as_many_as_asked_for(tmp_path: Path) -> None:
    options = (
        "--shapes",
        "1024x1024",
        "--tokens",
        "1,2,3",
        "--from-memory",
        "2",
        "-t",
        "1",
        "-r",
        "1",
        "--sample-ms",
        "1",
        "--types",
        "spk4",
    )
    document = document_of("matmul", tmp_path, *options)
    rows = document["rows"]
    kinds = {1: ["q4_0", "spk4", "spk4"], 2: ["q4_0", "spk4"], 3: ["q4_0", "spk4"]}
    assert [(row["tokens"], row["type"]) for row in rows] == [(t, kind) for t in kinds for kind in kinds[t]]
    assert [row["silent_target"] for row in rows[1:3]] == [0.15, 0.38], (
        "one row for each share of silent inputs"
    )
    assert [row["weights_from"] for row in rows] == ["memory"] * 5 + ["cache"] * 2
    assert all((row["read_share"] or 0) > 0 for row in rows[:5]) and rows[5]["read_share"] is None
    (limit,) = document["limits"]
    assert limit["threads"] == 1 and limit["byte_adds_per_s"] > limit["read_bytes_per_s"] > 0


def test_matmul_of_a_forced_kernel_says_so(tmp_path: Path) -> None:
    options = (*TINY_MATMUL, "--types", "spk4", "-t", "1")
    rows = document_of("matmul", tmp_path, *options, SPIKEQUANT_FORCE_ISA="plain-c")["rows"]
    assert {row["isa"] for row in rows if row["type"] == "spk4"} == {"plain-c"}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--types", "q9"), 2, "there is no type 'q9'"),
        (("--shapes", "576"), 2, "not a list of shapes"),
        (("--tokens", "0"), 2, "not a list of positive numbers"),
        (("--shapes", "64x100", "--tokens", "1", "-t", "1"), 7, "does not fit type q4_0"),
    ],
)
def test_matmul_refuses_bad_arguments(
    tmp_path: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    process = run_script("matmul", *arguments, "--results", tmp_path)
    assert process.returncode == status, process.stderr
    assert message in process.stderr and "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())


def test_end_to_end(tmp_path: Path, tiny_model_f32: Path, cache: dict[str, str]) -> None:
    options = ("-m", tiny_model_f32, "--types", "spk4,f16", "-p", "16", "-n", "4", "-r", "2", "-t", "1")
    options += ("--loads", "1")
    rows = document_of("end_to_end", tmp_path, *options, **cache)["rows"]
    assert [row["type"] for row in rows] == ["q4_0", "spk4", "f16"]
    for row in rows:
        assert (row["model"], row["threads"]) == (tiny_model_f32.stem, 1)
        assert row["pp16_tps"] > 0 and row["tg4_tps"] > 0
        assert row["pp_ratio_min"] <= row["pp_ratio"] <= row["pp_ratio_max"]
        assert row["tg_ratio_min"] <= row["tg_ratio"] <= row["tg_ratio_max"]
        assert min(row["load_s"], row["load_ratio"], row["peak_ratio"]) > 0
        assert row["peak_bytes"] > 1 << 20
    assert rows[0]["pp_ratio"] == rows[0]["tg_ratio"] == rows[0]["load_ratio"] == 1
    assert "CPU_SPIKE" in rows[1]["path"]


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q4_k_m", "iq4_xs", "spk4"])
def test_models_of_random_weights(random_models: ModuleType, tmp_path: Path, kind: str, experts: int) -> None:
    shape = random_models.LlamaShape(
        layers=8,
        width=256,
        ff_width=512,
        heads=4,
        kv_heads=1,
        vocabulary=512,
        experts=experts,
        experts_used=2,
    )
    path = tmp_path / "random.gguf"
    random_models.write_model(path, kind, shape, SilentProgress())
    assert 0 < path.stat().st_size - random_models.file_bytes(kind, shape) < 100_000
    assert list(tmp_path.iterdir()) == [path]
    with Model(path, ctx_size=8, threads=1) as model:
        assert model.n_vocab == 512
        assert np.isfinite(model.decode([1, 2, 3], 0, outputs=1)).all()


def test_interrupted_benchmark_goes_on(common: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "unfinished.jsonl"
    measured = []

    def measure() -> list[dict]:
        measured.append(1)
        return [{"seconds": 1.5}]

    assert common.Journal(path, ["a", 1]).rows("first", measure) == [{"seconds": 1.5}]
    again = common.Journal(path, ["a", 1])
    assert again.rows("first", measure) == [{"seconds": 1.5}] and len(measured) == 1
    again.rows("second", measure)
    assert len(measured) == 2
    common.Journal(path, ["b", 1]).rows("first", measure)
    assert len(measured) == 3, "measured with other arguments"
    again.close()
    assert not path.exists()


def test_accuracy(tmp_path: Path, tiny_model_f32: Path, tiny_text: Path, cache: dict[str, str]) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(tiny_text.read_bytes()[1000:])
    options = (
        "-m",
        tiny_model_f32,
        "-f",
        tiny_text,
        "-f",
        other,
        "--types",
        "q4_0,spk4",
        "-c",
        "64",
        "-t",
        "2",
    )
    document = document_of("accuracy", tmp_path / "results", *options, "--chunks", "2", **cache)
    expected = [(text.name, kind) for text in (tiny_text, other) for kind in ("f16", "q4_0", "spk4")]
    assert [(row["text"], row["type"]) for row in document["rows"]] == expected
    assert [(text["chunks"], text["ctx"]) for text in document["texts"]] == [(2, 64), (2, 64)]
    for row in document["rows"]:
        assert row.keys() >= ACCURACY_KEYS
        assert row["ppl"] > 1
        assert (row["kld"] == 0) == (row["type"] == "f16")


def test_accuracy_finds_texts(
    tmp_path: Path, tiny_model_f32: Path, tiny_text: Path, cache: dict[str, str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("wiki.test.raw", "web.eval.txt", "web.calib.txt", "notes.md"):
        (data / name).write_bytes(tiny_text.read_bytes())
    options = ("-m", tiny_model_f32, "--types", "f16,q8_0", "-c", "64", "-t", "1", "--chunks", "1")
    document = document_of("accuracy", tmp_path / "results", *options, **cache, **{DATA_VARIABLE: str(data)})
    assert [text["name"] for text in document["texts"]] == ["web.eval.txt", "wiki.test.raw"]
    empty = tmp_path / "empty"
    empty.mkdir()
    process = run_script("accuracy", *options, **cache, **{DATA_VARIABLE: str(empty)})
    assert process.returncode == 3
    assert "no *.raw or *.txt" in process.stderr


def test_table_on_stdout_and_the_rest_on_stderr(tmp_path: Path) -> None:
    process = run_script("matmul", *TINY_MATMUL, "-t", "1", "--types", "spk4", "--results", tmp_path)
    assert process.returncode == 0, process.stderr
    assert "Gproducts/s" in process.stdout and "CPU_SPIKE" in process.stdout
    assert "written:" in process.stderr and "written:" not in process.stdout


def test_slow_paths_are_refused(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKEQUANT_FORCE_ISA", raising=False)
    monkeypatch.setattr(common, "buffer_types", lambda: ["CPU", "CPU_SPIKE", "CPU_REPACK"])
    host = replace(host_facts(), features=("avx2",), kernel="avx2")
    common.require_fast_kernel(host)
    with pytest.raises(SpikeQuantError, match="plain C"):
        common.require_fast_kernel(replace(host, kernel="plain-c"))
    common.require_fast_kernel(replace(host, kernel="plain-c", features=("sse2",)))
    common.require_fast_path("spk4", ["CPU", "CPU_SPIKE"], host)
    common.require_fast_path("f16", ["CPU"], host)
    for kind in ("spk4", "q4_0"):
        with pytest.raises(SpikeQuantError, match="slow path"):
            common.require_fast_path(kind, ["CPU"], host)
    common.require_fast_path("q4_0", ["CPU"], replace(host, features=("sse2",)))


def test_rounds_alternate_and_ratios_are_of_one_round(common: ModuleType) -> None:
    calls: list[str] = []
    seconds = iter([1.0, 2.0, 8.0, 2.0])  # a b, b a
    subjects = {name: lambda name=name: (calls.append(name), next(seconds))[1] for name in "ab"}
    measured = common.in_turns(subjects, 2)
    assert calls == ["a", "b", "b", "a"]
    assert measured == {"a": [1.0, 2.0], "b": [2.0, 8.0]}
    assert common.ratios(measured["b"], measured["a"]) == (0.375, 0.25, 0.5)


# ---- alarm


def speeds(path: Path, *ratios: float, spread: float = 0.01, cpu: str = "x") -> Path:
    """A document of matmul.py with these ratios to Q4_0."""
    rows = [
        {"type": "spk4", "rows": 64, "inputs": 64, "tokens": 2**number, "threads": 1}
        | {"ratio_q4_0": ratio, "ratio_q4_0_min": ratio - spread, "ratio_q4_0_max": ratio + spread}
        for number, ratio in enumerate(ratios)
    ]
    rows.append(rows[0] | {"type": "q4_0", "ratio_q4_0": 1.0})
    host = {"cpu": cpu, "kernel": "avx2"}
    path.write_text(json.dumps({"benchmark": "matmul", "host": host, "rows": rows}))
    return path


@pytest.mark.parametrize(
    ("after", "spread", "falling"),
    [
        ((2.0, 1.0, 1.5), 0.01, []),
        ((1.92, 0.96, 1.6), 0.01, []),  # four per cent
        ((1.8, 1.0, 1.5), 0.01, [0]),
        ((1.8, 1.0, 1.5), 0.25, []),  # a round was as fast as before
        ((1.88, 0.94, 1.41), 0.2, [3]),  # each may be chance, all of them together not
        ((2.4, 0.5, 1.5), 0.01, [1, 3]),
    ],
)
def test_alarm(tmp_path: Path, after: tuple[float, ...], spread: float, falling: list[int]) -> None:
    before = speeds(tmp_path / "before.json", 2.0, 1.0, 1.5)
    process = run_script("alarm", before, speeds(tmp_path / "after.json", *after, spread=spread), "--json")
    rows = json.loads(process.stdout)["rows"]
    assert len(rows) == 4 and rows[-1]["case"] == "geometric mean"
    assert [number for number, row in enumerate(rows) if row["falls"]] == falling
    assert process.returncode == bool(falling)
    assert rows[0]["change"] == pytest.approx(after[0] / 2 - 1)


def test_alarm_compares_only_what_can_be_compared(tmp_path: Path) -> None:
    before = speeds(tmp_path / "before.json", 2.0)
    for after, message in (
        (speeds(tmp_path / "cpu.json", 2.0, cpu="y"), "differ in cpu: x and y"),
        (speeds(tmp_path / "none.json", 1.0), None),
        (tmp_path / "absent.json", "is not a document of a benchmark"),
    ):
        process = run_script("alarm", before, after)
        if message is None:
            assert process.returncode == 1 and "falls" in process.stdout  # half as fast
        else:
            assert process.returncode not in (0, 1) and message in process.stderr
