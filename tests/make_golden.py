"""Writes tests/golden/*.json from the NumPy reference: python tests/make_golden.py

The files fix the arithmetic for every other implementation. Inputs are stored as bytes, so that no random
generator is needed to use them. Run this only when the format itself changes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from spikequant_gguf.codec import (
    activation_values,
    encode_activations,
    encode_weights,
    matmul,
    pack_weights,
    potentials,
    rotate,
    threshold_on_grid,
)
from spikequant_gguf.format import BLOCK_SPK4, FORMAT_VERSION

GOLDEN = Path(__file__).parent / "golden"


def _hex(array: np.ndarray) -> str:
    return np.ascontiguousarray(array).tobytes().hex()


def _write(name: str, about: str, cases: list[dict]) -> None:
    head = json.dumps({"about": about, "format_version": FORMAT_VERSION})[:-1]
    body = ",\n".join(json.dumps(case) for case in cases)
    (GOLDEN / name).write_text(f'{head}, "cases": [\n{body}\n]}}\n', encoding="utf-8", newline="\n")


def _weight_inputs(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    def normal(rows: int, n_in: int) -> np.ndarray:
        return (rng.standard_normal((rows, n_in)) * 0.02).astype(np.float32)

    outliers = normal(2, 128)
    outliers[0, [3, 5, 70]] = [1.5, -0.9, 0.8]
    crowded = np.zeros((2, 192), np.float32)  # equal outliers, more than any block has slots
    crowded[0, ::9], crowded[0, 4::9] = 3, -3
    crowded[1, [2, 3, 5, 64, 70, 71, 127, 191]] = 1, -2, 4, 1, 2, -4, 8, 16
    ties = np.round(normal(1, 64) * 100).astype(np.float32) / 4
    # integers times a threshold, but for three ties, which the product with the inverse just misses
    threshold = np.float32(82 / 8192)
    near_ties = (np.arange(64) % 16 - 8).astype(np.float32) * threshold
    near_ties[[5, 20, 50]] = np.float32([-7.5, -3.5, 3.5]) * threshold
    # the square of the first one's error is infinite, so that its gain is NaN; those of the others are not
    nan_gain = np.zeros((1, 64), np.float32)
    nan_gain[0, :4] = 2.0**65, 2.0**43, 2.0**43, -(2.0**43)
    tiny = normal(1, 64) * np.float32(1e-38)
    huge = normal(2, 64)
    huge[0] *= np.float32(1e30)
    huge[1, 0] = 1e22
    cases: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
        "normal": (normal(3, 128), None),
        "importance": (normal(2, 128), (rng.random(128) ** 3).astype(np.float32)),
        "importance zero in half": (normal(1, 128), np.repeat(np.float32([0, 1]), 64)),
        "outliers": (outliers, None),
        "more outliers than slots": (crowded, None),
        "positive": (np.abs(normal(1, 64)) + np.float32(0.1), None),
        "negative": (-np.abs(normal(1, 64)), None),
        "zero": (np.zeros((1, 64), np.float32), None),
        "one weight": (np.eye(1, 64, 17, dtype=np.float32), None),
        "ties": (ties, None),
        "near ties": (near_ties[None], None),
        "gain that is not a number": (rotate(nan_gain), None),
        "subnormal": (tiny.astype(np.float32), None),
        "huge": (huge.astype(np.float32), None),
    }
    return cases


def weight_cases(rng: np.random.Generator) -> list[dict]:
    cases = []
    for name, (weights, importance) in _weight_inputs(rng).items():
        for rotated in (True, False):
            blocks = encode_weights(weights, importance, rotated)
            cases.append(
                {
                    "name": f"{name}, {'rotated' if rotated else 'not rotated'}",
                    "rows": weights.shape[0],
                    "n_in": weights.shape[1],
                    "rotated": rotated,
                    "weights": _hex(weights),
                    "importance": None if importance is None else _hex(importance),
                    "blocks": _hex(blocks),
                }
            )
    return cases


def _activation_inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    def normal(tokens: int, n_in: int) -> np.ndarray:
        return rng.standard_normal((tokens, n_in)).astype(np.float32)

    heavy = rng.standard_t(2, (2, 192)).astype(np.float32)
    outlier = normal(1, 128)
    outlier[0, 77] = 3000
    cap = np.zeros((1, 128), np.float32)  # the median is 0: the largest value sets the step
    cap[0, 9] = -12345.678
    extreme = normal(5, 64)
    extreme[0, 1] = np.nan
    extreme[1, 2] = np.inf
    extreme[2, 3] = -np.inf
    extreme[3] = np.finfo(np.float32).max
    # the median is 2, so c = 3.75 makes the step 1, and every kind of tie occurs
    halves = np.concatenate([np.arange(-20, 20.5, 0.5), np.zeros(60), np.full(51, 2)])[None].astype("f4")
    return {
        "normal": normal(2, 128),
        "heavy tails": heavy,
        "outlier": outlier,
        "cap of the shift": cap,
        "not finite, and an overflow": extreme,
        "largest float": np.full((1, 64), np.finfo(np.float32).max, np.float32),
        "zero": np.zeros((1, 64), np.float32),
        "subnormal": (normal(1, 64) * np.float32(1e-38)).astype(np.float32),
        "below the smallest step": (normal(1, 64) * np.float32(2.0**-103)).astype(np.float32),
        "halves": halves,
    }


def activation_cases(rng: np.random.Generator) -> list[dict]:
    settings = [
        (2.3, 0.5, 8, True),
        (2.3, 0.5, 8, False),
        (2.8, 0.0, 0, True),
        (0.7, 1.5, 15, False),
        (3.75, 1.5, 6, False),
    ]
    cases = []
    for name, x in _activation_inputs(rng).items():
        for salience, silence, zero_point, rotated in settings:
            cases.append(
                {
                    "name": f"{name}, c {salience}, delta {silence}, zero-point {zero_point}, "
                    f"{'rotated' if rotated else 'not rotated'}",
                    "tokens": x.shape[0],
                    "n_in": x.shape[1],
                    "salience": salience,
                    "silence": silence,
                    "zero_point": zero_point,
                    "rotated": rotated,
                    "x": _hex(x),
                    "blocks": _hex(encode_activations(x, salience, silence, zero_point, rotated)),
                }
            )
    return cases


def _extreme_weights(n_blocks: int, rotated: bool) -> np.ndarray:
    """Rows of the largest potentials: zero-points 0 and 15, salient weights in all slots of every block."""
    values = np.zeros((2, n_blocks, 64), np.int32)
    values[0], values[1] = 15, -15
    values[0][:, [0, 63]], values[1][:, [0, 63]] = 31, -31
    values[0][1:, [1, 62]], values[1][1:, [1, 62]] = 31, -31
    return pack_weights(values.reshape(2, -1), threshold_on_grid([0.01, 700.0]), [0, 15], rotated)


def product_cases(rng: np.random.Generator) -> list[dict]:
    cases = []
    for name, n_in, rotated, zero_point in (
        ("rotated", 192, True, 8),
        ("not rotated", 64, False, 3),
        ("all excitatory", 128, False, 0),
    ):
        weights = encode_weights((rng.standard_t(4, (4, n_in)) * 0.05).astype(np.float32), None, rotated)
        weights = np.concatenate([weights, _extreme_weights(n_in // 64, rotated)], dtype=BLOCK_SPK4)
        x = rng.standard_t(3, (4, n_in)).astype(np.float32)
        x[1, 5] = 400
        x[3, 0] = np.nan
        activations = encode_activations(x, zero_point=zero_point, rotated=rotated)
        cases.append(_product(name, n_in, weights, activations))
    cases.append(_product("one rotated, the other not", 64, _extreme_weights(1, True), activations[:, :1]))
    return cases


def _product(name: str, n_in: int, weights: np.ndarray, activations: np.ndarray) -> dict:
    fine, coarse = potentials(weights, activations)
    return {
        "name": name,
        "rows": len(weights),
        "tokens": len(activations),
        "n_in": n_in,
        "weights": _hex(weights),
        "activations": _hex(activations),
        "shift": activation_values(activations)[3].tolist(),
        "fine": fine.tolist(),
        "coarse": coarse.tolist(),
        "y": _hex(matmul(weights, activations)),
    }


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    rng = np.random.default_rng(64)
    _write(
        "weights.json",
        "encode_weights: float32 rows (hex, little-endian) and the SPK4 blocks they become",
        weight_cases(rng),
    )
    _write(
        "activations.json",
        "encode_activations: float32 tokens (hex, little-endian), parameters (taken as float32), SPKA blocks",
        activation_cases(rng),
    )
    _write(
        "products.json",
        "matmul: SPK4 and SPKA blocks, potentials [tokens][rows] and outputs float32 [tokens][rows]; "
        "any NaN equals any NaN",
        product_cases(rng),
    )


if __name__ == "__main__":
    main()
