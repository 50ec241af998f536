"""How far models' predictions are from those of a reference: Kullback-Leibler divergence, token by token.

All models are open side by side and see the same chunk; so memory is bounded by one context each, logits are
never stored, and the reference is computed once. The perplexity of every model falls out of the same pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .evaluation import DEFAULT_CTX, Model, plan_chunks, text_tokens
from .ggml_patch.progress import Progress, SilentProgress
from .host import HostFacts, host_facts
from .perplexity import MeanAndError, as_text, perplexity_and_error, safe_exp, token_losses
from .texts import Text

__all__ = ["Divergence", "DivergenceResult", "DivergenceSums", "divergence", "token_divergences"]

_SAMPLE_BYTES = 20_000
_ROWS = 16  # logits treated at once, so that they stay in the cache


@dataclass(frozen=True)
class Divergence:
    """Accuracy of one model.

    Attributes:
        model: path of the file.
        ppl, ppl_stderr: its perplexity, as `perplexity` gives it.
        kld, kld_stderr: mean divergence KL(reference || model) in nats per token; None for the reference
            itself.
        same_top: share of positions where the most likely token is the reference's; None for the reference
            itself.
        ppl_ratio, ppl_ratio_stderr: its perplexity over the reference's; the error is small, since both are
            of the same tokens. None for the reference itself.
    """

    model: str
    ppl: float
    ppl_stderr: float
    kld: float | None = None
    kld_stderr: float | None = None
    same_top: float | None = None
    same_top_stderr: float | None = None
    ppl_ratio: float | None = None
    ppl_ratio_stderr: float | None = None


@dataclass(frozen=True)
class DivergenceResult:
    """Accuracy of several models against one.

    Attributes:
        reference: accuracy of the reference.
        models: accuracy of the others, in the order given.
        text, ctx, chunks, tokens, threads, seconds: as of PerplexityResult.
    """

    reference: Divergence
    models: tuple[Divergence, ...]
    text: Text
    ctx: int
    chunks: int
    tokens: int
    threads: int
    seconds: float
    host: HostFacts = field(repr=False)

    def to_json(self) -> dict:
        """The result as plain JSON types."""
        return {
            "reference": asdict(self.reference),
            "models": [asdict(model) for model in self.models],
            "text": self.text.to_json() | {"ctx": self.ctx, "chunks": self.chunks},
            "tokens": self.tokens,
            "threads": self.threads,
            "seconds": self.seconds,
            "host": self.host.to_json(),
        }


def divergence(
    reference: str | Path,
    models: Sequence[str | Path],
    text: Text | str | Path | None = None,
    *,
    ctx: int = DEFAULT_CTX,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DivergenceResult:
    """Compare the predictions of models with those of a reference over a text, as llama-perplexity scores it.

    Args:
        reference, models: GGUF files with the same vocabulary.
        text, ctx, chunks, threads, progress: as of `perplexity`.

    Raises:
        InputError: the models do not share one vocabulary; else as `perplexity`.
    """
    progress = progress or SilentProgress()
    source = as_text(text)
    if chunks is not None and chunks < 1:
        raise InputError("the number of chunks must be positive", "give a positive number with --chunks")
    with ExitStack() as stack:
        opened: list[Model] = []
        for number, path in enumerate((reference, *models)):
            progress.step("load", Path(path).name)
            opened.append(stack.enter_context(Model(path, ctx_size=ctx, threads=threads)))
            if number:
                _check_same_vocabulary(opened[0], opened[-1], source)
        base, others = opened[0], opened[1:]
        if ctx > base.trained_ctx:
            progress.note(f"the model was trained on contexts of only {base.trained_ctx} tokens")
        plan = plan_chunks(text_tokens(base, source.data, source.name, ctx), ctx, chunks, base.bos)
        progress.step("evaluate", f"{len(opened)} models on {len(plan)} chunks of {ctx} tokens")
        reference_losses = MeanAndError()
        sums = [DivergenceSums() for _ in others]
        started = time.perf_counter()
        for chunk in plan:
            # In lockstep, block by block: logits stay in each model's own context while they are compared.
            streams = [chunk.logits(model) for model in others]
            for expected, targets in chunk.logits(base):
                base_losses = token_losses(expected, targets)
                reference_losses.add(base_losses)
                for stream, accumulated in zip(streams, sums, strict=True):
                    logits, _ = next(stream)
                    accumulated.add(expected, base_losses, logits, targets)
            progress.advance(chunk.index + 1, len(plan))
        seconds = time.perf_counter() - started
    return DivergenceResult(
        reference=Divergence(str(reference), *perplexity_and_error(reference_losses)),
        models=tuple(accumulated.result(str(path)) for path, accumulated in zip(models, sums, strict=True)),
        text=source,
        ctx=ctx,
        chunks=len(plan),
        tokens=reference_losses.count,
        threads=base.threads,
        seconds=seconds,
        host=host_facts(),
    )


def token_divergences(
    expected: NDArray[np.float32], logits: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """KL(softmax(expected) || softmax(logits)) of each row, and whether both have their maximum in one place.

    Args:
        expected, logits: float32[rows, n_vocab].

    Returns:
        float64[rows] in nats, not negative; bool[rows]. Equal rows give exactly 0.
    """
    divergences = np.empty(len(expected), np.float64)
    for start in range(0, len(expected), _ROWS):
        rows = slice(start, start + _ROWS)
        p = _log_softmax(expected[rows])
        with np.errstate(invalid="ignore"):
            difference = p - _log_softmax(logits[rows])
        difference[np.isneginf(p)] = 0.0  # what the reference excludes adds nothing
        np.exp(p, out=p)
        # The sum of p * (ln p - ln q) is not negative; rounding may make it so by some 1e-17.
        divergences[rows] = np.maximum(np.einsum("ij,ij->i", p, difference), 0.0)
    return divergences, expected.argmax(axis=1) == logits.argmax(axis=1)


class DivergenceSums:
    """What one model adds up over all positions."""

    def __init__(self) -> None:
        self.losses, self.differences, self.divergences = MeanAndError(), MeanAndError(), MeanAndError()
        self.same = 0

    def add(
        self,
        expected: NDArray[np.float32],
        base_losses: NDArray[np.float64],
        logits: NDArray[np.float32],
        targets: NDArray[np.int32],
    ) -> None:
        """Takes in logits of the reference and the model, float32[rows, n_vocab]."""
        values, same = token_divergences(expected, logits)
        losses = token_losses(logits, targets)
        self.losses.add(losses)
        self.differences.add(losses - base_losses)
        self.divergences.add(values)
        self.same += int(same.sum())

    def result(self, model: str) -> Divergence:
        """The accuracy of the model of this name."""
        share = self.same / self.divergences.count
        ratio = safe_exp(self.differences.mean)
        return Divergence(
            model,
            *perplexity_and_error(self.losses),
            kld=self.divergences.mean,
            kld_stderr=self.divergences.error,
            same_top=share,
            same_top_stderr=math.sqrt(share * (1 - share) / (self.divergences.count - 1)),
            ppl_ratio=ratio,
            ppl_ratio_stderr=ratio * self.differences.error,
        )


def _check_same_vocabulary(reference: Model, model: Model, text: Text) -> None:
    """Raises InputError if the models see different tokens in the text."""
    sample = text.data[:_SAMPLE_BYTES]
    same = reference.n_vocab == model.n_vocab and reference.bos == model.bos
    if not same or not np.array_equal(reference.tokenize(sample), model.tokenize(sample)):
        raise InputError(
            f"{model.path} and {reference.path} have different vocabularies", "compare versions of one model"
        )


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
