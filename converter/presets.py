"""Presets of accuracy, sparseness and time, and salience thresholds for a share of salient values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.format import DEFAULT_SILENCE, SALIENT_SLOTS
from spikequant_gguf.native import NativeLibrary

from .inputs import SiteSurvey
from .sensitivity import Sensitivity
from .structure import Site

__all__ = ["PRESETS", "Preset", "SiteEncoder", "average_share", "choose_salience", "fixed_salience"]


@dataclass(frozen=True)
class Preset:
    """A point between sparse and accurate.

    Attributes:
        salient_share: of activations, on average over all inputs of linear layers.
        salient_weights: per block of 64, 0 to 4; the first block of a row takes 2 at most.
        silence: silence threshold in steps.
        chunks: of text to calibrate a small model on.
    """

    salient_share: float
    salient_weights: int = SALIENT_SLOTS
    silence: float = DEFAULT_SILENCE
    chunks: int = 128


PRESETS = {
    "fast": Preset(salient_share=0.08, salient_weights=1, silence=0.6, chunks=64),
    "balanced": Preset(salient_share=0.12),
    "accurate": Preset(salient_share=0.30, chunks=256),
}


@dataclass(frozen=True)
class SiteEncoder:
    """Encoder of a site.

    Attributes:
        salience: threshold.
        inputs, salient_inputs: values of a sample of the calibration text, and salient ones among them.
    """

    salience: float
    inputs: int
    salient_inputs: int


# Where there are no gradients: how much the divergence of SmolLM2-135M falls for the same fall of the
# encoder's relative error, by what it falls where the inputs of one kind of site alone stay in float, over
# the sum of their errors. Measured on 6 chunks of a part of the calibration text (C4) that was not
# calibrated on; each is good to a third.
_SENSITIVITY = {
    "attention input": 1.0,
    "attention output": 0.6,
    "MLP input": 3.3,
    "down projection": 1.6,
}
_GRID = [round(0.1 * k, 1) for k in range(10, 41)]
_BISECTIONS = 60


def choose_salience(
    surveys: Mapping[Site, SiteSurvey],
    factors: Mapping[Site, NDArray[np.float32]],
    share: float,
    library: NativeLibrary,
    sensitivity: Sensitivity | None = None,
) -> dict[Site, SiteEncoder]:
    """The thresholds of least expected divergence with at most this share of salient values on average.

    The divergence is taken as the sum of the encoder's relative errors, each weighted by what the gradients
    at the site say, or without them by what its kind was found to matter. The average counts every input of
    every site.
    """
    sites = list(surveys)
    weights = _weights(surveys, factors, sensitivity)
    curves = {site: _curve(surveys[site], factors.get(site), library) for site in sites}
    sizes = np.array([surveys[site].sample.shape[1] for site in sites], np.float64)

    def choose(price: float) -> list[int]:
        return [
            int(np.argmin(weights[site] * curves[site][1] + price * size * curves[site][0]))
            for site, size in zip(sites, sizes / sizes.sum(), strict=True)
        ]

    def average(chosen: list[int]) -> float:
        shares = [curves[site][0][k] for site, k in zip(sites, chosen, strict=True)]
        return float(np.dot(shares, sizes) / sizes.sum())

    low, high = 0.0, 1e6  # prices of a share: too many salient values, and few enough
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if average(choose(middle)) <= share else (middle, high)
    return {
        site: _encoder(_GRID[k], surveys[site], curves[site][0][k])
        for site, k in zip(sites, choose(high), strict=True)
    }


def _weights(
    surveys: Mapping[Site, SiteSurvey],
    factors: Mapping[Site, NDArray[np.float32]],
    sensitivity: Sensitivity | None,
) -> dict[Site, float]:
    """Divergence for a relative squared error of one at each site; of all sites in the same unit."""
    measured = {}
    for site, found in surveys.items():
        gradients = None if sensitivity is None else sensitivity.inputs(site.readers[0])
        if gradients is None:  # units cannot be mixed
            return {each: _SENSITIVITY.get(each.kind, 1.0) for each in surveys}
        scale = factors.get(site, np.ones_like(gradients)).astype(np.float64)
        # the encoder's error is about the same in every channel of the scaled inputs
        per_channel = (found.mean_squares * scale**2).mean()
        measured[site] = float(0.5 * per_channel * (gradients / scale**2).sum())
    return measured


def fixed_salience(
    surveys: Mapping[Site, SiteSurvey],
    factors: Mapping[Site, NDArray[np.float32]],
    salience: float,
    library: NativeLibrary,
) -> dict[Site, SiteEncoder]:
    """The same threshold for all sites."""
    return {
        site: _encoder(salience, found, found.encoded(factors.get(site), salience, library)[0])
        for site, found in surveys.items()
    }


def average_share(encoders: Mapping[Site, SiteEncoder], surveys: Mapping[Site, SiteSurvey]) -> float | None:
    """Share of salient values among all inputs of the sites; None if there are none."""
    sizes = {site: found.sample.shape[1] for site, found in surveys.items()}
    if not sizes:
        return None
    salient = sum(sizes[site] * each.salient_inputs / each.inputs for site, each in encoders.items())
    return salient / sum(sizes.values())


def _encoder(salience: float, found: SiteSurvey, share: float) -> SiteEncoder:
    return SiteEncoder(salience, found.sample.size, round(share * found.sample.size))


def _curve(
    found: SiteSurvey, factors: NDArray[np.float32] | None, library: NativeLibrary
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Salient share and relative error at each threshold of the grid."""
    points = [found.encoded(factors, salience, library) for salience in _GRID]
    return np.array([share for share, _ in points]), np.array([error for _, error in points])
