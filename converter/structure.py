"""Which linear layers share an input, and which earlier tensors can take over a scaling of it.

The scaling t of an input channel changes nothing if the weights that read the channel are divided by t and
whatever writes it is multiplied by t: the gain of the norm before the layer, or rows of earlier weights.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Site", "find_sites", "output_matrix"]

# Architectures whose blocks are norm -> attention, norm -> gated MLP, with nothing else after the norms.
_KNOWN = ("llama", "qwen2", "qwen3")
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Site:
    """An input that one or several weight matrices read.

    Attributes:
        kind: "attention input", "attention output", "MLP input", "down projection", or "" if unknown.
        readers: weight matrices, the first one stands for all where inputs are collected.
        gains: vectors with an entry per channel, to be multiplied (the norm's gain).
        writers: matrices (and biases, vectors) whose rows write the channels.
        heads: (value heads, query heads per value head) if the channels are those of attention heads: query
        heads that share a value head read the same written rows.
    """

    kind: str
    readers: tuple[str, ...]
    gains: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    heads: tuple[int, int] = (1, 1)

    @property
    def can_scale(self) -> bool:
        return bool(self.gains or self.writers)


def find_sites(
    architecture: str, metadata: Mapping[str, object], names: Sequence[str], spiking: Sequence[str]
) -> list[Site]:
    """Sites of all spiking matrices, in their order.

    Args:
        architecture: general.architecture of the model.
        metadata: of the model, for the numbers of heads.
        names: all tensors.
        spiking: weight matrices that become SPK4.
    """
    if architecture not in _KNOWN:
        return [Site("", (name,)) for name in spiking]
    present, wanted = set(names), set(spiking)
    heads = metadata.get(f"{architecture}.attention.head_count")
    groups = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    sites: list[Site] = []
    placed: set[str] = set()
    for name in spiking:
        match = _BLOCK.match(name)
        if name in placed:
            continue
        site = _site(name, match.group(0), present, wanted, heads, groups) if match else None
        site = site or Site("", (name,))
        sites.append(site)
        placed.update(site.readers)
    return sites


def output_matrix(names: Container[str]) -> str:
    """The weight matrix that makes logits in a model with these tensors: the embedding, if that is shared."""
    return "output.weight" if "output.weight" in names else "token_embd.weight"


def _site(
    name: str,
    block: str,
    present: set[str],
    wanted: set[str],
    heads: object,
    groups: object,
) -> Site | None:
    def tensors(*parts: str) -> tuple[str, ...]:
        return tuple(block + part for part in parts if block + part in present)

    def readers(*parts: str) -> tuple[str, ...]:
        return tuple(block + part for part in parts if block + part in wanted)

    part = name.removeprefix(block)
    attention = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
    if part in attention:
        # A reader that keeps its type can be scaled like the others, but then all must be plain matrices.
        everyone = tensors(*attention)
        gains = tensors("attn_norm.weight", "attn_norm.bias") if set(everyone) <= wanted else ()
        return Site("attention input", readers(*attention), gains)
    if part in ("ffn_gate.weight", "ffn_up.weight"):
        everyone = tensors("ffn_gate.weight", "ffn_up.weight")
        alone = block + "ffn_gate_inp.weight" not in present and set(everyone) <= wanted
        return Site(
            "MLP input",
            readers("ffn_gate.weight", "ffn_up.weight"),
            tensors("ffn_norm.weight", "ffn_norm.bias") if alone else (),
        )
    if part == "attn_output.weight":
        if isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups == 0:
            writers = tensors("attn_v.weight", "attn_v.bias")
            return Site("attention output", (name,), writers=writers, heads=(groups, heads // groups))
        return Site("attention output", (name,))
    if part == "ffn_down.weight":
        gated = block + "ffn_gate.weight" in present
        return Site(
            "down projection", (name,), writers=tensors("ffn_up.weight", "ffn_up.bias") if gated else ()
        )
    return None
