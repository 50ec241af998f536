"""Runs a sweep: finished points are kept in the folder of the result and not measured again."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..converter.checkpoint import checkpoint_to_gguf, download, hub_id, open_checkpoint
from ..converter.lockstep import calibration_stretches
from ..converter.workspace import workspace
from ..errors import InputError, UnsupportedError
from ..evaluation import DEFAULT_CTX, Chunk, Model, plan_chunks, text_tokens
from ..files import file_sha256
from ..ggml_patch.cache import make_folder, short_hash
from ..ggml_patch.progress import Progress, SilentProgress
from ..gguf_header import read_header
from ..host import HostFacts, default_threads, host_facts
from ..inspect_file import model_type
from ..journal import Journal
from ..perplexity import as_text
from ..simulate.packages import require_packages
from ..texts import Text, default_calibration_text, read_text
from ..variants import SPIKE_TYPE, ConverterProgress, quantized_tensor_types
from .points import STUDIES, Point, plan_points

__all__ = ["DEFAULT_CALIBRATION_CHUNKS", "DEFAULT_CHUNKS", "SweepPoint", "SweepResult", "sweep"]

DEFAULT_CHUNKS, DEFAULT_CALIBRATION_CHUNKS = 4, 16
_QUICK_CHUNKS, _QUICK_CALIBRATION_CHUNKS = 2, 4
_JOURNAL = "sweep-points.jsonl"


@dataclass(frozen=True)
class SweepPoint:
    """A measured method.

    Attributes:
        study, name, series: as of Point.
        weight_bits, activation_bits: of standard codes.
        salient_share: of activation codes; of a baseline, of channels of more bits.
        silent_share: activation codes that are 0; None for a baseline.
        salient_weight_share: None for a baseline.
        ppl, ppl_stderr, ppl_ratio, ppl_ratio_stderr, kld, kld_stderr, same_top: as of Divergence.
        spikes_per_token: over all linear layers, with the coding of the sweep; None for a baseline.
        rate_spikes_per_token: the same values rate coded.
        seconds: taken.
        settings: of the method, flat.
    """

    study: str
    name: str
    series: str
    weight_bits: int
    activation_bits: int
    salient_share: float
    silent_share: float | None
    salient_weight_share: float | None
    ppl: float
    ppl_stderr: float
    ppl_ratio: float
    ppl_ratio_stderr: float
    kld: float
    kld_stderr: float
    same_top: float
    spikes_per_token: float | None
    rate_spikes_per_token: float | None
    seconds: float
    settings: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class SweepResult:
    """Measured points of one model on one text.

    Attributes:
        reference: name, file, sha256, architecture, ppl and ppl_stderr of the float model.
        text, ctx, chunks: what was evaluated.
        calibration, calibration_chunks: what weights were calibrated on, in chunks of the same size.
        threads: that computed.
        command: of the command line that gives this.
        created: time, ISO 8601.
        notes: sentences that belong under the tables.
        points: in the order of their studies.
        plots: file names beside the document.
    """

    reference: dict[str, Any]
    text: Text
    ctx: int
    chunks: int
    calibration: Text
    calibration_chunks: int
    threads: int
    command: str
    created: str
    notes: tuple[str, ...]
    points: tuple[SweepPoint, ...]
    host: HostFacts = field(repr=False)
    plots: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return {
            "reference": self.reference,
            "text": self.text.to_json() | {"chunks": self.chunks, "ctx": self.ctx},
            "calibration": self.calibration.to_json() | {"chunks": self.calibration_chunks, "ctx": self.ctx},
            "host": self.host.to_json() | {"threads": self.threads},
            "command": self.command,
            "created": self.created,
            "notes": list(self.notes),
            "plots": list(self.plots),
            "points": [asdict(point) for point in self.points],
        }


def sweep(
    source: str | Path,
    text: Text | str | Path | None = None,
    folder: str | Path = "sweep",
    *,
    calibration: Text | str | Path | None = None,
    what: Sequence[str] | str = "all",
    quick: bool = False,
    chunks: int | None = None,
    calibration_chunks: int | None = None,
    ctx: int = DEFAULT_CTX,
    coding: str = "ttfs",
    threads: int | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Measures methods on a model in torch; texts are cut and scored as llama-perplexity does.

    Args:
        source: GGUF file of floats or a stock type, folder of a checkpoint, or its id on Hugging Face. In
            float32 it is the reference.
        text: to evaluate; `default_evaluation_text` if None.
        folder: for finished points, which a later sweep of the same model, texts and chunks finds there.
        calibration: text to calibrate on; Python's documentation if None.
        what: studies, see `plan_points`. Finished points of others in the folder are in the result, too.
        quick: fewer points and chunks.
        chunks, ctx: of the text, as of `perplexity`.
        calibration_chunks: of the calibration text.
        coding: of the spikes that are counted, ``ttfs`` or ``rate``.

    Raises:
        SpikeQuantError: torch or transformers are missing.
        InputError, UnsupportedError: a file cannot be read, or transformers does not know the architecture.
    """
    progress = progress or SilentProgress()
    wanted = plan_points(what, quick, coding)
    evaluated = as_text(text)
    calibrated = _calibration_text(calibration)
    chunks = chunks or (_QUICK_CHUNKS if quick else DEFAULT_CHUNKS)
    calibration_chunks = calibration_chunks or (
        _QUICK_CALIBRATION_CHUNKS if quick else DEFAULT_CALIBRATION_CHUNKS
    )
    threads = threads or default_threads()
    _import_torch(threads)
    folder = make_folder(Path(folder))
    with _gguf(source, folder, progress) as (path, name):
        progress.step("hash", path.name)
        digest = file_sha256(path, progress.advance)
        plan, parts = _tokens(path, evaluated, calibrated, ctx, chunks, calibration_chunks)
        identity = [digest, evaluated.sha256, ctx, len(plan), calibrated.sha256, len(parts), _code_digest()]
        journal = Journal(folder / _JOURNAL, identity)
        with ExitStack() as stack:
            bench = _LazyBench(stack, path, plan, parts, folder, identity, progress)
            reference = journal.rows("reference", lambda: [bench.reference()])[0]
            different = list({_key(point): point for point in reversed(_grouped(wanted))}.values())[::-1]
            for number, point in enumerate(different):
                title = f"{point.study}: {point.name} ({number + 1} of {len(different)})"
                journal.rows(_key(point), lambda point=point, title=title: [bench.measure(point, title)])
        bench.clean()
        for point in wanted:
            journal.rows(_label(point), lambda point=point: journal[_key(point)])
        header = read_header(path)
    everything = plan_points("all", False, coding) + plan_points("all", True, coding) + wanted
    shown = [point for point in dict.fromkeys(everything) if _label(point) in journal]
    notes = [*reference.pop("notes"), *_notes(header)]
    return SweepResult(
        reference={
            "name": Path(name).stem if name.endswith(".gguf") else name,
            "file": os.fspath(source),
            "sha256": digest,
            "architecture": str(header.metadata.get("general.architecture", "")),
        }
        | reference,
        text=evaluated,
        ctx=ctx,
        chunks=len(plan),
        calibration=calibrated,
        calibration_chunks=len(parts),
        threads=threads,
        command=_command(name, evaluated, calibrated, wanted, quick, chunks, calibration_chunks, ctx, coding),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        notes=tuple(notes),
        points=tuple(
            _measured(point, journal) for point in sorted(shown, key=lambda point: STUDIES.index(point.study))
        ),
        host=host_facts(),
    )


