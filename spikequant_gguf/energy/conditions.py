"""How the modelled ratios depend on the constants, and where the wanted ones end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from .constants import OPERATIONS, Constants, constant_sets, load_constants
from .counts import Counts
from .model import SystemEnergy, model_energy
from .shares import Shares, shares

__all__ = ["WANTED", "Condition", "conditions", "ratio", "sensitivity"]

WANTED = {"fp16_mac": 4.6, "q4_0": 2.0}
"""Ratios to reach, by the system compared with."""

_FACTORS = (0.5, 2.0)
_WIDE = 4096  # inputs and rows of a layer in which the other of the two is small
_SEARCHED = 1 << 20  # largest width, batch or factor looked at


@dataclass(frozen=True)
class Condition:
    """One thing varied while all else stays.

    Attributes:
        system: compared with.
        wanted: ratio.
        quantity: what is varied or included.
        value: as it is here; None if it has no single value.
        limit: up to or from which the wanted ratio holds; None if it holds or fails everywhere looked at.
        unit: of value and limit.
        ratio: at `value`, or with what is included.
        holds: whether that is the wanted ratio or more.
        text: all of it in a sentence.
    """

    system: str
    wanted: float
    quantity: str
    value: float | None
    limit: float | None
    unit: str
    ratio: float
    holds: bool
    text: str

    def to_json(self) -> dict:
        return asdict(self)


def ratio(rows: Sequence[SystemEnergy], system: str, memory: bool = False) -> float:
    """How many times less energy spk4 takes than a system, with or without memory."""
    by_name = {row.system: row.total if memory else row.compute for row in rows}
    return by_name[system] / by_name["spk4"]


def sensitivity(counts: Sequence[Counts], tokens: int, constants: Constants) -> list[dict]:
    """Ratios with one constant halved and doubled, and with every set of constants."""
    variations = [
        (f"{operation} × {factor:g}", operation, factor, constants.scaled(operation, factor))
        for operation in OPERATIONS
        for factor in _FACTORS
    ]
    variations += [(name, None, None, load_constants(name)) for name in constant_sets()]
    found = []
    for label, operation, factor, varied in variations:
        rows = model_energy(counts, tokens, varied)
        found.append(
            {
                "varied": label,
                "operation": operation,
                "factor": factor,
                "ratios": {system: ratio(rows, system) for system in WANTED},
                "ratios_with_memory": {system: ratio(rows, system, memory=True) for system in WANTED},
            }
        )
    return found


def conditions(counts: Sequence[Counts], tokens: int, constants: Constants) -> list[Condition]:
    """Where the wanted ratios hold: see Condition."""
    average = shares(counts)
    return [
        condition
        for system, wanted in WANTED.items()
        for condition in _of_system(counts, tokens, constants, average, system, wanted)
    ]


def _of_system(
    counts: Sequence[Counts], tokens: int, constants: Constants, average: Shares, system: str, wanted: float
) -> list[Condition]:
    def at(counted: Sequence[Counts], prices: Constants = constants, memory: bool = False) -> float:
        return ratio(model_energy(counted, tokens, prices), system, memory)

    def layer(n_inputs: int, n_rows: int, of: Shares = average) -> list[Counts]:
        return [of.counts("layer", n_inputs, n_rows, tokens, 1)]

    def make(
        quantity: str, value: float | None, limit: float | None, unit: str, found: float, text: str
    ) -> Condition:
        return Condition(system, wanted, quantity, value, limit, unit, found, found >= wanted, text)

    now, with_memory = at(counts), at(counts, memory=True)
    found = [
        make("as counted", None, None, "", now, f"Arithmetic and dequantization: {now:.2f} ×."),
        make("memory included", None, None, "", with_memory, f"With DRAM traffic: {with_memory:.2f} ×."),
    ]

    def with_batch(batch: float) -> float:
        """Weights read once for so many tokens; bytes of inputs and outputs stay."""
        read = [
            replace(
                count,
                products=max(1, round(count.tokens / batch)),
                bytes=_bytes(count, max(1, round(count.tokens / batch))),
            )
            for count in _times(counts, _SEARCHED // tokens + 1)
        ]
        return ratio(model_energy(read, tokens, constants), system, memory=True)

    least = _first(lambda batch: with_batch(batch) >= wanted, _SEARCHED)
    best = with_batch(_SEARCHED)
    text = (
        f"With memory (inputs and outputs through DRAM, too) from {least} tokens per reading of weights on."
        if least
        else f"With memory (inputs and outputs through DRAM, too) at no batch size: at most {best:.2f} ×."
    )
    found.append(make("tokens per reading of the weights, with memory", None, least, "tokens", best, text))

    pj = constants.pj["int32_add"]
    factor = _last(lambda factor: at(counts, constants.scaled("int32_add", factor)) >= wanted)
    limit = None if factor is None else factor * pj
    text = (
        f"The addition may cost up to {limit:.3g} pJ (here {pj:g}), all other constants as they are."
        if limit is not None
        else "It holds whatever the addition costs."
        if now >= wanted
        else f"It fails with additions of {pj:g} pJ and cheaper ones."
    )
    found.append(make("energy of an int32 addition", pj, limit, "pJ", now, text))

    for quantity, text, build in (
        ("outputs per input", "outputs (rows) share an input's coding", lambda n: layer(_WIDE, n)),
        ("inputs per output", "inputs share an output's readout", lambda n: layer(64 * n, _WIDE)),
    ):
        scale = 1 if quantity.startswith("outputs") else 64
        least = _first(lambda n, build=build: at(build(n)) >= wanted, _SEARCHED // 64)
        limit = None if least is None else float(scale * least)
        said = f"At least {limit:.0f} {text}." if limit else f"No number of {quantity} is enough."
        found.append(make(quantity, None, limit, "", at(build(_WIDE // scale)), said))

    for quantity, varied in (
        ("no silent input", replace(average, silent=0.0)),
        ("every input salient", replace(average, silent=0.0, salient=1.0, salient_spikes=1.0)),
    ):
        value = at(layer(_WIDE, _WIDE, varied))
        found.append(
            make(
                quantity,
                None,
                None,
                "",
                value,
                f"{quantity.capitalize()} ({_WIDE} × {_WIDE}): {value:.2f} ×.",
            )
        )
    return found


def _bytes(count: Counts, products: int) -> int:
    """Bytes of a tensor whose weights are read so many times, all of them."""
    weights = count.n_rows * (2 + 2 * count.n_inputs // 64) + count.n_inputs * count.n_rows // 2
    return products * weights + count.tokens * (count.n_inputs + 4 * count.n_rows)


def _times(counts: Sequence[Counts], times: int) -> list[Counts]:
    """Counts of a text so many times as long."""
    scaled = ("tokens", "spikes", "silent", "salient", "rate_spikes", "adds", "shift_adds", "readouts")
    return [replace(count, **{name: times * getattr(count, name) for name in scaled}) for count in counts]


def _first(holds: Callable[[int], bool], largest: int) -> int | None:
    """The smallest number from 1 on that holds, of a property that stays once it holds; None if none does."""
    if not holds(largest):
        return None
    low, high = 0, largest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _last(holds: Callable[[float], bool]) -> float | None:
    """The largest factor that holds, of a property that ends; None if it never ends or never begins."""
    if not holds(1e-6) or holds(_SEARCHED):
        return None
    low, high = 1e-6, float(_SEARCHED)
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
