"""Inputs of linear layers: sums of their products, and what the encoder makes of them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.format import DEFAULT_ZERO_POINT
from spikequant_gguf.native import NativeLibrary, bind

from .lockstep import BatchModel
from .progress import CALIBRATE, Progress
from .structure import Site

__all__ = ["SiteSurvey", "moments", "survey", "token_weights"]

_SURVEY_STRETCHES = 8
_SAMPLE = 64  # tokens of the survey that are kept
_SLICE = 512  # tokens whose inputs are rounded alike: SPIKE_SLICE of spike-quantizer.h
_SLAB = 2 * _SLICE  # tokens treated at once
_ROWS = 256  # of a square matrix treated at once
_PARTS = 16  # of the tokens of a survey
# Squared norm of a token that counts in full, in medians. The activations of a text's first token can be 500
# times as large as the others': a layer would be quantized for that token alone.
_LARGEST = 10.0

_FUNCTIONS = {
    "spike_prepare_inputs": (
        None,
        (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        + (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    ),
    "spike_round_inputs": (
        None,
        (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    ),
    "spike_add_products": (
        None,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        + (ctypes.c_int64, ctypes.c_int64, ctypes.c_bool, ctypes.c_void_p, ctypes.c_int),
    ),
}


class SiteSurvey:
    """What a first pass over a little text says about the inputs of a site.

    Attributes:
        mean_squares: of each channel over tokens weighted as by token_weights, float32[n_in].
        sample: inputs of some tokens, float32[n, n_in].
    """

    def __init__(self, x: NDArray[np.float32]) -> None:
        weights = token_weights(x)
        squares = sum(
            np.square(part * weight[:, None], dtype=np.float64).sum(axis=0)
            for part, weight in zip(np.array_split(x, _PARTS), np.array_split(weights, _PARTS), strict=True)
        )
        self.mean_squares = (np.asarray(squares) / len(x)).astype(np.float32)
        self.sample = x[:: max(1, len(x) // _SAMPLE)][:_SAMPLE].copy()

    def encoded(
        self, factors: NDArray[np.float32] | None, salience: float, library: NativeLibrary
    ) -> tuple[float, float]:
        """Salient share of the values and mean relative squared error of the encoder at a threshold."""
        x = self.sample if factors is None else self.sample * factors
        blocks = library.encode_activations(x, salience, zero_point=DEFAULT_ZERO_POINT)
        error = np.square(library.decode_activations(blocks) - x, dtype=np.float64).sum(axis=1)
        size = np.square(x, dtype=np.float64).sum(axis=1)
        bits = np.unpackbits(np.ascontiguousarray(blocks["salient_mask"]).view(np.uint8))
        return float(bits.sum() / x.size), float((error / np.maximum(size, 1e-30)).mean())


def survey(
    path: Path, tokens: NDArray[np.int32], sites: Mapping[str, Site], threads: int, progress: Progress
) -> dict[Site, SiteSurvey]:
    """Reads some of int32[stretches, ctx] with the model. Sites that it never uses are not in the result."""
    chosen = tokens[:: max(1, len(tokens) // _SURVEY_STRETCHES)][:_SURVEY_STRETCHES]
    found: dict[Site, SiteSurvey] = {}
    n_sites = len(set(sites.values()))

    def on_input(name: str, x: NDArray[np.float32], _: NDArray[np.float32]) -> None:
        if sites[name] not in found:
            found[sites[name]] = SiteSurvey(x)
            progress(CALIBRATE, "first look", len(found), 2 * n_sites)
            if len(found) == n_sites:
                model.stop()

    model = BatchModel(
        path,
        stretches=len(chosen),
        ctx=chosen.shape[1],
        threads=threads,
        names=sites,
        on_input=on_input,
    )
    with model:
        model.run(chosen)
    return found


def token_weights(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Factors of float32[n_tokens, n_in] that bound the norms of massive activations: float32[n_tokens]."""
    squares = np.concatenate([np.einsum("ti,ti->t", part, part) for part in np.array_split(x, _PARTS)])
    limit = _LARGEST * np.median(squares)
    return np.sqrt(limit / np.maximum(squares, max(limit, 1e-30))).astype(np.float32)


def moments(
    x: NDArray[np.float32],
    seen: NDArray[np.float32],
    factors: NDArray[np.float32] | None,
    library: NativeLibrary,
    threads: int,
    *,
    deviations: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Second moments of a layer's inputs, scaled and rotated as the layer will see them.

    Args:
        x, seen: inputs in the source model and in the one that is being quantized, float32[n_tokens, n_in].
        factors: of the channels, float32[n_in], or None.
        deviations: whether the second result is wanted; it takes two thirds of the time.

    Returns:
        Weighted mean of seen seenᵀ, and of seen (x - seen)ᵀ, both float32[n_in, n_in]; see token_weights.
    """
    bind(library.cpu, _FUNCTIONS)
    n_tokens, n_in = seen.shape
    weights = token_weights(x)
    slab = max(1, min(_SLAB, n_tokens))
    slices = -(-slab // _SLICE)
    own_rows, other_rows = np.empty((2, slab, n_in), np.float32)
    own_codes, other_codes = np.empty((2, slices, _SLICE * n_in), np.int16)
    own_steps, other_steps = np.empty((2, slices, n_in), np.float32)

    def prepare(values: NDArray[np.float32], start: int, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        part = values[start : start + slab]
        scaled = None if factors is None else factors.ctypes.data
        library.cpu.spike_prepare_inputs(
            part.ctypes.data, *part.shape, scaled, weights[start:].ctypes.data, rows.ctypes.data, threads
        )
        return rows[: len(part)]

    def in_integers(
        rows: NDArray[np.float32], codes: NDArray[np.int16], steps: NDArray[np.float32]
    ) -> tuple[int, int]:
        library.cpu.spike_round_inputs(
            rows.ctypes.data, *rows.shape, codes.ctypes.data, steps.ctypes.data, threads
        )
        return codes.ctypes.data, steps.ctypes.data

    def mean(symmetric: bool) -> NDArray[np.float32]:
        sums = np.zeros((n_in, n_in))
        for start in range(0, n_tokens, slab):
            rows = prepare(seen, start, own_rows)
            left = right = in_integers(rows, own_codes, own_steps)
            if not symmetric:
                others = prepare(x, start, other_rows)
                others -= rows
                right = in_integers(others, other_codes, other_steps)
            library.cpu.spike_add_products(*left, *right, *rows.shape, symmetric, sums.ctypes.data, threads)
        return _mean(sums, n_tokens, symmetric)

    # one after the other: sums in double precision are the largest arrays of all
    own = mean(True)
    return own, mean(False) if deviations else None


def _mean(sums: NDArray[np.float64], count: int, symmetric: bool) -> NDArray[np.float32]:
    """sums / count, float32[n, n]. symmetric: what is above the diagonal of `sums` does not count."""
    result = np.empty(sums.shape, np.float32)
    for first in range(0, len(sums), _ROWS):
        end = first + _ROWS
        result[first:end] = np.divide(sums[first:end], count)
        if symmetric:
            result[:first, first:end] = result[first:end, :first].T
            corner = np.tril(result[first:end, first:end])
            result[first:end, first:end] = corner + np.tril(corner, -1).T
    return result
