"""Plots of a sweep, as PNG and SVG, in the style of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import atomic_path
from .run import SweepPoint, SweepResult

__all__ = ["draw"]

_FORMATS = ("png", "svg")


def draw(result: SweepResult, folder: Path) -> tuple[str, ...]:
    """Draws a plot for each study that has points; returns the names of the files in `folder`.

    Raises:
        OutputError: a file cannot be written.
    """
    names: list[str] = []
    for study, plot in _PLOTS.items():
        points = [point for point in result.points if point.study == study]
        if not points:
            continue
        figure = Figure(figsize=(9, 5), layout="constrained")
        plot(figure, points)
        text = f"{result.text.name}, {result.chunks} chunks of {result.ctx} tokens"
        figure.suptitle(f"{result.reference['name']}: {_TITLES[study]}", fontsize=11)
        figure.supxlabel(
            f"{text}; calibrated on {result.calibration.name}; {result.created[:10]}", fontsize=8
        )
        for kind in _FORMATS:
            path = folder / f"sweep-{study}.{kind}"
            # Names of elements drawn by chance would make every file another one.
            with matplotlib.rc_context({"svg.hashsalt": study}), atomic_path(path) as partial:
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(partial, format=kind, dpi=120, metadata=metadata)
            names.append(path.name)
    return tuple(names)


def _bits(figure: Figure, points: Sequence[SweepPoint]) -> None:
    left, right = figure.subplots(1, 2)
    widths = [point.weight_bits for point in points]
    _line(left, widths, points, lambda point: point.kld, "C0", None)
    _line(right, widths, points, lambda point: point.ppl_ratio, "C0", None)
    left.set_ylabel("KL divergence, nats per token")
    right.set_ylabel("perplexity, float32 = 1")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xticks(widths)
        axes.set_xlabel("bits of weights and of activations")
        axes.grid(alpha=0.3, which="both")


def _salience(figure: Figure, points: Sequence[SweepPoint]) -> None:
    axes = figure.subplots()
    labels = {"top share": "largest share of each token", "threshold": "threshold c (MAD rule)"}
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        mine = sorted((point for point in points if point.series == series), key=lambda p: p.salient_share)
        shares = [100 * point.salient_share for point in mine]
        _line(axes, shares, mine, lambda point: point.kld, f"C{number}", labels.get(series, series))
        if series == "threshold":
            for share, point in zip(shares, mine, strict=True):
                axes.annotate(point.name, (share, point.kld), (4, 6), textcoords="offset points", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)  # for the names of the last points
    axes.set_xlabel("salient activations, %")
    axes.set_ylabel("KL divergence, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _ablations(figure: Figure, points: Sequence[SweepPoint]) -> None:
    axes = figure.subplots()
    for place, point in enumerate(reversed(points)):
        first = point is points[0]
        axes.barh(place, point.kld, xerr=point.kld_stderr, color="C0" if first else "C7", capsize=3)
        axes.annotate(f" {point.kld:.3f}", (point.kld + point.kld_stderr, place), va="center", fontsize=8)
    axes.set_yticks(range(len(points)), [point.name for point in reversed(points)])
    smallest, largest = (choose(point.kld for point in points) for choose in (min, max))
    if largest > _WIDE * smallest > 0:  # the small ones could not be told apart
        axes.set_xscale("log")
        axes.set_xlim(smallest / 2, 2 * largest)
    else:
        axes.margins(x=0.12)
    axes.set_xlabel("KL divergence, nats per token")
    axes.grid(alpha=0.3, axis="x")


_PLOTS: dict[str, Callable[[Figure, Sequence[SweepPoint]], None]] = {
    "bits": _bits,
    "salience": _salience,
    "ablations": _ablations,
    "baselines": _ablations,
}
_WIDE = 8
_TITLES = {
    "bits": "widths of weights and activations",
    "salience": "salient activations at W4A4",
    "ablations": "one part left out, W4A4",
    "baselines": "published W4A4 methods, same harness",
}


def _line(
    axes: Axes,
    places: Sequence[float],
    points: Sequence[SweepPoint],
    value: Callable[[SweepPoint], float],
    color: str,
    label: str | None,
) -> None:
    errors = [point.kld_stderr if value(point) == point.kld else point.ppl_ratio_stderr for point in points]
    heights = [value(point) for point in points]
    axes.errorbar(places, heights, yerr=errors, marker="o", color=color, label=label, capsize=3)
