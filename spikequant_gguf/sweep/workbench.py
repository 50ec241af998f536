"""The model of a sweep: made to compute in one way after another, and compared with itself in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..converter import Scaling
from ..converter import plan as conversion_plan
from ..converter.smoothing import fold, scaling_factors
from ..converter.source import open_gguf
from ..converter.structure import Site, find_sites
from ..divergence import DivergenceSums
from ..errors import UnsupportedError
from ..evaluation import Chunk
from ..files import atomic_path
from ..ggml_patch.progress import Progress
from ..perplexity import MeanAndError, perplexity_and_error, token_losses
from ..simulate.baselines import BASELINES
from ..simulate.encoder import SpikeEncoder
from ..simulate.layer import SpikeLinear, SpikeWeights
from ..simulate.model import TorchModel
from ..simulate.moments import collect_moments
from ..simulate.quantizer import quantize
from .points import Method

__all__ = ["FloatLogits", "Workbench"]


class FloatLogits:
    """Logits of the float model at the scored positions, computed once and kept in a file.

    Args:
        path: of the file; one that is there is complete, and is used.
        chunks: of the text.
        compute: float32[scored, n_vocab] of a chunk.
        progress: told of every chunk that is computed.

    Attributes:
        losses: of all scored tokens.
    """

    def __init__(
        self,
        path: Path,
        chunks: Sequence[Chunk],
        compute: Callable[[Chunk], NDArray[np.float32]],
        progress: Progress,
    ) -> None:
        self._path, self._chunks = path, chunks
        if not path.is_file():
            progress.step("float model", f"{len(chunks)} chunks")
            with atomic_path(path) as partial, partial.open("wb") as file:
                for done, chunk in enumerate(chunks):
                    np.lib.format.write_array(file, compute(chunk))
                    progress.advance(done + 1, len(chunks))
        self.losses = MeanAndError()
        for _, _, losses in self:
            self.losses.add(losses)

    def __iter__(self) -> Iterator[tuple[Chunk, NDArray[np.float32], NDArray[np.float64]]]:
        """Each chunk with its logits, float32[scored, n_vocab], and losses, float64[scored]."""
        with self._path.open("rb") as file:
            for chunk in self._chunks:
                logits = np.lib.format.read_array(file)
                yield chunk, logits, token_losses(logits, chunk.targets)


class Workbench:
    """Simulates methods on one model. A context manager.

    Args:
        path: GGUF file of the model.
        chunks: to evaluate.
        calibration: int32[tokens] each, to collect moments on; read when a method first needs them.
        scratch: folder where float logits and moments are kept, for a sweep that goes on later.
        progress: told of what takes long.

    Attributes:
        float_logits: of the model as it is.
        notes: sentences about layers that stay in float32.
    """

    def __init__(
        self,
        path: Path,
        chunks: Sequence[Chunk],
        calibration: Sequence[NDArray[np.int32]],
        scratch: Path,
        progress: Progress,
    ) -> None:
        self._progress, self._chunks, self._calibration = progress, list(chunks), list(calibration)
        self.notes: list[str] = []
        with ExitStack() as stack:
            self._source = stack.enter_context(open_gguf(path))
            planned = conversion_plan(path)
            self.warnings = planned.warnings
            progress.step("load", path.name)
            self._model = TorchModel(path)
            plain = [
                tensor.name
                for tensor in planned.spiking
                if len(tensor.shape) == 2 and tensor.name.startswith("blk.")
            ]
            self._names = [name for name in plain if name in self._model.layers]
            if not self._names:
                raise UnsupportedError(
                    f"{path}: transformers' model has no linear layer that can spike", "sweep another model"
                )
            if len(self._names) < len(planned.spiking):
                self.notes.append(
                    f"{len(planned.spiking) - len(self._names)} of {len(planned.spiking)} matrices stay "
                    "in float32"
                )
            self._sites = find_sites(
                self._source.architecture, self._source.metadata, list(self._source.tensors), self._names
            )
            self.float_logits = FloatLogits(scratch / "logits.npy", self._chunks, self._scored, progress)
            self._stack = stack.pop_all()
        self._moments_file = scratch / "moments.npy"
        self._moments: dict[str, torch.Tensor] | None = None
        self._factors: dict[Site, NDArray[np.float32]] | None = None
        self._weights: tuple[tuple, dict[str, Any]] | None = None

    def __enter__(self) -> Workbench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def reference(self) -> tuple[float, float]:
        """Perplexity of the float model and its standard error."""
        return perplexity_and_error(self.float_logits.losses)

    def measure(self, method: Method, title: str) -> dict[str, Any]:
        """Accuracy and spikes of a method: the measured fields of a SweepPoint."""
        started = time.perf_counter()
        transforms = fold(self._scaling() if method.smoothing else {})
        changed = {
            name: self._transformed(name, transforms) for name in transforms if name not in self._names
        }
        try:
            self._model.change({name: value for name, value in changed.items() if value is not None})
            layers = self._layers(method, transforms, title)
            self._model.replace(layers)
            self._model.reset_counts()
            self._progress.step("evaluate", title)
            sums = DivergenceSums()
            for done, (chunk, expected, losses) in enumerate(self.float_logits):
                sums.add(expected, losses, self._scored(chunk), chunk.targets)
                self._progress.advance(done + 1, len(self._chunks))
            counts = self._model.counts()
        finally:
            self._model.restore()
        accuracy = sums.result(title)
        tokens = sum(len(chunk.tokens) for chunk in self._chunks)
        weights = [layer.weights for layer in layers.values() if isinstance(layer, SpikeLinear)]
        n_weights = sum(each.values.numel() for each in weights)
        share = float(np.mean([getattr(layer, "salient_share", 0.0) for layer in layers.values()]))
        return {
            "salient_share": counts.salient / counts.codes if counts.codes else share,
            "silent_share": 1 - counts.spikes / counts.codes if counts.codes else None,
            "salient_weight_share": sum(each.salient for each in weights) / n_weights if weights else None,
            "ppl": accuracy.ppl,
            "ppl_stderr": accuracy.ppl_stderr,
            "ppl_ratio": accuracy.ppl_ratio,
            "ppl_ratio_stderr": accuracy.ppl_ratio_stderr,
            "kld": accuracy.kld,
            "kld_stderr": accuracy.kld_stderr,
            "same_top": accuracy.same_top,
            "spikes_per_token": counts.fired(method.settings.coding) / tokens if counts.codes else None,
            "rate_spikes_per_token": counts.fired("rate") / tokens if counts.codes else None,
            "seconds": time.perf_counter() - started,
        }

    def _scored(self, chunk: Chunk) -> NDArray[np.float32]:
        """The model's logits at the scored positions, as it computes now."""
        return self._model.logits(chunk.tokens, chunk.first)[: len(chunk.targets)]

    # ---- layers

    def _layers(self, method: Method, transforms: dict[str, Scaling], title: str) -> dict[str, nn.Module]:
        weights = self._quantized(method, transforms, title)
        layers: dict[str, nn.Module] = {}
        for site in self._sites:
            encoder = SpikeEncoder(method.settings)
            for name in site.readers:
                bias = self._model.layers[name].bias
                found = weights[name]
                layers[name] = SpikeLinear(found, encoder, bias) if isinstance(found, SpikeWeights) else found
        return layers

    def _quantized(self, method: Method, transforms: dict[str, Scaling], title: str) -> dict[str, Any]:
        """SpikeWeights of each layer, or a baseline's whole layers; those of the last method are kept."""
        if self._weights is None or self._weights[0] != method.weights_key():
            self._weights = None  # before others are made: memory
            moments = self._all_moments() if method.gptq or method.baseline else {}
            self._progress.step("quantize", title)
            found: dict[str, Any] = {}
            for done, site in enumerate(self._sites):
                matrix = moments.get(site.readers[0])
                factors = self._scaling().get(site) if method.smoothing else None
                if matrix is not None and factors is not None:
                    t = torch.from_numpy(factors)
                    matrix = matrix * t[:, None] * t[None, :]
                found |= self._site_weights(site, method, matrix, transforms)
                self._progress.advance(done + 1, len(self._sites))
            self._weights = (method.weights_key(), found)
        return self._weights[1]

    def _site_weights(
        self, site: Site, method: Method, moments: torch.Tensor | None, transforms: dict[str, Scaling]
    ) -> dict[str, Any]:
        matrices = {name: self._transformed(name, transforms) for name in site.readers}
        if method.baseline is not None:
            make = BASELINES[method.baseline]
            return {
                name: make(matrix, moments, self._model.layers[name].bias, method.channels)
                for name, matrix in matrices.items()
            }
        together = quantize(torch.cat(list(matrices.values())), moments, method.settings, gptq=method.gptq)
        found, first = {}, 0
        for name, matrix in matrices.items():
            found[name] = together.rows(slice(first, first + len(matrix)))
            first += len(matrix)
        return found

    def _transformed(self, name: str, transforms: dict[str, Scaling]) -> torch.Tensor | None:
        """A parameter after smoothing; None for one that the model has not."""
        try:
            values = self._model.parameter(name)
        except KeyError:
            return None
        scaling = transforms.get(name)
        if scaling is None:
            return values
        rows = values.numpy().reshape(-1, values.shape[-1])
        return torch.from_numpy(np.ascontiguousarray(scaling(rows, 0))).view(values.shape)

    # ---- calibration

    def _all_moments(self) -> dict[str, torch.Tensor]:
        if self._moments is None:
            names = [site.readers[0] for site in self._sites]
            if not self._moments_file.is_file():
                self._progress.step("calibrate", f"{len(self._calibration)} chunks")
                found = collect_moments(self._model, names, self._calibration, self._progress.advance)
                with atomic_path(self._moments_file) as partial, partial.open("wb") as file:
                    for name in names:
                        np.lib.format.write_array(file, found[name].numpy())
            with self._moments_file.open("rb") as file:
                self._moments = {name: torch.from_numpy(np.lib.format.read_array(file)) for name in names}
        return self._moments

    def _scaling(self) -> dict[Site, NDArray[np.float32]]:
        if self._factors is None:
            moments = self._all_moments()
            found = {
                site: scaling_factors(site, moments[site.readers[0]].diagonal().numpy().copy(), self._source)
                for site in self._sites
            }
            self._factors = {site: factors for site, factors in found.items() if factors is not None}
        return self._factors
