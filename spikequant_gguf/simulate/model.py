"""A GGUF language model in torch, its linear layers replaceable by simulated ones.

transformers reads the file and dequantizes it, SPK4 included, since this package teaches the gguf package the
type. So names, norms and the order of rows come out as transformers wants them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ..errors import FormatError, InputError, UnsupportedError
from ..format import (
    DEFAULT_SALIENCE,
    DEFAULT_SILENCE,
    KEY_ENCODER_SALIENCE,
    KEY_ENCODER_SILENCE,
    KEY_ENCODER_TENSORS,
    KEY_SALIENCE_THRESHOLD,
    KEY_SILENCE_THRESHOLD,
    TYPE_SPK4,
    blocks_from_bytes,
)
from ..gguf_header import GGUFHeader, TensorInfo, read_header
from ..verify import verify_file
from .encoder import SpikeCounts, SpikeEncoder
from .layer import SpikeLinear, SpikeWeights
from .settings import SpikeSettings

__all__ = ["TorchModel", "encoder_settings", "load_model", "read_checkpoint", "read_gguf"]


class TorchModel:
    """A causal language model in float32.

    Args:
        path: GGUF file.

    Attributes:
        architecture: as GGUF names it.
        config: of transformers.
        layers: the linear layers in blocks, by the GGUF name of their weights.

    Raises:
        InputError: the file cannot be read.
        UnsupportedError: transformers does not read models of this architecture from GGUF.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.header: GGUFHeader = read_header(path)
        self.architecture = str(self.header.metadata.get("general.architecture", ""))
        self._model = read_gguf(path, self.architecture)
        self._model.requires_grad_(False).eval()
        self.config = self._model.config
        names = _tensor_names(self._model, self.architecture)
        self._parameters = {
            gguf_name: name for name, gguf_name in names.items() if not gguf_name.startswith("output.")
        }
        self._modules = {
            gguf_name: name.removesuffix(".weight")
            for gguf_name, name in self._parameters.items()
            if gguf_name.startswith("blk.")
            and gguf_name.endswith(".weight")
            and isinstance(self._model.get_submodule(name.removesuffix(".weight")), nn.Linear)
        }
        self.layers: dict[str, nn.Linear] = {
            gguf_name: self._model.get_submodule(name) for gguf_name, name in self._modules.items()
        }
        self._changed: dict[str, torch.Tensor] = {}

    def logits(self, tokens: ArrayLike, first: int = 0) -> NDArray[np.float32]:
        """Logits at tokens[first:] of one context: float32[n - first, n_vocab]."""
        values = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        with torch.inference_mode():
            output = self._model(values, logits_to_keep=values.shape[1] - first, use_cache=False)
        for encoder in self._encoders():
            encoder.forget_input()
        return output.logits[0].float().numpy()

    def replace(self, layers: Mapping[str, nn.Module]) -> None:
        """Put other modules in the place of linear layers, named as in `layers`."""
        for gguf_name, layer in layers.items():
            parent, _, name = self._modules[gguf_name].rpartition(".")
            setattr(self._model.get_submodule(parent), name, layer)

    def simulated(self, gguf_name: str) -> nn.Module:
        """What computes a layer now."""
        return self._model.get_submodule(self._modules[gguf_name])

    def change(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set parameters, such as gains of norms, by their GGUF names; restore() undoes it."""
        for gguf_name, value in values.items():
            parameter = self.parameter(gguf_name)
            self._changed.setdefault(gguf_name, parameter.clone())
            parameter.copy_(value.view(parameter.shape))

    def restore(self) -> None:
        """The model as it was read."""
        self.replace(self.layers)
        for gguf_name, value in self._changed.items():
            self.parameter(gguf_name).copy_(value)
        self._changed.clear()

    def parameter(self, gguf_name: str) -> torch.Tensor:
        """A parameter of the model as it was read, or as `change` set it. KeyError if there is none."""
        layer = self.layers.get(gguf_name.removesuffix(".bias") + ".weight", None)
        if gguf_name.endswith(".bias") and layer is not None and layer.bias is not None:
            return layer.bias
        if gguf_name in self.layers:
            return self.layers[gguf_name].weight
        return self._model.get_parameter(self._parameters[gguf_name])

    def counts(self) -> SpikeCounts:
        """What has fired since the last reset_counts, over all layers."""
        return sum((encoder.counts for encoder in self._encoders()), SpikeCounts())

    def reset_counts(self) -> None:
        for encoder in self._encoders():
            encoder.reset_counts()

    def _encoders(self) -> Iterator[SpikeEncoder]:
        found = {
            id(module.encoder): module.encoder
            for module in self._model.modules()
            if isinstance(getattr(module, "encoder", None), SpikeEncoder)
        }
        return iter(found.values())


def load_model(path: str | Path, *, exact: bool = True) -> TorchModel:
    """An SPK4 file as a simulated model: its codes, thresholds and encoder settings, its other tensors.

    Args:
        exact: integer potentials and outputs of layers equal the runtime's to the bit, given equal inputs.

    Raises:
        InputError: the file cannot be read, or holds no SPK4 tensor.
        UnsupportedError: the architecture is not supported, or a tensor of it is not.
    """
    path = Path(path)
    report = verify_file(path)
    if not report.ok:
        fault = report.faults[0].error()
        raise FormatError(f"{path}: {fault.message}", fault.remedy)
    model = TorchModel(path)
    tensors = [tensor for tensor in model.header.tensors if tensor.type_id == TYPE_SPK4]
    if not tensors:
        raise InputError(
            f"{path}: the file has no SPK4 tensors", "give a model that `spikequant convert` wrote"
        )
    unknown = [tensor.name for tensor in tensors if tensor.name not in model.layers]
    if unknown:
        raise UnsupportedError(
            f"{path}: '{unknown[0]}' is no linear layer in transformers' model", "use the runtime instead"
        )
    settings = encoder_settings(model.header)
    encoders: dict[tuple, SpikeEncoder] = {}
    layers: dict[str, nn.Module] = {}
    data = np.memmap(path, np.uint8, mode="r")
    for tensor in tensors:
        old = model.layers[tensor.name]
        weights = _in_order(_weights(tensor, data), old.weight, tensor.name)
        chosen = replace(settings.get(tensor.name, settings[""]), rotated=weights.rotated)
        # Layers of one block that are coded alike may have the same input, which is then coded once.
        key = (tensor.name.rsplit(".", 2)[0], old.in_features, chosen)
        encoder = encoders.setdefault(key, SpikeEncoder(chosen))
        layers[tensor.name] = SpikeLinear(weights, encoder, old.bias, exact)
    model.replace(layers)
    return model


# ---- reading


def read_gguf(path: Path, architecture: str) -> transformers.PreTrainedModel:
    """The model of a GGUF file, in float32. UnsupportedError if transformers cannot read it."""
    return _read(
        path.parent,
        f"{path}: transformers cannot read a model of architecture '{architecture}' from GGUF",
        "simulate a model of another architecture, for example llama, qwen2 or qwen3",
        gguf_file=path.name,
    )


def read_checkpoint(folder: Path) -> transformers.PreTrainedModel:
    """The model of a checkpoint's folder, in float32. UnsupportedError if transformers cannot read it."""
    return _read(folder, f"{folder}: transformers cannot read the checkpoint", "use the runtime instead")


def _read(folder: Path, fault: str, remedy: str, **options: str) -> transformers.PreTrainedModel:
    logging = transformers.utils.logging
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # one of its bars knows no switch
            return transformers.AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,  # and do not ask for it
                **options,
            )
    except Exception as error:  # whatever its many architectures raise on a file that is not quite theirs
        raise UnsupportedError(f"{fault}: {error}", remedy) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _tensor_names(model: nn.Module, architecture: str) -> dict[str, str]:
    """GGUF names by the names of parameters."""
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise UnsupportedError(f"gguf knows no architecture '{architecture}'", "simulate another model")
    names = get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    found = {}
    for name, _ in model.named_parameters():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is not None:
            found[name] = gguf_name
    return found


