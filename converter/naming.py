"""Names of output files, after llama.cpp's convention: Base-Size-Finetune-Version-ENCODING.gguf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from spikequant_gguf.format import TYPE_NAME

__all__ = ["default_name", "fill_template"]

_ENCODING = TYPE_NAME.upper()
# An encoding at the end of a file's name, as in SmolLM2-135M.Q4_1 or SmolLM2-135M-F16, or a part's number.
_OLD_ENCODING = re.compile(
    r"([-._](i?q\d\w*|b?f(p)?(16|32)|tq\d\w*|mxfp4\w*))?(-\d{5}-of-\d{5})?$", re.IGNORECASE
)
_UNWANTED = re.compile(r"[^\w.+-]+")


def default_name(metadata: Mapping[str, Any], fallback: str) -> str:
    """The name of the output of a model.

    Args:
        metadata: general.basename and so on are taken from here.
        fallback: the source's name, for a model without such metadata.
    """

    def text(key: str) -> str | None:
        value = metadata.get(f"general.{key}")
        return _plain(value) if isinstance(value, str) and _plain(value) else None

    base, name = text("basename"), text("name")
    if base is None and name is None:
        name = _plain(_OLD_ENCODING.sub("", fallback.removesuffix(".gguf"))) or "model"
    # without a base name, the name holds all the other parts already
    parts = [text(key) if base is not None else None for key in ("finetune", "version", "size_label")]
    return gguf.naming_convention(name, base, *parts, _ENCODING) + ".gguf"


def fill_template(path: Path) -> Path:
    """Fills ``{ftype}`` and ``{FTYPE}`` in a file name, as in ``model-{ftype}.gguf``."""
    name = path.name
    for key in ("ftype", "outtype"):
        name = name.replace(f"{{{key}}}", _ENCODING.lower()).replace(f"{{{key.upper()}}}", _ENCODING)
    return path.with_name(name) if name else path


def _plain(text: str) -> str:
    """Without anything that does not belong into a file name."""
    return _UNWANTED.sub("-", text.strip()).strip("-.")
