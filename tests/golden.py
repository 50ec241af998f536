"""Reads the golden vectors in tests/golden: inputs and what every implementation must make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from spikequant_gguf.format import BLOCK_SPK4, BLOCK_SPKA

GOLDEN = Path(__file__).parent / "golden"


def _load(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))["cases"]


def _array(digits: str, dtype: Any, *shape: int) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(digits), dtype).reshape(shape).copy()


def weight_cases() -> list[dict[str, Any]]:
    """name, rotated; weights float32[rows, n_in]; importance float32[n_in] or None; blocks SPK4[rows, n]."""
    cases = _load("weights.json")
    for case in cases:
        rows, n_in = case["rows"], case["n_in"]
        case["weights"] = _array(case["weights"], "<f4", rows, n_in)
        if case["importance"] is not None:
            case["importance"] = _array(case["importance"], "<f4", n_in)
        case["blocks"] = _array(case["blocks"], BLOCK_SPK4, rows, n_in // 64)
    return cases


def activation_cases() -> list[dict[str, Any]]:
    """name, salience, silence, zero_point, rotated; x float32[tokens, n_in]; blocks SPKA[tokens, n]."""
    cases = _load("activations.json")
    for case in cases:
        tokens, n_in = case["tokens"], case["n_in"]
        case["x"] = _array(case["x"], "<f4", tokens, n_in)
        case["blocks"] = _array(case["blocks"], BLOCK_SPKA, tokens, n_in // 64)
    return cases


def product_cases() -> list[dict[str, Any]]:
    """name; weights, activations (blocks); fine, coarse int32[tokens, rows]; shift int[tokens]; y float32."""
    cases = _load("products.json")
    for case in cases:
        rows, tokens, n_blocks = case["rows"], case["tokens"], case["n_in"] // 64
        case["weights"] = _array(case["weights"], BLOCK_SPK4, rows, n_blocks)
        case["activations"] = _array(case["activations"], BLOCK_SPKA, tokens, n_blocks)
        case["fine"], case["coarse"] = (np.array(case[key], np.int32) for key in ("fine", "coarse"))
        case["y"] = _array(case["y"], "<f4", tokens, rows)
    return cases