def _weights(tensor: TensorInfo, data: NDArray[np.uint8]) -> SpikeWeights:
    n_bytes = tensor.n_bytes or 0
    raw = np.array(data[tensor.offset : tensor.offset + n_bytes])
    return SpikeWeights.from_blocks(blocks_from_bytes(raw.reshape(tensor.n_rows, n_bytes // tensor.n_rows)))


def _in_order(weights: SpikeWeights, wanted: torch.Tensor, name: str) -> SpikeWeights:
    """The weights with their rows ordered as transformers has them in `wanted`, float32[rows, n].

    llama.cpp orders rows of queries and keys otherwise in some architectures; transformers has undone that.
    """
    found = weights.dequantized()
    if torch.equal(found, wanted):
        return weights
    order = {row.numpy().tobytes(): i for i, row in enumerate(found)}
    index = [order.get(row.numpy().tobytes(), -1) for row in wanted.detach()]
    if -1 in index:
        raise UnsupportedError(
            f"transformers changes the weights of '{name}' when it reads them", "use the runtime instead"
        )
    return weights.rows(torch.tensor(index))


def encoder_settings(header: GGUFHeader) -> dict[str, SpikeSettings]:
    """Settings by the name of the tensor; under "" the model's."""
    metadata = header.metadata
    common = SpikeSettings(
        salience=_f32(metadata.get(KEY_SALIENCE_THRESHOLD, DEFAULT_SALIENCE)),
        silence=_f32(metadata.get(KEY_SILENCE_THRESHOLD, DEFAULT_SILENCE)),
    )
    found = {"": common}
    names = metadata.get(KEY_ENCODER_TENSORS, ())
    saliences, silences = (metadata.get(key, ()) for key in (KEY_ENCODER_SALIENCE, KEY_ENCODER_SILENCE))
    for name, salience, silence in zip(names, saliences, silences, strict=True):  # type: ignore[arg-type]
        found[str(name)] = replace(
            common,
            salience=_f32(salience) or common.salience,
            silence=_f32(silence) or common.silence,
        )
    return found


def _f32(value: object) -> float:
    return float(np.float32(value))  # type: ignore[arg-type]
