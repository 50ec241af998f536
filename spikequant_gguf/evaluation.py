"""Loads a model through llama-cpp-python's low-level API and yields the logits of chunks of a text.

The chunks are those of llama-perplexity, token for token: consecutive, `ctx` tokens each, the first one
replaced by BOS where the model wants one, and only the second half scored, so that every prediction has half
a context before it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import runtime
from .errors import FormatError, InputError, SpikeQuantError, UnsupportedError
from .host import default_threads
from .llama_log import collect_errors, redirect_log
from .verify import verify_file

__all__ = ["DEFAULT_CTX", "MINIMUM_CTX", "Chunk", "Model", "check_model_file", "plan_chunks", "text_tokens"]

DEFAULT_CTX = 512
"""Tokens of a chunk, as in llama-perplexity."""
MINIMUM_CTX = 8
_BATCH = 512  # tokens computed at once; llama.cpp's default


class Model:
    """A model with one context of `ctx_size` tokens, to be closed after use (a context manager).

    Attributes:
        path: of the file.
        ctx_size: tokens that fit into the context.
        threads: that compute.
        n_vocab: tokens of the vocabulary, the width of logits.
        bos: id of the token that the model wants at the start; None if it wants none.

    Raises:
        RuntimeMissingError: there is no patched llama-cpp-python.
        InputError: the file is missing or damaged, or llama.cpp refuses it.
    """

    def __init__(self, path: str | Path, *, ctx_size: int = DEFAULT_CTX, threads: int | None = None) -> None:
        self.path = Path(path)
        self.ctx_size = ctx_size
        self.threads = threads if threads is not None else default_threads()
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        if ctx_size < 1 or self.threads < 1:
            raise InputError("context size and threads must be positive", "correct the arguments")
        self.api = api = _llama()
        check_model_file(self.path)
        try:
            with collect_errors() as errors:
                self._model = api.llama_model_load_from_file(os.fsencode(self.path), _model_params(api))
            if not self._model:
                raise _refusal(self.path, errors)
            with collect_errors() as errors:
                self._context = api.llama_init_from_model(self._model, self._context_params())
            if not self._context:
                raise _refusal(self.path, errors)
            self._make_batch()
        except BaseException:
            self.close()
            raise
        self.vocab = api.llama_model_get_vocab(self._model)
        self.n_vocab: int = api.llama_vocab_n_tokens(self.vocab)
        wants_bos = api.llama_vocab_get_add_bos(self.vocab)
        self.bos: int | None = api.llama_vocab_bos(self.vocab) if wants_bos else None

    @property
    def handle(self) -> Any:
        """The llama_model of llama.cpp, for its low-level functions."""
        return self._model

    @property
    def context(self) -> Any:
        """The llama_context of llama.cpp, for its low-level functions."""
        return self._context

    @property
    def trained_ctx(self) -> int:
        """Tokens of the longest context that the model was trained on."""
        return self.api.llama_model_n_ctx_train(self._model)

    def tokenize(
        self, text: bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Tokens of a text. add_special: BOS, EOS as the model wants. parse_special: text may name them."""
        room = len(text) + 16
        while True:
            tokens = (self.api.llama_token * room)()
            n = self.api.llama_tokenize(self.vocab, text, len(text), tokens, room, add_special, parse_special)
            if n >= 0:
                return np.ctypeslib.as_array(tokens)[:n].astype(np.int32)
            if n == np.iinfo(np.int32).min:
                raise InputError("the text is too long for the tokenizer", "give a shorter text")
            room = -n

    def piece(self, token: int, special: bool = False) -> bytes:
        """Bytes of a token. special: also of control tokens, which are empty otherwise."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = self.api.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def clear(self) -> None:
        """Forget all tokens."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self._context), True)

    def decode(self, tokens: ArrayLike, position: int, outputs: int) -> NDArray[np.float32]:
        """Compute up to 512 tokens from `position` on; returns logits of the last `outputs` of them.

        Returns:
            float32[outputs, n_vocab]. It is llama.cpp's own memory, valid until the next call.
        """
        values = np.asarray(tokens, np.int32)
        n = len(values)
        if not 0 < n <= _BATCH or not 0 <= outputs <= n or position + n > self.ctx_size:
            raise InputError(
                f"{n} tokens at position {position} do not fit a context of {self.ctx_size}",
                "use a larger context",
            )
        self._tokens[:n] = values
        self._positions[:n] = np.arange(position, position + n)
        self._wanted[:n] = 0
        self._wanted[n - outputs : n] = 1
        self._batch.n_tokens = n
        with collect_errors() as errors:
            status = self.api.llama_decode(self._context, self._batch)
            self.api.llama_synchronize(self._context)
        if status != 0:
            reason = "; ".join(errors) or f"status {status}"
            raise SpikeQuantError(
                f"{self.path}: llama.cpp could not compute the model: {reason}", "use a smaller context"
            )
        if outputs == 0:
            return np.empty((0, self.n_vocab), np.float32)
        return np.ctypeslib.as_array(self.api.llama_get_logits(self._context), shape=(outputs, self.n_vocab))

    def logits(self, tokens: ArrayLike, first: int = 0) -> Iterator[NDArray[np.float32]]:
        """Logits of tokens[first:] from an empty context, in blocks of at most 512 rows.

        Yields:
            float32[rows, n_vocab], in llama.cpp's own memory: valid until the next block.
        """
        self.clear()
        values = np.asarray(tokens, np.int32)
        for start in range(0, len(values), _BATCH):
            part = values[start : start + _BATCH]
            outputs = min(len(part), max(0, start + len(part) - first))
            block = self.decode(part, start, outputs)
            if outputs:
                yield block

    def close(self) -> None:
        """Free all memory; the model cannot be used afterwards."""
        if self._batch is not None:
            self.api.llama_batch_free(self._batch)
        if self._context:
            self.api.llama_free(self._context)
        if self._model:
            self.api.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _context_params(self) -> Any:
        """llama-perplexity's settings, for one sequence."""
        params = self.api.llama_context_default_params()
        params.n_ctx = self.ctx_size
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = self.threads
        params.swa_full = False
        return params

    def _make_batch(self) -> None:
        self._batch = batch = self.api.llama_batch_init(_BATCH, 0, 1)
        self._tokens = np.ctypeslib.as_array(batch.token, shape=(_BATCH,))
        self._positions = np.ctypeslib.as_array(batch.pos, shape=(_BATCH,))
        self._wanted = np.ctypeslib.as_array(batch.logits, shape=(_BATCH,))
        for i in range(_BATCH):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0


