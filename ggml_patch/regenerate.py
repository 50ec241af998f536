"""For maintainers: rewrite the series and spike/ from a tree that was patched, then edited.

    python -m spikequant_gguf.ggml_patch.apply TREE         # an unpacked source package
    $EDITOR TREE/vendor/llama.cpp/ggml/...
    python -m spikequant_gguf.ggml_patch.regenerate TREE [--sdist PATH] [--into NAME.patch]

Each changed file stays in the (last) patch that touches it, subjects and explanations stay as they are. Files
that no patch touches yet go to the patch named by ``--into``. Nothing is written unless the new series
applied to the pinned source package gives exactly this tree, and fits the neighbouring releases, too: each
hunk gets as much context as all of them share. The hashes in UPSTREAM.toml are renewed with it.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import itertools
import re
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spikequant_gguf.errors import BuildError, InputError, SpikeQuantError

from . import unidiff
from .apply import ORIGINALS, STAMP, check_version
from .cache import open_cache
from .fetch import find_sdist
from .progress import SilentProgress, print_error
from .upstream import UPSTREAM_FILE, PatchSource, Upstream, load_releases

_CONTEXT = 3
# Lines of context before and behind a hunk's changes, most first.
_CONTEXTS = sorted(
    itertools.product(range(_CONTEXT + 1), repeat=2),
    key=lambda lines: (-sum(lines), abs(lines[0] - lines[1])),
)
_BUILD_OUTPUT = (STAMP, f"{ORIGINALS}/", "llama_cpp/lib/", ".git/")


@dataclass
class _Patch:
    """A patch on its way to the series: its text before the first diff, and (before, after) of each file."""

    file: Path
    header: str
    files: dict[str, tuple[bytes | None, bytes]]


@dataclass
class _Neighbour:
    """Another release, and the content of its files so far patched."""

    upstream: Upstream
    files: dict[str, bytes]


def regenerate(
    tree: Path,
    sdist: Path | None = None,
    into: str | None = None,
    source: PatchSource | None = None,
    upstream_file: Path = UPSTREAM_FILE,
) -> list[Path]:
    """Rewrite what differs; returns the paths written.

    tree: edited tree. sdist: the pinned source package (default: the cached or downloaded one). into: name of
    the patch for files that no patch touches yet. Raises InputError or BuildError, and then has written
    nothing.
    """
    upstream, *others = load_releases(upstream_file)
    source = source or PatchSource()
    check_version(tree, upstream)
    pristine = _read_sdist(find_sdist(open_cache(), upstream, sdist, SilentProgress()), upstream)
    edited = _changed_files(tree, pristine)
    prefix = f"{upstream.spike_folder}/"
    hooks = {path: content for path, content in edited.items() if not path.startswith(prefix)}
    patches = _assign(source, pristine, hooks, into)
    neighbours = _read_neighbours(others, hooks)
    unpatched = {release.upstream.version: dict(release.files) for release in neighbours}
    outputs = {patch.file: _format(patch, neighbours) for patch in patches if patch.files}
    _check(outputs, pristine, hooks)
    dropped = [patch.file for patch in patches if not patch.files]

    spike = source.root / "spike"
    outputs |= {
        spike / path.removeprefix(prefix): content
        for path, content in edited.items()
        if path.startswith(prefix)
    }
    dropped += [path for name, path in source.spike_files().items() if prefix + name not in edited]
    touched = {path: pristine[path] for path in hooks if path in pristine}
    outputs[upstream_file] = _with_hashes(upstream_file, touched, unpatched)
    written = [path for path, content in outputs.items() if not path.exists() or path.read_bytes() != content]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(outputs[path])
    for path in dropped:
        path.unlink()
    return written + dropped


def renew_hashes(
    sdist: Path | None = None, source: PatchSource | None = None, upstream_file: Path = UPSTREAM_FILE
) -> list[Path]:
    """Write the hashes of the files that the series changes, after patches were edited by hand.

    Raises BuildError if a hunk does not fit the pin or one of its neighbours.
    """
    upstream, *others = load_releases(upstream_file)
    pristine = _read_sdist(find_sdist(open_cache(), upstream, sdist, SilentProgress()), upstream)
    changes = [
        (patch.name, change)
        for patch in (source or PatchSource()).patches()
        for change in unidiff.parse(patch.read_bytes(), patch.name)
    ]
    touched = {change.path: pristine[change.path] for _, change in changes if change.path in pristine}
    neighbours = _read_neighbours(others, touched)
    unpatched = {release.upstream.version: dict(release.files) for release in neighbours}
    for release in (_Neighbour(upstream, dict(touched)), *neighbours):
        for name, change in changes:
            content = release.files.get(change.path, b"")
            release.files[change.path] = unidiff.apply_hunks(content, change, name)
    content = _with_hashes(upstream_file, touched, unpatched)
    if upstream_file.read_bytes() == content:
        return []
    upstream_file.write_bytes(content)
    return [upstream_file]


def _read_neighbours(releases: list[Upstream], names: Iterable[str]) -> list[_Neighbour]:
    """The files of these names in the other releases."""
    wanted = set(names)
    found = []
    for upstream in releases:
        sdist = find_sdist(open_cache(), upstream, None, SilentProgress())
        found.append(_Neighbour(upstream, _read_sdist(sdist, upstream, wanted)))
    return found


def _read_sdist(sdist: Path, upstream: Upstream, names: set[str] | None = None) -> dict[str, bytes]:
    """Content of the package's files, of those in ``names`` if it is given."""
    top = upstream.sdist.removesuffix(".tar.gz") + "/"
    with tarfile.open(sdist) as archive:
        return {
            member.name.removeprefix(top): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile() and (names is None or member.name.removeprefix(top) in names)
        }


