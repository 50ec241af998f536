"""Runs a model, and a twin of it that is being quantized, side by side in llama.cpp, layer by layer.

All tokens are one batch, so that every linear layer is met once. When the twin comes to a layer, the inputs
of both models are known: the layer can be quantized for the inputs that it will really see, and the twin goes
on with the outputs of the quantized layer. Works for every architecture that llama.cpp runs.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikequant_gguf.errors import InputError, SpikeQuantError
from spikequant_gguf.evaluation import Model
from spikequant_gguf.ggml_api import TensorStruct, operation_number, tensor_at, tensor_rows
from spikequant_gguf.gguf_header import read_header
from spikequant_gguf.llama_log import collect_errors
from spikequant_gguf.watched import WatchedModel

from .graph_memory import GraphMemory, give_back, give_back_caches
from .structure import Site

__all__ = ["MAX_STRETCHES", "BatchModel", "Lockstep", "calibration_stretches"]

MAX_STRETCHES = 256
"""Sequences that llama.cpp keeps at a time."""

_FLAG_COMPUTE = 16  # GGML_TENSOR_FLAG_COMPUTE: nodes without it are left out
_ABORTED = 2
# Layers behind the last attention see only tokens whose logits are asked for. Not all: logits are large.
_OUTPUT_EVERY = 4

_Input = Callable[[str, NDArray[np.float32], NDArray[np.float32]], None]


class BatchModel(WatchedModel):
    """A model that computes many stretches of text as one batch and shows the inputs of linear layers.

    Args:
        path: GGUF file that llama.cpp can run.
        stretches, ctx: number of stretches, and tokens of each.
        threads: that compute.
        on_input: called with the name of each weight matrix that is multiplied, its inputs,
            float32[n_tokens, n_in], and its outputs, float32[n_tokens, n_out]; both valid until it returns.
        names: of weight matrices to stop at.
        replaced: those of them whose outputs llama.cpp need not compute: on_input writes them, or nobody
            reads them.
    """

    def __init__(
        self,
        path: Path,
        *,
        stretches: int,
        ctx: int,
        threads: int,
        names: Mapping[str, Any],
        on_input: _Input,
        replaced: Collection[str] = (),
    ) -> None:
        self._stretches, self._ctx = stretches, ctx
        self._names = {name.encode(): name for name in names}
        self._on_input, self._replaced = on_input, replaced
        self._stopped = self._looking = False
        self._nodes: list[TensorStruct] = []  # seen when looking ahead
        self._memory = GraphMemory()
        super().__init__(path, ctx_size=stretches * ctx, threads=threads)
        try:
            self._set_batch(np.zeros((1, 1), np.int32))
            self._look_ahead(give_back_caches)
        except BaseException:
            self.close()
            raise

    def run(self, tokens: NDArray[np.int32]) -> None:
        """Computes int32[stretches, ctx], each row a text of its own, to the end or until stop() is called.

        Raises:
            SpikeQuantError: llama.cpp cannot compute it. Whatever on_input raised.
        """
        self.prepare(tokens)
        self.compute()

    def prepare(self, tokens: NDArray[np.int32]) -> None:
        """The first part of run(): what takes the most memory for a moment."""
        self._set_batch(tokens)
        self._look_ahead(self._memory.look)
        self._give_back_logits()

    def compute(self) -> None:
        """The second part of run()."""
        status = self.api.llama_decode(self._context, self._batch)
        self._raise_fault()
        if status != 0 and not (status == _ABORTED and self._stopped):
            raise SpikeQuantError(
                f"{self.path}: llama.cpp could not compute {self._batch.n_tokens} tokens at once "
                f"(status {status})",
                "calibrate on fewer chunks with --calibration-chunks",
            )

    def stop(self) -> None:
        """Ends the run after the current layer."""
        self._stopped = True

    def _set_batch(self, tokens: NDArray[np.int32]) -> None:
        batch, view = self._batch, np.ctypeslib.as_array
        stretches, ctx = tokens.shape
        batch.n_tokens = total = tokens.size
        view(batch.token, shape=(total,))[:] = tokens.reshape(-1)
        view(batch.pos, shape=(total,))[:] = np.tile(np.arange(ctx), stretches)
        view(batch.logits, shape=(total,))[:] = np.arange(total) % _OUTPUT_EVERY == _OUTPUT_EVERY - 1
        for i in range(total):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // ctx

    def _look_ahead(self, use: Callable[[list[TensorStruct]], None]) -> None:
        """Calls `use` with the nodes of the graph for the batch: begins to compute it and goes no further."""
        self._looking = True
        with collect_errors():  # that it was broken off
            self.api.llama_decode(self._context, self._batch)
        self._looking = False
        use(self._nodes)
        self._nodes.clear()
        memory = self.api.llama_get_memory(self._context)
        if memory:
            self.api.llama_memory_clear(memory, False)

    def _context_params(self) -> Any:
        params = super()._context_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self._stretches * self._ctx
        params.n_seq_max = self._stretches
        # A model without a cache, for embeddings, gives out every token.
        header = read_header(self.path).metadata
        causal = header.get(f"{header.get('general.architecture')}.attention.causal", True)
        wanted = self._stretches * self._ctx // (_OUTPUT_EVERY if causal else 1)
        params.n_outputs_max = max(self._stretches, wanted)
        params.kv_unified = False
        kind = dict(type(params)._fields_)["abort_callback"]
        self._abort_callback = kind(self._ended)  # the runtime holds no reference
        params.abort_callback = self._abort_callback
        return params

    def _ended(self, _user_data: Any) -> bool:
        return self._stopped or self._looking or self._fault is not None

    def _make_batch(self) -> None:
        self._batch = self.api.llama_batch_init(self._stretches * self._ctx, 0, 1)

    def _on_node(self, node: TensorStruct, ask: bool) -> bool:
        if self._stopped:
            return False
        if self._looking:
            if ask:
                self._nodes.append(node)
            return not ask
        if ask:
            self._memory.used(node)
        else:
            self._memory.give_back_dead(node)
        return self._on_product(node, ask)

    def _on_product(self, node: TensorStruct, ask: bool) -> bool:
        """As _on_node; looks for the products of the matrices with the given names."""
        if node.op != operation_number("MUL_MAT"):
            return not ask
        name = self._names.get(tensor_at(node.src[0]).name)
        if name is None:
            return not ask
        if name in self._replaced:
            node.flags = node.flags & ~_FLAG_COMPUTE if ask else node.flags | _FLAG_COMPUTE
        if not ask:
            x = np.ascontiguousarray(tensor_rows(tensor_at(node.src[1])))
            self._on_input(name, x, tensor_rows(node))
        return True

    def _give_back_logits(self) -> None:
        """Frees the pages of llama.cpp's buffer of logits: cleared and so touched by it, but of no use here.

        They would take more than all the rest. Written to after all, they are there again.
        """
        address = ctypes.cast(self.api.llama_get_logits(self._context), ctypes.c_void_p).value
        if address:
            n_outputs = self._stretches * self._ctx // _OUTPUT_EVERY  # or more
            give_back(address, 4 * n_outputs * self.n_vocab)


class Lockstep:
    """A model and its twin. A context manager.

    Args:
        path, stretches, ctx, threads: as of BatchModel.
        sites: the site of each weight matrix that is to be quantized.
        last: those whose products nobody reads, here: the logits.
    """

    def __init__(
        self,
        path: Path,
        *,
        stretches: int,
        ctx: int,
        threads: int,
        sites: Mapping[str, Site],
        last: Collection[str] = (),
    ) -> None:
        self._sites = sites
        self._left = len(set(sites.values()))
        self._met_by_source: set[Site] = set()
        self._met_by_twin: set[Site] = set()
        self._ready, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._inputs: tuple[str, NDArray[np.float32]] | None = None
        self._failure: BaseException | None = None
        model = partial(BatchModel, path, stretches=stretches, ctx=ctx, threads=threads, names=sites)
        self._source = model(on_input=self._of_source, replaced=last)
        try:
            self._twin = model(on_input=self._of_twin, replaced=sites)
        except BaseException:
            self._source.close()
            raise

    def run(
        self,
        tokens: NDArray[np.int32],
        on_site: Callable[[Site, NDArray[np.float32], NDArray[np.float32]], None],
        product: Callable[[str, NDArray[np.float32], NDArray[np.float32]], None],
    ) -> None:
        """Goes through all layers.

        Args:
            tokens: int32[stretches, ctx].
            on_site: called once for each site, with the inputs of the source model and of the twin,
                float32[n_tokens, n_in].
            product: called for each weight matrix after its site, with the twin's inputs and an array for
                the outputs with which the twin shall go on, float32[n_tokens, n_out].

        Raises:
            SpikeQuantError: as BatchModel.run. Whatever the functions raise.
        """
        self._on_site, self._product = on_site, product
        self._source.prepare(tokens)
        self._twin.prepare(tokens)
        thread = threading.Thread(target=self._run_source, daemon=True)
        thread.start()
        self._ready.acquire()
        try:
            self._twin.compute()
        finally:
            self._source.stop()
            self._go.release()
            thread.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._twin.close()
        self._source.close()

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The two take turns: while one computes, the other waits, so that both can use all threads.

    def _run_source(self) -> None:
        try:
            self._source.compute()
        except BaseException as error:
            self._failure = error
        self._inputs = None
        self._ready.release()

    def _of_source(self, name: str, x: NDArray[np.float32], _: NDArray[np.float32]) -> None:
        site = self._sites[name]
        if site not in self._met_by_source:
            self._met_by_source.add(site)
            self._inputs = (name, x)
            self._ready.release()
            self._go.acquire()

    def _of_twin(self, name: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        site = self._sites[name]
        if site not in self._met_by_twin:
            self._met_by_twin.add(site)
            if self._inputs is None or self._inputs[0] != name or self._inputs[1].shape != x.shape:
                raise self._failure or SpikeQuantError(
                    f"tensor '{name}': two runs of the model do not use it alike",
                    "report this, or convert with --no-calibration",
                )
            self._on_site(site, self._inputs[1], x)
            self._left -= 1
            if not self._left:  # Nothing after the last site matters. Its own products do not, either.
                self._twin.stop()
                return
            self._go.release()
            self._ready.acquire()
        self._product(name, x, y)


def calibration_stretches(
    model: Model, text: bytes, name: str, ctx: int, stretches: int
) -> NDArray[np.int32]:
    """int32[n, ctx]: n <= `stretches` pieces of a text, spread over it, BOS first if the model wants one.

    Raises:
        InputError: the text has less than one of them.
    """
    tokens = model.tokenize(text)
    found = len(tokens) // ctx
    if found == 0:
        raise InputError(
            f"the calibration text '{name}' has only {len(tokens)} tokens, less than one context of {ctx}",
            "give a longer text with --calibration",
        )
    n = min(stretches, found)
    chosen = np.stack([tokens[(i * found // n) * ctx :][:ctx] for i in range(n)]).astype(np.int32)
    if model.bos is not None:
        chosen[:, 0] = model.bos
    return chosen
