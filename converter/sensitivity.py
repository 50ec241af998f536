"""How much a model's output distribution suffers from errors of its layers, measured by gradients in torch.

To second order, an error e of a layer's outputs makes a divergence of (g·e)²/2 for each token, averaged over
random g: gradients of random combinations of the logits, whose covariance is that of the model's own
distribution (Fisher information). Their second moments tell the quantizer which rows matter and which make up
for each other's errors; those at the inputs tell what errors of the encoder cost.

The measured values do not depend on the number of threads: each computes texts of its own, and sums take them
in their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.errors import SpikeQuantError, UnsupportedError
from spikequant_gguf.simulate.packages import require_packages

from .source import Source

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Cost", "GradientModel", "Sensitivity", "sensitivity_chunks", "sensitivity_cost"]

_CHUNK_SHARE = 4  # one of so many chunks of the calibration text is enough
# Norm of a token's gradient that counts in full, in root mean squares of the chunk. A few tokens of a text
# have gradients many times as large as the others', and say little about those of another text.
_LARGEST = 1.5
_LARGEST_DIVERGENCE = 0.1  # of torch's model from llama.cpp's, before it is taken for another model
_MOST_WORKERS = 4  # threads; each holds the activations of a chunk
_PACKAGES = 400_000_000  # bytes of torch and transformers
_FIRST_TOKEN = 1  # left out: its activations are of another kind, see token_weights in inputs.py


@dataclass(frozen=True)
class _Place:
    """Where a layer's moments are in the file. rows: 0 without those of the outputs; n_in: of the weights."""

    offset: int
    rows: int
    n_in: int


class Sensitivity:
    """Moments of gradients, kept in a temporary file.

    Args:
        chunks: of text that they were measured on.
    """

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self._file: IO[bytes] = TemporaryFile()
        self._places: dict[str, _Place] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add(self, name: str, outputs: NDArray[np.float32] | None, inputs: NDArray[np.float32]) -> None:
        """Keeps float32[rows, rows], if known, and float32[n_in] of a weight matrix."""
        self._file.seek(0, 2)
        rows = 0 if outputs is None else len(outputs)
        self._places[name] = _Place(self._file.tell(), rows, len(inputs))
        for values in (inputs,) if outputs is None else (outputs, inputs):
            self._file.write(memoryview(np.ascontiguousarray(values, np.float32)).cast("B"))

    def outputs(self, name: str) -> NDArray[np.float32] | None:
        """Mean of g gᵀ over gradients at the layer's outputs, float32[rows, rows]; None if not measured."""
        place = self._places.get(name)
        if place is None or place.rows == 0:
            return None
        return self._read(place.offset, place.rows**2).reshape(place.rows, -1)

    def inputs(self, name: str) -> NDArray[np.float32] | None:
        """Mean square of gradients at the layer's inputs, float32[n_in], where all readers count."""
        place = self._places.get(name)
        return None if place is None else self._read(place.offset + 4 * place.rows**2, place.n_in)

    def _read(self, offset: int, count: int) -> NDArray[np.float32]:
        self._file.seek(offset)
        return np.frombuffer(self._file.read(4 * count), np.float32)


