"""Accuracy, size and speed of several versions of a model, in one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .divergence import Divergence, DivergenceResult, divergence
from .energy.comparison import compared_energies
from .errors import InputError
from .evaluation import DEFAULT_CTX
from .format import KEY_CALIBRATION
from .ggml_patch.progress import Progress, SilentProgress
from .gguf_header import GGUFHeader, read_header
from .host import HostFacts, available_memory, default_threads, host_facts
from .inspect_file import model_size, model_type
from .perplexity import as_text
from .speed import DEFAULT_DECODE, DEFAULT_PROMPT, DEFAULT_ROUNDS, Speed, speed
from .texts import Text
from .variants import REFERENCE_TYPE, Variants, quantized_tensor_types

__all__ = ["BASELINE_TYPE", "Comparison", "ComparisonRow", "compare", "compare_types"]

BASELINE_TYPE = "q4_0"
"""Speeds are given relative to the model of this type."""

_FLOAT_ORDER = ("f32", "bf16", "f16")
_MEMORY_SHARE = 0.6  # of the available memory that models may take side by side
_MEMORY_FACTOR = 1.3  # weights, which kernels may lay out again, and a context


@dataclass(frozen=True)
class ComparisonRow:
    """One model.

    Attributes:
        name: to show.
        file: path.
        type: for example ``q4_0``.
        bytes: size of its files.
        bits_per_weight: tensor bits per parameter.
        ppl, ppl_stderr, kld, kld_stderr, same_top, ppl_ratio: as of Divergence; of the reference 0 and 1.
        prompt_tps, decode_tps: tokens per second; None if not measured.
        prompt_ratio, decode_ratio: relative to the Q4_0 model, measured in turns with it; None without one.
        prompt_ratio_range, decode_ratio_range: smallest and largest of the rounds.
        energy: modelled, of the linear layers in a prompt: see energy.comparison.compared_energies.
    """

    name: str
    file: str
    type: str
    bytes: int
    bits_per_weight: float | None
    ppl: float
    ppl_stderr: float
    kld: float
    kld_stderr: float
    same_top: float
    ppl_ratio: float
    prompt_tps: float | None = None
    decode_tps: float | None = None
    prompt_ratio: float | None = None
    decode_ratio: float | None = None
    prompt_ratio_range: tuple[float, float] | None = None
    decode_ratio_range: tuple[float, float] | None = None
    energy: dict | None = None


@dataclass(frozen=True)
class Comparison:
    """A table of models.

    Attributes:
        reference: name of the row whose predictions count as right.
        text, ctx, chunks: what was evaluated.
        threads: that computed.
        rounds, prompt, decode: of the speed test; rounds is 0 if there was none.
        notes: sentences that belong under the table.
        rows: the reference first.
    """

    reference: str
    text: Text
    ctx: int
    chunks: int
    threads: int
    rounds: int
    prompt: int
    decode: int
    notes: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    host: HostFacts = field(repr=False)

    def to_json(self) -> dict:
        """The comparison as plain JSON types."""
        return {
            "reference": self.reference,
            "text": self.text.to_json() | {"chunks": self.chunks, "ctx": self.ctx},
            "host": self.host.to_json() | {"threads": self.threads},
            "speed": {"rounds": self.rounds, "prompt": self.prompt, "decode": self.decode},
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
        }


def compare_types(
    source: str | Path,
    types: Sequence[str],
    text: Text | str | Path | None = None,
    *,
    imatrix: str | Path | None = None,
    calibration: str | Path | None = None,
    calibration_chunks: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Comparison:
    """Compare versions of one GGUF model, making in the cache what is missing.

    Args:
        source: GGUF file of floats, or of a stock type; its F16 version is the reference, listed or not.
        types: names as of `Variants.make`.
        imatrix: importance matrix for the quantizers.
        calibration: text to calibrate SPK4 on; None for the converter's default.
        calibration_chunks: of that text; None for the converter's default.
        options: ctx, chunks, rounds, prompt, decode as of `compare`.

    Raises:
        InputError, UnsupportedError, RuntimeMissingError, OutputError: see `Variants` and `compare`.
    """
    wanted = list(dict.fromkeys(kind.strip().lower() for kind in types))
    progress = progress or SilentProgress()
    threads = threads if threads is not None else default_threads()
    checked = as_text(text)  # before the long work begins
    variants = Variants(
        source,
        imatrix=imatrix,
        calibration=calibration,
        calibration_chunks=calibration_chunks,
        threads=threads,
        progress=progress,
    )
    if REFERENCE_TYPE in wanted:
        wanted.remove(REFERENCE_TYPE)
    wanted.insert(0, REFERENCE_TYPE)
    made = {kind: variants.make(kind) for kind in wanted}
    notes = []
    if quantized_tensor_types(variants.header):
        grid = variants.source_type.upper()
        notes.append(
            f"The source is {grid}, so the F16 reference's weights lie on its grid: {grid} is no fair peer, "
            "and unrotated formats with like groups look better here than on a model of floats."
        )
    return compare(
        list(made.values()),
        checked,
        names=[kind.upper() for kind in made],
        reference=made[REFERENCE_TYPE],
        threads=threads,
        notes=notes,
        progress=progress,
        **options,  # type: ignore[arg-type]
    )


def compare(
    models: Sequence[str | Path],
    text: Text | str | Path | None = None,
    *,
    reference: str | Path | None = None,
    names: Sequence[str] | None = None,
    ctx: int = DEFAULT_CTX,
    chunks: int | None = None,
    threads: int | None = None,
    rounds: int = DEFAULT_ROUNDS,
    prompt: int = DEFAULT_PROMPT,
    decode: int = DEFAULT_DECODE,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Compare finished GGUF models with the same vocabulary.

    Args:
        models: two or more files.
        reference: one of them or another file; the first float model if None, else the one of most bits.
        names: of the rows; file names if None.
        ctx, chunks: as of `perplexity`.
        rounds, prompt, decode: as of `speed`; rounds = 0 leaves speed out.
        notes: sentences for under the table.

    Raises:
        InputError: there are fewer than two models, or they do not fit together; else as `Model`.
    """
    progress = progress or SilentProgress()
    paths = list(dict.fromkeys(Path(model) for model in models))
    if names is None:
        labels = dict(zip(paths, _file_names(paths), strict=True))
    else:
        labels = dict(zip(map(Path, models), names, strict=True))
    base = Path(reference) if reference is not None else _choose_reference(paths)
    if base not in paths:
        labels[base] = base.stem
    ordered = [base, *(path for path in paths if path != base)]
    if len(ordered) < 2:
        raise InputError("a comparison needs at least two models", "give another model, or --types")
    source = as_text(text)
    headers = {path: read_header(path) for path in ordered}
    kinds = {path: model_type(header) for path, header in headers.items()}
    sizes = {path: model_size(path) for path in ordered}
    accuracy = _accuracy(
        ordered, {path: sizes[path].file_bytes for path in ordered}, source, ctx, chunks, threads, progress
    )
    notes = [*notes, *_calibration_notes(headers.values(), source)]
    baseline = next((path for path in ordered if kinds[path] == BASELINE_TYPE), None)
    progress.step("energy")
    energies = compared_energies(headers, source, largest_tokens=2 * ctx, baseline=baseline, threads=threads)
    speeds: dict[str, Speed] = {}
    if rounds:
        if baseline is None:
            notes.append(f"Without a {BASELINE_TYPE.upper()} model there are no relative speeds.")
        measured = speed(
            ordered, baseline, prompt=prompt, decode=decode, rounds=rounds, threads=threads, progress=progress
        )
        speeds = {each.model: each for each in measured.models}
    by_model = {each.model: each for each in (accuracy.reference, *accuracy.models)}
    return Comparison(
        reference=labels[base],
        text=source,
        ctx=ctx,
        chunks=accuracy.chunks,
        threads=accuracy.threads,
        rounds=rounds,
        prompt=prompt,
        decode=decode,
        notes=tuple(notes),
        rows=tuple(
            ComparisonRow(
                name=labels[path],
                file=str(path),
                type=kinds[path],
                bytes=sizes[path].file_bytes,
                bits_per_weight=sizes[path].bits_per_weight,
                **_accuracy_fields(by_model[str(path)]),
                **_speed_fields(speeds.get(str(path))),
                energy=energies[path],
            )
            for path in ordered
        ),
        host=host_facts(),
    )


