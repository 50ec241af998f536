"""Turns an open source into the tensors of the output, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.errors import InputError, SpikeQuantError, UnsupportedError
from spikequant_gguf.format import blocks_to_bytes
from spikequant_gguf.validation import first_weight_fault

from .fingerprint import fingerprint_of_recipe
from .importance import Importance
from .journal import Fingerprint
from .plan import FLOATS, INTEGERS, ConversionPlan, TensorPlan
from .progress import QUANTIZE, Progress
from .provenance import Provenance, output_metadata
from .quantize import Backend, DirectQuantizer, Workers, check_finite, quantize_rows
from .recipe import Recipe, TensorQuantizer, TensorStatistics
from .source import Source
from .write import Layout, OutputFile, OutputTensor

__all__ = ["Job"]

# Weights that are in memory at a time, unless a quantizer wants whole matrices: 32 MiB as float32.
_PIECE_WEIGHTS = 1 << 23


@dataclass
class Job:
    """Everything that a conversion needs once its source is open and its plan and recipe are made."""

    source: Source
    planned: ConversionPlan
    recipe: Recipe
    importance: Importance | None
    backend: Backend
    workers: Workers
    quantizer: TensorQuantizer = field(init=False)

    def __post_init__(self) -> None:
        self.quantizer = self.recipe.quantizer or DirectQuantizer(self.backend, self.workers, self.importance)

    def write(
        self, output: OutputFile, provenance: Provenance, known: Fingerprint | None, progress: Progress
    ) -> dict[str, TensorStatistics]:
        """Writes the output file; returns the statistics of its SPK4 tensors. Errors as convert().

        known: the fingerprint of everything but recipe and contents; None to start over, without a journal.
        """
        statistics = {tensor.name: TensorStatistics() for tensor in self.planned.spiking}
        raw = self.source.raw_metadata
        placeholders = output_metadata(raw, provenance, statistics)  # of the final size already
        layout = Layout(
            placeholders,
            [OutputTensor(tensor.name, tensor.shape, tensor.target_type) for tensor in self.planned.tensors],
            self.source.alignment,
        )
        if known is not None:
            known = {**known, **fingerprint_of_recipe(self.recipe, provenance, layout.header(placeholders))}
        output.begin(layout, known, progress)
        for record in output.records:
            if record.name in statistics:
                statistics[record.name] = TensorStatistics(**record.details)
        done = sum(tensor.source_bytes for tensor in self.planned.tensors[: output.n_resumed])
        total = self.planned.source_bytes
        for tensor in self.planned.tensors[output.n_resumed :]:

            def report(share: float, tensor: TensorPlan = tensor, done: int = done) -> None:
                progress(QUANTIZE, tensor.name, done + round(share * tensor.source_bytes), total)

            def details(name: str = tensor.name) -> dict[str, float]:
                return asdict(statistics[name]) if name in statistics else {}

            try:
                data = _reported(self._data(tensor, statistics), tensor.target_bytes, report)
                output.write_tensor(data, details)
            except SpikeQuantError as error:
                raise _named(error, tensor.name) from error
            done += tensor.source_bytes
        self.source.check_unchanged()
        output.commit(output_metadata(raw, provenance, statistics), progress)
        return statistics

    def _data(
        self, tensor: TensorPlan, statistics: dict[str, TensorStatistics]
    ) -> Iterator[NDArray[np.uint8]]:
        """The data of one tensor of the output, in pieces."""
        if tensor.source_type == tensor.target_type and tensor.name not in self.recipe.transforms:
            yield from self._copy(tensor)
        elif tensor.is_spiking:
            yield from self._spiking(tensor, statistics)
        else:
            for matrix, _, rows in self._rows(tensor, _PIECE_WEIGHTS):
                yield quantize_rows(
                    self.backend,
                    self.workers,
                    int(tensor.target_type),
                    rows,
                    self._importance_of(tensor, matrix),
                )

    def _copy(self, tensor: TensorPlan) -> Iterator[NDArray[np.uint8]]:
        """The data as they are, after checking them."""
        kind = tensor.source_type
        for _, first, n_rows in self._pieces(tensor, _PIECE_WEIGHTS):
            raw = self.source.read_raw(tensor.name, first, n_rows)
            if kind in FLOATS:
                check_finite(tensor.name, self.source.decode(tensor.name, raw), first)
            elif kind not in INTEGERS and not self.backend.validate(int(kind), raw):
                rows = f"rows {first} to {first + n_rows - 1}"
                raise InputError(f"{rows} hold invalid {kind.name} data", "download the model again")
            yield raw

    def _spiking(
        self, tensor: TensorPlan, statistics: dict[str, TensorStatistics]
    ) -> Iterator[NDArray[np.uint8]]:
        limit = None if self.quantizer.whole_matrices else _PIECE_WEIGHTS
        for matrix, first, rows in self._rows(tensor, limit):
            blocks, of_rows = self.quantizer.quantize(tensor.name, rows, matrix)
            fault = first_weight_fault(blocks, rotation=None)
            if fault is not None:
                row, block, reason = fault
                raise InputError(
                    f"row {first + row}, block {block}: weights too large to be stored ({reason})",
                    "check the source model, or give this tensor another type with --tensor-type",
                )
            statistics[tensor.name] += of_rows
            yield blocks_to_bytes(blocks)

    def _rows(self, tensor: TensorPlan, limit: int | None) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Matrix, first row (over all matrices) and the transformed rows of each piece."""
        transform = self.recipe.transforms.get(tensor.name)
        for matrix, first, n_rows in self._pieces(tensor, limit):
            rows = self.source.read_rows(tensor.name, first, n_rows)
            check_finite(tensor.name, rows, first)
            if transform is not None:
                rows = np.ascontiguousarray(transform(rows, first), np.float32)
                check_finite(tensor.name, rows, first)
            yield matrix, first, rows

    def _pieces(self, tensor: TensorPlan, limit: int | None) -> Iterator[tuple[int, int, int]]:
        """Matrix, first row, number of rows of pieces of at most `limit` weights, each of one matrix."""
        n_in = tensor.shape[0]
        height = tensor.shape[1] if len(tensor.shape) > 1 else 1
        step = height if limit is None else min(height, max(1, limit // n_in))
        for matrix in range(tensor.n_weights // (n_in * height)):
            for row in range(0, height, step):
                yield matrix, matrix * height + row, min(step, height - row)

    def _importance_of(self, tensor: TensorPlan, matrix: int) -> NDArray[np.float32] | None:
        if self.importance is None:
            return None
        return self.importance.of(tensor.name, matrix, tensor.shape[0])


def _reported(
    chunks: Iterator[NDArray[np.uint8]], n_bytes: int, report: Callable[[float], None]
) -> Iterator[NDArray[np.uint8]]:
    """Passes chunks on and reports the share of n_bytes that is done."""
    done = 0
    report(0.0)
    for chunk in chunks:
        yield chunk
        done += chunk.nbytes
        report(done / n_bytes)


def _named(error: SpikeQuantError, name: str) -> SpikeQuantError:
    """The error with the tensor's name in it, if it is about one and does not name it."""
    if not isinstance(error, (InputError, UnsupportedError)) or name in error.message:
        return error
    return type(error)(f"tensor '{name}': {error.message}", error.remedy)
