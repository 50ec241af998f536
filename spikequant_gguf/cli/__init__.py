"""The command line, `spikequant`. Every command parses arguments, calls one function and shows its result."""

from .app import app, main

__all__ = ["app", "main"]
