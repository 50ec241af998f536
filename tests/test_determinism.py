"""The same text from NumPy, C and every kernel; the same logits from any number of threads, each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from graph_spy import SpyModel
from make_golden_text import GOLDEN, N_TOKENS, write_model
from native_build import KERNELS, cpu_runs, host_architecture
from numpy_llama import NumpyLlama, greedy

from spikequant_gguf.runtime import RuntimeInfo

THREADS = (1, 2, 3, 4, 5, 7, 8, 12, 16)
REPEATS = 100


@pytest.fixture(scope="module")
def golden() -> dict:
    document = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(document["tokens"]) == N_TOKENS
    return document


@pytest.fixture(scope="module")
def model(golden: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("golden"), golden["seed"])


_GREEDY = """
import json, sys
import llama_cpp, numpy as np
path, kernel, prompt, n_tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
from spikequant_gguf.native import load
assert load().kernel == kernel, load().kernel
threads = {"n_threads": 2, "n_threads_batch": 2}
model = llama_cpp.Llama(path, n_ctx=256, type_k=0, type_v=0, logits_all=True, verbose=False, **threads)
tokens = []
model.eval(prompt)
for _ in range(n_tokens):
    tokens.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    model.eval(tokens[-1:])
print(json.dumps(tokens))
"""


def test_numpy_writes_the_golden_text(golden: dict, model: Path) -> None:
    assert greedy(NumpyLlama(model), golden["prompt"], N_TOKENS) == golden["tokens"]


@pytest.mark.parametrize("kernel", KERNELS[host_architecture()])
def test_every_kernel_writes_the_golden_text(
    runtime: RuntimeInfo, golden: dict, model: Path, kernel: str
) -> None:
    if not cpu_runs(kernel):
        pytest.skip(f"NOT RUN: this CPU has no {kernel}")
    done = subprocess.run(
        [sys.executable, "-c", _GREEDY, model, kernel, json.dumps(golden["prompt"]), str(N_TOKENS)],
        env=os.environ | {"SPIKEQUANT_FORCE_ISA": kernel},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == golden["tokens"]


_LOGITS = """
import hashlib, json, sys
import llama_cpp, numpy as np
path, repeats = sys.argv[1], int(sys.argv[2])
prompt = [1 + i * 7 % 300 for i in range(33)]
found = {}
for threads in map(int, sys.argv[3:]):
    each = {"n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(path, n_ctx=64, logits_all=True, verbose=False, **each)
    digests = set()
    for _ in range(repeats):
        model.reset()
        model.eval(prompt)           # many tokens at once
        for token in (5, 300, 17):   # and one by one
            model.eval([token])
        digests.add(hashlib.sha256(np.asarray(model.scores[: model.n_tokens]).tobytes()).hexdigest())
    found[threads] = sorted(digests)
print(json.dumps(found))
"""


def test_threads_and_repetition_change_no_bit_of_the_logits(
    runtime: RuntimeInfo, tiny_models: dict[str, Path]
) -> None:
    repeats = -(-REPEATS // len(THREADS))
    command = [sys.executable, "-c", _LOGITS, tiny_models["spk4"], str(repeats), *map(str, THREADS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(THREADS)
    assert len({digest for digests in found.values() for digest in digests}) == 1


# ---- a prompt in one piece or in two, as when a server finds its beginning in the cache

PROMPT = [1 + i * 7 % 300 for i in range(70)]  # enough for the tiles of llama.cpp's attention
PARTS = [[70], [69, 1], [33, 37], [1] * 70]


def test_spike_products_are_those_of_any_division(runtime: RuntimeInfo, tiny_models: dict[str, Path]) -> None:
    """A product whose inputs are the same has the same outputs, however many tokens are computed with it.

    Attention, which is llama.cpp's own, sums in another order for many queries; so later layers see others.
    """
    last: list[dict[str, tuple[bytes, bytes]]] = []
    with SpyModel(tiny_models["spk4"], ctx_size=128, threads=1) as model:
        for parts in PARTS:
            model.clear()
            position = 0
            for size in parts:
                model.products.clear()
                model.decode(PROMPT[position : position + size], position, outputs=1)
                position += size
            last.append(
                {each.weights: (each.x[-1].tobytes(), each.y[-1].tobytes()) for each in model.products}
            )
    whole, *others = last
    for divided in others:
        assert divided.keys() == whole.keys() and len(whole) > 10
        same = [name for name in whole if whole[name][0] == divided[name][0]]
        assert {"blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"} <= set(same)
        assert all(whole[name][1] == divided[name][1] for name in same)


def test_one_token_at_a_time_makes_the_cache_invisible(
    runtime: RuntimeInfo, tiny_models: dict[str, Path]
) -> None:
    """What docs/serving.md advises: with n_batch=1 a cached beginning changes no bit of the answer."""
    model = llama_cpp.Llama(
        str(tiny_models["spk4"]), n_ctx=128, n_batch=1, n_threads=2, logits_all=True, verbose=False
    )
    answers = []
    for _ in range(2):  # the second time all but the last token of the prompt are in the cache
        drawn = model.generate(PROMPT, temp=0.0)
        tokens = [next(drawn) for _ in range(8)]
        answers.append((tokens, np.array(model.scores[: model.n_tokens]).tobytes()))
    assert answers[0] == answers[1]