class _LazyBench:
    """The workbench, opened when something must be measured."""

    def __init__(
        self,
        stack: ExitStack,
        path: Path,
        plan: list[Chunk],
        parts: list[NDArray[np.int32]],
        folder: Path,
        identity: list,
        progress: Progress,
    ) -> None:
        self._stack, self._arguments = stack, (path, plan, parts)
        self._scratch = folder / f"scratch-{short_hash(json.dumps(identity))[:12]}"
        self._progress = progress
        self._bench: Any = None

    def reference(self) -> dict[str, Any]:
        bench = self._open()
        ppl, ppl_stderr = bench.reference()
        return {"ppl": ppl, "ppl_stderr": ppl_stderr, "notes": bench.notes}

    def measure(self, point: Point, title: str) -> dict[str, Any]:
        return self._open().measure(point.method, title)

    def clean(self) -> None:
        """Removes what only an unfinished sweep needs."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _open(self) -> Any:
        if self._bench is None:
            workbench = importlib.import_module(".workbench", __package__)  # imports torch
            self._bench = self._stack.enter_context(
                workbench.Workbench(*self._arguments, make_folder(self._scratch), self._progress)
            )
        return self._bench


# ---- inputs


def _import_torch(threads: int) -> None:
    require_packages("torch", "transformers", "accelerate")
    # Threads that spin while they wait for work slow each other down many times where other programs compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(threads)


@contextmanager
def _gguf(source: str | Path, folder: Path, progress: Progress) -> Iterator[tuple[Path, str]]:
    """The GGUF file of a model and the model's name; of a checkpoint a temporary one in `folder`."""
    path = Path(source)
    if path.is_dir() or (not path.exists() and hub_id(os.fspath(source))):
        shown = ConverterProgress(progress)
        if path.is_dir():
            checkpoint = open_checkpoint(path)
        else:
            checkpoint = open_checkpoint(download(os.fspath(source), shown), os.fspath(source))
        with workspace(folder) as temporary:
            yield checkpoint_to_gguf(checkpoint, temporary, shown), checkpoint.name
        return
    if model_type(read_header(path)) == SPIKE_TYPE:
        raise UnsupportedError(
            f"{path} is a spike model, and a sweep starts from floats", "give the model that it was made from"
        )
    yield path, path.name


