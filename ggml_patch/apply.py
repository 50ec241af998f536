"""Apply the patch to an unpacked llama-cpp-python source package, and take it off again.

Needs no git. All results are computed before the first byte is written. A stamp in the tree records the
sha256 of every touched file before and after, and the unpatched files are kept beside it; so applying is
idempotent, finishes what an interrupted run began, moves a tree from one revision of the patch to another by
writing only the files that differ (which keeps rebuilds short), and ``remove`` restores the tree to the byte.

    python -m spikequant_gguf.ggml_patch.apply TREE [--remove]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from spikequant_gguf.errors import BuildError, InputError, SpikeQuantError

from . import unidiff
from .progress import print_error
from .upstream import PatchSource, Upstream, load_upstream, patch_id

STAMP = ".spikequant-applied.json"
ORIGINALS = ".spikequant-originals"
_STAMP_VERSION = 1
_FRESH_TREE = "unpack the source package again; `spikequant build --force` does it for its own copy"


@dataclass(frozen=True)
class ApplyReport:
    """What one call did. ``patch_id`` is None after ``remove``; ``written``: files whose content changed."""

    tree: Path
    patch_id: str | None
    written: tuple[str, ...]

    @property
    def already_done(self) -> bool:
        """True if the tree already was in the wanted state."""
        return not self.written


@dataclass(frozen=True)
class _Touched:
    """sha256 (hex) of one file: unpatched (None: the file is new), and patched (two while a tree is in
    transition).
    """

    before: str | None
    after: tuple[str, ...]


def apply(
    tree: Path | str, upstream: Upstream | None = None, source: PatchSource | None = None
) -> ApplyReport:
    """Bring ``tree``, the root of an unpacked source package, into the patched state.

    upstream: the release that it must be; None for any that the series is made for. Raises InputError if it
    is another package or was changed by hand, BuildError if the series does not fit.
    """
    tree = Path(tree)
    upstream = upstream or load_upstream(version=_version(tree, load_upstream()))
    source = source or PatchSource()
    check_version(tree, upstream)
    stamp = _read_stamp(tree)
    unpatched = _unpatched_files(tree, stamp)
    patched = _patched_files(tree, upstream, source, unpatched)
    for path in patched:
        unpatched.setdefault(path, _read(tree / path))
    _check_pristine(unpatched, upstream)

    target = {path: patched.get(path, unpatched[path]) for path in sorted(unpatched)}
    new = {path: _Touched(_digest(unpatched[path]), (_digest(patched[path]),)) for path in patched}
    identity = patch_id(upstream, source)
    differing = {path: content for path, content in target.items() if _read(tree / path) != content}
    if differing or new != stamp:
        for path in patched:
            if unpatched[path] is not None:
                _write(tree / ORIGINALS, path, unpatched[path])
        # Each file is in a state that this stamp names while they are written: a dead run can be finished.
        _write_stamp(tree, None, _merge(stamp, new))
        for path, content in differing.items():
            _write(tree, path, content)
        for path in stamp.keys() - new.keys():
            _write(tree / ORIGINALS, path, None)
    _write_stamp(tree, identity, new)
    return ApplyReport(tree, identity, tuple(differing))


def remove(tree: Path | str) -> ApplyReport:
    """Restore the unpatched tree to the byte; without a stamp there is nothing to do.

    Raises InputError if a patched file was changed by hand since.
    """
    tree = Path(tree)
    unpatched = _unpatched_files(tree, _read_stamp(tree))
    written = tuple(path for path, content in sorted(unpatched.items()) if _write(tree, path, content))
    _write(tree, STAMP, None)
    if (tree / ORIGINALS).exists():
        shutil.rmtree(tree / ORIGINALS)
    return ApplyReport(tree, None, written)


def check_version(tree: Path, upstream: Upstream) -> None:
    """Raise InputError unless ``tree`` holds this release of llama-cpp-python."""
    version = _version(tree, upstream)
    if version != upstream.version:
        raise InputError(
            f"this is llama-cpp-python {version}, but the patch is made for {upstream.version}",
            f"use {upstream.sdist}",
        )


def _version(tree: Path, upstream: Upstream) -> str:
    version = read_version(_read(tree / "llama_cpp" / "__init__.py") or b"")
    if version is None:
        raise InputError(
            f"{tree} is not an unpacked llama-cpp-python source package",
            f"give the folder that {upstream.sdist} unpacks to",
        )
    return version


def read_version(content: bytes) -> str | None:
    """The version that llama_cpp/__init__.py states."""
    found = re.search(rb"^__version__\s*=\s*[\"']([^\"']+)", content, re.MULTILINE)
    return found.group(1).decode("utf-8", "replace") if found is not None else None


def _unpatched_files(tree: Path, stamp: dict[str, _Touched]) -> dict[str, bytes | None]:
    """Unpatched content of every file that the stamp names, after checking that nobody else changed it."""
    contents: dict[str, bytes | None] = {}
    for path, touched in stamp.items():
        if _digest(_read(tree / path)) not in (touched.before, *touched.after):
            raise InputError(f"{path} was changed by hand since the patch was applied to {tree}", _FRESH_TREE)
        contents[path] = None if touched.before is None else _read(tree / ORIGINALS / path)
        if _digest(contents[path]) != touched.before:
            raise InputError(f"the kept original of {path} in {tree} is damaged", _FRESH_TREE)
    return contents


def _patched_files(
    tree: Path, upstream: Upstream, source: PatchSource, unpatched: dict[str, bytes | None]
) -> dict[str, bytes]:
    """Patched content of every file of the series and of spike/, computed from unpatched content alone."""
    results: dict[str, bytes] = {}
    for patch in source.patches():
        for change in unidiff.parse(patch.read_bytes(), patch.name):
            path = change.path
            content = results.get(path)
            if content is None:
                content = unpatched[path] if path in unpatched else _read(tree / path)
            if change.creates and content is not None:
                raise BuildError(f"patch {patch.name} creates {path}, which already exists", _FRESH_TREE)
            if not change.creates and content is None:
                raise BuildError(
                    f"patch {patch.name} changes {path}, which does not exist in {tree}", _FRESH_TREE
                )
            results[path] = unidiff.apply_hunks(content or b"", change, patch.name)
    for name, file in source.spike_files().items():
        path = f"{upstream.spike_folder}/{name}"
        if path in results or (path not in unpatched and (tree / path).exists()):
            raise BuildError(
                f"{path} is both in spike/ and in the tree or the series",
                "keep one of them: new sources belong in spike/, hooks in the series",
            )
        results[path] = file.read_bytes()
    return results


def _check_pristine(unpatched: dict[str, bytes | None], upstream: Upstream) -> None:
    for path, content in unpatched.items():
        if path in upstream.files and _digest(content) != upstream.files[path]:
            raise InputError(f"{path} differs from {upstream.requirement}", _FRESH_TREE)


def _merge(old: dict[str, _Touched], new: dict[str, _Touched]) -> dict[str, _Touched]:
    merged = dict(old)
    for path, touched in new.items():
        known = old[path].after if path in old else ()
        merged[path] = _Touched(touched.before, tuple(dict.fromkeys((*known, *touched.after))))
    return merged


def _read_stamp(tree: Path) -> dict[str, _Touched]:
    content = _read(tree / STAMP)
    if content is None:
        return {}
    try:
        document = json.loads(content)
        if document["version"] != _STAMP_VERSION:
            raise ValueError(f"version {document['version']}")
        return {
            path: _Touched(entry["before"], tuple(entry["after"]))
            for path, entry in document["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{tree / STAMP} is damaged: {error}", _FRESH_TREE) from error


def _write_stamp(tree: Path, identity: str | None, files: dict[str, _Touched]) -> None:
    document = {
        "version": _STAMP_VERSION,
        "patch_id": identity,
        "files": {
            path: {"before": touched.before, "after": list(touched.after)}
            for path, touched in sorted(files.items())
        },
    }
    _write(tree, STAMP, (json.dumps(document, indent=1) + "\n").encode())


def _digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(root: Path, name: str, content: bytes | None) -> bool:
    """Give ``root/name`` this content by rename; None deletes it, and folders that are empty then.

    False if it was so already; its time stays in that case.
    """
    path = root / name
    if _read(path) == content:
        return False
    if content is None:
        path.unlink()
        for folder in path.parents:
            if folder == root or any(folder.iterdir()):
                break
            folder.rmdir()
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".spikequant-partial")
    partial.write_bytes(content)
    if path.exists():
        partial.chmod(path.stat().st_mode)
    os.replace(partial, path)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Command line for people who unpack the source package themselves."""
    parser = argparse.ArgumentParser(
        prog="python -m spikequant_gguf.ggml_patch.apply",
        description="Apply the SpikeQuant patch to an unpacked llama-cpp-python.",
    )
    parser.add_argument("tree", type=Path, help="root of the unpacked source package")
    parser.add_argument("--remove", action="store_true", help="restore the unpatched files instead")
    options = parser.parse_args(arguments)
    try:
        report = remove(options.tree) if options.remove else apply(options.tree)
    except SpikeQuantError as error:
        return print_error(error)
    state = f"patch {report.patch_id} applied" if report.patch_id else "patch removed"
    print(f"{state}: {len(report.written)} files written in {report.tree}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
