"""SpikeQuant for GGUF: 4-bit models whose linear layers are integrate-and-fire neurons.

Importing this package teaches the gguf package the types SPK4 and SPKA. It needs neither torch nor llama_cpp.
"""

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

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "FormatError",
    "InputError",
    "OutputError",
    "RuntimeMissingError",
    "SpikeQuantError",
    "UnsupportedError",
    "register_with_gguf",
]

register_with_gguf()
