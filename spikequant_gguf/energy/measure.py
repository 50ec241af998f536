"""Joules per token of whole models, measured in turns: idle, A, idle, B; idle, B, idle, A; ...

Each sample is preceded by one of the idle machine, whose power is subtracted. What is measured is the whole
package: attention, output and everything else beside the linear layers, and whatever else the machine does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..evaluation import Model
from ..ggml_patch.progress import Progress, SilentProgress
from .sources import EnergySource, MeasurementError

__all__ = ["BATCH", "LEAST_REPEATS", "MeasureOptions", "Measured", "compute_text", "measure", "unavailable"]

BATCH = 512
"""Tokens of a prompt that are computed at once."""
LEAST_REPEATS = 5
_MOST_LOST = 3  # samples that a counter may spoil


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure.

    Attributes:
        repeats: samples per model and phase; at least LEAST_REPEATS.
        seconds: of one sample, at least; the text is computed again and again until then.
        idle_seconds: of the sample of the idle machine before it.
        settle_seconds: between load and idle sample, so that clocks and fans calm down.
    """

    repeats: int = LEAST_REPEATS
    seconds: float = 3.0
    idle_seconds: float = 2.0
    settle_seconds: float = 0.5

    def check(self) -> None:
        """Raises InputError."""
        if self.repeats < LEAST_REPEATS:
            raise InputError(f"{self.repeats} repeats show no spread", f"give {LEAST_REPEATS} or more")
        if not (0 < self.seconds < math.inf and 0 < self.idle_seconds < math.inf):
            raise InputError("samples take positive seconds, and end", "give about 3")
        if not 0 <= self.settle_seconds < math.inf:
            raise InputError(f"{self.settle_seconds} seconds cannot be waited", "give 0 or more")


@dataclass(frozen=True)
class Measured:
    """Energy of one model in one phase.

    Attributes:
        system: type of the model.
        model: path; None where nothing was measured.
        phase: ``prompt`` or ``decode``.
        method: ``rapl``, ``perf``, ``powermetrics``, or ``unavailable``.
        reason: why it is unavailable, else None.
        source: counters.
        joules_per_token: mean of the repeats, idle subtracted; None if unavailable. stdev: over the repeats.
        total_joules_per_token: the same without subtraction.
        idle_watts: mean of the idle samples.
        repeats: samples. lost: samples that the counter spoiled, which were repeated.
        tokens: of the text. batch: computed at once. sequence_length: longest context.
        seconds, idle_seconds, stabilisation_seconds, sampling_seconds: of MeasureOptions and source.
        ratio_to_q4_0: Q4_0's joules over this model's in the same round, median; then their range.
    """

    system: str
    model: str | None
    phase: str
    method: str
    reason: str | None = None
    source: str | None = None
    joules_per_token: float | None = None
    stdev: float | None = None
    total_joules_per_token: float | None = None
    idle_watts: float | None = None
    repeats: int = 0
    lost: int = 0
    tokens: int | None = None
    batch: int | None = None
    sequence_length: int | None = None
    threads: int | None = None
    seconds: float | None = None
    idle_seconds: float | None = None
    stabilisation_seconds: float | None = None
    sampling_seconds: float | None = None
    ratio_to_q4_0: float | None = None
    ratio_to_q4_0_range: tuple[float, float] | None = None

    def to_json(self) -> dict:
        return asdict(self)


def unavailable(system: str, phase: str, reason: str) -> Measured:
    """Nothing was measured, for this reason."""
    return Measured(system, None, phase, "unavailable", reason)


def compute_text(model: Model, ids: NDArray[np.int32], batch: int) -> None:
    """Compute a text from an empty context, `batch` tokens at once, with the logits of the last of each."""
    model.clear()
    for start in range(0, len(ids), batch):
        model.decode(ids[start : start + batch], start, 1)


