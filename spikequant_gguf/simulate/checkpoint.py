"""A checkpoint's model in torch with the layers of a spike GGUF that was made of it.

Reading a GGUF back into torch (model.py) takes transformers' own mapping, which it has for some
architectures. Here the model is at hand, and only its linear layers are found and replaced; so every
architecture will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from torch import nn

from ..errors import UnsupportedError
from ..format import TYPE_SPK4, blocks_from_bytes
from ..gguf_header import read_header
from ..verify import verify_file
from .encoder import SpikeEncoder
from .experts import SpikeExperts, SpikeRouted
from .layer import SpikeLinear, SpikeWeights
from .model import encoder_settings
from .settings import SpikeSettings

__all__ = ["SimulatedTensor", "linear_layers", "row_order", "simulate_checkpoint"]


@dataclass(frozen=True)
class SimulatedTensor:
    """What computes a spiking tensor in torch.

    Attributes:
        module: SpikeLinear, or SpikeRouted for the matrices of experts.
        order: int64[rows]; row i of the module is row order[i] of the tensor.
    """

    module: SpikeLinear | SpikeRouted
    order: torch.Tensor


def simulate_checkpoint(
    model: nn.Module, floats: Path, spikes: Path, *, exact: bool = True
) -> dict[str, SimulatedTensor]:
    """Replaces the linear layers of a model of transformers, in place, by those of a spike GGUF.

    Args:
        model: as loaded from the checkpoint, float32.
        floats: GGUF of the same weights, F32, F16 or BF16; tells where llama.cpp has each row.
        spikes: GGUF with SPK4 tensors, converted from `floats` without smoothing (which changes norms).
        exact: as of load_model.

    Returns:
        The replaced layers by the names of their tensors.

    Raises:
        FormatError: the data of `spikes` are damaged, or of another version of the format.
        UnsupportedError: a spiking tensor is no linear layer of the model, or has other rows.
    """
    verify_file(spikes).raise_if_faulty()
    header = read_header(spikes)
    settings = encoder_settings(header)
    blocks = {
        tensor.name: np.asarray(tensor.data)
        for tensor in gguf.GGUFReader(spikes).tensors
        if tensor.tensor_type == TYPE_SPK4
    }
    originals = {
        tensor.name: _floats(tensor) for tensor in gguf.GGUFReader(floats).tensors if tensor.name in blocks
    }
    builder = _Builder(settings, exact)
    architecture = str(header.metadata["general.architecture"])
    found: dict[str, SimulatedTensor] = {}
    for path, name in linear_layers(model, architecture, header.metadata):
        if name in blocks:
            old = model.get_submodule(path)
            found[name] = builder.linear(name, blocks[name], originals[name], old)
            _replace(model, path, found[name].module)
    for path, names in _experts(model):
        if all(name in blocks for name in names.values()):
            old = model.get_submodule(path)
            gate, up = old.gate_up_proj.detach().chunk(2, dim=1)
            parts = {"gate": gate, "up": up, "down": old.down_proj.detach()}
            made = {
                part: builder.routed(names[part], blocks[names[part]], originals[names[part]], wanted)
                for part, wanted in parts.items()
            }
            found |= {names[part]: tensor for part, tensor in made.items()}
            modules = {part: tensor.module for part, tensor in made.items()}
            _replace(model, path, SpikeExperts(**modules, activation=old.act_fn))  # type: ignore[arg-type]
    missing = sorted(set(blocks) - set(found))
    if missing:
        raise UnsupportedError(
            f"{spikes}: '{missing[0]}' is no linear layer of {type(model).__name__}",
            "use the runtime instead",
        )
    return found


class _Builder:
    """Makes layers; those of one block that are coded alike share an encoder, as their input may be one."""

    def __init__(self, settings: dict[str, SpikeSettings], exact: bool) -> None:
        self._settings, self._exact = settings, exact
        self._encoders: dict[tuple, SpikeEncoder] = {}

    def linear(
        self, name: str, blocks: np.ndarray, original: torch.Tensor, old: nn.Linear
    ) -> SimulatedTensor:
        order = row_order(original, old.weight.detach(), name)
        layer = self._layer(name, blocks, order, old.bias, self._encoders)
        return SimulatedTensor(layer, order)

    def routed(
        self, name: str, blocks: np.ndarray, original: torch.Tensor, wanted: torch.Tensor
    ) -> SimulatedTensor:
        """wanted: float32[experts, rows, n]."""
        orders = [row_order(*pair, name) for pair in zip(original, wanted, strict=True)]
        if not all(torch.equal(order, orders[0]) for order in orders):
            raise UnsupportedError(f"the experts of '{name}' have their rows in different orders")
        layers = [self._layer(name, matrix, orders[0], None, {}) for matrix in blocks]
        return SimulatedTensor(SpikeRouted(layers), orders[0])

    def _layer(
        self, name: str, blocks: np.ndarray, order: torch.Tensor, bias: torch.Tensor | None, encoders: dict
    ) -> SpikeLinear:
        weights = SpikeWeights.from_blocks(blocks_from_bytes(blocks)).rows(order)
        chosen = replace(self._settings.get(name, self._settings[""]), rotated=weights.rotated)
        key = (name.rsplit(".", 2)[0], weights.values.shape[1], chosen)
        encoder = encoders.setdefault(key, SpikeEncoder(chosen))
        return SpikeLinear(weights, encoder, bias, self._exact)


def linear_layers(
    model: nn.Module, architecture: str, metadata: Mapping[str, object]
) -> Iterator[tuple[str, str]]:
    """Path of each linear layer and the GGUF name of its weights.

    Args:
        model: of transformers.
        architecture, metadata: of the GGUF.

    Raises:
        UnsupportedError: gguf knows no such architecture.
    """
    names = _name_map(architecture, metadata)
    for path, module in list(model.named_modules()):
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if isinstance(module, nn.Linear) and name is not None:
            yield path, name


def _experts(model: nn.Module) -> Iterator[tuple[str, dict[str, str]]]:
    """Path of each module of experts and the GGUF names of its matrices."""
    for path, module in list(model.named_modules()):
        shapes = [getattr(getattr(module, name, None), "ndim", 0) for name in ("gate_up_proj", "down_proj")]
        if shapes == [3, 3]:
            block = next(part for part in path.split(".") if part.isdigit())
            yield path, {part: f"blk.{block}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")}


def _name_map(architecture: str, metadata: Mapping[str, object]) -> gguf.TensorNameMap:
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise UnsupportedError(f"gguf knows no architecture '{architecture}'", "simulate another model")
    return get_tensor_name_map(kinds[architecture], int(metadata[f"{architecture}.block_count"]))  # type: ignore[call-overload]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _floats(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """A float tensor as torch has it, in the file's type: [rows, n] or [experts, rows, n]."""
    kind, data = tensor.tensor_type, np.asarray(tensor.data)
    if kind == gguf.GGMLQuantizationType.BF16:
        return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
    if kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        raise UnsupportedError(f"'{tensor.name}' has the type {kind.name}", "give a GGUF of floats")
    return torch.from_numpy(data.copy())


def row_order(original: torch.Tensor, wanted: torch.Tensor, name: str) -> torch.Tensor:
    """Where `original`, as a GGUF has it, has each row of `wanted`, as transformers has it: int64[rows].

    Raises:
        UnsupportedError: it does not have each of them once.
    """
    rounded = wanted.to(original.dtype).float().numpy()
    places = {row.tobytes(): i for i, row in enumerate(original.float().numpy())}
    index = [places.get(row.tobytes(), -1) for row in rounded]
    if sorted(index) != list(range(len(original))):
        raise UnsupportedError(
            f"llama.cpp's converter changes the weights of '{name}', not only the order of rows",
            "use the runtime instead",
        )
    return torch.tensor(index)
