"""Checks the safetensors of a checkpoint before anything is read: all there, none extra, none cut off."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikequant_gguf.errors import InputError, UnsupportedError

__all__ = ["ShardTensor", "Shards", "check_shards"]

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_NUMBERED = re.compile(r"^model-(\d{5})-of-(\d{5})\.safetensors$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER_BYTES = 100_000_000  # of the safetensors format
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class ShardTensor:
    """A tensor of a safetensors file. dtype: as safetensors names it, for example ``BF16``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True)
class Shards:
    """The sound safetensors files of a checkpoint. paths: in order; tensors: of all of them."""

    paths: tuple[Path, ...]
    tensors: tuple[ShardTensor, ...]

    @property
    def float_type(self) -> str:
        """The smallest of ``f16``, ``bf16`` and ``f32`` that holds all matrices without loss.

        Scaled 8-bit floats count as bf16, the type that their models compute in.
        """
        found = {
            tensor.dtype for tensor in self.tensors if len(tensor.shape) > 1 and tensor.dtype in _LOSSLESS
        }
        names = {_LOSSLESS[dtype] for dtype in found} or {"bf16"}
        return names.pop() if len(names) == 1 else "f32"


_LOSSLESS = {
    **{"F16": "f16", "BF16": "bf16", "F32": "f32", "F64": "f32"},
    **dict.fromkeys(("F8_E4M3", "F8_E5M2"), "bf16"),
}


def check_shards(folder: Path) -> Shards:
    """Finds and checks the weights of a checkpoint.

    Raises:
        InputError: there are no safetensors, or a file is missing, extra, cut off or damaged, or the index
            names files outside the folder or tensors that are not where it says.
        UnsupportedError: the folder holds an adapter instead of a model.
    """
    index_path = folder / INDEX_NAME
    weight_map = _read_index(index_path) if index_path.is_file() else None
    paths = _indexed(folder, weight_map) if weight_map is not None else _unindexed(folder)
    place: dict[str, str] = {}
    tensors = []
    for path in paths:
        for tensor in _read_header(path):
            if tensor.name in place:
                raise InputError(f"{path}: tensor '{tensor.name}' is in {place[tensor.name]}, too", _AGAIN)
            place[tensor.name] = path.name
            tensors.append(tensor)
    if weight_map is not None:
        _compare(index_path, weight_map, place)
    return Shards(paths, tuple(tensors))


# ---- which files


def _read_index(path: Path) -> dict[str, str]:
    index = _parse_json(path, path.read_bytes())
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: there is no weight_map in it", _AGAIN)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise InputError(
                f"{path}: tensor '{tensor}' is said to be in {name!r}, not a safetensors file of this folder",
                "the index is damaged or hostile: download the checkpoint from a trusted place",
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\:\0")


def _indexed(folder: Path, weight_map: Mapping[str, str]) -> tuple[Path, ...]:
    names = sorted(set(weight_map.values()))
    _require(folder, names)
    extra = sorted(
        path.name for path in folder.iterdir() if _NUMBERED.match(path.name) and path.name not in names
    )
    if extra:
        raise InputError(
            f"{folder / extra[0]}: the index does not know this file",
            "remove it if it belongs to another model, or download the checkpoint again",
        )
    return tuple(folder / name for name in names)


def _unindexed(folder: Path) -> tuple[Path, ...]:
    if (folder / _SINGLE_NAME).is_file():
        return (folder / _SINGLE_NAME,)
    numbered = sorted(path.name for path in folder.iterdir() if _NUMBERED.match(path.name))
    if not numbered:
        raise _no_weights(folder)
    count = int(_NUMBERED.match(numbered[0]).group(2))
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    _require(folder, names)
    if len(numbered) != count:
        extra = sorted(set(numbered) - set(names))
        raise InputError(f"{folder / extra[0]}: this file is not one of the {count} of the model", _AGAIN)
    return tuple(folder / name for name in names)


def _require(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: of {len(names)} weight files, {missing[0]}{others} missing", _AGAIN)


def _no_weights(folder: Path) -> InputError | UnsupportedError:
    names = [path.name for path in folder.iterdir()]
    if "adapter_config.json" in names:
        return UnsupportedError(
            f"{folder}: this is an adapter (LoRA), not a whole model", "merge it into its base model first"
        )
    if any(name.endswith(_PICKLES) for name in names):
        return InputError(
            f"{folder}: the weights are pickled (.bin), which can run any code and is not read",
            "load them with transformers in a safe place; save_pretrained() writes safetensors",
        )
    models = [name for name in names if name.endswith(".gguf")]
    if models:
        return InputError(
            f"{folder}: a folder with GGUF files", f"give the file, for example {folder / models[0]}"
        )
    return InputError(
        f"{folder}: there is no model.safetensors in it",
        "give the folder of a Hugging Face checkpoint, or a GGUF file",
    )


def _compare(index_path: Path, weight_map: Mapping[str, str], place: Mapping[str, str]) -> None:
    for name, stated in sorted(weight_map.items()):
        found = place.get(name)
        if found != stated:
            where = f"but it is in {found}" if found else "but it is not there"
            raise InputError(f"{index_path}: tensor '{name}' is said to be in {stated}, {where}", _AGAIN)
    extra = sorted(set(place) - set(weight_map))
    if extra:
        raise InputError(f"{index_path}: it does not list tensor '{extra[0]}' of {place[extra[0]]}", _AGAIN)


# ---- one file


def _read_header(path: Path) -> list[ShardTensor]:
    """The tensors of one file, whose data must fill it without holes and overlap."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else file_bytes
            if header_bytes > _MAX_HEADER_BYTES or 8 + header_bytes > file_bytes:
                raise InputError(f"{path}: the file is cut off or no safetensors file", _AGAIN)
            header = _parse_json(path, file.read(header_bytes))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is damaged", _AGAIN)
    spans, tensors = [], []
    for name, entry in header.items():
        if name != "__metadata__":
            tensor, begin = _tensor(path, name, entry)
            tensors.append(tensor)
            spans.append((begin, begin + tensor.n_bytes, name))
    end = 0
    for begin, after, name in sorted(spans):
        if begin != end:
            raise InputError(f"{path}: the data of tensor '{name}' do not follow those before it", _AGAIN)
        end = after
    data_bytes = file_bytes - 8 - header_bytes
    if end > data_bytes:
        raise InputError(
            f"{path}: the file is cut off: {end - data_bytes} bytes of weights are missing", _AGAIN
        )
    if end < data_bytes:
        raise InputError(f"{path}: {data_bytes - end} bytes too many at the end of the file", _AGAIN)
    return tensors


def _tensor(path: Path, name: str, entry: Any) -> tuple[ShardTensor, int]:
    """The tensor and the start of its data."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = (
            isinstance(dtype, str)
            and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            and begin <= end
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{path}: the entry of tensor '{name}' is damaged", _AGAIN)
    bits = _BITS.get(dtype)
    for size in shape if bits is not None else ():
        bits *= size
    if bits is not None and bits != 8 * (end - begin):
        raise InputError(
            f"{path}: tensor '{name}' of {dtype} {shape} has {end - begin} bytes of data", _AGAIN
        )
    return ShardTensor(name, dtype, tuple(shape), end - begin), begin


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the JSON in it is damaged: {error}", _AGAIN) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found