def sensitivity_chunks(tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Those of the calibration text's int32[chunks, ctx] to measure on, spread over it."""
    chosen = max(1, len(tokens) // _CHUNK_SHARE)
    return tokens[np.arange(chosen) * len(tokens) // chosen]


@dataclass(frozen=True)
class Cost:
    """What measuring sensitivities takes.

    Attributes:
        fixed: bytes, beside those of the process and of the mapped source file: model and moments.
        per_worker: bytes of the activations of a chunk.
        products: multiplications for each token.
    """

    fixed: int
    per_worker: int
    products: float

    def workers(self, threads: int, limit: int) -> int:
        """Threads that can compute within a limit of bytes, at least one."""
        return max(1, min(threads, _MOST_WORKERS, (limit - self.fixed) // self.per_worker))

    def memory(self, workers: int) -> int:
        """Bytes at the highest point."""
        return self.fixed + workers * self.per_worker


def sensitivity_cost(source: Source, names: list[str], ctx: int) -> Cost:
    """Counted from the shapes of a model; names: of the weight matrices, ctx: tokens of a chunk."""
    matrices = [source.tensors[name] for name in names]
    parameters = sum(tensor.n_rows * tensor.n_in for tensor in source.tensors.values())
    weights = sum(tensor.n_rows * tensor.n_in for tensor in matrices)
    squares = sum(tensor.n_rows**2 for tensor in matrices)
    embedded = source.tensors.get("token_embd.weight")
    vocabulary, head = (0, 0) if embedded is None else (embedded.n_rows, embedded.n_rows * embedded.n_in)
    activations = sum(2 * tensor.n_rows + tensor.n_in for tensor in matrices) + 4 * vocabulary
    return Cost(
        _PACKAGES + 4 * (parameters + squares), 4 * ctx * activations, 2.0 * (weights + head) + squares
    )


class GradientModel:
    """A source model in torch, whose gradients can be measured.

    Args:
        source: the model.
        names: of the weights of linear layers. Those that torch's model has not are left out.
        tokens: int32[n], the start of a text.
        expected: llama.cpp's logits for them, float32[n, n_vocab].

    Raises:
        SpikeQuantError: torch or transformers are not installed.
        UnsupportedError: transformers cannot read the model, or computes another one.
    """

    def __init__(
        self, source: Source, names: list[str], tokens: NDArray[np.int32], expected: NDArray[np.float32]
    ) -> None:
        try:
            require_packages("torch", "transformers")
        except SpikeQuantError as error:
            raise SpikeQuantError(error.message, f"{error.remedy}, or give --no-sensitivity") from error
        self._model = _load(source, tokens, expected)
        self._layers, self._orders = _find_layers(self._model, source, names)

    def measure(
        self, tokens: NDArray[np.int32], workers: int, report: Callable[[int, int], None]
    ) -> Sensitivity:
        """Sensitivities of all layers.

        Args:
            tokens: int32[chunks, ctx].
            workers: threads; the result does not depend on them.
            report: called with the number of finished chunks and of all.
        """
        sums = _measure(self._model, self._layers, tokens, workers, report)
        found = Sensitivity(len(tokens))
        count = np.float32(max(1, tokens.size - _FIRST_TOKEN * len(tokens)))
        for name in self._layers:
            outputs, inputs = (sums.pop((name, part), None) for part in ("outputs", "inputs"))
            order = self._orders.get(name)
            if outputs is None or inputs is None:  # what no text goes through
                continue
            if order is None:
                found.add(name, None, inputs.numpy() / count)
            else:
                place = np.argsort(order)  # of each of the tensor's rows in the module
                found.add(name, outputs.numpy()[np.ix_(place, place)] / count, inputs.numpy() / count)
        return found


def _check_same_model(model: nn.Module, tokens: NDArray[np.int32], expected: NDArray[np.float32]) -> None:
    """Raises UnsupportedError unless the model has about these logits."""
    import torch

    with torch.no_grad():
        try:
            logits = _logits(model, tokens)[0]
        except Exception as error:  # whatever a model of its many architectures raises
            raise UnsupportedError(f"transformers cannot compute the model: {error}") from error
        wanted = torch.from_numpy(np.array(expected)).log_softmax(-1)
        same_width = wanted.shape[-1] == logits.shape[-1]
        divergence = (
            float((wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean()) if same_width else np.inf
        )
    if not divergence <= _LARGEST_DIVERGENCE:
        raise UnsupportedError("transformers computes other outputs for this model than llama.cpp")


def _load(source: Source, tokens: NDArray[np.int32], expected: NDArray[np.float32]) -> nn.Module:
    """The source in torch: as transformers reads the GGUF, or else the checkpoint that it was made from."""
    from spikequant_gguf.simulate.model import read_checkpoint, read_gguf

    try:
        model = read_gguf(source.paths[0], source.architecture)
        _check_same_model(model, tokens, expected)
    except UnsupportedError as error:
        if source.checkpoint is None:
            raise UnsupportedError(error.message.removeprefix(f"{source.paths[0]}: ")) from error
        model = read_checkpoint(source.checkpoint)
        _check_same_model(model, tokens, expected)
    return model.requires_grad_(False)


def _find_layers(
    model: nn.Module, source: Source, names: list[str]
) -> tuple[dict[str, nn.Module], dict[str, NDArray[np.int64]]]:
    """Layers by the names of their weights, and the tensor's row for each of theirs, where it has them."""
    import torch

    from spikequant_gguf.simulate.checkpoint import linear_layers, row_order

    wanted = set(names)
    layers: dict[str, nn.Module] = {}
    orders: dict[str, NDArray[np.int64]] = {}
    for path, name in linear_layers(model, source.architecture, source.metadata):
        if name in wanted:
            tensor = source.tensors[name]
            layers[name] = layer = model.get_submodule(path)
            rows = torch.tensor(source.read_rows(name, 0, tensor.n_rows))
            with suppress(UnsupportedError):  # what is known of inputs still holds
                orders[name] = row_order(rows, layer.weight.detach(), name).numpy()
    return layers, orders


def _measure(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    tokens: NDArray[np.int32],
    workers: int,
    report: Callable[[int, int], None],
) -> dict[tuple[str, str], torch.Tensor]:
    """Sums over all tokens by layer and part: "outputs", float32[rows, rows], and "inputs", float32[n_in]."""
    import torch

    sums = _OrderedSums((name, part) for name in layers for part in ("outputs", "inputs"))
    current = threading.local()  # chunk that a thread is at, and the layers that it has met there

    def watch(name: str) -> Callable[..., None]:
        def on_outputs(chunk: int, gradient: torch.Tensor) -> None:
            g = _bounded(gradient)
            sums.add((name, "outputs"), chunk, g.T @ g)

        def on_inputs(chunk: int, gradient: torch.Tensor) -> None:
            sums.add((name, "inputs"), chunk, _bounded(gradient).square().sum(0))

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            chunk = current.chunk
            if name in current.met or not inputs[0].requires_grad:
                return
            current.met.add(name)
            output.register_hook(lambda gradient: on_outputs(chunk, gradient))
            inputs[0].register_hook(lambda gradient: on_inputs(chunk, gradient))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embeddings.register_forward_hook(lambda _, __, output: output.detach().requires_grad_()))

    def compute(chunk: int) -> None:
        torch.set_num_threads(1)
        current.chunk, current.met = chunk, set()
        try:
            _backward(model, tokens[chunk], chunk)
            sums.finish(chunk)
        except BaseException as error:
            sums.fail(error)
            raise

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for done, _ in enumerate(pool.map(compute, range(len(tokens))), 1):
                    report(done, len(tokens))
            except BaseException as error:
                sums.fail(error)
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)
        for handle in handles:
            handle.remove()
    return sums.values


def _backward(model: nn.Module, tokens: NDArray[np.int32], seed: int) -> None:
    """Gradients of one random combination of the logits of int32[ctx]."""
    import torch

    logits = _logits(model, tokens)
    with torch.no_grad():
        # of covariance diag(p) - p pᵀ, which is the curvature of the divergence
        probabilities = logits.softmax(-1)
        signs = np.random.default_rng(seed).integers(0, 2, logits.shape, np.int8)
        direction = probabilities.sqrt() * torch.from_numpy(signs * 2 - 1)
        direction -= probabilities * direction.sum(-1, keepdim=True)
    logits.backward(direction)


def _logits(model: nn.Module, tokens: NDArray[np.int32]) -> torch.Tensor:
    """float32[1, n, n_vocab] of int32[n]."""
    import torch

    return model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits.float()


def _bounded(gradient: torch.Tensor) -> torch.Tensor:
    """float32[1, ctx, n] as float32[tokens, n] without the first token, norms of massive ones bounded."""
    g = gradient.reshape(-1, gradient.shape[-1])[_FIRST_TOKEN:]
    norms = g.norm(dim=1, keepdim=True)
    limit = _LARGEST * norms.square().mean().sqrt()
    return g * (limit / norms.clamp(min=1e-30)).clamp(max=1)


class _OrderedSums:
    """Sums whose terms come from several threads and are added in the order of their numbers, 0, 1, ...

    Args:
        keys: of the sums. Each may have one term of a number, or none.
    """

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        self.values: dict[tuple[str, str], torch.Tensor] = {}
        self._next = dict.fromkeys(keys, 0)
        self._finished: set[int] = set()
        self._changed = threading.Condition()
        self._fault: BaseException | None = None

    def add(self, key: tuple[str, str], number: int, term: torch.Tensor) -> None:
        """Waits for the terms before it; the first one is taken over. Raises what another thread raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._fault is not None or self._next[key] == number)
            if self._fault is not None:
                raise self._fault
            if key in self.values:
                self.values[key] += term
            else:
                self.values[key] = term
            self._advance(key, number + 1)
            self._changed.notify_all()

    def finish(self, number: int) -> None:
        """No more terms have this number."""
        with self._changed:
            self._finished.add(number)
            for key, following in self._next.items():
                self._advance(key, following)
            self._changed.notify_all()

    def fail(self, fault: BaseException) -> None:
        """Lets all that wait give up."""
        with self._changed:
            self._fault = self._fault or fault
            self._changed.notify_all()

    def _advance(self, key: tuple[str, str], following: int) -> None:
        while following in self._finished:
            following += 1
        self._next[key] = following
