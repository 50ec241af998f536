"""`spikequant energy`: counts of a real text turned into modelled energies, and measured ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..evaluation import Model
from ..format import TYPE_SPK4
from ..ggml_patch.progress import Progress, SilentProgress
from ..gguf_header import read_header
from ..host import HostFacts, host_facts
from ..inspect_file import model_type
from ..perplexity import as_text
from ..shapes import SHAPES
from ..texts import Text
from .conditions import Condition, conditions, ratio, sensitivity
from .constants import DEFAULT_CONSTANTS, Constants, load_constants
from .counts import Counts, counting, read_counts, read_token_counts, total
from .measure import BATCH, Measured, MeasureOptions, measure, unavailable
from .model import SystemEnergy, by_kind, model_energy
from .rapl import POWERCAP
from .shares import counts_of_shape, shares_by_kind
from .sources import find_source

__all__ = ["PHASES", "EnergyResult", "PhaseEnergy", "count_text", "energy"]

PHASES = ("prompt", "decode")
METHOD = "op_model"


@dataclass(frozen=True)
class PhaseEnergy:
    """What a model does with a text in one way, and what it would cost.

    Attributes:
        phase: ``prompt``: up to 512 tokens at once, or ``decode``: one by one.
        tokens: computed.
        counts: by tensor.
        token_counts: TOKEN_COUNTS[n], single tokens in single tensors; `token` counts from the start of the
            text; empty for a shape.
        rows: energies by system, the model itself first.
        layers: the same by kind of layer.
        sensitivity, conditions: see conditions.py.
    """

    phase: str
    tokens: int
    counts: list[Counts] = field(repr=False)
    token_counts: NDArray[np.void] = field(repr=False)
    rows: list[SystemEnergy]
    layers: dict[str, list[SystemEnergy]] = field(repr=False)
    sensitivity: list[dict] = field(repr=False)
    conditions: list[Condition] = field(repr=False)

    def ratio(self, system: str, memory: bool = False) -> float:
        """How many times less energy than a system: of arithmetic and dequantization, or with memory."""
        return ratio(self.rows, system, memory)

    @property
    def spike_ratio(self) -> float:
        """Spikes of a rate code for every spike."""
        sums = total(self.counts)
        return sums["rate_spikes"] / sums["spikes"]

    def per_token(self) -> list[dict]:
        """Sums over all tensors, by token of the text."""
        if not len(self.token_counts):
            return []
        place = self.token_counts["token"]
        inputs = np.array([count.n_inputs for count in self.counts])[self.token_counts["counter"]]
        rows = np.array([count.n_rows for count in self.counts])[self.token_counts["counter"]]
        columns = {name: self.token_counts[name].astype(np.int64) for name in _OF_TOKENS}
        columns |= {"silent": inputs - columns["spikes"], "readouts": rows}
        sums = {name: np.zeros(self.tokens, np.int64) for name in columns}
        for name, values in columns.items():
            np.add.at(sums[name], place, values)
        return [
            {"token": token} | {name: int(values[token]) for name, values in sums.items()}
            for token in range(self.tokens)
        ]

    def to_json(self) -> dict:
        return {
            "phase": self.phase,
            "tokens": self.tokens,
            "batch": min(BATCH, self.tokens) if self.phase == "prompt" else 1,
            "rows": self._rows_json(self.rows),
            "counts": total(self.counts) | {"rate_to_ttfs": self.spike_ratio},
            "shares": {kind: share.to_json() for kind, share in shares_by_kind(self.counts).items()},
            "layers": [{"kind": kind, "rows": self._rows_json(rows)} for kind, rows in self.layers.items()],
            "sensitivity": self.sensitivity,
            "conditions": [condition.to_json() for condition in self.conditions],
            "tensors": [count.to_json() for count in self.counts],
            "per_token": self.per_token(),
        }

    @staticmethod
    def _rows_json(rows: list[SystemEnergy]) -> list[dict]:
        return [
            row.to_json()
            | {"ratio": ratio(rows, row.system), "ratio_with_memory": ratio(rows, row.system, memory=True)}
            for row in rows
        ]


_OF_TOKENS = ("spikes", "salient", "rate_spikes", "adds", "shift_adds")


@dataclass(frozen=True)
class EnergyResult:
    """Counts and modelled energies of one model on one text, and what was measured.

    Attributes:
        model: path.
        shape: name of the shape that the energies are of; None for the model itself.
        assumption: what a shape's counts rest on; None for the model itself.
        phases: modelled.
        measured: of every phase, one by model; says why where nothing was.
    """

    model: str
    text: Text
    shape: str | None
    assumption: str | None
    phases: list[PhaseEnergy]
    measured: list[Measured]
    constants: Constants
    threads: int
    host: HostFacts = field(repr=False)

    def phase(self, name: str) -> PhaseEnergy:
        """``prompt`` or ``decode``. Raises StopIteration if it was left out."""
        return next(phase for phase in self.phases if phase.phase == name)

    def to_json(self) -> dict:
        """The result as plain JSON types; energies in picojoules per token of the linear layers.

        `rows` and `counts` are those of the first phase; `phases` has all.
        """
        phases = [phase.to_json() for phase in self.phases]
        return {
            "model": self.model,
            "shape": self.shape,
            "assumption": self.assumption,
            "text": self.text.to_json() | {"tokens": self.phases[0].tokens},
            "method": METHOD,
            "phase": phases[0]["phase"],
            "rows": phases[0]["rows"],
            "counts": phases[0]["counts"],
            "measured": [measured.to_json() for measured in self.measured],
            "constants": self.constants.to_json(),
            "phases": phases,
            "host": self.host.to_json() | {"threads": self.threads},
        }


def energy(
    models: Sequence[str | Path] | str | Path,
    text: Text | str | Path | None = None,
    *,
    tokens: int = 256,
    phases: Sequence[str] = PHASES,
    shape: str | None = None,
    constants: str = DEFAULT_CONSTANTS,
    dram_bit: float | None = None,
    measuring: bool = True,
    options: MeasureOptions | None = None,
    powercap: Path = POWERCAP,
    threads: int | None = None,
    progress: Progress | None = None,
) -> EnergyResult:
    """Count what a model with spike-coded tensors does for the first `tokens` tokens of a text.

    Args:
        models: the first one is counted; all are measured, in turns, where the machine has a counter.
        phases: of ``prompt`` and ``decode``.
        shape: name of a shape, for which the model's shares by kind of layer are assumed.
        constants: a named set or a TOML file. dram_bit: another energy per bit, in picojoules.
        measuring: whether to measure at all.
        powercap: folder of the RAPL counters.

    Raises:
        InputError: the text is too short, the first model has no spikes, two models have the same type, or an
            argument is wrong. MeasurementError: the counter cannot be relied on.
    """
    paths = [Path(models)] if isinstance(models, str | Path) else [Path(model) for model in models]
    progress = progress or SilentProgress()
    options = options or MeasureOptions()
    options.check()
    prices = load_constants(constants)
    if dram_bit is not None:
        prices = prices.with_dram_bit(dram_bit)
    if shape is not None and shape not in SHAPES:
        raise InputError(f"there is no shape '{shape}'", f"choose from {', '.join(SHAPES)}")
    if not phases or not set(phases) <= set(PHASES):
        raise InputError(f"phases are {' and '.join(PHASES)}", "name at least one of them")
    named = _by_system(paths)
    source = as_text(text)
    progress.step("count", f"{tokens} tokens of {source.name}")
    counted, used_threads = count_text(paths[0], source, tokens, phases, threads)
    found = []
    assumption = None
    for phase, (counts, token_counts) in counted.items():
        if shape is not None:
            products = -(-tokens // BATCH) if phase == "prompt" else tokens
            counts = counts_of_shape(SHAPES[shape], shares_by_kind(counts), tokens, products)
            token_counts = token_counts[:0]
            assumption = (
                f"Only the shape is of {shape}: shares of silent and salient inputs by kind of layer are "
                f"those measured in {paths[0].name} on this text."
            )
        layers = {kind: model_energy(group, tokens, prices) for kind, group in by_kind(counts).items()}
        found.append(
            PhaseEnergy(
                phase,
                tokens,
                counts,
                token_counts,
                model_energy(counts, tokens, prices),
                layers,
                sensitivity(counts, tokens, prices),
                conditions(counts, tokens, prices),
            )
        )
    return EnergyResult(
        model=str(paths[0]),
        text=source,
        shape=shape,
        assumption=assumption,
        phases=found,
        measured=_measured(
            named, source, tokens, list(counted), shape, measuring, options, powercap, used_threads, progress
        ),
        constants=prices,
        threads=used_threads,
        host=host_facts(),
    )


def count_text(
    model: str | Path, text: Text, tokens: int, phases: Sequence[str] = PHASES, threads: int | None = None
) -> tuple[dict[str, tuple[list[Counts], NDArray[np.void]]], int]:
    """Counts by tensor, and TOKEN_COUNTS, of every phase; and the number of threads that computed.

    Raises:
        InputError: the text is too short, or the model has no spikes.
    """
    if not any(tensor.type_id == TYPE_SPK4 for tensor in read_header(Path(model)).tensors):
        raise InputError(f"{model} has no spike-coded tensors", "convert it with `spikequant convert`")
    found = {}
    with Model(model, ctx_size=max(tokens, 8), threads=threads) as loaded:
        ids = loaded.tokenize(text.data)[:tokens]
        if len(ids) < tokens:
            raise InputError(f"the text '{text.name}' has only {len(ids)} tokens", "give a longer text")
        for phase in phases:
            batch = BATCH if phase == "prompt" else 1
            loaded.clear()
            seen = []
            with counting(tokens=True):
                done = 0
                for start in range(0, tokens, batch):
                    part = ids[start : start + batch]
                    loaded.decode(part, start, len(part))  # all logits, so that no layer skips a token
                    kept = read_token_counts()
                    kept["token"][done:] += start
                    seen.append(kept[done:])
                    done = len(kept)
            found[phase] = read_counts(), np.concatenate(seen)
        return found, loaded.threads


def _by_system(paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by type of the model; the first one is the counted one."""
    named: dict[str, Path] = {}
    for path in paths:
        kind = model_type(read_header(path))
        if kind in named:
            raise InputError(f"{path} and {named[kind]} are both {kind}", "give one model of each type")
        named[kind] = path
    return named


def _measured(
    models: dict[str, Path],
    text: Text,
    tokens: int,
    phases: Sequence[str],
    shape: str | None,
    measuring: bool,
    options: MeasureOptions,
    powercap: Path,
    threads: int,
    progress: Progress,
) -> list[Measured]:
    reason = None
    if shape is not None:
        reason = "a shape has no model to measure"
    elif not measuring:
        reason = "it was not asked for (--no-measure)"
    else:
        source = find_source(powercap)
        if isinstance(source, str):
            reason = source
    if reason is not None:
        return [unavailable(system, phase, reason) for phase in phases for system in models]
    return measure(models, text.data, tokens, phases, source, options, threads=threads, progress=progress)