def _changed_files(tree: Path, pristine: dict[str, bytes]) -> dict[str, bytes]:
    """Content of every file of the tree that is new or differs. A deleted file is an error: patches cannot
    say it.
    """
    changed = {}
    present = {path.relative_to(tree).as_posix(): path for path in tree.rglob("*") if path.is_file()}
    for name, path in sorted(present.items()):
        if name.startswith(_BUILD_OUTPUT) or "__pycache__" in name:
            continue
        content = path.read_bytes()
        if pristine.get(name) != content:
            changed[name] = content
    missing = [name for name in pristine if name not in present and not name.startswith(_BUILD_OUTPUT)]
    if missing:
        raise InputError(f"{missing[0]} is missing in {tree}", "the series cannot delete files; restore it")
    return changed


def _assign(
    source: PatchSource, pristine: dict[str, bytes], hooks: dict[str, bytes], into: str | None
) -> list[_Patch]:
    """Split the changes over the patches of the series."""
    state: dict[str, bytes | None] = {}
    patches = []
    for file in source.patches():
        content = file.read_bytes()
        header = re.split(rb"^(?:diff |--- a/|--- /dev/null)", content, maxsplit=1, flags=re.MULTILINE)[0]
        patch = _Patch(file, header.decode(), {})
        for change in unidiff.parse(content, file.name):
            before = state.get(change.path, pristine.get(change.path))
            after = unidiff.apply_hunks(before or b"", change, file.name)
            patch.files[change.path] = (before, after)
            state[change.path] = after
        patches.append(patch)
    for path in state:
        last = [patch for patch in patches if path in patch.files][-1]
        before, _ = last.files[path]
        wanted = hooks.get(path, pristine.get(path))
        if wanted is None or wanted == before:
            del last.files[path]
        else:
            last.files[path] = (before, wanted)
    added = [path for path in hooks if path not in state]
    if added:
        target = next((patch for patch in patches if patch.file.name == into), None)
        if target is None:
            raise InputError(
                f"no patch touches {', '.join(added)} yet",
                "say with --into which patch of the series they belong to, or undo the change",
            )
        target.files |= {path: (pristine.get(path), hooks[path]) for path in added}
    return patches


def _format(patch: _Patch, neighbours: list[_Neighbour]) -> bytes:
    """Text of a patch; it is applied to the neighbours as well."""
    parts = [patch.header.encode()]
    for path, (before, after) in patch.files.items():
        parts.append(f"diff --git a/{path} b/{path}\n".encode())
        if before is None:
            parts.append(b"new file mode 100644\n")
        parts.append(f"--- {f'a/{path}' if before is not None else '/dev/null'}\n+++ b/{path}\n".encode())
        change = unidiff.FilePatch(path, before is None)
        for group in _groups(unidiff.split_lines(before or b""), unidiff.split_lines(after)):
            parts += _fit(group, before or b"", after, change, neighbours)
        for release in neighbours:
            release.files[path] = unidiff.apply_hunks(release.files.get(path, b""), change, patch.file.name)
    return b"".join(parts)


_Group = list[tuple[str, int, int, int, int]]


def _groups(before: list[bytes], after: list[bytes]) -> Iterable[_Group]:
    """What differs, in groups of difflib's opcodes that make one hunk each."""
    return difflib.SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(_CONTEXT)


def _fit(
    group: _Group, before: bytes, after: bytes, change: unidiff.FilePatch, neighbours: list[_Neighbour]
) -> list[bytes]:
    """Text of a hunk with as much context as fits every release; the hunk is added to ``change``."""
    old, new = unidiff.split_lines(before), unidiff.split_lines(after)
    contents = [unidiff.split_lines(release.files.get(change.path, b"")) for release in neighbours]
    for moved, (lead, trail) in itertools.product((group, _moved_down(group, old, new)), _CONTEXTS):
        trimmed = _trim(moved, lead, trail)
        hunk = _hunk(old, new, trimmed)
        trial = unidiff.FilePatch(change.path, change.creates, [*change.hunks, hunk])
        at_home = unidiff.place_hunks(old, trial)[-1] == max(hunk.start - 1, 0)
        if at_home and all(unidiff.place_hunks(lines, trial)[-1] is not None for lines in contents):
            change.hunks.append(hunk)
            return _text(old, new, trimmed, hunk.heading)
    versions = " and ".join(release.upstream.version for release in neighbours)
    raise BuildError(
        f"no context of the hunk of {change.path} at line {group[0][1] + 1} fits {versions}, too",
        "hook another place, or take a neighbour that differs out of UPSTREAM.toml",
    )


