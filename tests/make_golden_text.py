"""Writes tests/golden/text.json, 200 greedy tokens of a small model by NumPy.

    PYTHONPATH=tests python tests/make_golden_text.py

Run this only when the format or the reference quantizer changes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from converter_models import NumpyBackend
from numpy_llama import NumpyLlama, greedy
from tiny_model import write_tiny_model

from spikequant_gguf.converter import ConvertOptions, convert

GOLDEN = Path(__file__).parent / "golden" / "text.json"
PROMPT = [1, 299, 310, 321]
N_TOKENS = 200
SEEDS = range(100)
SHAPE = {"n_layer": 1, "n_embd": 64, "n_ff": 128, "n_head": 2, "n_head_kv": 1}
# What is not a linear layer may differ in its last bits, and a value next to a tie then gets another code. So
# the text must be one that such noise does not change.
NOISE, TRIALS = 1e-6, 4


def write_model(folder: Path, seed: int) -> Path:
    """A model of random weights; all but its linear layers is F32."""
    source = write_tiny_model(folder / f"golden-{seed}.gguf", seed=seed, **SHAPE)
    options = ConvertOptions(tensor_types=("token_embd=f32", "^output=f32"), force=True)
    return convert(source, folder / f"golden-{seed}-SPK4.gguf", options, backend=NumpyBackend()).path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            path = write_model(Path(folder), seed)
            tokens = greedy(NumpyLlama(path), PROMPT, N_TOKENS)
            print(f"seed {seed}: {len(set(tokens))} different tokens", flush=True)
            trials = (NumpyLlama(path, NOISE, trial) for trial in range(TRIALS))
            if len(set(tokens)) >= 30 and all(greedy(each, PROMPT, N_TOKENS) == tokens for each in trials):
                break
        else:
            raise SystemExit("no seed gives a text that noise does not change")
    document = {
        "about": "greedy tokens of tests/make_golden_text.py",
        "seed": seed,
        "prompt": PROMPT,
        "tokens": tokens,
    }
    GOLDEN.write_text(json.dumps(document) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
