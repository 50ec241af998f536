"""lm-evaluation-harness with spike models: scores equal our own, and a task on the real model."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from spikequant_gguf.errors import UnsupportedError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.harness import HarnessModel
from spikequant_gguf.perplexity import perplexity

QUESTIONS = [
    ("The capital of France is", ["Paris", "Berlin", "Madrid", "Rome"], 0),
    ("Grass is usually", ["blue", "green", "red", "black"], 1),
    ("The sun rises in the", ["west", "north", "east", "south"], 2),
    ("Water freezes and becomes", ["steam", "fire", "sand", "ice"], 3),
    ("The opposite of hot is", ["warm", "cold", "loud", "fast"], 1),
    ("A baby cat is called a", ["kitten", "puppy", "calf", "lamb"], 0),
    ("One, two, three, four,", ["nine", "ten", "five", "eight"], 2),
    ("Monday, Tuesday, Wednesday,", ["Thursday", "Sunday", "Monday", "Friday"], 0),
    ("Bees make", ["milk", "honey", "wool", "silk"], 1),
    ("At night we can see the moon and the", ["sun", "grass", "fish", "stars"], 3),
    ("Cows eat", ["grass", "stones", "cars", "books"], 0),
    ("A triangle has this many sides:", ["seven", "nine", "three", "six"], 2),
    ("Fish live in", ["trees", "water", "fire", "books"], 1),
    ("We hear with our", ["ears", "knees", "elbows", "hair"], 0),
    ("The largest planet is", ["Mars", "Venus", "Jupiter", "Mercury"], 2),
    ("Shakespeare wrote", ["software", "recipes", "maps", "plays"], 3),
]


def request(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_scores_are_those_of_the_logits(tiny_models: dict[str, Path]) -> None:
    path = tiny_models["spk4"]
    with HarnessModel(path, ctx_size=64, threads=1) as harness:
        ((score, greedy),) = harness.loglikelihood(
            [request("loglikelihood", "it was the end of", " that which")], disable_tqdm=True
        )
    with Model(path, ctx_size=64, threads=1) as model:
        tokens = model.tokenize(b"it was the end of that which")
        before = len(model.tokenize(b"it was the end of"))
        logits = np.concatenate([block.copy() for block in model.logits(tokens)]).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = tokens[before:]
    expected = logs[np.arange(before - 1, len(tokens) - 1), targets].sum()
    assert score == pytest.approx(expected, rel=1e-6)
    assert greedy == bool((logs[before - 1 : -1].argmax(axis=1) == targets).all())


def test_rolling_windows_cover_the_text_once(tiny_models: dict[str, Path], tiny_text: Path) -> None:
    """Its mean is near the perplexity of the same text, which uses other windows."""
    text = tiny_text.read_text(encoding="utf-8")[:4000]
    with HarnessModel(tiny_models["spk4"], ctx_size=64, threads=1) as harness:
        (total,) = harness.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
        n_tokens = len(harness.tok_encode(text, add_special_tokens=False))
    expected = perplexity(tiny_models["spk4"], tiny_text, ctx=64, chunks=20, threads=1)
    assert -total / n_tokens == pytest.approx(np.log(expected.ppl), rel=0.05)


def test_generation_stops_where_it_should(tiny_models: dict[str, Path]) -> None:
    with HarnessModel(tiny_models["spk4"], ctx_size=64, threads=1) as harness:
        options = {"until": [], "max_gen_toks": 12}
        (text,) = harness.generate_until([request("generate_until", "it was", options)], disable_tqdm=True)
        assert len(text) >= 6
        stop = text[4]
        options = {"until": stop, "max_gen_toks": 12, "do_sample": False}
        (cut,) = harness.generate_until([request("generate_until", "it was", options)], disable_tqdm=True)
        assert cut == text[: text.index(stop)]
        options = {"do_sample": True, "temperature": 0.7}
        with pytest.raises(UnsupportedError, match="samples at random"):
            harness.generate_until([request("generate_until", "it was", options)], disable_tqdm=True)


def test_task_of_the_real_model(real_models: dict[str, Path], tmp_path: Path) -> None:
    """A task on a local file: SPK4 answers nearly as well as F16."""
    rows = [
        {"question": question, "choices": choices, "label": label} for question, choices, label in QUESTIONS
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "everyday",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "everyday.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    accuracy = {}
    for kind in ("f16", "spk4"):
        with HarnessModel(real_models[kind], ctx_size=128, threads=1) as model:
            found = lm_eval.simple_evaluate(
                model, tasks=["everyday"], task_manager=manager, bootstrap_iters=0, log_samples=False
            )
        accuracy[kind] = found["results"]["everyday"]["acc,none"]
    assert accuracy["f16"] >= 0.7
    assert accuracy["spk4"] >= accuracy["f16"] - 0.2, accuracy
