"""How a neuron's trace looks in a terminal."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..activations import SPIKE_STEPS
from ..neuron import NeuronTrace
from .tables import line

__all__ = ["show_neuron"]

_SHADES = " ░▒▓█"
_MOST_GROUPS = 24  # lines of the raster
_BAR = 28


def show_neuron(out: Console, trace: NeuronTrace) -> None:
    """Raster by groups of inputs, then current and potential at every time, then what is read out."""
    fires = trace.time > 0
    salient = [int(np.count_nonzero(trace.kind == kind)) for kind in (1, 2)]
    line(out, f"{trace.tensor}, neuron {trace.row}: {len(trace.time)} inputs, {SPIKE_STEPS} time steps")
    line(out, f"token {trace.position} of {trace.text!r}: {trace.piece!r}")
    line(
        out,
        f"{np.count_nonzero(fires)} spikes ({np.count_nonzero(trace.polarity > 0)} +, "
        f"{np.count_nonzero(trace.polarity < 0)} −), {np.count_nonzero(~fires)} silent; salient: "
        f"{salient[0]} fine, {salient[1]} coarse (2^{trace.shift} steps)",
    )
    line(out, "")
    _show_raster(out, trace)
    _show_membrane(out, trace)
    line(
        out,
        f"V = {trace.potential_fine[-1]} + {trace.potential_coarse[-1]}·2^{trace.shift} = "
        f"{trace.potential[-1]}; θ = {trace.threshold:.6g}, s = {trace.step:.6g}; an output of 1 fires at "
        f"V = {trace.firing_threshold:.4g}",
    )
    line(
        out,
        f"y = θ·s·V = {float(trace.output):.9g} ({trace.output_bits}): the runtime's own output, to the bit",
    )
    strongest = ", ".join(
        f"{each['input']} ({'+' if each['polarity'] > 0 else '−'} at {each['time']}, {each['kind']}, weight "
        f"{each['weight']}): {each['contribution']:+d}"
        for each in trace.strongest(5)
    )
    line(out, f"strongest inputs: {strongest}")
    line(out, f"{trace.threads} threads on {trace.host.cpu}, kernel {trace.host.kernel}")


def _show_raster(out: Console, trace: NeuronTrace) -> None:
    n_inputs = len(trace.time)
    per_group = -(-n_inputs // _MOST_GROUPS // 64) * 64 if n_inputs > 64 * _MOST_GROUPS else 64
    line(out, "spikes by inputs and time: the darker the more; red +, blue −, as most of them are")
    head = Text(f"{'inputs':>13} ")
    for time in range(1, SPIKE_STEPS + 1):
        head.append(f"{time:>3}")
    out.print(head.append("  silent"))
    groups = range(0, n_inputs, per_group)
    counts = np.zeros((len(groups), 2, SPIKE_STEPS + 1), np.int64)
    for sign, polarity in enumerate((1, -1)):
        at = (trace.time > 0) & (trace.polarity == polarity)
        np.add.at(counts[:, sign], (np.flatnonzero(at) // per_group, trace.time[at]), 1)
    largest = max(1, int(counts.sum(axis=1).max()))
    for place, first in enumerate(groups):
        last = min(first + per_group, n_inputs)
        text = Text(f"{first:>6}–{last - 1:<6} ")
        for time in range(1, SPIKE_STEPS + 1):
            plus, minus = counts[place, :, time]
            shade = _SHADES[-(-4 * int(plus + minus) // largest)]
            text.append(f" {shade * 2}", "red" if plus >= minus else "blue")
        silent = int(np.count_nonzero(trace.time[first:last] == 0))
        out.print(text.append(f"  {silent:>6}"))
    line(out, "")


def _show_membrane(out: Console, trace: NeuronTrace) -> None:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("time", "+", "−", "fine", "coarse", "current", "potential V"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    extent = max(1, int(np.abs(trace.potential).max()))
    current = trace.current_fine + (trace.current_coarse << trace.shift)
    for step in range(SPIKE_STEPS):
        now = trace.time == step + 1
        potential = int(trace.potential[step])
        bar = "█" * round(_BAR * abs(potential) / extent)
        drawn = Text(f"{bar:>{_BAR}}│" if potential < 0 else f"{'':>{_BAR}}│{bar}")
        drawn.stylize("blue" if potential < 0 else "red")
        table.add_row(
            str(step + 1),
            str(np.count_nonzero(now & (trace.polarity > 0))),
            str(np.count_nonzero(now & (trace.polarity < 0))),
            str(np.count_nonzero(now & (trace.kind == 1))),
            str(np.count_nonzero(now & (trace.kind == 2))),
            str(int(current[step])),
            str(potential),
            drawn,
        )
    out.print(table)
