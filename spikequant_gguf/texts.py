"""Texts to evaluate and calibrate on: a file, or on a bare machine Python's own documentation.

A perplexity or divergence means nothing without its text; so every result carries name and sha256 of the
text.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InputError

__all__ = [
    "DATA_VARIABLE",
    "EVALUATION_FILE",
    "Text",
    "default_calibration_text",
    "default_evaluation_text",
    "evaluation_text",
    "read_text",
]

DATA_VARIABLE = "SPIKEQUANT_DATA"
"""Names a folder with evaluation texts."""
EVALUATION_FILE = "wiki.test.raw"
"""The WikiText-2 test split, the usual text of published perplexities."""

_EVALUATION_STRIDE = 3  # every third topic of the documentation is for evaluation


@dataclass(frozen=True)
class Text:
    """A text and where it is from.

    Attributes:
        name: what to call it in a result.
        data: its bytes, UTF-8 as a rule; llama.cpp's tokenizers work on bytes.
        sha256: of the file, or of the data if it is from none.
        file: path of the file; None if it is from none.
    """

    name: str
    data: bytes = field(repr=False)
    sha256: str
    file: str | None = None

    def to_json(self) -> dict:
        """Name, file, size in bytes and sha256; not the text itself."""
        return {"name": self.name, "file": self.file, "bytes": len(self.data), "sha256": self.sha256}


def read_text(path: str | Path) -> Text:
    """The text of a file.

    One line feed at the end of the file is dropped, as llama.cpp's programs do.

    Raises:
        InputError: the file cannot be read, is empty or is no text.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the text {path}: {error.strerror or error}", "give the path of a text file with -f"
        ) from error
    if not data.strip():
        raise InputError(f"the text {path} is empty", "give a file with text")
    if b"\0" in data:
        raise InputError(f"{path} is not a text file: it contains zero bytes", "give a UTF-8 text file")
    return Text(path.name, data.removesuffix(b"\n"), hashlib.sha256(data).hexdigest(), str(path))


def evaluation_text(path: str | Path | None = None) -> Text:
    """The text at `path`; without one, `default_evaluation_text`. Raises InputError."""
    return read_text(path) if path is not None else default_evaluation_text()


def default_evaluation_text() -> Text:
    """``wiki.test.raw`` in the folder named by $SPIKEQUANT_DATA; without it, Python's documentation.

    Raises:
        InputError: the folder does not hold the file, or this Python has no documentation.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        return _documentation()[0]
    path = Path(folder).expanduser() / EVALUATION_FILE
    if not path.is_file():
        raise InputError(
            f"{DATA_VARIABLE} names {folder}, but there is no {EVALUATION_FILE} in it",
            f"put it there, give a text with -f, or unset {DATA_VARIABLE} to use Python's documentation",
        )
    return read_text(path)


def default_calibration_text() -> Text:
    """The calibration part of Python's documentation: no paragraph of it is in the evaluation part.

    Raises:
        InputError: this Python has no documentation.
    """
    return _documentation()[1]


def _documentation() -> tuple[Text, Text]:
    """(evaluation, calibration) parts of the help topics that come with Python.

    Topics repeat paragraphs of one another, sometimes indented otherwise; so the calibration part leaves out
    every paragraph that the evaluation part has, and neither part has one twice.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise InputError(
            "this Python comes without its documentation (pydoc_data), the default text",
            "give a text file, for evaluation with -f",
        ) from error
    names = sorted(topics)
    evaluation_names = names[::_EVALUATION_STRIDE]
    calibration_names = [name for name in names if name not in set(evaluation_names)]
    seen: set[str] = set()
    version = platform.python_version()
    parts = []
    for part, chosen in (("evaluation", evaluation_names), ("calibration", calibration_names)):
        paragraphs = []
        for name in chosen:
            for paragraph in re.split(r"\n\s*\n", topics[name]):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    paragraphs.append(paragraph.strip("\n"))
        title = f"Python {version} documentation (pydoc_data.topics), {part} part"
        data = "\n\n".join(paragraphs).encode()
        parts.append(Text(title, data, hashlib.sha256(data).hexdigest()))
    return parts[0], parts[1]