def _moved_down(group: _Group, old: list[bytes], new: list[bytes]) -> _Group:
    """The change with its only insertion as far down as equal lines let it, as git does; else the group."""
    inserted = [each for each in group if each[0] != "equal"]
    if len(inserted) != 1 or inserted[0][0] != "insert":
        return group
    (_, at, _, first, end) = inserted[0]
    while at < len(old) and old[at] == new[first]:
        at, first, end = at + 1, first + 1, end + 1
    lead, trail = min(at, _CONTEXT), min(len(old) - at, _CONTEXT)
    return [
        ("equal", at - lead, at, first - lead, first),
        ("insert", at, at, first, end),
        ("equal", at, at + trail, end, end + trail),
    ]


def _trim(group: _Group, lead: int, trail: int) -> _Group:
    """The group with that many lines of context at its ends, if it has more."""
    trimmed = list(group)
    if trimmed[0][0] == "equal":
        kind, i1, i2, j1, j2 = trimmed[0]
        cut = max(i2 - i1 - lead, 0)
        trimmed[0] = (kind, i1 + cut, i2, j1 + cut, j2)
    if trimmed[-1][0] == "equal":
        kind, i1, i2, j1, j2 = trimmed[-1]
        cut = max(i2 - i1 - trail, 0)
        trimmed[-1] = (kind, i1, i2 - cut, j1, j2 - cut)
    return trimmed


def _hunk(old: list[bytes], new: list[bytes], group: _Group) -> unidiff.Hunk:
    (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
    return unidiff.Hunk(i1 + (i2 > i1), unidiff.heading(old, i1), old[i1:i2], new[j1:j2])


def _text(old: list[bytes], new: list[bytes], group: _Group, heading: bytes) -> list[bytes]:
    (_, i1, _, j1, _), (_, _, i2, _, j2) = group[0], group[-1]
    ranges = f"@@ -{_range(i1, i2)} +{_range(j1, j2)} @@".encode()
    lines = [ranges + (b" " + heading if heading else b"") + b"\n"]
    for kind, i1, i2, j1, j2 in group:
        if kind == "equal":
            lines += [_line(b" ", line) for line in old[i1:i2]]
        else:
            lines += [_line(b"-", line) for line in old[i1:i2]]
            lines += [_line(b"+", line) for line in new[j1:j2]]
    return lines


def _range(start: int, stop: int) -> str:
    count = stop - start
    return f"{start + (count > 0)},{count}"


def _line(mark: bytes, line: bytes) -> bytes:
    return mark + line if line.endswith(b"\n") else mark + line + b"\n\\ No newline at end of file\n"


def _check(outputs: dict[Path, bytes], pristine: dict[str, bytes], hooks: dict[str, bytes]) -> None:
    state: dict[str, bytes] = {}
    for file, content in sorted(outputs.items()):
        for change in unidiff.parse(content, file.name):
            before = state.get(change.path, pristine.get(change.path, b""))
            state[change.path] = unidiff.apply_hunks(before, change, file.name)
    for path, wanted in hooks.items():
        if state.get(path) != wanted:
            raise BuildError(
                f"the new series would not give {path} as it is in the tree",
                "move its changes into one patch of the series",
            )


def _with_hashes(
    upstream_file: Path, files: dict[str, bytes], neighbours: dict[str, dict[str, bytes]]
) -> bytes:
    """UPSTREAM.toml with new tables of hashes, which stand at its end."""
    text = upstream_file.read_text(encoding="utf-8")
    head, marker, _ = text.partition("\n[files]\n")
    if not marker:
        raise InputError(f"{upstream_file} has no [files] table", "add one at its end")
    tables = [head + marker + _hash_rows(files)]
    tables += [
        f'[neighbour_files."{version}"]\n{_hash_rows(contents)}' for version, contents in neighbours.items()
    ]
    return "\n".join(tables).encode()


def _hash_rows(files: dict[str, bytes]) -> str:
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in sorted(files.items())}
    return "".join(f'"{path}" = "{digest}"\n' for path, digest in digests.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m spikequant_gguf.ggml_patch.regenerate",
        description="Rewrite the series and spike/ from a patched, then edited tree.",
    )
    parser.add_argument(
        "tree", type=Path, nargs="?", help="root of the edited tree; none: only renew the hashes"
    )
    parser.add_argument("--sdist", type=Path, help="the pinned source package")
    parser.add_argument("--into", metavar="NAME.patch", help="patch for files that no patch touches yet")
    options = parser.parse_args(arguments)
    try:
        if options.tree is None:
            written = renew_hashes(options.sdist)
        else:
            written = regenerate(options.tree, options.sdist, options.into)
    except SpikeQuantError as error:
        return print_error(error)
    for path in written:
        print(f"{'wrote' if path.exists() else 'removed'} {path}")
    print(f"{len(written)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
