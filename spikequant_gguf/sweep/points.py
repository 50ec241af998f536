"""Which points a sweep measures. The first of every study but the curves is the full recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import InputError
from ..simulate.settings import SpikeSettings

__all__ = ["STUDIES", "Method", "Point", "plan_points"]

STUDIES = ("bits", "salience", "ablations", "baselines")
_WIDTHS, _QUICK_WIDTHS = (1, 2, 3, 4, 5, 6), (2, 3, 4, 5)
_SHARES, _QUICK_SHARES = (0.0, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2), (0.0, 0.025, 0.1)
_THRESHOLDS, _QUICK_THRESHOLDS = (4.5, 3.5, 2.8, 2.3, 1.9, 1.6), (2.3,)
_QUICK_ABLATIONS = ("all parts", "no salience", "no rotation", "no GPTQ", "no salient weights")
_QUICK_BASELINES = ("SpikeQuant", "round to nearest", "Atom, 128 channels")


@dataclass(frozen=True)
class Method:
    """How the linear layers compute, and how their codes are found.

    Attributes:
        settings: of the spiking arithmetic; of a baseline only the bit widths are used.
        gptq: calibrated codes; else each weight is rounded to the nearest.
        smoothing: channels are scaled first (converter/smoothing.py).
        baseline: a name of simulate.baselines.BASELINES instead of spiking layers.
        channels: share of a baseline's channels that have more bits; above 1 their number.
    """

    settings: SpikeSettings = field(default_factory=SpikeSettings)
    gptq: bool = True
    smoothing: bool = True
    baseline: str | None = None
    channels: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All choices, flat."""
        return {
            **asdict(self.settings),
            **{key: value for key, value in vars(self).items() if key != "settings"},
        }

    def weights_key(self) -> tuple:
        """Methods with the same key have the same weights."""
        settings = self.settings
        of_weights = (
            settings.weight_bits,
            settings.rotated,
            settings.weight_zero_point,
            settings.salient_weights,
            settings.weight_group,
        )
        return (self.baseline, self.channels, self.smoothing, self.gptq, *of_weights)


@dataclass(frozen=True)
class Point:
    """One method to measure.

    Attributes:
        study: one of STUDIES.
        name: unique in its study.
        series: points of one series are a line of the study's plot.
        method: to measure.
    """

    study: str
    name: str
    series: str
    method: Method


def plan_points(what: Sequence[str] | str = "all", quick: bool = False, coding: str = "ttfs") -> list[Point]:
    """The points of some studies, in the order in which they are shown.

    Args:
        what: names of STUDIES, or "all".
        quick: fewer points.
        coding: of the spikes that are counted.

    Raises:
        InputError: there is no such study.
    """
    wanted = list(STUDIES) if what == "all" else [what] if isinstance(what, str) else list(what)
    unknown = [name for name in wanted if name not in STUDIES]
    if unknown or not wanted:
        raise InputError(
            f"there is no study '{', '.join(unknown)}'", f"choose from all, {', '.join(STUDIES)}"
        )
    full = Method(SpikeSettings(coding=coding))
    studies = {
        "bits": _bits(full, _QUICK_WIDTHS if quick else _WIDTHS),
        "salience": _salience(
            full, _QUICK_SHARES if quick else _SHARES, _QUICK_THRESHOLDS if quick else _THRESHOLDS
        ),
        "ablations": _ablations(full, _QUICK_ABLATIONS if quick else None),
        "baselines": _baselines(full, _QUICK_BASELINES if quick else None),
    }
    return [point for name in STUDIES if name in wanted for point in studies[name]]


def _bits(full: Method, widths: Sequence[int]) -> list[Point]:
    return [
        Point("bits", f"W{width}A{width}", "W = A", _with(full, weight_bits=width, activation_bits=width))
        for width in widths
    ]


def _salience(full: Method, shares: Sequence[float], thresholds: Sequence[float]) -> list[Point]:
    points = [
        Point("salience", f"top {100 * share:g} %", "top share", _with(full, salience=None, top_share=share))
        for share in shares
    ]
    return points + [
        Point("salience", f"c = {threshold:g}", "threshold", _with(full, salience=threshold))
        for threshold in thresholds
    ]


def _ablations(full: Method, names: Sequence[str] | None) -> list[Point]:
    methods = {
        "all parts": full,
        "no salience": _with(full, salience=None),
        "no coarse step": _with(full, coarse_step=False),
        "no salient weights": _with(full, salient_weights=0),
        "no rotation": _with(full, rotated=False),
        "no GPTQ": replace(full, gptq=False),
        "no smoothing": replace(full, smoothing=False),
        "symmetric": _with(full, weight_zero_point=False),
        "group scales": _with(full, weight_group=64),
        "group steps": _with(full, activation_group=64),
    }
    return [
        Point("ablations", name, name, method)
        for name, method in methods.items()
        if names is None or name in names
    ]


def _baselines(full: Method, names: Sequence[str] | None) -> list[Point]:
    plain = replace(full, settings=SpikeSettings(salience=None, salient_weights=0, rotated=False))
    methods = {
        "SpikeQuant": full,
        "round to nearest": replace(plain, baseline="round to nearest", gptq=False, smoothing=False),
        "SpikeLLM, 10 % of channels": replace(plain, baseline="SpikeLLM", channels=0.1),
        "Atom, 3 % of channels": replace(plain, baseline="Atom", channels=1 / 32, smoothing=False),
        "Atom, 128 channels": replace(plain, baseline="Atom", channels=128, smoothing=False),
        # QuaRot (Ashkboos et al., arXiv:2404.00456) without its KV cache, in rotations of 64.
        "rotation and GPTQ, as in QuaRot": replace(
            full, settings=SpikeSettings(salience=None, salient_weights=0, silence=0.0), smoothing=False
        ),
    }
    return [
        Point("baselines", name, name, method)
        for name, method in methods.items()
        if names is None or name in names
    ]


def _with(method: Method, **settings: Any) -> Method:
    return replace(method, settings=replace(method.settings, **settings))
