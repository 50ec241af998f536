"""One neuron of a real model at work: the spikes it gets for one token of a text, its membrane potential over
time, and what is read out in the end, which must be the runtime's own output to the bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .activations import SPIKE_STEPS, activation_values, encode_activations, spike_train
from .errors import InputError, SpikeQuantError
from .format import BLOCK_SPK4, DEFAULT_SALIENCE, DEFAULT_SILENCE, QK_SPK, TYPE_SPK4
from .gguf_header import TensorInfo, read_header
from .host import HostFacts, host_facts
from .inspect_file import inspect_file
from .potentials import readout
from .probe import ProbedModel
from .weights import weight_values

__all__ = ["DEFAULT_TEXT", "LayerSpikes", "NeuronTrace", "layer_spikes", "trace_neuron"]

DEFAULT_TEXT = "A neuron adds up what reaches it, and fires when that is enough."
_LONGEST = 512  # tokens


@dataclass(frozen=True)
class LayerSpikes:
    """What reaches a linear layer while a text is read.

    Attributes:
        model, tensor, text: of which, and what was read.
        pieces: the text's tokens.
        blocks: BLOCK_SPKA[tokens, n_blocks], the inputs as spikes.
        outputs: float32[tokens, rows], of the runtime.
        salience, silence: settings of the encoder.
        threads: that computed.
    """

    model: str
    tensor: str
    text: str
    pieces: tuple[str, ...]
    blocks: NDArray[np.void] = field(repr=False)
    outputs: NDArray[np.float32] = field(repr=False)
    salience: float
    silence: float
    threads: int


@dataclass(frozen=True)
class NeuronTrace:
    """One neuron and one token. Times are 1..16; the larger a value, the earlier its only spike.

    Attributes:
        model, tensor, row: of which neuron.
        text, position, piece: of which token: its place in the text, and what it says.
        time: int[n_in], 1..16; 0 for a silent input.
        polarity: int[n_in], +1 excitatory, -1 inhibitory, 0 silent.
        kind: of every input: 0 standard, 1 salient on the fine step, 2 salient on the coarse step.
        weights: int[n_in], code minus zero-point: what a spike adds, times its polarity.
        current_fine, current_coarse: int[16], input current at each time, from the spikes so far.
        potential_fine, potential_coarse: int[16], the sums of the currents up to each time.
        threshold, step, shift: θ of the neuron, s and k of the token.
        zero_point: of the neuron's weights.
        output: float32, the potential as read out.
        runtime_output: float32, what the runtime computed.
        threads: that computed.
    """

    model: str
    tensor: str
    row: int
    text: str
    position: int
    piece: str
    time: NDArray[np.int64] = field(repr=False)
    polarity: NDArray[np.int64] = field(repr=False)
    kind: NDArray[np.int64] = field(repr=False)
    weights: NDArray[np.int64] = field(repr=False)
    current_fine: NDArray[np.int64] = field(repr=False)
    current_coarse: NDArray[np.int64] = field(repr=False)
    potential_fine: NDArray[np.int64] = field(repr=False)
    potential_coarse: NDArray[np.int64] = field(repr=False)
    threshold: float
    step: float
    shift: int
    zero_point: int
    output: np.float32
    runtime_output: np.float32
    threads: int
    host: HostFacts = field(repr=False)

    @property
    def potential(self) -> NDArray[np.int64]:
        """int[16], both classes in fine steps: V = N + S·2^k."""
        return self.potential_fine + (self.potential_coarse << self.shift)

    @property
    def unit(self) -> float:
        """θ·s, the output of one unit of potential."""
        return float(np.float32(self.threshold) * np.float32(self.step))

    @property
    def firing_threshold(self) -> float:
        """The potential that stands for an output of 1: 1 / (θ·s)."""
        return 1 / self.unit if self.unit else float("inf")

    @property
    def output_bits(self) -> str:
        """The output's 32 bits in hexadecimal, which are the runtime's as well."""
        return f"0x{int(np.float32(self.output).view(np.uint32)):08x}"

    def strongest(self, number: int = 8) -> list[dict]:
        """The inputs that moved the potential most, the strongest first."""
        magnitude = np.where(self.time > 0, SPIKE_STEPS + 1 - self.time, 0)
        moved = self.weights * self.polarity * magnitude << np.where(self.kind == 2, self.shift, 0)
        order = np.argsort(-np.abs(moved), kind="stable")[:number]
        return [
            {
                "input": int(each),
                "time": int(self.time[each]),
                "polarity": int(self.polarity[each]),
                "kind": KINDS[self.kind[each]],
                "weight": int(self.weights[each]),
                "contribution": int(moved[each]),
            }
            for each in order
            if self.time[each]
        ]

    def to_json(self) -> dict:
        """The trace as plain JSON types."""
        return {
            "model": self.model,
            "tensor": self.tensor,
            "row": self.row,
            "text": self.text,
            "position": self.position,
            "piece": self.piece,
            "inputs": [
                {
                    "input": index,
                    "time": int(self.time[index]) or None,
                    "polarity": int(self.polarity[index]),
                    "kind": KINDS[self.kind[index]],
                    "weight": int(self.weights[index]),
                }
                for index in range(len(self.time))
            ],
            "time": list(range(1, SPIKE_STEPS + 1)),
            "current": {"fine": self.current_fine.tolist(), "coarse": self.current_coarse.tolist()},
            "potential": {
                "fine": self.potential_fine.tolist(),
                "coarse": self.potential_coarse.tolist(),
                "total": self.potential.tolist(),
            },
            "threshold": self.threshold,
            "step": self.step,
            "salient_shift": self.shift,
            "zero_point": self.zero_point,
            "firing_threshold": self.firing_threshold,
            "output": float(self.output),
            "output_bits": self.output_bits,
            "runtime_output": float(self.runtime_output),
            "equal_to_the_runtime": True,  # else there is no trace
            "strongest": self.strongest(),
            "host": self.host.to_json() | {"threads": self.threads},
        }


KINDS = ("standard", "fine", "coarse")
"""Names of NeuronTrace.kind."""


def layer_spikes(
    model: str | Path, tensor: str, text: str = DEFAULT_TEXT, *, threads: int | None = None
) -> LayerSpikes:
    """Read a text with a model and keep what reaches one of its layers.

    Args:
        tensor: name, with or without ``.weight``.

    Raises:
        InputError: there is no such spike-coded tensor, or the text has no tokens.
        UnsupportedError: the layer is not a plain one (experts).
    """
    info = _find_tensor(Path(model), tensor)
    summary = next(each for each in inspect_file(model).tensors if each.name == info.name)
    with ProbedModel(model, [info.name], ctx_size=_LONGEST, threads=threads) as loaded:
        ids = loaded.tokenize(text.encode())[:_LONGEST]
        if not len(ids):
            raise InputError("the text has no tokens", 'give one with -p "..."')
        pieces = tuple(loaded.piece(int(token), special=True).decode(errors="replace") for token in ids)
        loaded.decode(ids, 0, len(ids))
        used = loaded.threads
        products = loaded.products
    if not products:
        raise InputError(f"the model never uses '{info.name}' in a plain product", "choose another tensor")
    salience = DEFAULT_SALIENCE if summary.salience is None else summary.salience
    silence = DEFAULT_SILENCE if summary.silence is None else summary.silence
    blocks = encode_activations(products[0].x, salience, silence, rotated=summary.rotated is not False)
    return LayerSpikes(str(model), info.name, text, pieces, blocks, products[0].y, salience, silence, used)


def trace_neuron(
    model: str | Path,
    neuron: str,
    text: str = DEFAULT_TEXT,
    *,
    position: int | None = None,
    threads: int | None = None,
) -> NeuronTrace:
    """Follow one neuron through one token of a text.

    Args:
        neuron: ``TENSOR:ROW``, for example ``blk.3.ffn_up:17``.
        position: of the token in the text, from 0, or from the end if negative; the last one if None.

    Raises:
        InputError: there is no such neuron or token; else as layer_spikes.
        SpikeQuantError: the runtime computed another output. It never should.
    """
    found = re.fullmatch(r"(.+):(\d+)", neuron)
    if found is None:
        raise InputError(f"'{neuron}' names no neuron", "give TENSOR:ROW, for example blk.0.ffn_up:17")
    info, row = _find_tensor(Path(model), found[1]), int(found[2])
    if row >= info.n_rows:
        raise InputError(
            f"'{info.name}' has {info.n_rows} neurons", f"give a row from 0 to {info.n_rows - 1}"
        )
    layer = layer_spikes(model, info.name, text, threads=threads)
    place = len(layer.pieces) - 1 if position is None else position
    place = place + len(layer.pieces) if place < 0 else place
    if not 0 <= place < len(layer.pieces):
        raise InputError(f"the text has {len(layer.pieces)} tokens", "give another --position")

    row_blocks = _row(Path(model), info, row)
    values, threshold = weight_values(row_blocks)
    weights = values[0].astype(np.int64)
    blocks = layer.blocks[place : place + 1]
    _, _, step, shift = activation_values(blocks)
    train = spike_train(blocks)
    time = train.time[0].astype(np.int64) + 1
    polarity, coarse = train.polarity[0].astype(np.int64), train.coarse[0]
    salient = np.unpackbits(
        np.ascontiguousarray(blocks["salient_mask"][0], "<u8").view(np.uint8), bitorder="little"
    ).astype(bool)
    currents = []
    for of_class in (~coarse, coarse):
        arriving = np.where(of_class & (time > 0), weights * polarity, 0)
        arrived = np.bincount(time, arriving, SPIKE_STEPS + 1)[1:]  # exact: small integers
        currents.append(np.cumsum(arrived.astype(np.int64)))
    fine, coarse_potential = (np.cumsum(current) for current in currents)
    output = readout(threshold, step, fine[-1:, None], coarse_potential[-1:, None], shift)[0, 0]
    computed = layer.outputs[place, row]
    if output.view(np.uint32) != computed.view(np.uint32) and not np.isnan([output, computed]).all():
        raise SpikeQuantError(
            f"the runtime computed {computed!r} for this neuron, its potential gives {output!r}",
            "run `spikequant doctor` and report it: the two must be equal",
        )
    return NeuronTrace(
        model=str(model),
        tensor=info.name,
        row=row,
        text=text,
        position=place,
        piece=layer.pieces[place],
        time=time,
        polarity=polarity,
        kind=np.where(coarse, 2, np.where(salient, 1, 0)),
        weights=weights,
        current_fine=currents[0],
        current_coarse=currents[1],
        potential_fine=fine,
        potential_coarse=coarse_potential,
        threshold=float(threshold[0]),
        step=float(step[0]),
        shift=int(shift[0]),
        zero_point=int(row_blocks["header"][0, 0]) & 15,
        output=output,
        runtime_output=computed,
        threads=layer.threads,
        host=host_facts(),
    )


def _find_tensor(path: Path, name: str) -> TensorInfo:
    tensors = {tensor.name: tensor for tensor in read_header(path).tensors}
    info = tensors.get(name) or tensors.get(f"{name}.weight")
    if info is None:
        raise InputError(f"{path} has no tensor '{name}'", "list them with `spikequant inspect MODEL`")
    if info.type_id != TYPE_SPK4:
        raise InputError(f"'{info.name}' is not spike-coded", "choose an SPK4 tensor, or convert the model")
    return info


def _row(path: Path, info: TensorInfo, row: int) -> NDArray[np.void]:
    """BLOCK_SPK4[1, n_blocks] of one row."""
    n_blocks = info.shape[0] // QK_SPK
    with path.open("rb") as file:
        file.seek(info.offset + row * n_blocks * BLOCK_SPK4.itemsize)
        raw = file.read(n_blocks * BLOCK_SPK4.itemsize)
    return np.frombuffer(raw, BLOCK_SPK4).reshape(1, n_blocks)
