"""`spikequant energy`: counts of a real text, turned into modelled energies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..evaluation import Model
from ..host import HostFacts, host_facts
from ..perplexity import as_text
from ..texts import Text
from .constants import Constants, load_constants
from .counts import Counts, counting, read_counts, total
from .model import SystemEnergy, model_energy
from .rapl import find_rapl

__all__ = ["EnergyResult", "energy"]


@dataclass(frozen=True)
class EnergyResult:
    """Counts of one model on one text, and the energies they stand for.

    Attributes:
        tokens: computed.
        decode: whether token by token; else all at once, as a prompt is.
        rows: by system, the model itself first.
        unavailable: why no energy was measured.
    """

    model: str
    text: Text
    tokens: int
    decode: bool
    counts: list[Counts]
    rows: list[SystemEnergy]
    constants: Constants
    unavailable: str
    host: HostFacts

    def ratio(self, system: str, memory: bool = False) -> float:
        """How many times less energy than a system: of arithmetic and dequantization, or with memory."""
        by_name = {row.system: row.compute + (row.memory if memory else 0.0) for row in self.rows}
        return by_name[system] / by_name["spk4"]

    @property
    def spike_ratio(self) -> float:
        """Spikes of a rate code for every spike."""
        sums = total(self.counts)
        return sums["rate_spikes"] / sums["spikes"]

    def to_json(self) -> dict:
        """The result as plain JSON types; energies in picojoules per token of the linear layers."""
        ratios = [
            {"ratio": self.ratio(row.system), "ratio_with_memory": self.ratio(row.system, memory=True)}
            for row in self.rows
        ]
        return {
            "model": self.model,
            "text": self.text.to_json() | {"tokens": self.tokens},
            "phase": "decode" if self.decode else "prompt",
            "method": "modelled from counted operations",
            "rows": [row.to_json() | ratio for row, ratio in zip(self.rows, ratios, strict=True)],
            "counts": total(self.counts) | {"rate_to_ttfs": self.spike_ratio},
            "tensors": [count.to_json() for count in self.counts],
            "measured": [
                {
                    "system": "spk4",
                    "method": "unavailable",
                    "reason": self.unavailable,
                    "joules_per_token": None,
                    "stdev": None,
                }
            ],
            "constants": self.constants.to_json(),
            "host": self.host.to_json(),
        }


def energy(
    model: str | Path,
    text: Text | str | Path | None = None,
    *,
    tokens: int = 256,
    decode: bool = False,
    constants: str = "horowitz-45nm",
    threads: int | None = None,
) -> EnergyResult:
    """Count what a model with spike-coded tensors does for the first `tokens` tokens of a text.

    constants: a named set or a TOML file. Raises InputError for a text too short, or a model without spikes.
    """
    prices = load_constants(constants)
    source = as_text(text)
    with Model(model, ctx_size=max(tokens, 8), threads=threads) as loaded:
        ids = loaded.tokenize(source.data)[:tokens]
        if len(ids) < tokens:
            raise InputError(f"the text '{source.name}' has only {len(ids)} tokens", "give a longer text")
        step = 1 if decode else 512  # llama.cpp's batch
        with counting():
            for start in range(0, tokens, step):
                part = ids[start : start + step]
                loaded.decode(part, start, len(part))
        counts = read_counts()
    if not counts:
        raise InputError(f"{model} has no spike-coded tensors", "convert it with `spikequant convert`")
    source_of_joules = find_rapl()
    return EnergyResult(
        model=str(model),
        text=source,
        tokens=tokens,
        decode=decode,
        counts=counts,
        rows=model_energy(counts, tokens, prices),
        constants=prices,
        unavailable=source_of_joules
        if isinstance(source_of_joules, str)
        else "RAPL counters exist; this command does not measure with them",
        host=host_facts(),
    )
