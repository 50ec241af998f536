"""The pin: which llama-cpp-python the patch belongs to, its neighbours that the patch fits, too, and the
identity of the patch itself.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spikequant_gguf.errors import BuildError, InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).resolve().parent
UPSTREAM_FILE = PACKAGE / "UPSTREAM.toml"
PATCH_ID_LENGTH = 12


@dataclass(frozen=True)
class Upstream:
    """A release as ``UPSTREAM.toml`` describes it.

    ``files`` maps a path in the source package to the sha256 (hex) of its unpatched content.
    """

    project: str
    version: str
    sdist: str
    sha256: str
    llama_cpp_commit: str
    ggml_version: str
    spike_folder: str
    files: dict[str, str]

    @property
    def requirement(self) -> str:
        """The pin as pip writes it, for example ``llama-cpp-python==0.3.36``."""
        return f"{self.project}=={self.version}"


@dataclass(frozen=True)
class PatchSource:
    """A patch: ordered diffs and new files. ``root`` holds ``series/`` and ``spike/``."""

    root: Path = PACKAGE

    def patches(self) -> list[Path]:
        """The series in order. Two patches with the same number are an error."""
        found = sorted((self.root / "series").glob("*.patch"))
        numbers = [re.match(r"\d{4}-", patch.name) for patch in found]
        for patch, number in zip(found, numbers, strict=True):
            if number is None:
                raise BuildError(
                    f"patch {patch.name} has no four-digit number in front",
                    "name patches 0001-what-it-does.patch; the number is the order",
                )
        if len({number.group() for number in numbers if number}) != len(found):
            raise BuildError(
                "two patches of the series have the same number",
                "renumber them: the number is the order in which they are applied",
            )
        return found

    def spike_files(self) -> dict[str, Path]:
        """New sources by their path relative to ``spike/``, without hidden files and byte code."""
        root = self.root / "spike"
        files = {}
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if path.is_file() and not hidden:
                files[relative.as_posix()] = path
        return files

    def inputs(self) -> Iterator[tuple[str, bytes]]:
        """Everything that decides what the patched tree looks like: (name, content)."""
        for patch in self.patches():
            yield f"series/{patch.name}", patch.read_bytes()
        for name, path in self.spike_files().items():
            yield f"spike/{name}", path.read_bytes()


def load_releases(path: Path = UPSTREAM_FILE) -> list[Upstream]:
    """The releases that the series fits, the pin first, then its neighbours. Raises BuildError if the file is
    missing or incomplete.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        pin, hashes = document["pin"], document.get("neighbour_files", {})
        neighbours = [
            Upstream(**pin | facts | {"version": version}, files=dict(hashes.get(version, {})))
            for version, facts in document.get("neighbours", {}).items()
        ]
        return [Upstream(**pin, files=dict(document.get("files", {}))), *neighbours]
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise BuildError(f"{path} is not a valid pin: {error}", "Install spikequant-gguf again.") from error


def load_upstream(path: Path = UPSTREAM_FILE, version: str | None = None) -> Upstream:
    """The pin, or its neighbour of that version. Raises BuildError if the file is missing or incomplete,
    InputError if the series is not made for that version.
    """
    releases = load_releases(path)
    found = releases[0] if version is None else next((r for r in releases if r.version == version), None)
    if found is None:
        known = ", ".join(release.version for release in releases)
        raise InputError(
            f"the patch is not made for {releases[0].project} {version}",
            f"choose one of {known}; what another would take says "
            f"`python -m spikequant_gguf.ggml_patch.canary {version}`",
        )
    return found


def source_hash(upstream: Upstream, source: PatchSource | None) -> str:
    """sha256 (hex) of pin and patch; of the pin alone when ``source`` is None (the unpatched build)."""
    digest = hashlib.sha256(f"{upstream.requirement} {upstream.sha256}\n".encode())
    if source is not None:
        for name, content in source.inputs():
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def patch_id(upstream: Upstream | None = None, source: PatchSource | None = None) -> str:
    """First 12 hex digits of the hash of pin and patch: what a matching runtime reports as its patch id."""
    return source_hash(upstream or load_upstream(), source or PatchSource())[:PATCH_ID_LENGTH]