def _calibration_text(text: Text | str | Path | None) -> Text:
    if text is None:
        return default_calibration_text()
    return text if isinstance(text, Text) else read_text(text)


def _tokens(
    path: Path, text: Text, calibration: Text, ctx: int, chunks: int, calibration_chunk_count: int
) -> tuple[list[Chunk], list[NDArray[np.int32]]]:
    """Both texts in llama.cpp's tokens."""
    if chunks < 1 or calibration_chunk_count < 1:
        raise InputError("the numbers of chunks must be positive", "correct the arguments")
    with Model(path, ctx_size=ctx) as model:
        plan = plan_chunks(text_tokens(model, text.data, text.name, ctx), ctx, chunks, model.bos)
        parts = calibration_stretches(model, calibration.data, calibration.name, ctx, calibration_chunk_count)
    return plan, list(parts)


# ---- points


def _grouped(points: Sequence[Point]) -> list[Point]:
    """The points, those with the same weights one after the other."""
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        groups.setdefault(point.method.weights_key(), []).append(point)
    return [point for group in groups.values() for point in group]


def _label(point: Point) -> str:
    """Case of the journal for a point that was asked for; studies may share what was measured."""
    return f"{point.study}: {point.name}: {_key(point)}"


def _key(point: Point) -> str:
    """Case of the journal for a measurement."""
    return json.dumps(point.method.to_json(), sort_keys=True)


def _measured(point: Point, journal: Journal) -> SweepPoint:
    fields = journal[_label(point)][0]
    settings = point.method.settings
    return SweepPoint(
        point.study,
        point.name,
        point.series,
        settings.weight_bits,
        settings.activation_bits,
        settings=point.method.to_json(),
        **fields,
    )


def _notes(header: Any) -> list[str]:
    notes = [
        "Embeddings, output and KV cache stay in float32; only the linear layers of the blocks are simulated."
    ]
    types = quantized_tensor_types(header)
    if types:
        grid = ", ".join(types)
        notes.append(f"The source is {grid}: weights on that grid flatter unrotated formats with groups.")
    return notes


def _command(
    name: str,
    text: Text,
    calibration: Text,
    points: Sequence[Point],
    quick: bool,
    chunks: int,
    calibration_chunks: int,
    ctx: int,
    coding: str,
) -> str:
    """The command line, of paths the last component."""
    words = ["spikequant", "sweep", name]
    for option, given in (("-f", text), ("--calibration", calibration)):
        if given.file is not None:
            words += [option, Path(given.file).name]
    studies = list(dict.fromkeys(point.study for point in points))
    words += ["--what", "all" if len(studies) == len(STUDIES) else ",".join(studies)]
    words += ["--quick"] if quick else []
    words += ["--chunks", str(chunks), "--calibration-chunks", str(calibration_chunks)]
    words += ["--ctx-size", str(ctx)] if ctx != DEFAULT_CTX else []
    words += ["--coding", coding] if coding != "ttfs" else []
    return shlex.join(words)


def _code_digest() -> str:
    """Changes with the code that measures, so that points of other code are not mixed with new ones."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(__version__.encode())
    for file in sorted([*(package / "simulate").glob("*.py"), Path(__file__).with_name("workbench.py")]):
        # of what is computed, not of how it is written
        digest.update(ast.dump(ast.parse(file.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16]
