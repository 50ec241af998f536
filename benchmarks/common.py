"""What the benchmarks share: options, measuring in turns, checks of the fast path, results.

Every document says on which machine it was measured. Figures of different runs are not comparable on a
machine that others use, too; ratios within a run are, because everything is measured in turns.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import rich.console
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from spikequant_gguf.compare import BASELINE_TYPE
from spikequant_gguf.console import Console, to_json_text
from spikequant_gguf.errors import SpikeQuantError
from spikequant_gguf.files import atomic_path
from spikequant_gguf.ggml_api import buffer_types
from spikequant_gguf.ggml_patch.cache import make_folder
from spikequant_gguf.ggml_patch.progress import Progress
from spikequant_gguf.host import HostFacts, host_facts
from spikequant_gguf.journal import Journal
from spikequant_gguf.runtime import require_runtime
from spikequant_gguf.variants import SPIKE_OPTIONS, SPIKE_TYPE

RESULTS = Path(__file__).parent / "results"
SPIKE_BUFFER, REPACK_BUFFER = "CPU_SPIKE", "CPU_REPACK"
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_DEFAULT_CACHE_BYTES = 64 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
_FORCE_VARIABLE = "SPIKEQUANT_FORCE_ISA"


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document on stdout")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result (%(default)s)")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


def names(text: str) -> list[str]:
    """Option value: names separated by commas, each once."""
    found = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError("give at least one name")
    return found


def counts(text: str) -> list[int]:
    """Option value: positive numbers separated by commas, each once."""
    try:
        found = list(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of positive numbers, like 1,2")
    return found


def positive(text: str) -> int:
    """Option value: one positive number."""
    found = counts(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return found[0]


def with_baseline(types: Sequence[str]) -> list[str]:
    """The types, the one that ratios refer to first."""
    return list(dict.fromkeys((BASELINE_TYPE, *types)))


def run(
    name: str,
    argv: Sequence[str] | None,
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Progress], dict],
    render: Callable[[rich.console.Console, dict], None],
    plot: Callable[[Figure, dict], None] | None = None,
) -> int:
    """Measure, keep the document and its plot in the folder of results, and show it.

    `measure` finds a Journal in ``options.journal``: what an interrupted run with the same arguments has
    measured. Ends the program after an error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(json_output=options.json, quiet=options.quiet, verbose=options.verbose)
    with console.exit_codes(SystemExit):
        host = host_facts()
        installed = require_runtime()
        require_fast_kernel(host)
        identity = [name, arguments, host.to_json(), installed.patch_id]
        options.journal = Journal(options.results / f"{name}.unfinished.jsonl", identity)
        with console.progress() as progress:
            measured = measure(options, progress)
        now = datetime.now(timezone.utc)
        document = {
            "benchmark": name,
            "created": now.isoformat(timespec="seconds"),
            "arguments": arguments,
            "host": host.to_json() | {"last_level_cache_bytes": last_level_cache()},
        } | measured
        path = make_folder(options.results) / f"{name}-{now:%Y%m%dT%H%M%SZ}.json"
        with atomic_path(path) as partial:
            partial.write_text(to_json_text(document) + "\n", encoding="utf-8")
        if plot is not None:
            save_plot(path.with_suffix(".png"), document, plot)
        options.journal.close()
        console.result(lambda: document, lambda out: render(out, document))
        console.say(f"written: {path}")
    return 0


def save_plot(path: Path, document: dict, plot: Callable[[Figure, dict], None]) -> None:
    """Draw a document as PNG, with the machine below."""
    host = document["host"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    plot(figure, document)
    place = f"{host['cpu']}, {host['cores']} cores, {host['os']}; SPK4 kernel {host['kernel']}"
    figure.supxlabel(f"{place}; {document['created'][:10]}", fontsize=8)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def in_turns(
    subjects: Mapping[str, Callable[[], float]],
    rounds: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """What each subject returns in each round: A B C, C B A, A B C, ..., so that a drift favours none."""
    measured: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        order = list(subjects) if number % 2 == 0 else list(reversed(subjects))
        for name in order:
            measured[name].append(subjects[name]())
        advance(number + 1, rounds)
    return measured


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast as the baseline in the same round: median, smallest, largest of the rounds."""
    each = [theirs / own for own, theirs in zip(seconds, baseline, strict=True)]
    return statistics.median(each), min(each), max(each)


def require_fast_kernel(host: HostFacts) -> None:
    """Raises SpikeQuantError if spike products use plain C on a CPU that has AVX2, unless that is forced."""
    if host.kernel == "plain-c" and "avx2" in host.features and not os.environ.get(_FORCE_VARIABLE):
        raise SpikeQuantError(
            "this runtime computes spike products in plain C though the CPU has AVX2",
            "run `spikequant build`",
        )


def require_fast_path(kind: str, buffers: Sequence[str], host: HostFacts) -> None:
    """Raises SpikeQuantError if SPK4 or Q4_0 weights are not in the buffer type of their fast kernels.

    buffers: names of the buffer types that hold weights of a type.
    """
    wanted = dict.fromkeys(SPIKE_OPTIONS, SPIKE_BUFFER)
    if "avx2" in host.features and REPACK_BUFFER in buffer_types():
        wanted[BASELINE_TYPE] = REPACK_BUFFER
    if kind in wanted and wanted[kind] not in buffers:
        raise SpikeQuantError(
            f"{kind.upper()} weights are in {', '.join(buffers) or 'no buffer'} instead of {wanted[kind]}, "
            "so a slow path would be measured",
            "run `spikequant doctor`; for matrices, use rows that are a multiple of 8",
        )


def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU; 64 MiB where the system does not tell."""
    sizes = []
    for file in _CACHES.glob("index*/size"):
        with suppress(OSError):
            found = re.fullmatch(r"(\d+)([KM]?)", file.read_text(encoding="ascii").strip())
            if found:
                sizes.append(int(found.group(1)) * _UNITS[found.group(2)])
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def show_table(out: rich.console.Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with names on the left and numbers on the right; the rows of SPK4 stand out."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in titles:
        text = title in ("model", "type", "path", "isa", "text")
        table.add_column(title, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="bold" if SPIKE_TYPE in row else None)
    out.print(table)


def show_notes(out: rich.console.Console, document: dict) -> None:
    """The machine, and the sentences that belong under a table."""
    host = document["host"]
    notes = [f"{host['cpu']}, {host['cores']} cores, kernel {host['kernel']}, {host['os']}"]
    for line in notes + [f"Note: {note}" for note in document.get("notes", [])]:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def ratio_text(ratio: float | None, low: float | None, high: float | None) -> str:
    """A ratio and the range of its rounds."""
    return "" if ratio is None else f"{ratio:.2f} ({low:.2f}–{high:.2f})"
