"""How much of a layer's input fires, and what another shape with the same shares would count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..errors import InputError
from ..format import QK_SPK, SALIENT_SLOTS
from ..shapes import LlamaShape
from .counts import Counts, total
from .model import by_kind

__all__ = ["Shares", "counts_of_shape", "shares", "shares_by_kind"]

_HEADER_BYTES = 2  # per row


@dataclass(frozen=True)
class Shares:
    """Of the inputs of some layers, averaged over tokens.

    Attributes:
        silent: share of inputs that never fire.
        salient: share with a fifth bit.
        salient_spikes: share that are salient and fire; nearly the same.
        rate_spikes: what a rate code would fire per input.
        steps: time steps per token, of the fine and the coarse values together.
    """

    silent: float
    salient: float
    salient_spikes: float
    rate_spikes: float
    steps: float

    def to_json(self) -> dict:
        return asdict(self)

    def counts(self, name: str, n_inputs: int, n_rows: int, tokens: int, products: int) -> Counts:
        """What spike-counters.c would count of a tensor with these shares (in whole numbers)."""
        inputs = tokens * n_inputs
        spikes = round(inputs * (1 - self.silent))
        salient_spikes = min(spikes, round(inputs * self.salient_spikes))
        per_product = n_rows * (_HEADER_BYTES + SALIENT_SLOTS * n_inputs // QK_SPK)  # whatever fires
        alone = products == tokens  # then only the lines of inputs that fire are read
        codes = spikes * n_rows // 2 if alone else products * n_inputs * n_rows // 2
        return Counts(
            name=name,
            n_inputs=n_inputs,
            n_rows=n_rows,
            products=products,
            tokens=tokens,
            spikes=spikes,
            silent=inputs - spikes,
            salient=round(inputs * self.salient),
            rate_spikes=round(inputs * self.rate_spikes),
            adds=n_rows * (spikes - salient_spikes + round(tokens * self.steps)),
            shift_adds=n_rows * salient_spikes,
            readouts=n_rows * tokens,
            bytes=products * per_product + codes + tokens * (n_inputs + 4 * n_rows),
        )


def shares(counts: Sequence[Counts]) -> Shares:
    """Averages over tensors, each input counting once."""
    sums = total(counts)
    inputs = sum(count.tokens * count.n_inputs for count in counts)
    salient_spikes = sum(count.shift_adds // count.n_rows for count in counts)
    steps = sum(
        count.adds // count.n_rows - count.spikes + count.shift_adds // count.n_rows for count in counts
    )
    return Shares(
        silent=sums["silent"] / inputs,
        salient=sums["salient"] / inputs,
        salient_spikes=salient_spikes / inputs,
        rate_spikes=sums["rate_spikes"] / inputs,
        steps=steps / sum(count.tokens for count in counts),
    )


def counts_of_shape(
    shape: LlamaShape, measured: Mapping[str, Shares], tokens: int, products: int
) -> list[Counts]:
    """Counts of a model of which only the shape is known.

    Args:
        measured: shares by kind of layer, of another model.
        tokens, products: computed; as many products per tensor as batches.

    Raises:
        InputError: the other model lacks a kind of layer.
    """
    found = []
    for name, rows, inputs in shape.linear_layers():
        kind = name.rpartition(".")[2]
        if kind not in measured:
            raise InputError(
                f"the model has no spike-coded {kind} to take shares from", "give a model of the Llama kind"
            )
        found.append(measured[kind].counts(f"{name}.weight", inputs, rows, tokens, products))
    return found


def shares_by_kind(counts: Sequence[Counts]) -> dict[str, Shares]:
    """Shares of each kind of layer."""
    return {kind: shares(group) for kind, group in by_kind(counts).items()}
