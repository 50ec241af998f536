"""Modelled energy of several models on the same text, for the rows of a comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import SpikeQuantError
from ..format import TYPE_SPK4
from ..gguf_header import GGUFHeader, TensorInfo
from ..inspect_file import type_name
from ..texts import Text
from .analysis import METHOD, count_text
from .constants import DEFAULT_CONSTANTS, load_constants
from .counts import Counts
from .model import SystemEnergy, model_energy, type_energy

__all__ = ["compared_energies"]

_LINEAR = re.compile(r"blk\.\d+\.\w+\.weight")
_TOKENS = 256
PHASE = "prompt"


def compared_energies(
    headers: Mapping[Path, GGUFHeader],
    text: Text,
    *,
    largest_tokens: int,
    baseline: Path | None,
    threads: int | None = None,
    constants: str = DEFAULT_CONSTANTS,
) -> dict[Path, dict]:
    """The field `energy` of every model: picojoules per token of its linear layers while it reads a prompt.

    A spike model's operations are counted while it reads the text; those of other types follow from shapes.
    `ratio` says how many times less than the baseline a model takes, with memory; `compute_ratio` without.
    Where there is no figure, `method` is ``unavailable`` and `reason` says why.

    Args:
        largest_tokens: that the text surely has.
        baseline: the model that ratios refer to.
    """
    prices = load_constants(constants)
    tokens = min(_TOKENS, largest_tokens)
    found: dict[Path, SystemEnergy | str] = {}
    for path, header in headers.items():
        try:
            if any(tensor.type_id == TYPE_SPK4 for tensor in header.tensors):
                counted = count_text(path, text, tokens, (PHASE,), threads)[0][PHASE][0]
                counts = [count for count in counted if _LINEAR.fullmatch(count.name)]
                found[path] = model_energy(counts, tokens, prices)[0]
            else:
                types = {tensor.name: type_name(tensor.type_id) for tensor in header.tensors}
                found[path] = type_energy(_shapes(header.tensors, tokens), tokens, prices, types, "stock")
        except KeyError as error:
            found[path] = f"there is no model of the operations of type {str(error.args[0]).upper()}"
        except SpikeQuantError as error:
            found[path] = error.message
    base = found.get(baseline) if baseline is not None else None
    return {
        path: _field(each, base if isinstance(base, SystemEnergy) else None, tokens, prices.name)
        for path, each in found.items()
    }


def _shapes(tensors: Sequence[TensorInfo], tokens: int) -> list[Counts]:
    """The linear layers with a product each, and nothing that only spikes have. Raises SpikeQuantError."""
    found = []
    for tensor in tensors:
        if not _LINEAR.fullmatch(tensor.name) or len(tensor.shape) < 2:
            continue
        if len(tensor.shape) > 2:
            raise SpikeQuantError("how often each expert computes is not known without a spike model")
        found.append(Counts(tensor.name, tensor.shape[0], tensor.shape[1], 1, tokens, *([0] * 8)))
    if not found:
        raise SpikeQuantError("the model has no linear layers of a known name")
    return found


def _field(energy: SystemEnergy | str, base: SystemEnergy | None, tokens: int, constants: str) -> dict:
    if isinstance(energy, str):
        return {"method": "unavailable", "reason": energy, "pj_per_token": None, "ratio": None}
    return {
        "method": METHOD,
        "phase": PHASE,
        "tokens": tokens,
        "constants": constants,
        "pj_per_token": energy.total,
        "arithmetic": energy.arithmetic,
        "dequantization": energy.dequantization,
        "memory": energy.memory,
        "ratio": base.total / energy.total if base else None,
        "compute_ratio": base.compute / energy.compute if base else None,
    }