def _accuracy(
    ordered: list[Path],
    file_bytes: dict[Path, int],
    text: Text,
    ctx: int,
    chunks: int | None,
    threads: int | None,
    progress: Progress,
) -> DivergenceResult:
    """All models side by side if they fit into memory, else the reference with one other at a time."""
    base, others = ordered[0], ordered[1:]
    memory = available_memory()
    needed = _MEMORY_FACTOR * sum(file_bytes.values())
    together = memory is None or needed < _MEMORY_SHARE * memory
    groups = [others] if together else [[other] for other in others]
    results = [
        divergence(base, group, text, ctx=ctx, chunks=chunks, threads=threads, progress=progress)
        for group in groups
    ]
    first = results[0]
    return DivergenceResult(
        first.reference,
        tuple(model for result in results for model in result.models),
        first.text,
        first.ctx,
        first.chunks,
        first.tokens,
        first.threads,
        sum(result.seconds for result in results),
        first.host,
    )


def _calibration_notes(headers: Iterable[GGUFHeader], text: Text) -> list[str]:
    """What spike models were calibrated on; it matters most if the evaluated text is of the same kind."""
    notes = []
    for found in dict.fromkeys(str(header.metadata.get(KEY_CALIBRATION, "")) for header in headers):
        if found and text.file is None and found.startswith(text.name.split(",")[0]):
            notes.append(
                f"SPK4 was calibrated on another part of the text evaluated here, which favours it: {found}."
            )
        elif found:
            notes.append(f"SPK4 was calibrated on: {found}.")
    return notes


def _choose_reference(paths: Sequence[Path]) -> Path:
    if not paths:
        raise InputError("there are no models to compare", "give at least two")
    kinds = [model_type(read_header(path)) for path in paths]
    for kind in _FLOAT_ORDER:
        if kind in kinds:
            return paths[kinds.index(kind)]
    return max(paths, key=lambda path: model_size(path).bits_per_weight or 0.0)


def _file_names(paths: Sequence[Path]) -> list[str]:
    """Names without folder and suffix; with as much of the folder as makes them differ."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _accuracy_fields(result: Divergence) -> dict:
    is_reference = result.kld is None
    return {
        "ppl": result.ppl,
        "ppl_stderr": result.ppl_stderr,
        "kld": 0.0 if is_reference else result.kld,
        "kld_stderr": 0.0 if is_reference else result.kld_stderr,
        "same_top": 1.0 if is_reference else result.same_top,
        "ppl_ratio": 1.0 if is_reference else result.ppl_ratio,
    }


def _speed_fields(result: Speed | None) -> dict:
    fields: dict = {}
    for test in ("prompt", "decode"):
        timing = getattr(result, test, None)
        if timing is not None:
            fields[f"{test}_tps"] = timing.tps
            fields[f"{test}_ratio"] = timing.ratio
            if timing.ratio is not None:
                fields[f"{test}_ratio_range"] = (timing.ratio_min, timing.ratio_max)
    return fields
