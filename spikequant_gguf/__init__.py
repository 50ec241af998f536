"""SpikeQuant for GGUF: 4-bit models whose linear layers are integrate-and-fire neurons.

    from spikequant_gguf import compare, convert, energy, perplexity

Importing this package teaches the gguf package the types SPK4 and SPKA. It needs neither torch nor llama_cpp;
the functions (see api.py) import what they need when they are called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import (
    BuildError,
    FormatError,
    InputError,
    OutputError,
    RuntimeMissingError,
    SpikeQuantError,
    UnsupportedError,
)
from .format import register_with_gguf

if TYPE_CHECKING:
    from .api import compare, convert, dequantize, energy, perplexity

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "FormatError",
    "InputError",
    "OutputError",
    "RuntimeMissingError",
    "SpikeQuantError",
    "UnsupportedError",
    "compare",
    "convert",
    "dequantize",
    "energy",
    "perplexity",
    "register_with_gguf",
]
_FUNCTIONS = ("compare", "convert", "dequantize", "energy", "perplexity")


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS})


class _Package(ModuleType):
    """Four functions are named like the modules that hold them; importing one of these must not hide them."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

register_with_gguf()
