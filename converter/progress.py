"""How the converter tells what it does. Units are bytes in every stage."""

from __future__ import annotations

from typing import Protocol

__all__ = [
    "CALIBRATE",
    "CHECKPOINT",
    "DOWNLOAD",
    "HASH",
    "QUANTIZE",
    "RESUME",
    "STAGES",
    "VERIFY",
    "Progress",
    "no_progress",
]

DOWNLOAD = "download"
"""Fetching a checkpoint from Hugging Face; the total is unknown (0)."""
CHECKPOINT = "checkpoint"
"""Turning a checkpoint into a temporary GGUF with llama.cpp's converter."""
HASH = "hash"
"""sha256 of the source; the item is a file name."""
CALIBRATE = "calibrate"
RESUME = "resume"
"""Reading again what a stopped conversion had written; the item is a tensor name."""
QUANTIZE = "quantize"
"""Reading, quantizing and writing; the item is a tensor name, bytes are those of the source."""
VERIFY = "verify"
"""Reading the written file again; the item is a tensor name."""

STAGES = (DOWNLOAD, CHECKPOINT, HASH, CALIBRATE, RESUME, QUANTIZE, VERIFY)
"""In the order in which they occur; those that a conversion does not need are left out."""


class Progress(Protocol):
    """Receives progress; may raise KeyboardInterrupt to stop. It is called from one thread."""

    def __call__(self, stage: str, item: str | None, done: int, total: int) -> None:
        """done of total bytes of a stage are finished; total 0: unknown. item: the file or tensor at work."""


def no_progress(stage: str, item: str | None, done: int, total: int) -> None:
    """Shows nothing."""
