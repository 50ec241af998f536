"""Figures of real spikes: of a layer, of a neuron, and of all layers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..activations import SPIKE_STEPS, spike_train
from ..energy.counts import Counts
from ..energy.model import layer_kind
from ..neuron import KINDS, LayerSpikes, NeuronTrace
from .documents import Origin, describe_host
from .drawing import MINUS, PLUS, Axes, Canvas, Picture, colour, render

__all__ = ["layer_raster", "layer_times", "neuron_picture", "salience_by_layer"]

_MARKS = {"standard": ("o", 5), "fine": ("^", 16), "coarse": ("s", 18)}
_SHOWN_TOKENS = 1
_TICKS = (1, 4, 8, 12, 16)


def neuron_picture(trace: NeuronTrace, width: float | None = None) -> Picture:
    """Raster of the inputs above, currents and membrane potential below, on one axis of time."""

    def draw(canvas: Canvas) -> None:
        raster, membrane = canvas.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _raster(raster, trace.time, trace.polarity, trace.kind)
        _legend(raster)
        times = np.arange(SPIKE_STEPS + 1)
        parts = (
            ("fine", np.concatenate([[0], trace.potential_fine]), colour("w4a4"), 1.2),
            ("coarse · 2^k", np.concatenate([[0], trace.potential_coarse << trace.shift]), "#9c6ade", 1.2),
            ("V, all", np.concatenate([[0], trace.potential]), "#1f2933", 2.0),
        )
        for name, values, shade, width in parts:
            if name == "V, all" or values.any():
                membrane.step(times, values, where="post", color=shade, linewidth=width, label=name)
        low, high = membrane.get_ylim()
        for sign in (1, -1):
            if low < sign * trace.firing_threshold < high:
                membrane.axhline(sign * trace.firing_threshold, color=PLUS, linewidth=0.9, linestyle="--")
        membrane.plot(SPIKE_STEPS, trace.potential[-1], "o", color=PLUS, markersize=5, zorder=5)
        up = trace.potential[-1] > 0
        membrane.annotate(
            f"y = {trace.output:.4g}", (0.985, 0.06 if up else 0.94), xycoords="axes fraction", ha="right",
            va="bottom" if up else "top", color=PLUS, fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
        )  # fmt: skip
        membrane.axhline(0, color="#6b7785", linewidth=0.7)
        membrane.set_xlabel("time (1 is the largest value)")
        membrane.set_ylabel("membrane potential V")
        membrane.set_xlim(0.4, SPIKE_STEPS + 0.6)
        membrane.set_xticks(_TICKS)
        membrane.margins(y=0.15)
        output = membrane.secondary_yaxis("right", (lambda v: v * trace.unit, lambda y: y / trace.unit))
        output.set_ylabel("output θ·s·V")
        membrane.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3, fontsize=7.5)

    title = f"Neuron {trace.row} of {trace.tensor}"
    method = (
        f"inputs of the layer taken from the runtime at token {trace.position} ({trace.piece!r}) and encoded "
        f"again; V at the end, read out with θ = {trace.threshold:.4g} and s = {trace.step:.4g}, gives "
        f"{trace.output_bits}, the runtime's own output to the bit; firing threshold (an output of 1, "
        f"dashed) at V = {trace.firing_threshold:.4g}"
    )
    alt = (
        f"Spikes of {len(trace.time)} inputs over 16 time steps, and the membrane potential, which ends at "
        f"{trace.potential[-1]}, read out as {trace.output:.4g}"
    )
    host = trace.host.to_json() | {"threads": trace.threads}
    command = f"spikequant inspect {_file(trace.model)} --neuron {trace.tensor}:{trace.row}"
    origin = Origin(method, repr(trace.text), command, describe_host(host))
    options = {} if width is None else {"width": width}
    return render("neuron", title, alt, origin, draw, 4.8, **options)


def layer_raster(layer: LayerSpikes, origin: Origin) -> Picture:
    """Every input of a layer and the time of its spike, for the last token."""
    train = spike_train(layer.blocks[-_SHOWN_TOKENS:])
    kind = _kinds(layer.blocks[-_SHOWN_TOKENS:], train.coarse)
    time, polarity = train.time[0] + 1, train.polarity[0]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        _raster(axes, time, polarity, kind[0])
        _legend(axes)
        axes.set_xlabel("time (1 is the largest value)")
        axes.set_xlim(0.4, SPIKE_STEPS + 0.6)
        axes.set_xticks(_TICKS)

    alt = f"Spike raster of {layer.tensor}: {np.count_nonzero(time > 0)} of {len(time)} inputs fire once each"
    return render("raster", f"Spikes into {layer.tensor}", alt, origin, draw, 3.6)


def layer_times(layer: LayerSpikes, origin: Origin) -> Picture:
    """How many spikes come at each time, by class, over all tokens; silent inputs apart."""
    train = spike_train(layer.blocks)
    kind = _kinds(layer.blocks, train.coarse)
    silent = float((train.time < 0).mean())
    shares = []
    for place in range(len(KINDS)):
        times = train.time[(kind == place) & (train.time >= 0)]
        shares.append(100 * np.bincount(times, minlength=SPIKE_STEPS) / train.time.size)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        steps = np.arange(1, SPIKE_STEPS + 1)
        base = np.zeros(SPIKE_STEPS)
        for name, values, shade in zip(KINDS, shares, ("#30638e", "#edae49", "#9c6ade"), strict=True):
            label = "standard" if name == "standard" else f"salient, {name} step"
            axes.bar(steps, values, 0.8, base, color=shade, label=label)
            base += values
        axes.bar(18, 100 * silent, 0.8, color="#c3cad1", label="silent")
        axes.set_xticks([*_TICKS, 18], [*map(str, _TICKS), "never"])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("time of the spike")
        axes.set_ylabel("share of the inputs, %")
        axes.legend()

    alt = (
        f"Spike times of {layer.tensor} over {len(layer.blocks)} tokens: {silent:.1%} of the inputs silent, "
        f"{(shares[1].sum() + shares[2].sum()):.1f} % salient"
    )
    return render("spike-times", f"Spike times into {layer.tensor}", alt, origin, draw)


def salience_by_layer(counts: Sequence[Counts], origin: Origin) -> Picture | None:
    """Shares of salient and of silent inputs over the depth of the model, by kind of layer."""
    series: dict[str, dict[int, Counts]] = {}
    for count in counts:
        parts = count.name.split(".")
        if parts[0] == "blk" and len(parts) > 2 and parts[1].isdigit():
            series.setdefault(_SITES.get(layer_kind(count.name), layer_kind(count.name)), {})[
                int(parts[1])
            ] = count
    if not series:
        return None

    def draw(canvas: Canvas) -> None:
        above, below = canvas.subplots(2, 1, sharex=True)
        for axes, part in ((above, "salient"), (below, "silent")):
            for place, (site, layers) in enumerate(series.items()):
                values = [
                    100 * getattr(each, part) / (each.tokens * each.n_inputs) for each in layers.values()
                ]
                axes.plot(list(layers), values, marker=".", color=_SITE_COLOURS[place % 4], label=site)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(f"{part} inputs, %")
        above.legend(ncols=2)
        below.set_xlabel("layer")

    sums = [sum(getattr(count, part) for count in counts) for part in ("salient", "silent")]
    inputs = sum(count.tokens * count.n_inputs for count in counts)
    alt = (
        f"Over all layers {sums[0] / inputs:.1%} of the inputs are salient and {sums[1] / inputs:.1%} silent"
    )
    return render("salience", "Salient and silent inputs by layer", alt, origin, draw, 4.0)


# Layers that share an input have the same spikes; one line stands for them.
_SITES = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv"), "attention input"),
    "attn_output": "attention output",
    **dict.fromkeys(("ffn_gate", "ffn_up"), "MLP input"),
    "ffn_down": "down projection",
}
_SITE_COLOURS = ("#30638e", "#00798c", "#edae49", "#d1495b")


def _raster(axes: Axes, time: np.ndarray, polarity: np.ndarray, kind: np.ndarray) -> None:
    for place, name in enumerate(KINDS):
        mark, size = _MARKS[name]
        for sign, shade in ((1, PLUS), (-1, MINUS)):
            at = np.flatnonzero((time > 0) & (kind == place) & (polarity == sign))
            # + left and - right of their time, and a little apart, so that neighbours can be told apart
            beside = time[at] - 0.17 * sign + (at * 37 % 11 - 5) / 60
            axes.scatter(beside, at, s=size, marker=mark, c=shade, linewidths=0, rasterized=len(at) > 4000)
    axes.set_ylim(len(time), -1)
    axes.set_ylabel("input (rotated basis)")
    axes.grid(axis="y", visible=False)


def _legend(axes: Axes) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], linestyle="", marker=mark, color="#6b7785", markersize=5, label=label)
        for (mark, _), label in zip(
            _MARKS.values(), ("standard", "salient, fine", "salient, coarse"), strict=True
        )
    ]
    signs = [
        Line2D([], [], linestyle="", marker="o", color=shade, markersize=5, label=label)
        for shade, label in ((PLUS, "+"), (MINUS, "−"))
    ]
    axes.legend(
        handles=[*marks, *signs],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=5,
        columnspacing=0.8,
        handletextpad=0.1,
        fontsize=7.5,
    )


def _kinds(blocks: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Index into KINDS of every input of BLOCK_SPKA[tokens, n_blocks]: int[tokens, n_in]."""
    octets = np.ascontiguousarray(blocks["salient_mask"], "<u8")[..., None].view(np.uint8)
    salient = np.unpackbits(octets, axis=-1, bitorder="little").reshape(coarse.shape).astype(bool)
    return np.where(coarse, 2, np.where(salient, 1, 0))


def _file(path: str) -> str:
    return path.rsplit("/", 1)[-1]
