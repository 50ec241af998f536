"""How a comparison looks as text: one table, or two where the terminal is narrow."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..compare import Comparison, ComparisonRow
from .tables import conditions, line, number

__all__ = ["show_comparison"]

_NAMES = ("model",)
_ACCURACY = ("type", "MB", "bits/w", "PPL", "KLD", "same top")
_SPEED = ("prompt t/s", "prompt × Q4_0", "decode t/s", "decode × Q4_0")
_SHORT = {"prompt × Q4_0": "× Q4_0", "decode × Q4_0": "× Q4_0"}


def show_comparison(out: Console, comparison: Comparison) -> None:
    """A row per model, and under the table all that the figures depend on."""
    cells = [_cells(row, comparison.reference) for row in comparison.rows]
    with_speed = any(row.prompt_tps or row.decode_tps for row in comparison.rows)
    tables = [_table(comparison, cells, (*_NAMES, *_ACCURACY, *(_SPEED if with_speed else ())))]
    if with_speed and Measurement.get(out, out.options.update(width=1000), tables[0]).maximum > out.width:
        tables = [_table(comparison, cells, (*_NAMES, *columns)) for columns in (_ACCURACY, _SPEED)]
    for table in tables:
        out.print(table)
    about = conditions(
        comparison.text, comparison.chunks, comparison.ctx, comparison.threads, comparison.host
    )
    line(out, f"PPL and KLD: {about}. KLD is against {comparison.reference}.")
    if with_speed:
        line(
            out,
            f"Speed: prompt of {comparison.prompt}, decode of {comparison.decode} tokens, median of "
            f"{comparison.rounds} rounds, each in turns with Q4_0 (± half the range of the rounds' ratios).",
        )
    modelled = [row for row in comparison.rows if row.energy and row.energy["pj_per_token"] is not None]
    if modelled:
        line(
            out,
            f"Energy of the linear layers, modelled: {_energies(modelled)} (constants "
            f"{modelled[0].energy['constants']}).",
        )
    for note in comparison.notes:
        line(out, f"Note: {note}")


def _table(comparison: Comparison, cells: Sequence[dict[str, str]], columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(columns[0], overflow="fold")
    for title in columns[1:]:
        justify = "left" if title == "type" else "right"
        table.add_column(_SHORT.get(title, title), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row, texts in zip(comparison.rows, cells, strict=True):
        style = "bold" if row.type == "spk4" else None
        table.add_row(*(texts[title] for title in columns), style=style)
    return table


def _cells(row: ComparisonRow, reference: str) -> dict[str, str]:
    """The text of every column of a row."""
    is_reference = row.name == reference
    return {
        "model": row.name,
        "type": row.type,
        "MB": f"{row.bytes / 1e6:.1f}",
        "bits/w": number(row.bits_per_weight, ".2f"),
        "PPL": f"{row.ppl:.3f} ± {row.ppl_stderr:.3f}",
        "KLD": "–" if is_reference else f"{row.kld:.4f} ± {row.kld_stderr:.4f}",
        "same top": "–" if is_reference else f"{100 * row.same_top:.1f} %",
        "prompt t/s": number(row.prompt_tps, ".1f"),
        "prompt × Q4_0": _ratio(row.prompt_ratio, row.prompt_ratio_range),
        "decode t/s": number(row.decode_tps, ".1f"),
        "decode × Q4_0": _ratio(row.decode_ratio, row.decode_ratio_range),
    }


def _energies(rows: Sequence[ComparisonRow]) -> str:
    """Arithmetic and dequantization, then memory, in microjoules per token of a prompt."""
    parts = []
    for row in rows:
        energy = row.energy or {}
        compute = (energy["arithmetic"] + energy["dequantization"]) / 1e6
        parts.append(f"{row.name} {compute:.1f} + memory {energy['memory'] / 1e6:.1f}")
    return ", ".join(parts) + " µJ per token of a prompt"


def _ratio(ratio: float | None, spread: tuple[float, float] | None) -> str:
    if ratio is None or spread is None:
        return "–"
    low, high = spread
    return f"{ratio:.2f}" if low == high else f"{ratio:.2f} ± {(high - low) / 2:.2f}"
