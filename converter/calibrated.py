"""The calibrated quantizer: layer after layer on the inputs that the quantized model will really have.

`calibration(...)` gives the function that convert() takes as `calibrate`. It smooths channels, chooses the
salience threshold of each layer, and then quantizes the layers in the order in which the model computes them
(see lockstep.py) by GPTQ in the rotated basis (spike-calibrated.cpp), the output last if it is to become
SPK4, too. Experts are quantized for the inputs of the source model (experts.py); what is only looked up, as
embeddings are, without calibration.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import spikequant_gguf
from spikequant_gguf.errors import InputError, UnsupportedError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.files import file_sha256
from spikequant_gguf.format import BLOCK_SPK4, QK_SPK, TYPE_SPK4, blocks_to_bytes
from spikequant_gguf.ggml_api import MatMul
from spikequant_gguf.native import NativeLibrary, bind, load
from spikequant_gguf.rotation import rotate
from spikequant_gguf.texts import Text, default_calibration_text

from .estimate import DEFAULT_MEMORY, Estimate, default_chunks, estimate
from .experts import calibrate_experts, expert_tensors
from .inputs import moments, survey
from .layer_journal import LayerJournal
from .lockstep import MAX_STRETCHES, Lockstep, calibration_stretches
from .plan import ConversionPlan
from .presets import PRESETS, Preset, SiteEncoder, average_share, choose_salience, fixed_salience
from .progress import CALIBRATE, Progress
from .quantize import DirectQuantizer, Workers, measure
from .recipe import Calibrate, EncoderSettings, Recipe, Scaling, TensorStatistics, Transform
from .sensitivity import GradientModel, Sensitivity, sensitivity_chunks, sensitivity_cost
from .smoothing import fold, scaling_factors
from .source import Source
from .structure import Site, find_sites, output_matrix

__all__ = ["CalibrationOptions", "calibration", "journal_path"]

DEFAULT_PRESET = "balanced"
_TEXT_TOKENS = 64  # of the context that only splits the text into tokens
_PRODUCT_TOKENS = 512  # that a quantized layer computes at once
_DESCENT_SWEEPS, _ROUNDS = 4, 2


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        text: to read; None for the documentation that comes with Python.
        preset: name of one of PRESETS.
        salience: threshold of all layers; None to choose one for each layer.
        salient_share: of activations on average, where thresholds are chosen; None for the preset's.
        silence: silence threshold of all layers in steps; None for the preset's.
        ctx: tokens of a stretch of text.
        chunks: stretches, at most as many as the text has; None for the preset's, or less for a large model.
        threads: None for one per core. They change the time, not the result.
        damping: added to the diagonal of the moments, as a share of its mean.
        correction: share of the predictable deviation of a layer's inputs that its weights make up for.
        smoothing: scale channels before quantization, where the architecture's structure is known.
        sensitivity: measure how much errors of each layer matter; None for where transformers can compute the
            model and that takes no more than DEFAULT_MEMORY.
        output_damping: added to the diagonal of the moments of gradients, as a share of its mean.
        journal: file that keeps finished layers, so that an interrupted conversion can go on; None for none.
        announce: called with an estimate before the long part begins.
    """

    text: Text | None = None
    preset: str = DEFAULT_PRESET
    salience: float | None = None
    salient_share: float | None = None
    silence: float | None = None
    ctx: int = 512
    chunks: int | None = None
    threads: int | None = None
    damping: float = 0.2
    correction: float = 0.25
    smoothing: bool = True
    sensitivity: bool | None = None
    output_damping: float = 0.3
    journal: Path | None = None
    announce: Callable[[Estimate], None] | None = None

    def __post_init__(self) -> None:
        if not 1 <= (self.chunks or 1) <= MAX_STRETCHES or self.ctx < QK_SPK:
            raise InputError(
                f"{self.chunks} chunks of {self.ctx} tokens are no calibration",
                f"use 1 to {MAX_STRETCHES} chunks of {QK_SPK} tokens or more",
            )
        if self.preset not in PRESETS:
            raise InputError(f"there is no preset '{self.preset}'", f"choose from {', '.join(PRESETS)}")
        if self.salient_share is not None and not 0 <= self.salient_share <= 1:
            raise InputError(f"a salient share of {self.salient_share} is not in 0..1", "use about 0.12")

    @property
    def chosen(self) -> Preset:
        """The preset."""
        return PRESETS[self.preset]


