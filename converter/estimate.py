"""What a calibration will take, counted from the shapes of a model, and how much text it reads by default."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from spikequant_gguf.host import available_memory

from .source import Source
from .structure import Site

__all__ = ["DEFAULT_MEMORY", "Estimate", "default_chunks", "estimate", "needed_memory"]

DEFAULT_MEMORY = 10_000_000_000
"""Bytes that a calibration takes at most by default: larger models get fewer chunks."""

_PRODUCTS_PER_SECOND = 30e9  # of one core, measured on an AMD EPYC (Zen 4)
_PROCESS = 150_000_000  # bytes of Python, its libraries, and llama.cpp without any tokens
_OUTPUT_SHARE = 4  # one of so many tokens has logits, see lockstep.py


@dataclass(frozen=True)
class Estimate:
    """What a calibration will take.

    Attributes:
        tokens: that both models compute.
        products: multiplications of all the work.
        memory: bytes at the highest point, beside the source file itself, which is mapped.
        available: bytes that are free, or None if unknown.
        finished: tensors that a journal already has.
        without_sensitivity: why sensitivities are left out; empty if they are not, or not wanted.
    """

    tokens: int
    products: float
    memory: int
    available: int | None
    finished: int
    without_sensitivity: str = ""

    def sentence(self, threads: int) -> str:
        """For people."""
        minutes = self.products / (_PRODUCTS_PER_SECOND * threads) / 60
        text = f"calibration on {self.tokens} tokens: {self.memory / 1e9:.1f} GB, about {minutes:.1f} minutes"
        if self.without_sensitivity:
            text += f"; without sensitivities of layers: {self.without_sensitivity}"
        if self.finished:
            text += f"; {self.finished} tensors are finished already"
        if self.available is not None and self.memory > self.available:
            text += f"; only {self.available / 1e9:.1f} GB are free: use fewer chunks if it fails"
        return text


def estimate(
    source: Source,
    sites: Mapping[str, Site],
    n_tokens: int,
    ctx: int,
    *,
    correction: bool,
    finished: int,
    outputs: Collection[str] = (),
    more_memory: int = 0,
    more_products: float = 0.0,
    without_sensitivity: str = "",
) -> Estimate:
    """Counts the products of both models, of the moments, and of the quantizer; and the largest arrays.

    Args:
        sites: of the weight matrices that are calibrated.
        n_tokens: of the text, in stretches of `ctx`.
        correction: whether deviations of inputs are made up for.
        finished: tensors that a journal already has.
        outputs: matrices that are calibrated, but not multiplied, because nobody reads the logits.
        more_memory, more_products: bytes and multiplications of sensitivities, which are measured beforehand.
        without_sensitivity: see Estimate.
    """
    tensors = [source.tensors[name] for name in sites]
    weights = sum(tensor.n_rows * tensor.n_in for tensor in tensors)
    squares = sum(source.tensors[site.readers[0]].n_in ** 2 for site in set(sites.values()))
    quantized = tensors + [source.tensors[name] for name in outputs]
    cubes = sum(tensor.n_rows * tensor.n_in**2 for tensor in quantized)
    of_moments = (0.75 if correction else 0.25) * squares  # products of integers, twice as fast as the others
    return Estimate(
        tokens=n_tokens,
        products=n_tokens * (2.0 * weights + of_moments) + 14.0 * cubes + more_products,
        memory=max(needed_memory(source, sites, n_tokens, ctx), _PROCESS + more_memory),
        available=available_memory(),
        finished=finished,
        without_sensitivity=without_sensitivity,
    )


def default_chunks(source: Source, names: Collection[str], ctx: int, most: int) -> int:
    """The preset's chunks, or half as many and so on until they need no more than DEFAULT_MEMORY, or 1.

    It depends on the model alone: the same input gives the same file on every machine.
    """
    chunks = most
    while chunks > 1 and needed_memory(source, names, chunks * ctx, ctx) > DEFAULT_MEMORY:
        chunks //= 2
    return chunks


def needed_memory(source: Source, names: Collection[str], n_tokens: int, ctx: int) -> int:
    """Bytes that a calibration of weight matrices takes at its highest point, beside the mapped source file.

    While layers are computed: results of the source model, which waits at the inputs of a layer, and of the
    twin, which computes it; inputs in half precision; keys, values and attention masks of one layer; and
    moments with what the quantizer makes of them. Before that, for a moment: keys and values of all layers of
    one model, or its logits with the attention masks of both in single precision.
    """
    tensors = [source.tensors[name] for name in names]
    if not tensors:
        return _PROCESS
    matrices = [tensor.shape[:2] for tensor in tensors]
    used = source.metadata.get(f"{source.architecture}.expert_used_count", 1)
    widest = max(max(tensor.shape[:2]) * (used if len(tensor.shape) == 3 else 1) for tensor in tensors)
    hidden = min(tensor.n_in for tensor in tensors)
    keys = Counter[str]()
    for tensor in source.tensors.values():
        if tensor.name.endswith(("attn_k.weight", "attn_v.weight")):
            keys[tensor.name.split(".")[1]] += tensor.n_rows
    if not keys:  # not told apart from queries
        keys.update({layer: 2 * hidden for layer in {name.split(".")[1] for name in names}})
    embedded = source.tensors.get("token_embd.weight")
    vocabulary = embedded.n_rows if embedded is not None else 0

    computing = 4 * (4 * widest + 4 * hidden) + 2 * widest + 2 * 2 * max(keys.values()) + 2 * 2 * ctx
    masks = 2 * 4 * ctx
    starting = max(2 * sum(keys.values()), 4 * vocabulary // _OUTPUT_SHARE + 4 * hidden + masks)
    squares = 16 * max(n_in for n_in, _ in matrices) ** 2
    largest = 3 * 4 * max(n_in * n_rows for n_in, n_rows in matrices)
    return _PROCESS + max(n_tokens * computing + squares + largest, n_tokens * starting)
