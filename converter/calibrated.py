"""The calibrated quantizer: GPTQ on second moments of real inputs, after smoothing and in the rotated basis.

`calibration(...)` gives the function that convert() takes as `calibrate`. Matrices whose inputs are not
collected (experts, the output, tensors multiplied in another way) are quantized without calibration.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.errors import InputError
from spikequant_gguf.format import BLOCK_SPK4, QK_SPK
from spikequant_gguf.native import NativeLibrary, bind, load
from spikequant_gguf.rotation import rotate
from spikequant_gguf.texts import Text, default_calibration_text

from .moments import MomentStore
from .plan import ConversionPlan
from .progress import CALIBRATE, Progress
from .quantize import DirectQuantizer, Workers, measure
from .recipe import Calibrate, Recipe, TensorStatistics
from .smoothing import fold, scaling_factors
from .source import Source
from .structure import Site, find_sites

__all__ = ["CalibrationOptions", "calibration"]


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        text: to read; None for the documentation that comes with Python.
        ctx: tokens of a stretch of text.
        chunks: stretches, at most as many as the text has.
        threads: None for one per core. They change the time, not the result.
        memory: bytes for sums of moments at a time; more memory, fewer passes over the text.
        damping: added to the diagonal of the moments, as a share of its mean.
        smoothing: scale channels before quantization, where the architecture's structure is known.
    """

    text: Text | None = None
    ctx: int = 512
    chunks: int = 32
    threads: int | None = None
    memory: int = 2 << 30
    damping: float = 0.01
    smoothing: bool = True

    def __post_init__(self) -> None:
        if self.chunks < 1 or self.ctx < QK_SPK:
            raise InputError(
                f"{self.chunks} chunks of {self.ctx} tokens are no calibration",
                f"use 1 chunk or more, of {QK_SPK} tokens or more",
            )


class _NativeOptions(ctypes.Structure):
    """spike_quantizer_options of spike-quantizer.h."""

    _fields_ = [
        ("damping", ctypes.c_float),
        ("salient_weights", ctypes.c_int32),
        ("descent_sweeps", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
        ("rotated", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
    ]


_FUNCTION = {
    "spike_quantize_calibrated": (
        ctypes.c_bool,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(_NativeOptions))
        + (ctypes.c_void_p, ctypes.c_void_p),
    )
}
_SALIENT_WEIGHTS, _DESCENT_SWEEPS, _ROUNDS = 2, 4, 2


class CalibratedQuantizer:
    """A TensorQuantizer that minimizes the error of outputs, not of weights.

    Args:
        library: native functions.
        store: moments by the name of the tensor that stands for a site.
        sites: of each tensor by name.
        factors: scaling of the inputs of a site, where there is one.
        direct: quantizes what has no moments.
        options: damping and threads.
    """

    whole_matrices = True

    def __init__(
        self,
        library: NativeLibrary,
        store: MomentStore,
        sites: Mapping[str, Site],
        factors: Mapping[Site, NDArray[np.float32]],
        direct: DirectQuantizer,
        options: CalibrationOptions,
        threads: int,
    ) -> None:
        bind(library.cpu, _FUNCTION)
        self._library, self._store, self._sites, self._factors = library, store, sites, factors
        self._direct, self._options, self._threads = direct, options, threads
        self._moments: tuple[Site, NDArray[np.float32] | None] | None = None

    def quantize(
        self, name: str, weights: NDArray[np.float32], matrix: int = 0
    ) -> tuple[NDArray[np.void], TensorStatistics]:
        site = self._sites.get(name)
        moments = self._moments_of(site) if site is not None else None
        if moments is None:
            return self._direct.quantize(name, weights, matrix)
        rows, n_in = weights.shape
        rotated = np.ascontiguousarray(rotate(weights))
        blocks = np.zeros((rows, n_in // QK_SPK), BLOCK_SPK4)
        error = np.zeros(rows, np.float32)
        options = _NativeOptions(
            self._options.damping, _SALIENT_WEIGHTS, _DESCENT_SWEEPS, _ROUNDS, 1, self._threads
        )
        done = self._library.cpu.spike_quantize_calibrated(
            rotated.ctypes.data,
            moments.ctypes.data,
            rows,
            n_in,
            options,
            blocks.ctypes.data,
            error.ctypes.data,
        )
        if not done:  # moments without rank, for example of a text of one token
            return self._direct.quantize(name, weights, matrix)
        return blocks, replace(measure(weights, blocks, self._library), calibrated_weights=weights.size)

    def _moments_of(self, site: Site) -> NDArray[np.float32] | None:
        """Moments of a site's inputs as the quantized layer will see them: scaled and rotated."""
        if self._moments is None or self._moments[0] != site:
            matrix = self._store.matrix(site.readers[0])
            if matrix is not None:
                factors = self._factors.get(site)
                if factors is not None:
                    matrix = matrix * factors[:, None] * factors[None, :]
                matrix = rotate(np.ascontiguousarray(rotate(matrix).T))
                matrix = np.ascontiguousarray(matrix + matrix.T) * np.float32(0.5)
            self._moments = (site, matrix)
        return self._moments[1]


def calibration(options: CalibrationOptions | None = None) -> Calibrate:
    """The `calibrate` argument of convert(): collects moments of the source model and quantizes with them."""
    chosen = options or CalibrationOptions()

    def calibrate(source: Source, planned: ConversionPlan, progress: Progress) -> Recipe:
        return _calibrate(source, planned, progress, chosen)

    return calibrate


def _calibrate(
    source: Source, planned: ConversionPlan, progress: Progress, options: CalibrationOptions
) -> Recipe:
    library = load()
    text = options.text or default_calibration_text()
    workers = Workers(options.threads)
    # Experts see only the tokens that are routed to them, in products of another kind; the output sees only
    # the last token of a stretch.
    plain = [
        tensor.name for tensor in planned.spiking if len(tensor.shape) == 2 and tensor.name.startswith("blk.")
    ]
    sites = find_sites(source.architecture, source.metadata, list(source.tensors), plain)
    store = MomentStore(
        source.paths[0],
        {site.readers[0]: source.tensors[site.readers[0]].n_in for site in sites},
        text.data,
        text.name,
        ctx=options.ctx,
        chunks=options.chunks,
        threads=workers.threads,
        budget=options.memory,
        report=lambda done, total: progress(CALIBRATE, text.name, done, total),
    )
    factors: dict[Site, NDArray[np.float32]] = {}
    if options.smoothing:
        mean_squares = store.diagonals()
        for site in sites:
            squares = mean_squares[site.readers[0]]
            found = scaling_factors(site, squares, source) if squares is not None else None
            if found is not None:
                factors[site] = found
    quantizer = CalibratedQuantizer(
        library,
        store,
        {name: site for site in sites for name in site.readers},
        factors,
        DirectQuantizer(library, workers),
        options,
        workers.threads,
    )
    return Recipe(
        calibration=f"{text.name}, sha256 {text.sha256[:16]}, "
        f"{options.chunks} chunks of {options.ctx} tokens",
        quantizer=quantizer,
        transforms=fold(factors),
        options=_command_options(options, text),
    )


def _command_options(options: CalibrationOptions, text: Text) -> tuple[str, ...]:
    """Options of the command line that lead to the same recipe."""
    words: list[str] = []
    if options.text is not None:
        words += ["--calibration", os.path.basename(options.text.file or text.name)]
    if options.chunks != CalibrationOptions.chunks:
        words += ["--calibration-chunks", str(options.chunks)]
    if not options.smoothing:
        words.append("--no-smoothing")
    return tuple(words)
