"""From a model to a spike model: the functions convert() and plan() of this package."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf.constants import MODEL_ARCH_NAMES

from spikequant_gguf.activations import check_encoder
from spikequant_gguf.errors import InputError
from spikequant_gguf.format import DEFAULT_SALIENCE, DEFAULT_SILENCE
from spikequant_gguf.runtime import native

from .checkpoint import Checkpoint, checkpoint_tensors, checkpoint_to_gguf, download, hub_id, open_checkpoint
from .fingerprint import fingerprint_of_source
from .importance import Importance, read_importance
from .job import Job
from .metadata import texts
from .naming import default_name, fill_template
from .overrides import read_overrides
from .plan import ConversionPlan, TensorRow, make_plan, parse_type_rules
from .progress import Progress, no_progress
from .provenance import Provenance, command_line, source_digest
from .quantize import Backend, Workers
from .recipe import Calibrate, Recipe, TensorStatistics
from .source import Source, gguf_files, open_gguf
from .split import check_parts, check_size, split_model
from .workspace import workspace
from .write import OutputFile, check_space

__all__ = ["ConvertOptions", "ConvertReport", "convert", "plan"]


@dataclass(frozen=True)
class ConvertOptions:
    """What the user can choose. The defaults make every linear layer SPK4.

    Attributes:
        salience: salience threshold of the encoder, between 0 and 7.5.
        silence: silence threshold of the encoder in steps, 0 to 4.
        importance: an importance matrix of llama-imatrix, or None.
        tensor_types: ``REGEX=TYPE``, for example ``ffn_down=q8_0``; the last one that matches a name counts.
        pure: make embeddings and output SPK4, too.
        threads: number of threads; None for one per core. It does not change the result.
        force: replace an existing output file.
        resume: go on with what the same conversion had written when it was stopped; False to start over.
        metadata: JSON file of authorship, with ``general.*`` keys; None for what the source says.
        model_name: for general.name, instead of the source's.
        override_kv: other keys of the output's metadata, each ``KEY=TYPE:VALUE``.
        split_max_size: largest size of a file of the output, as ``4G``; None for one file.
    """

    salience: float = DEFAULT_SALIENCE
    silence: float = DEFAULT_SILENCE
    importance: Path | None = None
    tensor_types: tuple[str, ...] = ()
    pure: bool = False
    threads: int | None = None
    force: bool = False
    resume: bool = True
    metadata: Path | None = None
    model_name: str | None = None
    override_kv: tuple[str, ...] = ()
    split_max_size: str | None = None

    def command_options(self) -> list[str]:
        """Those options of the command line that the result depends on; of paths the last component."""
        words = []
        if self.salience != DEFAULT_SALIENCE:
            words += ["--salience", str(self.salience)]
        if self.silence != DEFAULT_SILENCE:
            words += ["--silence", str(self.silence)]
        if self.importance is not None:
            words += ["--imatrix", self.importance.name]
        for rule in self.tensor_types:
            words += ["--tensor-type", rule]
        if self.metadata is not None:
            words += ["--metadata", self.metadata.name]
        if self.model_name is not None:
            words += ["--model-name", self.model_name]
        for override in self.override_kv:
            words += ["--override-kv", override]
        return [*words, "--pure"] if self.pure else words


@dataclass(frozen=True)
class ConvertReport:
    """What convert() did.

    Attributes:
        path: of the written file; of the first one if the model was split.
        file_bytes: its size, or that of all files.
        source: name of the source.
        source_sha256: hex digest of the source.
        calibration: the text that was used, or "none".
        plan: what became of each tensor.
        statistics: of each SPK4 tensor, by name.
        salient_input_share: of the calibrated layers' inputs, on the calibration text; None without one.
        warnings: sentences that the user should read.
        resumed: number of tensors that a stopped conversion had written.
        seconds: time taken.
        files: all that were written.
    """

    path: Path
    file_bytes: int
    source: str
    source_sha256: str
    calibration: str
    plan: ConversionPlan
    statistics: dict[str, TensorStatistics]
    salient_input_share: float | None
    warnings: tuple[str, ...]
    resumed: int
    seconds: float
    files: tuple[Path, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model, all tensors counted."""
        return self.plan.bits_per_weight

    @property
    def uncalibrated(self) -> tuple[str, ...]:
        """Tensors that a calibration did not reach, or not all of them; none if there was no calibration."""
        if self.calibration == Recipe.calibration:
            return ()
        return tuple(name for name, each in self.statistics.items() if each.calibrated_weights < each.weights)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "path": str(self.path),
            "files": [str(file) for file in self.files],
            "bytes": self.file_bytes,
            "source": self.source,
            "source_sha256": self.source_sha256,
            "calibration": self.calibration,
            "salient_input_share": self.salient_input_share,
            "bits_per_weight": self.bits_per_weight,
            "plan": self.plan.to_json(),
            "statistics": {
                name: {
                    "salient_weight_share": statistics.salient_weight_share,
                    "salient_input_share": statistics.salient_input_share,
                    "relative_error": statistics.relative_error,
                }
                for name, statistics in self.statistics.items()
            },
            "uncalibrated": list(self.uncalibrated),
            "warnings": list(self.warnings),
            "resumed": self.resumed,
            "seconds": self.seconds,
        }


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    *,
    calibrate: Calibrate | None = None,
    backend: Backend | None = None,
) -> ConvertReport:
    """Converts a model to SPK4.

    Memory is bounded by the largest piece that the quantizer wants, not by the model. The same source and
    options give the same bytes, whatever the number of threads.

    Args:
        source: path of a GGUF file, folder of a Hugging Face checkpoint, or its id there (``owner/name``).
        out: path of the output, ``{ftype}`` in it becomes ``spk4``; a folder gets a file named after
            llama.cpp's convention; None is the current folder.
        options: None for the defaults.
        progress: receives every step.
        calibrate: makes a Recipe from the opened source; None for quantization without calibration.
        backend: quantizes and dequantizes; None for the patched runtime.

    Returns:
        What was done. The file is complete, checked, and on disk.

    Raises:
        InputError: the source is missing, damaged, SPK4 already, or holds numbers that are not finite.
        UnsupportedError: its architecture, or no tensor of it can become SPK4.
        OutputError: the output exists, is the source, cannot be written, is being written by another
            process, or was begun by another conversion. What the same conversion could go on with is left
            beside it then, and after an interruption; nothing after other errors.
        RuntimeMissingError: the patched runtime is not there.
    """
    started = time.perf_counter()
    options, progress = options or ConvertOptions(), progress or no_progress
    _check(options)
    backend = backend or native()
    importance = read_importance(options.importance) if options.importance is not None else None
    model = _find(source, progress)
    overrides = read_overrides(options.metadata, options.model_name, options.override_kv)
    path = fill_template(Path(out)) if out is not None and not Path(out).is_dir() else None

    folder = path.parent if path is not None else Path(out or "")
    with ExitStack() as stack:
        # the name is claimed before any work is done, and let go last
        output = None if path is None else stack.enter_context(_output(path, options, model))
        opened = stack.enter_context(_open(model, folder, backend, progress))
        workers = stack.enter_context(Workers(options.threads))
        if output is None:
            path = folder / default_name({**opened.metadata, **texts(overrides)}, model.name)
            output = stack.enter_context(_output(path, options, model))
        planned = _plan(opened, options, importance)
        output.check_room(planned.target_bytes)
        digest = source_digest(model.files, progress)
        model.check_unchanged()
        known = fingerprint_of_source(digest, backend, importance) if options.resume else None
        if known is not None:
            output.check_fingerprint(known)
        recipe = calibrate(opened, planned, progress) if calibrate is not None else Recipe()
        _check_recipe(recipe, planned, opened)
        provenance = Provenance(
            source=model.name,
            source_sha256=digest,
            command=command_line(model.name, [*options.command_options(), *recipe.options]),
            calibration=recipe.calibration,
            salience=options.salience,
            silence=options.silence,
            encoder=recipe.encoder,
            importance=importance,
            overrides=overrides,
        )
        job = Job(opened, planned, recipe, importance, backend, workers)
        statistics = job.write(output, provenance, known, progress)
        recipe.finished()
    files = (path,)
    if options.split_max_size is not None:
        files = split_model(path, options.split_max_size, options.force)
    return ConvertReport(
        path=files[0],
        file_bytes=sum(file.stat().st_size for file in files),
        source=model.name,
        source_sha256=digest,
        calibration=recipe.calibration,
        plan=planned,
        statistics=statistics,
        salient_input_share=recipe.salient_input_share,
        warnings=planned.warnings,
        resumed=output.n_resumed,
        seconds=time.perf_counter() - started,
        files=files,
    )


