"""How results look as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..converter import ConversionPlan, ConvertReport
from ..dequantize import DequantizeReport
from ..divergence import DivergenceResult
from ..doctor import DoctorReport
from ..ggml_patch.build import BuildReport
from ..host import HostFacts
from ..inspect_file import InspectReport
from ..perplexity import PerplexityResult
from ..speed import Speed, SpeedResult, Timing
from ..texts import Text as SourceText
from ..verify import VerifyReport

__all__ = [
    "SPEED_FORMATS",
    "conditions",
    "line",
    "number",
    "show_build",
    "show_conversion",
    "show_dequantize",
    "show_divergence",
    "show_doctor",
    "show_inspect",
    "show_perplexity",
    "show_plan",
    "show_speed",
    "show_verify",
]

SPEED_FORMATS = ("table", "md", "csv")
_STATUS = {"ok": ("✓", "green"), "problem": ("✗", "red"), "info": ("·", "dim")}


def show_build(out: Console, report: BuildReport) -> None:
    if report.unpatched:
        line(out, f"Unpatched llama-cpp-python {report.pin} in {report.python_path}")
        return
    if report.handed_on:
        line(out, f"{report.wheel}: portable, patch {report.patch_id}; nothing was installed here")
        return
    state = "installed" if report.installed else "installed already"
    line(out, f"llama-cpp-python {report.pin} with patch {report.patch_id}: {state}")
    if report.self_test.get("kernel"):
        line(out, f"kernel: {report.self_test['kernel']}")
    line(out, f"tools: {next(iter(report.tools.values())).parent}" if report.tools else "tools: none")


def show_doctor(out: Console, report: DoctorReport) -> None:
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        sign, style = _STATUS[check.status]
        out.print(
            Text(f"{sign} ", style).append(f"{check.name:<{width}}  {check.value}", "default"), soft_wrap=True
        )
        if check.remedy:
            out.print(Text(f"  {'':<{width}}  -> {check.remedy}", style), soft_wrap=True)


def show_plan(out: Console, plan: ConversionPlan) -> None:
    for text in plan.lines():
        line(out, text)
    for warning in plan.warnings:
        line(out, f"warning: {warning}")


def show_conversion(out: Console, report: ConvertReport) -> None:
    """One line; the plan is for --dry-run, and `inspect` shows the tensors."""
    spiking = report.plan.spiking
    weights = sum(tensor.n_weights for tensor in spiking)
    salient = sum(each.salient_weights for each in report.statistics.values())
    inputs = ""
    if report.salient_input_share is not None:
        inputs = f" and {report.salient_input_share:.1%} of their inputs"
    for warning in report.warnings:
        line(out, f"warning: {warning}")
    if report.resumed:
        line(out, f"{report.resumed} of {len(report.plan.tensors)} tensors were there already")
    line(
        out,
        f"{report.path}: {len(spiking)} of {len(report.plan.tensors)} tensors are SPK4, "
        f"{salient / weights:.2%} of their weights{inputs} salient; {_megabytes(report.file_bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight; calibration: {report.calibration} "
        f"({report.seconds:.1f} s)",
    )
    if report.uncalibrated:
        line(out, f"not reached by the calibration: {_listed(report.uncalibrated)}")


def show_perplexity(out: Console, result: PerplexityResult) -> None:
    line(out, f"PPL = {result.ppl:.4f} ± {result.ppl_stderr:.5f}")
    line(out, conditions(result.text, result.chunks, result.ctx, result.threads, result.host))


def show_divergence(out: Console, result: DivergenceResult) -> None:
    for model in result.models:
        line(out, f"PPL       = {model.ppl:.4f} ± {model.ppl_stderr:.5f}")
        line(out, f"reference = {result.reference.ppl:.4f} ± {result.reference.ppl_stderr:.5f}")
        line(out, f"ratio     = {model.ppl_ratio:.4f} ± {model.ppl_ratio_stderr:.4f}")
        line(out, f"KLD       = {model.kld:.5f} ± {model.kld_stderr:.5f}")
        line(
            out, f"same top  = {100 * (model.same_top or 0):.2f} ± {100 * (model.same_top_stderr or 0):.2f} %"
        )
    line(out, conditions(result.text, result.chunks, result.ctx, result.threads, result.host))


def show_speed(out: Console, result: SpeedResult, layout: str) -> None:
    """As table, Markdown or CSV."""
    header = ["model", f"pp{result.prompt} t/s", "± σ", "ratio", f"tg{result.decode} t/s", "± σ", "ratio"]
    rows = [[_stem(each), *_timing_cells(each.prompt), *_timing_cells(each.decode)] for each in result.models]
    if layout == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        line(out, text.getvalue().rstrip("\n"))
        return
    if layout == "md":
        line(out, _markdown_row(header))
        line(out, "|---|" + "---:|" * (len(header) - 1))
        for row in rows:
            line(out, _markdown_row(row))
    else:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for number, title in enumerate(header):
            table.add_column(
                title, justify="right" if number else "left", no_wrap=bool(number), overflow="fold"
            )
        for row in rows:
            table.add_row(*row)
        out.print(table)
    base = f"; ratios to {result.baseline}" if result.baseline else ""
    line(out, f"{result.rounds} rounds{base}; {_host(result.threads, result.host)}")


def show_inspect(out: Console, report: InspectReport, tensors: bool, metadata: bool) -> None:
    if metadata:
        for key, value in report.metadata.items():
            line(out, f"{key} = {_value(value)}")
        line(out, "")
    if tensors:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for title, justify in (
            ("tensor", "left"),
            ("shape", "right"),
            ("type", "left"),
            ("bits/w", "right"),
            ("rotated", "left"),
            ("salient", "right"),
            ("of inputs", "right"),
            ("rel. error", "right"),
            ("c", "right"),
            ("δ", "right"),
        ):
            table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for tensor in report.tensors:
            table.add_row(
                tensor.name,
                " × ".join(map(str, tensor.shape)),
                tensor.type,
                number(tensor.bits_per_weight, "5.2f"),
                {True: "yes", False: "no", None: ""}[tensor.rotated],
                *(
                    "" if share is None else f"{share:.2%}"
                    for share in (tensor.salient_weight_share, tensor.salient_input_share)
                ),
                number(tensor.relative_error, ".4f"),
                number(tensor.salience, ".3g"),
                number(tensor.silence, ".3g"),
            )
        out.print(table)
    types = ", ".join(f"{name} {_megabytes(size)}" for name, size in report.types.items())
    line(
        out,
        f"{report.type}: {_megabytes(report.size.file_bytes)}, {report.size.parameters / 1e6:.1f} M "
        f"parameters, {number(report.size.bits_per_weight, '.3f') or '?'} bits per weight; {types}",
    )


def show_verify(out: Console, report: VerifyReport) -> None:
    for fault in report.faults:
        out.print(Text(f"✗ {fault}", "red"), soft_wrap=True)
    for warning in report.warnings:
        out.print(Text(f"! {warning}", "yellow"), soft_wrap=True)
    weights = sum(tensor.rows * tensor.inputs for tensor in report.tensors)
    salient = sum(tensor.salient_weights for tensor in report.tensors)
    share = f", {salient / weights:.2%} of the weights salient" if weights else ""
    verdict = "valid" if report.ok else f"{len(report.faults)} faults"
    line(
        out,
        f"{report.path}: {verdict}: {len(report.tensors)} SPK4 tensors{share}, {report.other_tensors} others "
        f"({report.seconds:.1f} s)",
    )


def show_dequantize(out: Console, report: DequantizeReport) -> None:
    line(
        out,
        f"{report.path}: {report.tensors} tensors as {report.type.upper()}, {_megabytes(report.file_bytes)} "
        f"({report.seconds:.1f} s)",
    )


def _timing_cells(timing: Timing | None) -> list[str]:
    if timing is None:
        return ["", "", ""]
    return [f"{timing.tps:.2f}", f"{timing.stdev_tps:.2f}", number(timing.ratio, ".3f")]


def _stem(speed: Speed) -> str:
    return speed.model.rsplit("/", 1)[-1]


def conditions(text: SourceText, chunks: int, ctx: int, threads: int, host: HostFacts) -> str:
    """What a figure of accuracy depends on."""
    return f"{text.name} (sha256 {text.sha256[:8]}…), {chunks} chunks of {ctx} tokens; {_host(threads, host)}"


def _host(threads: int, host: HostFacts) -> str:
    return f"{threads} threads on {host.cpu}, kernel {host.kernel or 'unknown'}, {host.os}"


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _listed(names: Sequence[str], most: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float | None, layout: str) -> str:
    """A formatted number; nothing for None."""
    return "" if value is None else format(value, layout)


def _value(value: object) -> str:
    if isinstance(value, dict):  # a long array
        return f"[{', '.join(map(repr, value['first']))}, … {value['items']} items]"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… {len(text)} characters"


def line(out: Console, text: str) -> None:
    """A line of plain text, not wrapped."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)
