"""Metadata that the user sets: authorship from a file, the model's name, single keys.

The forms are llama.cpp's: a JSON object of ``general.*`` keys, as `--metadata` of its converter reads it, and
``KEY=TYPE:VALUE``, as `--override-kv` of its programs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from spikequant_gguf.errors import InputError

from .metadata import encode_bool, encode_f32, encode_int, encode_text, encode_texts

__all__ = ["read_overrides"]

# What the converter itself states, and what would make the file unreadable.
_FIXED = re.compile(
    r"^(spikequant\.|split\.|quantize\.imatrix\."
    r"|general\.(architecture|file_type|quantization_version|alignment|type)$)"
)
_KEY = re.compile(r"^[A-Za-z0-9_.-]{1,200}$")
_OVERRIDE = re.compile(r"^([^=]+)=(int|float|bool|str):(.*)$", re.DOTALL)


def read_overrides(
    file: Path | None = None, name: str | None = None, overrides: Iterable[str] = ()
) -> dict[bytes, bytes]:
    """Encoded values by key, the later ones before the earlier: the file, the name, the single keys.

    Args:
        file: JSON object of ``general.*`` keys with texts or lists of texts.
        name: for general.name.
        overrides: each ``KEY=TYPE:VALUE``, TYPE being int, float, bool or str.

    Raises:
        InputError: the file is no such object, a key cannot be set, or a value is not of its type.
    """
    values = {} if file is None else _read_file(file)
    if name is not None:
        values["general.name"] = encode_text(name)
    for text in overrides:
        key, value = _parse(text)
        values[key] = value
    for key in values:
        if not _KEY.match(key):
            raise InputError(
                f"'{key}' is no key of metadata", "keys are of letters, digits, '.', '_' and '-'"
            )
        if _FIXED.match(key):
            raise InputError(f"the key {key} cannot be set", "it says what the file is, and is always right")
    return {key.encode(): value for key, value in values.items()}


def _read_file(path: Path) -> dict[str, bytes]:
    remedy = 'give a JSON object like {"general.author": "Ada", "general.tags": ["chat"]}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the JSON in it is damaged: {error}", remedy) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: this is no JSON object", remedy)
    values = {}
    for key, value in content.items():
        if not key.startswith("general."):
            raise InputError(f"{path}: '{key}' is no key of authorship", "set it with --override-kv")
        if isinstance(value, str):
            values[key] = encode_text(value)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            values[key] = encode_texts(value)
        else:
            raise InputError(f"{path}: the value of '{key}' is neither a text nor a list of texts", remedy)
    return values


def _parse(text: str) -> tuple[str, bytes]:
    found = _OVERRIDE.match(text)
    wrong = InputError(
        f"'{text}' is not of the form KEY=TYPE:VALUE, TYPE being int, float, bool or str",
        "for example --override-kv tokenizer.ggml.add_bos_token=bool:true",
    )
    if found is None:
        raise wrong
    key, kind, value = found.groups()
    try:
        if kind == "int":
            return key, encode_int(int(value))
        if kind == "float":
            number = float(value)
            if not math.isfinite(number):
                raise wrong
            return key, encode_f32(number)
    except (ValueError, OverflowError) as error:
        raise wrong from error
    if kind == "bool":
        if value not in ("true", "false"):
            raise wrong
        return key, encode_bool(value == "true")
    return key, encode_text(value)
