"""Figures of documents: accuracy, speed, energy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .documents import Document
from .drawing import (
    Axes,
    Canvas,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    Picture,
    colour,
    plain,
    render,
)

__all__ = [
    "SYSTEM_NAMES",
    "accuracy_of_types",
    "bench_speeds",
    "compare_speeds",
    "end_to_end",
    "energy_layers",
    "energy_sensitivity",
    "energy_split",
    "matmul_batches",
    "sweep_figures",
]

SYSTEM_NAMES = {
    "spk4": "SPK4",
    "fp16_mac": "FP16 MAC, 4-bit",
    "f16": "FP16 MAC, 16-bit",
    "q4_0": "Q4_0",
    "q4_k_m": "Q4_K_M",
    "w4a4": "W4A4, groups",
    "rate": "rate coding",
    "spikellm": "SpikeLLM-style",
}
_KLD_METHOD = (
    "KL divergence of next-token predictions from the reference, llama-perplexity's definition, "
    "± standard error"
)


_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7.5}


def accuracy_of_types(document: Document) -> Picture | None:
    """Divergence against bits per weight of the rows of compare or of benchmarks/accuracy.py."""
    rows = [row for row in document.data["rows"] if _positive(row.get("kld")) and row.get("bits_per_weight")]
    texts = list(dict.fromkeys(row["text"] for row in rows if isinstance(row.get("text"), str)))
    if texts:
        rows = [row for row in rows if row["text"] == texts[0]]
    if not rows:
        return None

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for place, row in enumerate(rows):
            spiking = row["type"] == "spk4"
            axes.errorbar(
                row["bits_per_weight"],
                row["kld"],
                row.get("kld_stderr"),
                fmt="D" if spiking else "o",
                color=colour(row["type"], place),
                markersize=8 if spiking else 6,
                capsize=3,
            )
            axes.annotate(
                _row_name(row, rows),
                (row["bits_per_weight"], row["kld"]),
                (0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                fontweight="bold" if spiking else "normal",
            )
        axes.margins(x=0.18, y=0.18)
        axes.set_ylim(bottom=0)
        plain(axes, "bits per weight, whole file", "KL divergence")

    text = None
    for described in document.data.get("texts", []):
        if texts and described.get("name") == texts[0]:
            text = f"{described['name']}, {described.get('chunks')} chunks of {described.get('ctx')} tokens"
    return render(
        f"{document.kind}-accuracy",
        "Accuracy against bits",
        "KL divergence from the reference against bits per weight: " + _said(rows, "type", "kld", ".3f"),
        document.origin(f"{_KLD_METHOD}; reference {_name(document.data['reference'])}", text),
        draw,
    )


# ---- the simulated sweep


def sweep_figures(document: Document) -> list[Picture]:
    """A picture of each study that has points."""
    studies: dict[str, list[dict]] = {}
    for point in document.data["points"]:
        if _positive(point.get("kld")):
            studies.setdefault(point["study"], []).append(point)
    found = []
    origin = document.origin(
        f"float simulation of the same arithmetic in torch; {_KLD_METHOD}; reference "
        f"{_name(document.data['reference'])}"
    )
    if "bits" in studies:
        found.append(_sweep_bits(studies["bits"], origin))
    if "salience" in studies:
        found.append(_sweep_salience(studies["salience"], origin))
    for study, title in (("ablations", "What each part is worth"), ("baselines", "Other methods at 4 bits")):
        if study in studies:
            found.append(_sweep_bars(study, title, studies[study], origin))
    return found


def _sweep_bits(points: list[dict], origin: Any) -> Picture:
    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for place, (series, line) in enumerate(_series(points).items()):
            line = sorted(line, key=lambda point: point["weight_bits"])
            axes.errorbar(
                [point["weight_bits"] for point in line],
                [point["kld"] for point in line],
                [point.get("kld_stderr") or 0 for point in line],
                marker="o",
                capsize=3,
                color=colour("spk4" if place == 0 else series, place),
                label=series,
            )
        _logarithmic(axes.yaxis, [point["kld"] for point in points])
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain(axes, "bits of weights and activations", "KL divergence (log)")
        axes.legend()

    alt = "KL divergence against bits: " + _said(points, "name", "kld", ".3f")
    return render("sweep-bits", "Accuracy against bits, simulated", alt, origin, draw)


def _sweep_salience(points: list[dict], origin: Any) -> Picture:
    known = [point for point in points if point.get("salient_share") is not None]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for place, (series, line) in enumerate(_series(known).items()):
            line = sorted(line, key=lambda point: point["salient_share"])
            axes.errorbar(
                [100 * point["salient_share"] for point in line],
                [point["kld"] for point in line],
                [point.get("kld_stderr") or 0 for point in line],
                marker="o",
                capsize=3,
                color=colour("spk4" if place == 0 else "q4_0", place),
                label=series,
            )
        _logarithmic(axes.yaxis, [point["kld"] for point in known])
        plain(axes, "salient activations, %", "KL divergence (log)")
        axes.legend()

    alt = "KL divergence against the share of salient activations: " + _said(known, "name", "kld", ".3f")
    return render("sweep-salience", "Accuracy against salience, simulated", alt, origin, draw)


def _sweep_bars(study: str, title: str, points: list[dict], origin: Any) -> Picture:
    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        first = points[0]["kld"]
        _bars(
            axes,
            [point["name"] for point in points],
            [point["kld"] for point in points],
            [colour("spk4") if place == 0 else colour("f16") for place in range(len(points))],
            [f"{point['kld']:.3f}" for point in points],
            errors=[point.get("kld_stderr") or 0 for point in points],
        )
        axes.axvline(first, color=colour("spk4"), linewidth=0.8, linestyle=":")
        if max(point["kld"] for point in points) > 20 * min(point["kld"] for point in points):
            _logarithmic(axes.xaxis, [point["kld"] for point in points])
            axes.set_xlabel("KL divergence (log)")
        else:
            axes.set_xlabel("KL divergence")

    alt = f"{title}, KL divergence: " + _said(points, "name", "kld", ".3f")
    return render(f"sweep-{study}", f"{title}, simulated", alt, origin, draw, 1.0 + 0.26 * len(points))


# ---- speed


def matmul_batches(document: Document) -> Picture | None:
    """Speed of spike products relative to Q4_0's against the number of tokens, a line per shape."""
    rows = [row for row in document.data["rows"] if row["type"] == "spk4" and row.get("ratio_q4_0")]
    if not rows:
        return None
    threads = max(row["threads"] for row in rows)
    silent = min((row["silent_target"] for row in rows if row.get("silent_target") is not None), default=None)
    rows = [row for row in rows if row["threads"] == threads and row.get("silent_target") in (None, silent)]
    shapes: dict[str, list[dict]] = {}
    for row in rows:
        shapes.setdefault(f"{row['rows']}×{row['inputs']}", []).append(row)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        palette = ("#f2a3ac", "#e5707e", "#d1495b", "#a8324a", "#7a1f3d", "#4d1230", "#2b0a1d")
        for place, (shape, line) in enumerate(shapes.items()):
            line = sorted(line, key=lambda row: row["tokens"])
            ratios = [row["ratio_q4_0"] for row in line]
            low = [row["ratio_q4_0"] - row.get("ratio_q4_0_min", row["ratio_q4_0"]) for row in line]
            high = [row.get("ratio_q4_0_max", row["ratio_q4_0"]) - row["ratio_q4_0"] for row in line]
            axes.errorbar(
                [row["tokens"] for row in line],
                ratios,
                [low, high],
                marker="o",
                markersize=4,
                capsize=2,
                color=palette[place % len(palette)],
                label=shape,
            )
        axes.axhline(1, color=colour("q4_0"), linewidth=1.2)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["tokens"] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(bottom=0)
        plain(axes, "tokens at once", "speed, Q4_0 = 1")
        axes.legend(title="rows × inputs", title_fontsize=8, ncols=2)

    isa = ", ".join(dict.fromkeys(str(row.get("isa")) for row in rows))
    method = (
        f"median of rounds in turns with Q4_0, bars: range of the rounds; kernel {isa}, {_threads(threads)}"
    )
    if silent is not None:
        method += f", {silent:.0%} of the inputs silent at one token"
    shown = (f"{shape} {line[-1]['ratio_q4_0']:.2f}" for shape, line in shapes.items())
    return render(
        "matmul-batches",
        "Speed of one product against batch",
        "Speed of SPK4 products relative to Q4_0, at the largest batch: " + ", ".join(shown),
        document.origin(method),
        draw,
    )


