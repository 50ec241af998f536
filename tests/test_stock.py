"""Beside an unpatched build of the same pin: stock models give the same logits, spike models are refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spikequant_gguf.dequantize import OUTPUT_TYPES, dequantize
from spikequant_gguf.ggml_patch.build import find_unpatched
from spikequant_gguf.runtime import RuntimeInfo

_CHILD = """
import hashlib, json, sys
import numpy as np
import llama_cpp
digests = {}
for path in sys.argv[1:]:
    threads = {"n_threads": 2, "n_threads_batch": 2}
    model = llama_cpp.Llama(path, n_ctx=256, n_batch=64, logits_all=True, verbose=False, **threads)
    tokens = [1 + i * 7 % 300 for i in range(100)]
    model.eval(tokens)
    digests[path] = hashlib.sha256(np.asarray(model.scores[: len(tokens)]).tobytes()).hexdigest()
json.dump({"library": llama_cpp.__file__, "digests": digests}, sys.stdout)
"""
STOCK_TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "IQ4_NL")


@pytest.fixture(scope="module")
def unpatched() -> Path:
    found = find_unpatched()
    assert found is not None, "run `spikequant build --unpatched`"
    return found


def run_child(models: list[Path], python_path: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    return subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, models)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_stock_types_give_the_same_logits(
    runtime: RuntimeInfo, unpatched: Path, tiny_model_f32: Path, quantized
):
    models = [quantized(tiny_model_f32, kind) for kind in STOCK_TYPES]
    results = {}
    for name, path in (("patched", None), ("unpatched", unpatched)):
        child = run_child(models, path)
        assert child.returncode == 0, child.stderr
        results[name] = json.loads(child.stdout)
    assert str(unpatched) in results["unpatched"]["library"]
    assert str(unpatched) not in results["patched"]["library"]
    assert results["patched"]["digests"] == results["unpatched"]["digests"]
    assert len(set(results["patched"]["digests"].values())) == len(models)


@pytest.mark.parametrize("kind", OUTPUT_TYPES)
def test_stock_llama_cpp_reads_a_dequantized_spike_model(
    runtime: RuntimeInfo, unpatched: Path, tiny_models: dict[str, Path], tmp_path: Path, kind: str
):
    """And computes the same logits as the patched runtime."""
    back = tmp_path / f"{kind}.gguf"
    dequantize(tiny_models["spk4"], back, kind)
    children = [run_child([back], path) for path in (unpatched, None)]
    assert [child.returncode for child in children] == [0, 0], children[0].stderr
    stock, patched = (json.loads(child.stdout)["digests"] for child in children)
    assert stock == patched


_LOAD = "import sys, llama_cpp; llama_cpp.Llama(sys.argv[1])"


def test_stock_llama_cpp_refuses_a_spike_model(
    runtime: RuntimeInfo, unpatched: Path, tiny_models: dict[str, Path]
):
    child = subprocess.run(
        [sys.executable, "-c", _LOAD, tiny_models["spk4"]],
        env=os.environ | {"PYTHONPATH": str(unpatched)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1  # an exception of llama_cpp.Llama, no crash
    assert "Failed to load model" in child.stderr
    assert re.search(r"tensor 'blk\S+' has invalid ggml type 90", child.stderr)
