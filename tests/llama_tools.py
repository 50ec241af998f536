"""Runs programs of llama.cpp from the runtime's tree; compares logits."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np

from spikequant_gguf.runtime import tool

_ATTEMPTS = 10


def run_llama_perplexity(pattern: str, model: Path, text: Path | None, *options: str) -> re.Match[str]:
    """Match of the pattern in what llama-perplexity prints on 2 threads.

    It may end before its log thread has written the last lines; so it is run again if they are missing.
    """
    command = [tool("llama-perplexity"), "-m", model, "-t", "2", *options]
    command += [] if text is None else ["-f", text]
    for _ in range(_ATTEMPTS):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        found = re.search(pattern, result.stdout + result.stderr)
        if found:
            return found
    raise AssertionError(f"llama-perplexity did not print {pattern}: {result.stdout}{result.stderr}")


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference of two sets of logits over the norm of the expected ones."""
    found = found - found.mean(axis=1, keepdims=True)
    expected = expected - expected.mean(axis=1, keepdims=True)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