def end_to_end(document: Document) -> Picture | None:
    """Speeds of whole models relative to Q4_0, by type, prompt and decode."""
    rows = document.data["rows"]
    if not rows:
        return None
    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads]
    models = list(dict.fromkeys(row["model"] for row in rows))

    def draw(canvas: Canvas) -> None:
        all_axes = canvas.subplots(len(models), 1, squeeze=False)[:, 0]
        for axes, model in zip(all_axes, models, strict=True):
            own = [row for row in rows if row["model"] == model]
            _speed_bars(axes, own, "type", "pp_ratio", "tg_ratio")
            axes.set_title(model, fontsize=9)

    settings = document.data.get("settings", {})
    method = (
        f"tokens per second relative to Q4_0, median of {settings.get('rounds', '?')} rounds in turns with "
        f"it; prompt of {settings.get('n_prompt', '?')}, decode of {settings.get('n_gen', '?')} tokens; "
        f"{_threads(threads)}"
    )
    height = sum(0.75 + 0.34 * sum(row["model"] == model for row in rows) for model in models)
    alt = "Speed relative to Q4_0 in prompts: " + _said(rows, "type", "pp_ratio", ".2f")
    return render(
        "end-to-end", "Speed of whole models", alt, document.origin(method, "arbitrary tokens"), draw, height
    )


