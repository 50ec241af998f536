"""SmolLM2-135M-Instruct: agreement with llama-perplexity, known figures, and sense in what it writes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from llama_tools import run_llama_perplexity

from spikequant_gguf.divergence import divergence
from spikequant_gguf.generate import Sampling, generate
from spikequant_gguf.perplexity import perplexity
from spikequant_gguf.texts import EVALUATION_FILE, default_evaluation_text

CHUNKS = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default text as a file; the line feed at its end is what both sides drop."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(default_evaluation_text().data + b"\n")
    return path


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "spk4"])
def test_equal_to_llama_perplexity(real_models: dict[str, Path], text: Path, kind: str) -> None:
    found = run_llama_perplexity(
        r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", real_models[kind], text, "--chunks", str(CHUNKS)
    )
    result = perplexity(real_models[kind], text, chunks=CHUNKS, threads=2)
    assert result.ppl == pytest.approx(float(found.group(1)), rel=1e-3)
    assert result.ppl_stderr == pytest.approx(float(found.group(2)), rel=1e-2)


def test_accuracy_is_in_the_usual_order(real_models: dict[str, Path], text: Path) -> None:
    order = ["f16", "q8_0", "q4_0", "spk4"]
    result = divergence(
        real_models["f16"], [real_models[kind] for kind in order], text, chunks=CHUNKS, threads=2
    )
    kld = dict(zip(order, (model.kld or 0.0 for model in result.models), strict=True))
    assert kld["f16"] == 0
    assert 0 < kld["q8_0"] < 0.02 < kld["q4_0"]
    assert 0.01 < kld["spk4"] < 0.6
    assert all(math.isfinite(model.ppl) for model in result.models)


def test_known_figure_of_the_reference(real_models: dict[str, Path], data_dir: Path) -> None:
    """First 8 chunks of WikiText-2 by stock llama.cpp: 23.62."""
    result = perplexity(real_models["f16"], data_dir / EVALUATION_FILE, chunks=8, threads=2)
    assert result.ppl == pytest.approx(23.62, abs=0.02)


def test_spike_model_answers(real_models: dict[str, Path]) -> None:
    options = {"n_predict": 8, "sampling": Sampling(temperature=0.0)}
    assert generate(real_models["spk4"], "What is the capital of France?", **options).chat
    counted = generate(real_models["spk4"], "One, two, three, four,", chat=False, **options)
    assert "five, six, seven" in counted.text