def plan(
    source: str | os.PathLike[str], options: ConvertOptions | None = None, progress: Progress | None = None
) -> ConversionPlan:
    """What convert() would do, without writing anything: the dry run. Arguments and errors as there.

    A GGUF source needs no runtime for it. Of a checkpoint, llama.cpp's converter names the tensors.
    """
    options, progress = options or ConvertOptions(), progress or no_progress
    _check(options)
    importance = read_importance(options.importance) if options.importance is not None else None
    model = _find(source, progress)
    if model.checkpoint is None:
        with _open(model, Path(), None, progress) as opened:
            return _plan(opened, options, importance)
    with tempfile.TemporaryDirectory(prefix="spikequant-") as folder:
        architecture, tensors = checkpoint_tensors(model.checkpoint, Path(folder))
    return _make_plan(architecture, tensors, options, importance)


# ---- the source


@dataclass(frozen=True)
class _Model:
    """What the user gave.

    Attributes:
        name: without its path.
        files: that it consists of, by name.
        checkpoint: if it is one; else the files are GGUF.
    """

    name: str
    files: dict[str, Path]
    checkpoint: Checkpoint | None = None

    def check_unchanged(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.check_unchanged()  # GGUF files are kept open and checked later


def _find(source: str | os.PathLike[str], progress: Progress) -> _Model:
    text = os.fspath(source)
    if "\0" in text:
        raise InputError(f"{text}: no path has a NUL in it", "give the path of a file or folder, or an id")
    path = Path(text)
    try:
        if text and path.is_dir():
            found = open_checkpoint(path)
        elif path.exists() or not hub_id(text):
            name, paths = gguf_files(path)
            return _Model(name, {part.name: part for part in paths})
        else:
            found = open_checkpoint(download(text, progress), text)
    except OSError as error:
        raise InputError(
            f"{text}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    return _Model(found.name, found.files, found)


def _output(path: Path, options: ConvertOptions, model: _Model) -> OutputFile:
    if options.split_max_size is not None:
        check_parts(path, options.force)
    return OutputFile(path, options.force, model.files.values())


@contextmanager
def _open(model: _Model, folder: Path, backend: Backend | None, progress: Progress) -> Iterator[Source]:
    """Opens the source; a checkpoint by way of a temporary GGUF file in `folder`."""
    with ExitStack() as stack:
        if model.checkpoint is None:
            source = open_gguf(next(iter(model.files.values())), backend)
        else:
            check_space(folder, model.checkpoint.gguf_bytes)
            temporary = stack.enter_context(workspace(folder))
            path = checkpoint_to_gguf(model.checkpoint, temporary, progress)
            source = open_gguf(path, backend, model.checkpoint.folder)
        yield stack.enter_context(source)


# ---- checks and planning


def _check(options: ConvertOptions) -> None:
    check_encoder(options.salience, options.silence)
    if options.split_max_size is not None:
        check_size(options.split_max_size)
    if options.threads is not None and options.threads < 1:
        raise InputError(f"{options.threads} threads cannot do the work", "use 1 or more")


def _plan(source: Source, options: ConvertOptions, importance: Importance | None) -> ConversionPlan:
    tensors = [(tensor.name, tensor.shape, tensor.type) for tensor in source.tensors.values()]
    unknown = source.architecture not in MODEL_ARCH_NAMES.values()
    warning = (
        f"'{source.architecture}' is no architecture known here; llama.cpp may not be able to run the result"
    )
    return _make_plan(source.architecture, tensors, options, importance, (warning,) if unknown else ())


def _make_plan(
    architecture: str,
    tensors: list[TensorRow],
    options: ConvertOptions,
    importance: Importance | None,
    warnings: tuple[str, ...] = (),
) -> ConversionPlan:
    rules = parse_type_rules(options.tensor_types)
    planned = make_plan(
        architecture, tensors, rules, pure=options.pure, has_importance=importance is not None
    )
    if importance is not None:
        importance.check((tensor.name, tensor.shape) for tensor in planned.spiking)
        unknown = [tensor.name for tensor in planned.spiking if tensor.name not in importance]
        if unknown:
            warnings += (
                f"the importance matrix does not know {len(unknown)} of {len(planned.spiking)} tensors, "
                f"the first is '{unknown[0]}'",
            )
    return replace(planned, warnings=warnings + planned.warnings)


def _check_recipe(recipe: Recipe, planned: ConversionPlan, source: Source) -> None:
    """A calibration that names what is not there is wrong about the model."""
    spiking = {tensor.name for tensor in planned.spiking}
    unknown = [name for name in recipe.transforms if name not in source.tensors]
    unknown += [name for name in recipe.encoder if name not in spiking]
    if unknown:
        raise ValueError(f"the recipe names '{unknown[0]}', which is not in the plan")