def compare_speeds(document: Document) -> Picture | None:
    """Speeds of the rows of compare relative to Q4_0."""
    rows = [row for row in document.data["rows"] if row.get("prompt_ratio") and row.get("decode_ratio")]
    if not rows:
        return None
    rows = [row | {"shown": _row_name(row, rows)} for row in rows]

    def draw(canvas: Canvas) -> None:
        _speed_bars(canvas.subplots(), rows, "shown", "prompt_ratio", "decode_ratio")

    speed = document.data.get("speed", {})
    method = (
        f"tokens per second relative to Q4_0, median of {speed.get('rounds', '?')} rounds in turns with it; "
        f"prompt of {speed.get('prompt', '?')}, decode of {speed.get('decode', '?')} tokens"
    )
    alt = "Speed relative to Q4_0 in prompts: " + _said(rows, "type", "prompt_ratio", ".2f")
    origin = document.origin(method, "arbitrary tokens")
    return render("compare-speed", "Speed of whole models", alt, origin, draw, 0.85 + 0.36 * len(rows))


def bench_speeds(document: Document) -> Picture | None:
    """Tokens per second of the models of bench."""
    models = [each for each in document.data["models"] if each.get("prompt") or each.get("decode")]
    if not models:
        return None
    phases = [phase for phase in ("prompt", "decode") if all(each.get(phase) for each in models)]
    names = [str(each["model"]).rsplit("/", 1)[-1].removesuffix(".gguf") for each in models]

    def draw(canvas: Canvas) -> None:
        all_axes = canvas.subplots(len(phases), 1, squeeze=False)[:, 0]
        for axes, phase in zip(all_axes, phases, strict=True):
            values = [each[phase]["tps"] for each in models]
            _bars(
                axes,
                names,
                values,
                [_colour_of_name(name) for name in names],
                [f"{value:.0f}" for value in values],
                errors=[each[phase].get("stdev_tps") or 0 for each in models],
            )
            axes.set_title(f"{phase}, {document.data[phase]} tokens", fontsize=9)
            axes.set_xlabel("tokens per second")

    method = f"tokens per second, median and standard deviation of {document.data['rounds']} rounds in turns"
    alt = "Tokens per second: " + ", ".join(
        f"{name} {each[phases[0]]['tps']:.0f}" for name, each in zip(names, models, strict=True)
    )
    height = len(phases) * (0.85 + 0.26 * len(models))
    origin = document.origin(method, "arbitrary tokens")
    return render("bench-speed", "Speed of whole models", alt, origin, draw, height)


