"""The JSON documents that a report is made from: what they are, and under which conditions they arose."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

__all__ = ["KINDS", "Document", "Origin", "read_document", "read_documents"]

KINDS = {
    "compare": "spikequant compare MODEL --json > compare.json",
    "energy": "spikequant energy MODEL-SPK4.gguf --json > energy.json",
    "sweep": "spikequant sweep MODEL --json > sweep.json",
    "bench": "spikequant bench MODEL… --json > bench.json",
    "matmul": "python benchmarks/matmul.py --json > matmul.json",
    "end_to_end": "python benchmarks/end_to_end.py --json > end_to_end.json",
    "accuracy": "python benchmarks/accuracy.py --json > accuracy.json",
}
"""Kinds of documents, and the commands that make them."""

_UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Origin:
    """What a figure depends on, in words.

    Attributes:
        method: how the values came about.
        text: that was read; None where no text plays a part.
        command: that made the document.
        host: machine and runtime.
        created: date and time; None if unknown.
    """

    method: str
    text: str | None
    command: str
    host: str
    created: str | None = None

    def lines(self) -> list[tuple[str, str]]:
        """(what, value) of all that is known."""
        found = [("Method", self.method), ("Text", self.text or "none: it does not matter here")]
        found += [("Command", self.command), ("Host", self.host)]
        return found + ([("Made", self.created)] if self.created else [])


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        kind: of KINDS.
        name: of the file.
        data: content.
    """

    kind: str
    name: str
    data: dict[str, Any]

    def origin(self, method: str, text: str | None = None) -> Origin:
        """Where its figures come from; text: overrides what the document says of its text."""
        host = self.data.get("host") or {}
        return Origin(
            method=method,
            text=text if text is not None else describe_text(self.data.get("text")),
            command=self._command(),
            host=describe_host(host),
            created=self.data.get("created"),
        )

    def _command(self) -> str:
        if "benchmark" in self.data:
            arguments = [str(each) for each in self.data.get("arguments", [])]
            return shlex.join(["python", f"benchmarks/{self.kind}.py", *arguments])
        return str(self.data.get("command") or f"{_UNKNOWN} ({self.name})")


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
    """All documents, of which a file may hold one. Raises InputError."""
    return [read_document(path) for path in paths]


def read_document(path: str | Path) -> Document:
    """One document of a kind that is recognized by its content. Raises InputError."""
    path = Path(path)
    remedy = "give what a command printed with --json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", remedy) from error
    except ValueError as error:  # of the encoding, too
        raise InputError(f"{path} is no JSON document: {error}", remedy) from error
    kind = _kind(data) if isinstance(data, dict) else None
    if kind is None:
        raise InputError(f"{path} is of no kind that a report shows", f"{remedy}: of {', '.join(KINDS)}")
    return Document(kind, path.name, data)


def _kind(data: dict[str, Any]) -> str | None:
    keys = set(data)
    if data.get("benchmark") in KINDS and isinstance(data.get("rows"), list):
        return data["benchmark"]
    if isinstance(data.get("points"), list):
        return "sweep"
    if {"phases", "constants", "rows"} <= keys:
        return "energy"
    if {"reference", "text", "rows"} <= keys:
        return "compare"
    if {"models", "rounds", "baseline"} <= keys:
        return "bench"
    return None


def describe_text(text: object) -> str | None:
    """A text's name, size and hash in words."""
    if not isinstance(text, dict):
        return None
    parts = [str(text.get("name") or text.get("file") or _UNKNOWN)]
    if text.get("sha256"):
        parts.append(f"sha256 {str(text['sha256'])[:8]}…")
    if text.get("chunks") and text.get("ctx"):
        parts.append(f"{text['chunks']} chunks of {text['ctx']} tokens")
    elif text.get("tokens"):
        parts.append(f"{text['tokens']} tokens")
    return ", ".join(parts)


def describe_host(host: dict[str, Any]) -> str:
    """Machine and runtime in words."""
    if not host:
        return _UNKNOWN
    threads = host.get("threads") or host.get("cores")
    parts = [re.sub(r"\s+", " ", str(host.get("cpu", _UNKNOWN)))]
    if threads:
        parts.append(f"{threads} threads" if host.get("threads") else f"{threads} cores")
    parts += [str(host[key]) for key in ("os",) if host.get(key)]
    if host.get("kernel"):
        parts.append(f"spike kernel {host['kernel']}")
    if host.get("llama_cpp"):
        parts.append(f"llama-cpp-python {host['llama_cpp']}")
    if host.get("spikequant"):
        parts.append(f"spikequant {host['spikequant']}")
    return ", ".join(parts)
