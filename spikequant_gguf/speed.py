"""Tokens per second of models, each measured in turns with a baseline: a busy machine slows down both.

The tests are those of llama-bench: a prompt of 512 tokens computed in one batch into an empty context, and
tokens computed one by one from an empty context.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .evaluation import Model
from .ggml_patch.progress import Progress, SilentProgress
from .host import HostFacts, host_facts

__all__ = ["DEFAULT_DECODE", "DEFAULT_PROMPT", "DEFAULT_ROUNDS", "Speed", "SpeedResult", "Timing", "speed"]

DEFAULT_PROMPT = 512
DEFAULT_DECODE = 64
DEFAULT_ROUNDS = 5
_PROMPT_BATCH = 512


@dataclass(frozen=True)
class Timing:
    """Rates of one test.

    Attributes:
        tps: median of the rounds, tokens per second.
        min_tps: of the slowest round.
        stdev_tps: standard deviation over the rounds.
        ratio: median over the rounds of the rate divided by the baseline's in the same round; None without a
            baseline, 1 for the baseline itself.
        ratio_min, ratio_max: the smallest and largest of these.
    """

    tps: float
    min_tps: float
    stdev_tps: float
    ratio: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None


@dataclass(frozen=True)
class Speed:
    """Speed of one model: `prompt` is None or `decode` is None if that test was left out."""

    model: str
    prompt: Timing | None
    decode: Timing | None


@dataclass(frozen=True)
class SpeedResult:
    """Speeds of several models.

    Attributes:
        models: in the order given.
        baseline: path of the model that ratios refer to; None without one.
        prompt, decode: tokens of the two tests.
        rounds: measured per model and test.
        threads: that computed.
    """

    models: tuple[Speed, ...]
    baseline: str | None
    prompt: int
    decode: int
    rounds: int
    threads: int
    host: HostFacts = field(repr=False)

    def to_json(self) -> dict:
        """The result as plain JSON types."""
        return asdict(self) | {
            "models": [asdict(model) for model in self.models],
            "host": self.host.to_json(),
        }


def speed(
    models: Sequence[str | Path],
    baseline: str | Path | None = None,
    *,
    prompt: int = DEFAULT_PROMPT,
    decode: int = DEFAULT_DECODE,
    rounds: int = DEFAULT_ROUNDS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SpeedResult:
    """Measure models in turns with the baseline: after a warm-up A B, B A, A B, ..., the context cleared.

    Args:
        models: GGUF files; may contain the baseline.
        baseline: GGUF file that ratios refer to.
        prompt, decode: tokens of the tests; 0 leaves a test out.
        rounds: pairs of measurements per model.
        threads: physical cores if None.

    Raises:
        InputError: an argument is not positive; else as `Model`.
    """
    if rounds < 1 or prompt < 0 or decode < 0 or prompt + decode == 0:
        raise InputError(
            "there is nothing to measure", "give positive rounds and a positive prompt or decode length"
        )
    progress = progress or SilentProgress()
    ctx = max(prompt, decode)
    with ExitStack() as stack:
        base = None
        if baseline is not None:
            progress.step("load", Path(baseline).name)
            base = stack.enter_context(Model(baseline, ctx_size=ctx, threads=threads))
            _warm_up(base, prompt, decode)
        measured: dict[str, Speed] = {}
        of_baseline: list[_Rates] = []
        used = 0
        for path in models:
            if baseline is not None and _same_file(path, baseline):
                continue
            progress.step("speed", f"{Path(path).name}, {rounds} rounds")
            with Model(path, ctx_size=ctx, threads=threads) as model:
                used = model.threads
                _warm_up(model, prompt, decode)
                pairs = _measure_pairs(model, base, prompt, decode, rounds, progress)
            of_baseline += [theirs for _, theirs in pairs if theirs is not None]
            measured[str(path)] = _summarize(str(path), pairs)
        if base is not None:
            used = base.threads
            if not of_baseline:  # nothing but the baseline was given
                progress.step("speed", f"{Path(baseline).name}, {rounds} rounds")
                of_baseline = [_measure(base, prompt, decode) for _ in range(rounds)]
            own = _summarize(str(baseline), [(rates, rates) for rates in of_baseline])
            measured.update({str(path): own for path in models if _same_file(path, baseline)})
    return SpeedResult(
        models=tuple(measured[str(path)] for path in models),
        baseline=None if baseline is None else str(baseline),
        prompt=prompt,
        decode=decode,
        rounds=rounds,
        threads=used,
        host=host_facts(),
    )


@dataclass(frozen=True)
class _Rates:
    """Tokens per second of one round; None for a test left out."""

    prompt: float | None
    decode: float | None


def _measure_pairs(
    model: Model, base: Model | None, prompt: int, decode: int, rounds: int, progress: Progress
) -> list[tuple[_Rates, _Rates | None]]:
    """(model, baseline) of each round; the order alternates, so that a steady drift favours neither."""
    pairs: list[tuple[_Rates, _Rates | None]] = []
    for number in range(rounds):
        if base is None:
            pairs.append((_measure(model, prompt, decode), None))
        elif number % 2 == 0:
            theirs = _measure(base, prompt, decode)
            pairs.append((_measure(model, prompt, decode), theirs))
        else:
            own = _measure(model, prompt, decode)
            pairs.append((own, _measure(base, prompt, decode)))
        progress.advance(number + 1, rounds)
    return pairs


def _measure(model: Model, prompt: int, decode: int) -> _Rates:
    return _Rates(
        prompt / _prompt_seconds(model, prompt) if prompt else None,
        decode / _decode_seconds(model, decode) if decode else None,
    )


def _prompt_seconds(model: Model, n_tokens: int) -> float:
    tokens = _some_tokens(model, n_tokens)
    model.clear()
    started = time.perf_counter()
    for start in range(0, n_tokens, _PROMPT_BATCH):
        part = tokens[start : start + _PROMPT_BATCH]
        model.decode(part, start, outputs=int(start + len(part) == n_tokens))
    return time.perf_counter() - started


def _decode_seconds(model: Model, n_tokens: int) -> float:
    tokens = _some_tokens(model, n_tokens)
    model.clear()
    started = time.perf_counter()
    for position in range(n_tokens):
        model.decode(tokens[position : position + 1], position, outputs=1)
    return time.perf_counter() - started


def _some_tokens(model: Model, n_tokens: int) -> NDArray[np.int32]:
    """The same arbitrary tokens in every round; spikes, and so the time, depend on them."""
    return np.random.default_rng(0).integers(0, model.n_vocab, n_tokens, dtype=np.int32)


def _warm_up(model: Model, prompt: int, decode: int) -> None:
    """Reads all weights once and lets threads start."""
    if prompt:
        _prompt_seconds(model, prompt)
    if decode:
        _decode_seconds(model, min(decode, 8))


def _summarize(model: str, pairs: list[tuple[_Rates, _Rates | None]]) -> Speed:
    return Speed(model, _timing(pairs, "prompt"), _timing(pairs, "decode"))


def _timing(pairs: list[tuple[_Rates, _Rates | None]], test: str) -> Timing | None:
    rates = [getattr(own, test) for own, _ in pairs]
    if rates[0] is None:
        return None
    ratios = [getattr(own, test) / getattr(theirs, test) for own, theirs in pairs if theirs is not None]
    return Timing(
        tps=statistics.median(rates),
        min_tps=min(rates),
        stdev_tps=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        ratio=statistics.median(ratios) if ratios else None,
        ratio_min=min(ratios) if ratios else None,
        ratio_max=max(ratios) if ratios else None,
    )


def _same_file(a: str | Path, b: str | Path) -> bool:
    return Path(a).resolve() == Path(b).resolve()