def check_model_file(path: Path) -> None:
    """Raises InputError unless this is a whole GGUF file; spike data in it are checked bit by bit."""
    report = verify_file(path)
    if not report.ok:
        fault = report.faults[0].error()
        raise FormatError(f"{path}: {fault.message}", fault.remedy)


@dataclass(frozen=True)
class Chunk:
    """One stretch of text to be scored.

    Attributes:
        index: number of the chunk, from 0.
        tokens: int32[ctx], as the model shall see them.
        first: position from which predictions are scored.
        targets: int32[ctx - first - 1], the token that follows each scored position.
    """

    index: int
    tokens: NDArray[np.int32]
    first: int
    targets: NDArray[np.int32]

    def logits(self, model: Model) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
        """The model's logits at the scored positions with their targets, in blocks.

        Yields:
            (float32[rows, n_vocab], int32[rows]); the logits are valid until the next block.
        """
        done = 0
        for block in model.logits(self.tokens, self.first):
            rows = min(len(block), len(self.targets) - done)  # nothing follows the last token
            if rows:
                yield block[:rows], self.targets[done : done + rows]
            done += rows


def text_tokens(model: Model, data: bytes, name: str, ctx: int) -> NDArray[np.int32]:
    """The tokens of a text for evaluation.

    Raises:
        InputError: they are fewer than two contexts.
        UnsupportedError: the model is of a kind that has no perplexity.
    """
    api = model.api
    if ctx < MINIMUM_CTX:
        raise InputError(
            f"a context of {ctx} tokens is too small", f"give a --ctx-size of {MINIMUM_CTX} or more"
        )
    if api.llama_model_has_encoder(model.handle) or not api.llama_model_has_decoder(model.handle):
        raise UnsupportedError(
            f"{model.path}: the model does not predict the next token of a text",
            "give a causal language model",
        )
    if api.llama_vocab_get_add_eos(model.vocab):
        raise UnsupportedError(
            f"{model.path}: the model ends every text with EOS, for which perplexity is not defined",
            "give a causal language model",
        )
    tokens = model.tokenize(data)
    if len(tokens) < 2 * ctx:
        raise InputError(
            f"the text '{name}' has only {len(tokens)} tokens; an evaluation at a context of {ctx} needs "
            f"{2 * ctx}",
            "give a longer text, or a smaller --ctx-size",
        )
    return tokens


def plan_chunks(tokens: NDArray[np.int32], ctx: int, chunks: int | None, bos: int | None) -> list[Chunk]:
    """The first `chunks` chunks of a tokenized text (all whole ones if None).

    Args:
        tokens: int32[n], n at least ctx.
        bos: put in place of the first token of each chunk, if not None.
    """
    available = len(tokens) // ctx
    first = ctx // 2
    planned = []
    for index in range(available if chunks is None else min(chunks, available)):
        original = tokens[index * ctx : (index + 1) * ctx]
        seen = original.copy()
        if bos is not None:
            seen[0] = bos
        planned.append(Chunk(index, seen, first, original[first + 1 :]))
    return planned


@cache
def _llama() -> ModuleType:
    """The low-level module of the checked llama-cpp-python, ready to use."""
    api = runtime.import_llama_cpp().llama_cpp
    redirect_log(api)
    api.llama_backend_init()
    return api


def _model_params(api: ModuleType) -> Any:
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0  # figures are of the CPU
    return params


def _refusal(path: Path, errors: list[str]) -> InputError:
    unique = list(dict.fromkeys(errors))
    reason = "; ".join(unique) if unique else "it gives no reason"
    return InputError(
        f"{path}: llama.cpp cannot load the model: {reason}", "check the file with `spikequant verify`"
    )
