"""How energies look as text."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ..energy import EnergyResult, Measured, PhaseEnergy
from ..energy.conditions import WANTED, ratio
from ..energy.counts import total
from .tables import line

__all__ = ["SYSTEM_NAMES", "show_energy"]

SYSTEM_NAMES = {
    "spk4": "SPK4",
    "fp16_mac": "FP16 MAC, 4-bit weights",
    "f16": "FP16 MAC, FP16 weights",
    "q4_0": "Q4_0 (llama.cpp)",
    "q4_k_m": "Q4_K_M (llama.cpp)",
    "w4a4": "W4A4, groups of 128",
    "rate": "rate coding",
    "spikellm": "SpikeLLM-style",
}


def show_energy(out: Console, result: EnergyResult) -> None:
    for phase in result.phases:
        _show_phase(out, result, phase)
    line(out, "ratio: arithmetic and dequantization over those of SPK4; in brackets with memory.")
    if result.assumption:
        line(out, f"Assumption: {result.assumption}")
    line(out, "Method: modelled from counted operations; nothing in the tables above is measured.")
    line(
        out, f"Constants: {result.constants.name} ({result.constants.process}); {result.constants.citation}."
    )
    line(
        out,
        f"Text: {result.text.name} (sha256 {result.text.sha256[:8]}…), {result.phases[0].tokens} tokens; "
        f"kernel {result.host.kernel} on {result.host.cpu}.",
    )
    _show_measured(out, result.measured)


def _show_phase(out: Console, result: EnergyResult, phase: PhaseEnergy) -> None:
    what = "at once" if phase.phase == "prompt" else "one by one"
    of = f"shape {result.shape}" if result.shape else result.model.rsplit("/", 1)[-1]
    line(
        out,
        f"{phase.phase.capitalize()}, {phase.tokens} tokens {what}: µJ per token in linear layers of {of}",
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("system", "arithmetic", "dequant.", "memory", "ratio", "(with memory)"):
        table.add_column(title, justify="left" if title == "system" else "right", no_wrap=True)
    for row in phase.rows:
        parts = (f"{part / 1e6:.2f}" for part in (row.arithmetic, row.dequantization, row.memory))
        ratios = f"{phase.ratio(row.system):.2f}", f"({phase.ratio(row.system, memory=True):.2f})"
        style = "bold" if row.system == "spk4" else None
        table.add_row(SYSTEM_NAMES[row.system], *parts, *ratios, style=style)
    out.print(table)
    sums = total(phase.counts)
    inputs = sums["spikes"] + sums["silent"]
    line(
        out,
        f"Per token {sums['spikes'] / phase.tokens:,.0f} spikes, {sums['silent'] / inputs:.1%} of the inputs "
        f"silent, {sums['salient'] / inputs:.1%} salient; rate coding would fire {phase.spike_ratio:.2f} × "
        "as many.",
    )
    kinds = "; ".join(
        f"{kind} {' / '.join(f'{ratio(rows, system):.1f}' for system in WANTED)}"
        for kind, rows in phase.layers.items()
    )
    line(out, f"Ratio to FP16 MAC / Q4_0 by kind of layer: {kinds}.")
    for system, wanted in WANTED.items():
        line(out, f"When is it {wanted:g} × or more below {SYSTEM_NAMES[system]}?")
        for condition in (each for each in phase.conditions if each.system == system):
            line(out, f"  {'✓' if condition.holds else '✗'} {condition.text}")
        values = [(each["ratios"][system], each["varied"]) for each in phase.sensitivity if each["operation"]]
        low, high = min(values), max(values)
        sets = ", ".join(
            f"{each['varied']} {each['ratios'][system]:.2f} ({each['ratios_with_memory'][system]:.2f})"
            for each in phase.sensitivity
            if not each["operation"]
        )
        line(
            out,
            f"  Sensitivity: {low[0]:.2f} ({low[1]}) to {high[0]:.2f} ({high[1]}); {sets}.",
        )
    line(out, "")


def _show_measured(out: Console, measured: list[Measured]) -> None:
    reasons = dict.fromkeys(each.reason for each in measured if each.reason)
    for reason in reasons:
        line(out, f"Measured: unavailable: {reason}.")
    rows = [each for each in measured if each.joules_per_token is not None]
    if not rows:
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("measured", "phase", "J/token", "± σ", "with idle", "idle W", "× below Q4_0"):
        table.add_column(title, justify="left" if title in ("measured", "phase") else "right", no_wrap=True)
    for row in rows:
        below = ""
        if row.ratio_to_q4_0 is not None and row.ratio_to_q4_0_range is not None:
            below = (
                f"{row.ratio_to_q4_0:.2f} ({row.ratio_to_q4_0_range[0]:.2f}–{row.ratio_to_q4_0_range[1]:.2f})"
            )
        table.add_row(
            SYSTEM_NAMES.get(row.system, row.system.upper()),
            row.phase,
            f"{row.joules_per_token:.4g}",
            f"{row.stdev:.2g}",
            f"{row.total_joules_per_token:.4g}",
            f"{row.idle_watts:.1f}",
            below,
        )
    out.print(table)
    first = rows[0]
    line(
        out,
        f"Measured with {first.method} ({first.source}): whole package, idle subtracted, "
        f"{first.repeats} rounds in turns, each of {first.seconds:g} s or more after "
        f"{first.stabilisation_seconds:g} s of rest; {first.threads} threads.",
    )
