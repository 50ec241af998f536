"""For maintainers: rewrite the series and spike/ from a tree that was patched, then edited.

    python -m spikequant_gguf.ggml_patch.apply TREE         # an unpacked source package
    $EDITOR TREE/vendor/llama.cpp/ggml/...
    python -m spikequant_gguf.ggml_patch.regenerate TREE [--sdist PATH] [--into NAME.patch]

Each changed file stays in the (last) patch that touches it, subjects and explanations stay as they are. Files
that no patch touches yet go to the patch named by ``--into``. Nothing is written unless the new series
applied to the pinned source package gives exactly this tree. The hashes in UPSTREAM.toml are renewed with it.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from spikequant_gguf.errors import BuildError, InputError, SpikeQuantError

from . import unidiff
from .apply import ORIGINALS, STAMP, check_version
from .cache import open_cache
from .fetch import find_sdist
from .progress import SilentProgress, print_error
from .upstream import UPSTREAM_FILE, PatchSource, Upstream, load_upstream

_CONTEXT = 3
_BUILD_OUTPUT = (STAMP, f"{ORIGINALS}/", "llama_cpp/lib/", ".git/")


@dataclass
class _Patch:
    """A patch on its way to the series: its text before the first diff, and (before, after) of each file."""

    file: Path
    header: str
    files: dict[str, tuple[bytes | None, bytes]]


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
    upstream = load_upstream(upstream_file)
    source = source or PatchSource()
    check_version(tree, upstream)
    pristine = _read_sdist(find_sdist(open_cache(), upstream, sdist, SilentProgress()), upstream)
    edited = _changed_files(tree, pristine)
    prefix = f"{upstream.spike_folder}/"
    hooks = {path: content for path, content in edited.items() if not path.startswith(prefix)}
    patches = _assign(source, pristine, hooks, into)
    outputs = {patch.file: _format(patch) for patch in patches if patch.files}
    _check(outputs, pristine, hooks)
    dropped = [patch.file for patch in patches if not patch.files]

    spike = source.root / "spike"
    outputs |= {
        spike / path.removeprefix(prefix): content
        for path, content in edited.items()
        if path.startswith(prefix)
    }
    dropped += [path for name, path in source.spike_files().items() if prefix + name not in edited]
    outputs[upstream_file] = _with_hashes(
        upstream_file, {path: pristine[path] for path in hooks if path in pristine}
    )
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
    """Write the hashes of the files that the series changes, after patches were edited by hand."""
    upstream = load_upstream(upstream_file)
    pristine = _read_sdist(find_sdist(open_cache(), upstream, sdist, SilentProgress()), upstream)
    touched = {
        change.path
        for patch in (source or PatchSource()).patches()
        for change in unidiff.parse(patch.read_bytes(), patch.name)
    }
    content = _with_hashes(upstream_file, {path: pristine[path] for path in touched if path in pristine})
    if upstream_file.read_bytes() == content:
        return []
    upstream_file.write_bytes(content)
    return [upstream_file]


def _read_sdist(sdist: Path, upstream: Upstream) -> dict[str, bytes]:
    top = upstream.sdist.removesuffix(".tar.gz") + "/"
    with tarfile.open(sdist) as archive:
        return {
            member.name.removeprefix(top): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile()
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


def _format(patch: _Patch) -> bytes:
    parts = [patch.header.encode()]
    for path, (before, after) in patch.files.items():
        parts.append(f"diff --git a/{path} b/{path}\n".encode())
        if before is None:
            parts.append(b"new file mode 100644\n")
        parts.append(f"--- {f'a/{path}' if before is not None else '/dev/null'}\n+++ b/{path}\n".encode())
        parts += _hunks(unidiff.split_lines(before or b""), unidiff.split_lines(after))
    return b"".join(parts)


def _hunks(before: list[bytes], after: list[bytes]) -> list[bytes]:
    """Unified diff without its two header lines."""
    lines = []
    for group in difflib.SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(_CONTEXT):
        first, last = group[0], group[-1]
        old, new = _range(first[1], last[2]), _range(first[3], last[4])
        lines.append(f"@@ -{old} +{new} @@\n".encode())
        for kind, i1, i2, j1, j2 in group:
            if kind == "equal":
                lines += [_line(b" ", line) for line in before[i1:i2]]
            else:
                lines += [_line(b"-", line) for line in before[i1:i2]]
                lines += [_line(b"+", line) for line in after[j1:j2]]
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


def _with_hashes(upstream_file: Path, files: dict[str, bytes]) -> bytes:
    """UPSTREAM.toml with a new [files] table, which is its last one."""
    text = upstream_file.read_text(encoding="utf-8")
    head, marker, _ = text.partition("\n[files]\n")
    if not marker:
        raise InputError(f"{upstream_file} has no [files] table", "add one at its end")
    rows = [
        f'"{path}" = "{hashlib.sha256(content).hexdigest()}"\n' for path, content in sorted(files.items())
    ]
    return (head + marker + "".join(rows)).encode()


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
