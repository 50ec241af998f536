"""Perplexity and divergence from F16 of a model's versions, on one or more texts.

Texts are given with -f, or they are those in the folder $SPIKEQUANT_DATA: files named *.raw and *.txt, except
for calibration and training texts. Without either it is Python's documentation.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import rich.console
from common import names, new_parser, positive, run, show_notes, show_table

from spikequant_gguf.compare import compare_types
from spikequant_gguf.errors import InputError
from spikequant_gguf.evaluation import DEFAULT_CTX
from spikequant_gguf.ggml_patch.progress import Progress
from spikequant_gguf.host import default_threads
from spikequant_gguf.models import smollm2
from spikequant_gguf.texts import DATA_VARIABLE, Text, default_evaluation_text, read_text
from spikequant_gguf.variants import DEFAULT_TYPES

DEFAULT_CHUNKS = 8
_NOT_FOR_EVALUATION = ("calib", "train")
_FIELDS = (
    *("name", "type", "bytes", "bits_per_weight", "ppl", "ppl_stderr", "ppl_ratio"),
    *("kld", "kld_stderr", "same_top"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with command-line arguments; returns 0, or raises SystemExit."""
    parser = new_parser(__doc__)
    parser.add_argument("-m", "--model", type=Path, help="GGUF model (SmolLM2-135M-Instruct)")
    parser.add_argument("-f", "--file", type=Path, action="append", help="text; may be given several times")
    parser.add_argument("--types", type=names, default=",".join(DEFAULT_TYPES), help="(%(default)s)")
    parser.add_argument("--calibration", type=Path, help="text to calibrate SPK4 on (Python's documentation)")
    parser.add_argument("-c", "--ctx-size", type=positive, default=DEFAULT_CTX, help="(%(default)s)")
    parser.add_argument("-t", "--threads", type=positive, help="(physical cores)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--chunks", type=positive, help=f"of each text ({DEFAULT_CHUNKS})")
    length.add_argument(
        "--quick", action="store_true", help=f"the default: {DEFAULT_CHUNKS} chunks of each text"
    )
    length.add_argument("--full", action="store_true", help="whole texts")
    options = parser.parse_args(argv)
    options.chunks = None if options.full else options.chunks or DEFAULT_CHUNKS
    options.threads = options.threads or default_threads()
    return run("accuracy", argv, options, measure, render)


def measure(options: argparse.Namespace, progress: Progress) -> dict:
    """The document of all texts and types: texts, notes, rows."""
    texts = find_texts(options.file)
    source = options.model or smollm2(progress=progress)
    rows, described, notes = [], [], []
    for text in texts:
        progress.step("text", text.name)
        comparison = compare_types(
            source,
            options.types,
            text,
            calibration=options.calibration,
            ctx=options.ctx_size,
            chunks=options.chunks,
            rounds=0,
            threads=options.threads,
            progress=progress,
        )
        described.append(comparison.to_json()["text"])
        notes += [note for note in comparison.notes if note not in notes]
        for row in comparison.rows:
            fields = asdict(row)
            rows.append(
                {"model": Path(source).stem, "text": text.name} | {key: fields[key] for key in _FIELDS}
            )
    return {"texts": described, "reference": comparison.reference, "notes": notes, "rows": rows}


def find_texts(files: Sequence[Path] | None) -> list[Text]:
    """The texts of the files, or those in $SPIKEQUANT_DATA, or Python's documentation.

    Raises:
        InputError: a file is no text, or the folder has none.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if files:
        return [read_text(path) for path in files]
    if not folder:
        return [default_evaluation_text()]
    found = [
        path
        for path in sorted(Path(folder).expanduser().glob("*"))
        if path.suffix in (".raw", ".txt") and not any(word in path.name for word in _NOT_FOR_EVALUATION)
    ]
    if not found:
        raise InputError(
            f"{DATA_VARIABLE} names {folder}, but there is no *.raw or *.txt in it",
            "put texts there, give one with -f, or unset it to use Python's documentation",
        )
    return [read_text(path) for path in found]


def render(out: rich.console.Console, document: dict) -> None:
    cells = []
    for row in document["rows"]:
        is_reference = row["name"] == document["reference"]
        divergence = [f"{row['kld']:.4f} ± {row['kld_stderr']:.4f}", f"{100 * row['same_top']:.1f} %"]
        cells.append(
            [
                row["text"],
                row["name"].lower(),
                f"{row['bits_per_weight']:.2f}" if row["bits_per_weight"] is not None else "",
                f"{row['ppl']:.3f} ± {row['ppl_stderr']:.3f}",
                *(["–", "–"] if is_reference else divergence),
            ]
        )
    show_table(out, ("text", "type", "bits/w", "PPL", "KLD", "same top"), cells)
    for text in document["texts"]:
        line = (
            f"{text['name']}: {text['chunks']} chunks of {text['ctx']} tokens, sha256 {text['sha256'][:8]}…"
        )
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    show_notes(out, document)


if __name__ == "__main__":
    raise SystemExit(main())