class _NativeOptions(ctypes.Structure):
    """spike_quantizer_options of spike-quantizer.h."""

    _fields_ = [
        ("damping", ctypes.c_float),
        ("salient_weights", ctypes.c_int32),
        ("descent_sweeps", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
        ("rotated", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("correction", ctypes.c_float),
        ("output_damping", ctypes.c_float),
    ]


_FUNCTION = {
    "spike_quantize_calibrated": (
        ctypes.c_bool,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        + (ctypes.POINTER(_NativeOptions), ctypes.c_void_p, ctypes.c_void_p),
    )
}


class CalibratedQuantizer:
    """A TensorQuantizer that hands out what was quantized during the calibration.

    Args:
        library: native functions.
        journal: the finished tensors.
        direct: quantizes all others.
        encoders: by the name of the weight tensor, for the statistics.
    """

    whole_matrices = True

    def __init__(
        self,
        library: NativeLibrary,
        journal: LayerJournal,
        direct: DirectQuantizer,
        encoders: Mapping[str, SiteEncoder],
    ) -> None:
        self._library, self._journal, self._direct, self._encoders = library, journal, direct, encoders

    def quantize(
        self, name: str, weights: NDArray[np.float32], matrix: int = 0
    ) -> tuple[NDArray[np.void], TensorStatistics]:
        if name in self._journal:
            blocks = self._journal.read(name)[matrix * len(weights) : (matrix + 1) * len(weights)]
            statistics = replace(measure(weights, blocks, self._library), calibrated_weights=weights.size)
        else:
            blocks, statistics = self._direct.quantize(name, weights, matrix)
        encoder = self._encoders.get(name)
        if encoder is not None:
            statistics += TensorStatistics(inputs=encoder.inputs, salient_inputs=encoder.salient_inputs)
        return blocks, statistics


class _LayerQuantizer:
    """Quantizes site after site; the two functions that Lockstep.run wants.

    Args:
        source: to read weights from.
        factors: scaling of the inputs of a site, where there is one.
        transforms: of the tensors, see Recipe.
        encoders: of the sites.
        sensitivity: of the layers, or None.
        journal: for what is finished.
        report: called after each site with its name.
    """

    def __init__(
        self,
        library: NativeLibrary,
        source: Source,
        sites: Mapping[str, Site],
        factors: Mapping[Site, NDArray[np.float32]],
        transforms: Mapping[str, Transform],
        encoders: Mapping[str, EncoderSettings],
        sensitivity: Sensitivity | None,
        journal: LayerJournal,
        options: CalibrationOptions,
        threads: int,
        report: Callable[[str], None],
    ) -> None:
        self._library, self._source, self._sites = library, source, sites
        self._factors, self._transforms, self._encoders = factors, transforms, encoders
        self._sensitivity, self._journal, self._options = sensitivity, journal, options
        self._threads, self._report = threads, report

    def on_site(self, site: Site, x: NDArray[np.float32], seen: NDArray[np.float32]) -> None:
        missing = [name for name in site.readers if name not in self._journal]
        if missing:
            own, cross = moments(
                x,
                seen,
                self._factors.get(site),
                self._library,
                self._threads,
                deviations=self._options.correction > 0,
            )
            for name in missing:
                self._journal.add(name, self._quantize(name, own, cross))
        self._report(site.readers[0])

    def product(self, name: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        """What the runtime computes with the quantized tensor, for unscaled inputs and outputs."""
        blocks = self._journal.read(name)
        factors = self._factors.get(self._sites[name])
        outputs = self._scaling_of_outputs(name)
        settings = self._encoders[name]
        n_tokens, n_in = x.shape
        step = min(_PRODUCT_TOKENS, n_tokens)
        with MatMul(
            TYPE_SPK4,
            blocks_to_bytes(blocks),
            n_in,
            step,
            buffer="CPU_SPIKE",
            threads=self._threads,
            salience=settings.salience or 0.0,
            silence=settings.silence or 0.0,
            library=self._library,
        ) as matmul:
            part = np.zeros((step, n_in), np.float32)
            for start in range(0, n_tokens, step):
                rows = x[start : start + step]
                part[: len(rows)] = rows if factors is None else rows * factors
                matmul.set_input(part)
                matmul.compute()
                result = matmul.output()[: len(rows)]
                y[start : start + step] = result if outputs is None else result / outputs

    def _quantize(
        self, name: str, own: NDArray[np.float32], cross: NDArray[np.float32] | None
    ) -> NDArray[np.void]:
        tensor = self._source.tensors[name]
        weights = self._source.read_rows(name, 0, tensor.n_rows)
        transform = self._transforms.get(name)
        if transform is not None:
            weights = np.ascontiguousarray(transform(weights, 0), np.float32)
        outputs = self._sensitivity.outputs(name) if self._sensitivity is not None else None
        factors = self._scaling_of_outputs(name)
        if outputs is not None and factors is not None:  # an error counts as what it is without the scaling
            outputs = outputs / factors / factors[:, None]
        return quantize_calibrated(
            self._library, weights, own, cross, self._options, self._threads, outputs=outputs
        )

    def _scaling_of_outputs(self, name: str) -> NDArray[np.float32] | None:
        transform = self._transforms.get(name)
        return transform.outputs if isinstance(transform, Scaling) else None


def quantize_calibrated(
    library: NativeLibrary,
    weights: NDArray[np.float32],
    own: NDArray[np.float32],
    cross: NDArray[np.float32] | None,
    options: CalibrationOptions,
    threads: int,
    *,
    outputs: NDArray[np.float32] | None = None,
) -> NDArray[np.void]:
    """One matrix, float32[rows, n_in], as BLOCK_SPK4[rows, n_in / 64].

    Args:
        own, cross: see moments().
        outputs: moments of gradients at the layer's outputs, float32[rows, rows], see Sensitivity.outputs().
    """
    bind(library.cpu, _FUNCTION)
    rotated = np.ascontiguousarray(rotate(weights))
    rows, n_in = weights.shape
    blocks = np.zeros((rows, n_in // QK_SPK), BLOCK_SPK4)
    error = np.zeros(rows, np.float32)
    outputs = None if outputs is None else np.ascontiguousarray(outputs, np.float32)
    done = library.cpu.spike_quantize_calibrated(
        rotated.ctypes.data,
        own.ctypes.data,
        None if cross is None else cross.ctypes.data,
        None if outputs is None else outputs.ctypes.data,
        rows,
        n_in,
        _NativeOptions(
            options.damping,
            options.chosen.salient_weights,
            _DESCENT_SWEEPS,
            _ROUNDS,
            1,
            threads,
            options.correction,
            options.output_damping,
        ),
        blocks.ctypes.data,
        error.ctypes.data,
    )
    if not done:  # moments without rank, for example of a text of one token
        return library.quantize(TYPE_SPK4, weights).view(BLOCK_SPK4).reshape(rows, -1)
    return blocks


def calibration(options: CalibrationOptions | None = None) -> Calibrate:
    """The `calibrate` argument of convert(): quantizes the source model's linear layers on a text."""
    chosen = options or CalibrationOptions()

    def calibrate(source: Source, planned: ConversionPlan, progress: Progress) -> Recipe:
        return _calibrate(source, planned, progress, chosen)

    return calibrate


def journal_path(source: str, out: Path | None) -> Path:
    """Where a conversion keeps finished layers: beside its output, or by the source's name in this folder."""
    name = Path(source).name if out is None else out.name
    return (Path() if out is None else out.parent) / f".{name}.unfinished"


def _calibrate(
    source: Source, planned: ConversionPlan, progress: Progress, options: CalibrationOptions
) -> Recipe:
    library = load()
    text = options.text or default_calibration_text()
    workers = Workers(options.threads)
    threads = workers.threads
    path = source.paths[0]
    experts = expert_tensors(planned)
    plain = [
        tensor.name for tensor in planned.spiking if len(tensor.shape) == 2 and tensor.name.startswith("blk.")
    ]
    output = output_matrix(source.tensors)
    # No gradients of it: moments of so many rows would take too much memory.
    outputs = {output: Site("", (output,))} if output in {tensor.name for tensor in planned.spiking} else {}
    found = find_sites(source.architecture, source.metadata, list(source.tensors), plain)
    sites = {name: site for site in found for name in site.readers}
    chunks = options.chunks or default_chunks(source, plain + experts, options.ctx, options.chosen.chunks)
    with Model(path, ctx_size=_TEXT_TOKENS, threads=threads) as model:
        tokens = calibration_stretches(model, text.data, text.name, options.ctx, chunks)
        expected = model.decode(tokens[0][:_TEXT_TOKENS], 0, min(options.ctx, _TEXT_TOKENS)).copy()

    gradients, left_out = _gradient_model(source, plain, tokens[0][: len(expected)], expected, options)
    names = plain + [*outputs] + experts
    journal = LayerJournal(
        options.journal,
        _fingerprint(path, names, text, len(tokens), options, library, gradients is not None),
    )
    cost = sensitivity_cost(source, plain, options.ctx)
    gradient_threads = cost.workers(threads, DEFAULT_MEMORY)
    measured = sensitivity_chunks(tokens)
    if options.announce is not None:
        options.announce(
            estimate(
                source,
                sites,
                tokens.size,
                options.ctx,
                correction=options.correction > 0,
                finished=len(journal),
                outputs=outputs,
                more_memory=cost.memory(gradient_threads) if gradients is not None else 0,
                more_products=cost.products * measured.size if gradients is not None else 0,
                without_sensitivity=left_out,
            )
        )
    sensitivity = None
    if gradients is not None:
        sensitivity = gradients.measure(
            measured, gradient_threads, lambda done, total: progress(CALIBRATE, "gradients", done, total)
        )
        del gradients
    surveys = survey(path, tokens, sites, threads, progress)
    factors: dict[Site, NDArray[np.float32]] = {}
    if options.smoothing:
        for site, facts in surveys.items():
            scaling = scaling_factors(site, facts.mean_squares, source)
            if scaling is not None:
                factors[site] = scaling
    transforms = fold(factors)
    encoders = _encoders(surveys, factors, sensitivity, options, library)
    settings = {name: _settings(encoders.get(site), options) for name, site in (sites | outputs).items()}

    done, n_steps = 0, 2 * len(surveys) + len(outputs)

    def report(item: str) -> None:
        nonlocal done
        done += 1
        progress(CALIBRATE, item, len(surveys) + done, n_steps)

    layers = _LayerQuantizer(
        library, source, sites, factors, transforms, settings, sensitivity, journal, options, threads, report
    )
    if surveys:
        used = {name: site for name, site in sites.items() if site in surveys} | outputs
        with Lockstep(
            path, stretches=len(tokens), ctx=options.ctx, threads=threads, sites=used, last=outputs
        ) as lockstep:
            lockstep.run(tokens, layers.on_site, layers.product)
    calibrate_experts(
        path,
        tokens,
        experts,
        source,
        journal,
        lambda weights, own: quantize_calibrated(library, weights, own, None, options, threads),
        library,
        threads=threads,
        report=lambda name: progress(CALIBRATE, name, experts.index(name) + 1, len(experts)),
    )
    quantizer = CalibratedQuantizer(
        library,
        journal,
        DirectQuantizer(library, workers),
        {name: encoders[site] for name, site in sites.items() if site in encoders},
    )
    read = f"{text.name}, sha256 {text.sha256[:16]}, {len(tokens)} chunks of {options.ctx} tokens"
    return Recipe(
        calibration=read if sensitivity is None else f"{read}, gradients of {sensitivity.chunks}",
        quantizer=quantizer,
        transforms=transforms,
        encoder=settings,
        options=_command_options(options, text),
        salient_input_share=average_share(encoders, surveys),
        finished=journal.delete,
    )


def _gradient_model(
    source: Source,
    names: list[str],
    tokens: NDArray[np.int32],
    expected: NDArray[np.float32],
    options: CalibrationOptions,
) -> tuple[GradientModel | None, str]:
    """The model in torch; or None and why sensitivities are left out, if they are wanted where possible."""
    if options.sensitivity is False:
        return None, ""
    needed = sensitivity_cost(source, names, options.ctx).memory(workers=1)
    if options.sensitivity is None and needed > DEFAULT_MEMORY:
        return None, f"{needed / 1e9:.0f} GB would be needed"
    try:
        return GradientModel(source, names, tokens, expected), ""
    except UnsupportedError as error:
        if options.sensitivity:
            raise
        return None, error.message


def _encoders(
    surveys: Mapping[Site, object],
    factors: Mapping[Site, NDArray[np.float32]],
    sensitivity: Sensitivity | None,
    options: CalibrationOptions,
    library: NativeLibrary,
) -> dict[Site, SiteEncoder]:
    if options.salience is not None:
        return fixed_salience(surveys, factors, options.salience, library)
    share = options.chosen.salient_share if options.salient_share is None else options.salient_share
    return choose_salience(surveys, factors, share, library, sensitivity)


def _settings(encoder: SiteEncoder | None, options: CalibrationOptions) -> EncoderSettings:
    silence = options.chosen.silence if options.silence is None else options.silence
    return EncoderSettings(None if encoder is None else encoder.salience, silence)


def _fingerprint(
    path: Path,
    names: list[str],
    text: Text,
    n_chunks: int,
    options: CalibrationOptions,
    library: NativeLibrary,
    with_gradients: bool,
) -> dict[str, object]:
    """Everything that the quantized layers depend on."""
    settings = asdict(options) | {"chunks": n_chunks}
    for irrelevant in ("text", "threads", "journal", "announce"):
        del settings[irrelevant]
    return {
        "version": spikequant_gguf.__version__,
        "runtime": library.patch_id,
        "source": file_sha256(path),
        "text": text.sha256,
        "tensors": names,
        "options": settings,
        "gradients": [version(name) for name in ("torch", "transformers")] if with_gradients else [],
    }


def _command_options(options: CalibrationOptions, text: Text) -> tuple[str, ...]:
    """Options of the command line that lead to the same recipe."""
    default = CalibrationOptions()
    words: list[str] = []
    if options.text is not None:
        words += ["--calibration", os.path.basename(options.text.file or text.name)]
    if options.preset != default.preset:
        words += ["--preset", options.preset]
    if options.salient_share is not None:
        words += ["--salient-share", str(options.salient_share)]
    if options.chunks is not None:
        words += ["--calibration-chunks", str(options.chunks)]
    if not options.smoothing:
        words.append("--no-smoothing")
    if options.sensitivity is not None:
        words.append("--sensitivity" if options.sensitivity else "--no-sensitivity")
    return tuple(words)
