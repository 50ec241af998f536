"""Cuts a finished model into files of a limited size, with llama.cpp's own llama-gguf-split."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from spikequant_gguf.errors import InputError, OutputError
from spikequant_gguf.runtime import tool
from spikequant_gguf.verify import verify_file

from .workspace import workspace

__all__ = ["check_parts", "check_size", "split_model"]

_SIZE = re.compile(r"^[1-9]\d{0,5}[MG]$")


def check_size(size: str) -> None:
    """Raises InputError unless a size is of llama.cpp's form, as ``500M`` or ``4G``."""
    if not _SIZE.match(size):
        raise InputError(f"'{size}' is no size of a file", "give whole M or G, as in --split-max-size 4G")


def check_parts(path: Path, force: bool) -> None:
    """Raises OutputError if parts of a model of this name are there and force is not set."""
    found = _parts(path.parent, path.stem)
    if found and not force:
        raise OutputError(f"{found[0]} exists already", "use --force, or another name with -o")


def split_model(path: Path, size: str, force: bool) -> tuple[Path, ...]:
    """Replaces a model by its parts.

    Args:
        path: of the whole model; it is there until all parts are.
        size: of a part at most, as ``4G``; a larger tensor has a part of its own.
        force: remove older parts of the same name.

    Returns:
        The parts in order, named ``…-00001-of-00003.gguf``; the file itself if one part would hold it all.

    Raises:
        OutputError: a part cannot be written. The whole model is kept then.
    """
    check_parts(path, force)
    with workspace(path.parent) as folder:
        command = [tool("llama-gguf-split"), "--split", "--split-max-size", size, path, folder / path.stem]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        made = _parts(folder, path.stem)
        sound = result.returncode == 0 and made and all(verify_file(part).ok for part in made)
        if not sound:
            lines = (result.stdout + result.stderr).split("\n")
            reason = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
            raise OutputError(
                f"{path} is written, but cannot be split: {reason}",
                "free space for a second copy, then run llama-gguf-split yourself",
            )
        if len(made) == 1:
            return (path,)
        try:
            for old in _parts(path.parent, path.stem):
                old.unlink()
            parts = tuple(path.parent / part.name for part in made)
            for part, target in zip(made, parts, strict=True):
                os.replace(part, target)
            path.unlink()
        except OSError as error:
            raise OutputError(
                f"{path} is written, but its parts are not: {error.strerror or error}", "check the folder"
            ) from error
    return parts


def _parts(folder: Path, stem: str) -> list[Path]:
    pattern = re.compile(re.escape(stem) + r"-\d{5}-of-\d{5}\.gguf")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
