"""Perplexity as llama-perplexity defines it: exp of the mean negative log-likelihood of the scored tokens."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .evaluation import DEFAULT_CTX, Model, plan_chunks, text_tokens
from .ggml_patch.progress import Progress, SilentProgress
from .host import HostFacts, host_facts
from .texts import Text, evaluation_text

__all__ = [
    "MeanAndError",
    "PerplexityResult",
    "as_text",
    "perplexity",
    "perplexity_and_error",
    "safe_exp",
    "token_losses",
]

_ROWS = 32  # logits treated at once, so that they stay in the cache


@dataclass
class MeanAndError:
    """Running mean of independent values and its standard error."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Takes in more values."""
        self.count += len(values)
        self.total += float(values.sum())
        self.squares += float(np.dot(values, values))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 where rounding leaves no variance, NaN for fewer than two values."""
        if self.count < 2:
            return math.nan
        variance = self.squares / self.count - self.mean**2
        return math.sqrt(max(variance, 0.0) / (self.count - 1))


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one text.

    Attributes:
        model: path of the file.
        text: what was evaluated.
        ctx: tokens per chunk.
        chunks: number of chunks evaluated.
        tokens: number of predictions scored.
        ppl, ppl_stderr: perplexity and its standard error.
        running: perplexity over the first 1, 2, ... chunks.
        threads: that computed.
        seconds: time of the evaluation, without loading.
    """

    model: str
    text: Text
    ctx: int
    chunks: int
    tokens: int
    ppl: float
    ppl_stderr: float
    running: tuple[float, ...]
    threads: int
    seconds: float
    host: HostFacts = field(repr=False)

    def to_json(self) -> dict:
        """The result as plain JSON types."""
        return {
            "model": self.model,
            "text": self.text.to_json() | {"ctx": self.ctx, "chunks": self.chunks},
            "tokens": self.tokens,
            "ppl": self.ppl,
            "ppl_stderr": self.ppl_stderr,
            "running": list(self.running),
            "threads": self.threads,
            "seconds": self.seconds,
            "host": self.host.to_json(),
        }


def perplexity(
    model: str | Path,
    text: Text | str | Path | None = None,
    *,
    ctx: int = DEFAULT_CTX,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a GGUF model, equal to llama-perplexity's up to rounding.

    Args:
        text: a Text or the path of a text file; `default_evaluation_text` if None.
        ctx: tokens per chunk, of which the second half is scored.
        chunks: evaluate only so many; all if None.
        threads: physical cores if None.
        progress: told of every chunk.

    Raises:
        RuntimeMissingError, InputError, UnsupportedError: see `Model` and `text_tokens`.
    """
    progress = progress or SilentProgress()
    source = as_text(text)
    if chunks is not None and chunks < 1:
        raise InputError("the number of chunks must be positive", "give a positive number with --chunks")
    progress.step("load", Path(model).name)
    with Model(model, ctx_size=ctx, threads=threads) as loaded:
        if ctx > loaded.trained_ctx:
            progress.note(f"the model was trained on contexts of only {loaded.trained_ctx} tokens")
        plan = plan_chunks(text_tokens(loaded, source.data, source.name, ctx), ctx, chunks, loaded.bos)
        progress.step("evaluate", f"{len(plan)} chunks of {ctx} tokens")
        losses, running = MeanAndError(), []
        started = time.perf_counter()
        for chunk in plan:
            for logits, targets in chunk.logits(loaded):
                losses.add(token_losses(logits, targets))
            running.append(safe_exp(losses.mean))
            progress.advance(chunk.index + 1, len(plan))
        seconds = time.perf_counter() - started
    ppl, ppl_stderr = perplexity_and_error(losses)
    return PerplexityResult(
        model=str(model),
        text=source,
        ctx=ctx,
        chunks=len(plan),
        tokens=losses.count,
        ppl=ppl,
        ppl_stderr=ppl_stderr,
        running=tuple(running),
        threads=loaded.threads,
        seconds=seconds,
        host=host_facts(),
    )


def as_text(text: Text | str | Path | None) -> Text:
    """A Text as it is, the text of a path, or the default text for None. Raises InputError."""
    return text if isinstance(text, Text) else evaluation_text(text)


def token_losses(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """Negative log-likelihood of each target.

    Args:
        logits: float32[rows, n_vocab].
        targets: int32[rows].

    Returns:
        float64[rows], in nats. NaN where logits are NaN.
    """
    losses = np.empty(len(targets), np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite logits have their well-defined results
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            block, wanted = logits[rows], targets[rows]
            shifted = block - block.max(axis=1, keepdims=True)
            chosen = shifted[np.arange(len(wanted)), wanted].astype(np.float64)
            losses[rows] = np.log(np.exp(shifted, out=shifted).sum(axis=1, dtype=np.float64)) - chosen
    return losses


def perplexity_and_error(losses: MeanAndError) -> tuple[float, float]:
    """Perplexity of losses in nats, and its standard error."""
    ppl = safe_exp(losses.mean)
    return ppl, ppl * losses.error


def safe_exp(value: float) -> float:
    """exp that overflows to infinity."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