def _speed_bars(axes: Axes, rows: Sequence[dict], name: str, prompt: str, decode: str) -> None:
    """Two bars a row: prompt and decode; Q4_0 is the line at 1."""
    places = range(len(rows))
    for shift, key, shade, label in ((-0.2, prompt, 1.0, "prompt"), (0.2, decode, 0.5, "decode")):
        values = [row[key] for row in rows]
        colours = [colour(row["type"], place) for place, row in enumerate(rows)]
        bars = axes.barh([place + shift for place in places], values, 0.38, color=colours, alpha=shade)
        axes.bar_label(bars, [f"{label} {value:.2f}" for value in values], padding=3, fontsize=7)
    axes.axvline(1, color=colour("q4_0"), linewidth=1.2)
    axes.set_yticks(places, [str(row[name]).upper() if name == "type" else row[name] for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.22)
    axes.set_xlabel("speed, Q4_0 = 1")


# ---- energy


def energy_split(document: Document, phase: dict) -> Picture:
    """Arithmetic, dequantization and memory by system: without memory above, with it below."""
    rows = phase["rows"]
    names = [SYSTEM_NAMES.get(row["system"], row["system"]) for row in rows]
    parts = (("arithmetic", 1.0), ("dequantization", 0.55), ("memory", 0.25))
    scale, unit = (1e9, "mJ") if max(row["memory"] for row in rows) > 2e10 else (1e6, "µJ")

    def draw(canvas: Canvas) -> None:
        above, below = canvas.subplots(2, 1)
        for axes, shown in ((above, parts[:2]), (below, parts)):
            left = [0.0] * len(rows)
            for part, shade in shown:
                values = [row[part] / scale for row in rows]
                colours = [colour(row["system"], place) for place, row in enumerate(rows)]
                axes.barh(names, values, 0.7, left, color=colours, alpha=shade)
                left = [a + b for a, b in zip(left, values, strict=True)]
            key = "ratio" if axes is above else "ratio_with_memory"
            for place, row in enumerate(rows):
                end = (left[place], place)
                axes.annotate(f"{row[key]:.2f} ×", end, (3, 0), **_BESIDE)
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.16)
        above.set_title("arithmetic (dark) and dequantization (light)", fontsize=8.5)
        below.set_title("with memory (lightest)", fontsize=8.5)
        below.set_xlabel(f"{unit} per token")

    what = "all tokens at once" if phase["phase"] == "prompt" else "token by token"
    title = f"Energy per token, {phase['phase']}" + (
        f", {document.data['shape'].upper()} shape" if document.data.get("shape") else ""
    )
    alt = f"Modelled energy of the linear layers, {what}; times SPK4: " + ", ".join(
        f"{name} {row['ratio']:.2f}, with memory {row['ratio_with_memory']:.2f}"
        for name, row in zip(names, rows, strict=True)
    )
    name = f"energy-{document.data['shape'] + '-' if document.data.get('shape') else ''}{phase['phase']}"
    return render(name, title, alt, _energy_origin(document, what), draw, 4.6)


