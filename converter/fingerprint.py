"""What a conversion's result depends on, so that only the same conversion goes on with a partial file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import spikequant_gguf
from spikequant_gguf.files import file_sha256
from spikequant_gguf.format import FORMAT_VERSION

from .importance import Importance
from .journal import Fingerprint
from .provenance import Provenance
from .quantize import Backend
from .recipe import Recipe, Scaling

__all__ = ["DIFFERENCES", "fingerprint_of_recipe", "fingerprint_of_source"]

DIFFERENCES: Mapping[str, str] = {
    "source": "another source",
    "version": "another version of spikequant-gguf",
    "runtime": "another build of the runtime",
    "importance": "another importance matrix",
    "options": "other options",
    "calibration": "another calibration",
    "contents": "other tensors or metadata",
}
"""The parts of a fingerprint, and what is said of the first one that differs."""


def fingerprint_of_source(sha256: str, backend: Backend, importance: Importance | None) -> dict[str, str]:
    """The parts that are known before calibration, which takes long. sha256: of the source."""
    return {
        "source": sha256,
        "version": f"{spikequant_gguf.__version__}, format {FORMAT_VERSION}",
        "runtime": str(getattr(backend, "patch_id", type(backend).__name__)),
        "importance": file_sha256(importance.path) if importance is not None else "none",
    }


def fingerprint_of_recipe(recipe: Recipe, provenance: Provenance, header: bytes) -> Fingerprint:
    """The other parts. header: of the output, with placeholders for what is not known yet.

    A calibration is described by its text and its settings, and by the scalings that it gave: these change
    several tensors together, so that tensors of different ones would not fit each other.
    """
    return {
        "options": provenance.command,
        "calibration": f"{recipe.calibration}, scaling {_digest_of_transforms(recipe)[:16]}",
        "contents": hashlib.sha256(header).hexdigest(),
    }


def _digest_of_transforms(recipe: Recipe) -> str:
    digest = hashlib.sha256()
    for name, transform in sorted(recipe.transforms.items()):
        digest.update(f"{name}\0{type(transform).__name__}\0".encode())
        if isinstance(transform, Scaling):
            for factors in (transform.inputs, transform.outputs):
                digest.update(b"-" if factors is None else factors.astype("<f4").tobytes())
    return digest.hexdigest()