def measure(
    models: Mapping[str, Path],
    text: bytes,
    tokens: int,
    phases: Sequence[str],
    source: EnergySource,
    options: MeasureOptions | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """Measure models in turns on the first `tokens` tokens of a text.

    Args:
        models: path by system, for example ``spk4`` and ``q4_0``.
        phases: of ``prompt`` and ``decode``.

    Raises:
        InputError: the text is too short. MeasurementError: the counter cannot be relied on.
    """
    options = options or MeasureOptions()
    options.check()
    progress = progress or SilentProgress()
    found = []
    with ExitStack() as stack:
        loaded, texts = {}, {}
        for system, path in models.items():
            progress.step("load", path.name)
            loaded[system] = stack.enter_context(Model(path, ctx_size=max(tokens, 8), threads=threads))
            texts[system] = loaded[system].tokenize(text)[:tokens]
            if len(texts[system]) < tokens:
                raise InputError(f"the text has only {len(texts[system])} tokens", "give a longer text")
        for phase in phases:
            batch = BATCH if phase == "prompt" else 1
            work = {
                system: lambda system=system, batch=batch: compute_text(loaded[system], texts[system], batch)
                for system in models
            }
            for run in work.values():
                run()  # warm-up: reads all weights, lets threads start
            progress.step("measure", f"{phase}, {options.repeats} rounds with {source.method}")
            samples = _rounds(work, source, options, progress)
            for system, path in models.items():
                found.append(
                    _summarize(
                        system, path, phase, tokens, batch, loaded[system].threads, samples, source, options
                    )
                )
    return found


@dataclass
class _Samples:
    """Of one system: joules per text, idle subtracted and not, by round; watts of the idle machine."""

    net: list[float]
    gross: list[float]
    idle_watts: list[float]
    lost: int = 0


def _rounds(
    work: Mapping[str, Callable[[], None]], source: EnergySource, options: MeasureOptions, progress: Progress
) -> dict[str, _Samples]:
    samples = {system: _Samples([], [], []) for system in work}
    for number in range(options.repeats):
        for system in list(work) if number % 2 == 0 else reversed(work):
            for attempt in range(_MOST_LOST + 1):
                try:
                    net, gross, idle = _sample(work[system], source, options)
                    break
                except MeasurementError:
                    if attempt == _MOST_LOST:
                        raise
                    samples[system].lost += 1
            samples[system].net.append(net)
            samples[system].gross.append(gross)
            samples[system].idle_watts.append(idle)
        progress.advance(number + 1, options.repeats)
    return samples


def _sample(
    run: Callable[[], None], source: EnergySource, options: MeasureOptions
) -> tuple[float, float, float]:
    """Joules of one run, idle subtracted and not, and watts of the idle machine."""
    time.sleep(options.settle_seconds)
    with source.measure() as idle:
        time.sleep(options.idle_seconds)
    watts = idle.joules / idle.seconds
    runs = 0
    with source.measure() as reading:
        begun = time.perf_counter()
        while runs == 0 or time.perf_counter() - begun < options.seconds:
            run()
            runs += 1
    if reading.joules <= 0:
        raise MeasurementError(
            "the counter did not move while the model computed", "another counter, or another machine"
        )
    return (reading.joules - watts * reading.seconds) / runs, reading.joules / runs, watts


def _summarize(
    system: str,
    path: Path,
    phase: str,
    tokens: int,
    batch: int,
    threads: int,
    samples: Mapping[str, _Samples],
    source: EnergySource,
    options: MeasureOptions,
) -> Measured:
    own = samples[system]
    ratio = bounds = None
    if "q4_0" in samples and min(own.net) > 0:
        ratios = [theirs / mine for theirs, mine in zip(samples["q4_0"].net, own.net, strict=True)]
        ratio, bounds = statistics.median(ratios), (min(ratios), max(ratios))
    return Measured(
        system=system,
        model=str(path),
        phase=phase,
        method=source.method,
        source=source.description,
        joules_per_token=statistics.mean(own.net) / tokens,
        stdev=statistics.stdev(own.net) / tokens,
        total_joules_per_token=statistics.mean(own.gross) / tokens,
        idle_watts=statistics.mean(own.idle_watts),
        repeats=options.repeats,
        lost=own.lost,
        tokens=tokens,
        batch=min(batch, tokens),
        sequence_length=tokens,
        threads=threads,
        seconds=options.seconds,
        idle_seconds=options.idle_seconds,
        stabilisation_seconds=options.settle_seconds,
        sampling_seconds=source.sampling_seconds,
        ratio_to_q4_0=ratio,
        ratio_to_q4_0_range=bounds,
    )