def energy_layers(document: Document, phase: dict) -> Picture:
    """Ratios to SPK4 by kind of layer."""
    kinds = [layer["kind"] for layer in phase["layers"]]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for shift, system in ((-0.2, "fp16_mac"), (0.2, "q4_0")):
            values = [_ratio(layer["rows"], system) for layer in phase["layers"]]
            places = [place + shift for place in range(len(kinds))]
            bars = axes.barh(places, values, 0.38, color=colour(system), label=SYSTEM_NAMES[system])
            axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=7)
        for wanted, system in ((4.6, "fp16_mac"), (2.0, "q4_0")):
            axes.axvline(wanted, color=colour(system), linewidth=1, linestyle=":")
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("energy, SPK4 = 1 (dotted: 4.6 and 2)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=2)

    origin = _energy_origin(document, "arithmetic and dequantization, without memory")
    alt = "Energy relative to SPK4 by kind of layer, FP16 MAC: " + ", ".join(
        f"{layer['kind']} {_ratio(layer['rows'], 'fp16_mac'):.1f}" for layer in phase["layers"]
    )
    return render(
        f"energy-layers-{phase['phase']}", f"By kind of layer, {phase['phase']}", alt, origin, draw, 3.4
    )


def energy_sensitivity(document: Document, phase: dict) -> Picture:
    """How far the ratio to FP16 MAC moves when a constant is halved or doubled."""
    base = _ratio(phase["rows"], "fp16_mac")
    spans: dict[str, list[float]] = {}
    for each in phase["sensitivity"]:
        if each["operation"]:
            spans.setdefault(each["operation"], []).append(each["ratios"]["fp16_mac"])
    ordered = sorted(spans, key=lambda name: max(spans[name]) - min(spans[name]))
    ordered = [name for name in ordered if max(spans[name]) - min(spans[name]) > 1e-3 * base]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for place, name in enumerate(ordered):
            halved, doubled = spans[name]
            axes.barh(place, halved - base, 0.62, base, color=colour("w4a4"))
            axes.barh(place, doubled - base, 0.62, base, color=colour("q4_0"))
        axes.axvline(base, color="#1f2933", linewidth=1)
        axes.axvline(4.6, color=colour("spk4"), linewidth=1, linestyle=":")
        axes.annotate("4.6", (4.6, len(ordered) - 0.45), fontsize=8, color=colour("spk4"), ha="center")
        axes.set_yticks(range(len(ordered)), [name.replace("_", " ") for name in ordered])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("FP16 MAC / SPK4 (yellow: constant halved, blue: doubled)")

    alt = f"The ratio {base:.2f} to FP16 MAC with constants halved and doubled: " + ", ".join(
        f"{name} {min(spans[name]):.1f} to {max(spans[name]):.1f}" for name in reversed(ordered)
    )
    origin = _energy_origin(document, "arithmetic and dequantization, one constant changed at a time")
    return render(
        f"energy-sensitivity-{phase['phase']}",
        f"Sensitivity to the constants, {phase['phase']}",
        alt,
        origin,
        draw,
        1.1 + 0.27 * len(ordered),
    )


def _energy_origin(document: Document, what: str) -> Any:
    constants = document.data["constants"]
    method = (
        f"operation model, not measured: operations counted in the runtime times {constants['name']} "
        f"({constants['citation']}); linear layers only; {what}"
    )
    if document.data.get("assumption"):
        method += f". {document.data['assumption']}"
    return document.origin(method)


# ---- parts


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    labels: Sequence[str],
    errors: Sequence[float],
) -> None:
    """Horizontal bars, the first at the top, each with its value."""
    bars = axes.barh(
        range(len(names)), values, 0.68, color=colours, xerr=errors, error_kw={"lw": 1, "capsize": 2}
    )
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.15)


def _logarithmic(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with numbers as people write them."""
    wide = max(values) > 200 * min(values)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _series(points: Iterable[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for point in points:
        found.setdefault(str(point.get("series") or ""), []).append(point)
    return found


def _ratio(rows: Sequence[dict], system: str) -> float:
    return next(row["ratio"] for row in rows if row["system"] == system)


def _positive(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value) and value > 0


def _said(rows: Sequence[dict], name: str, value: str, layout: str) -> str:
    return ", ".join(f"{row[name]} {format(row[value], layout)}" for row in rows)


def _name(reference: object) -> str:
    return str(reference.get("name") if isinstance(reference, dict) else reference)


def _row_name(row: dict, rows: Sequence[dict]) -> str:
    """The type, or where two rows share it the name."""
    same = sum(other["type"] == row["type"] for other in rows)
    return row["type"].upper() if same == 1 else str(row["name"])


def _colour_of_name(name: str) -> str:
    lower = name.lower()
    kinds = ("spk4", "q4_k_m", "q4_0", "iq4_xs", "q8_0", "f16")
    return colour(next((kind for kind in kinds if kind in lower), "other"))
