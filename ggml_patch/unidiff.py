"""Unified diffs, applied strictly: line numbers may be off, content may not.

No `patch` or `git` program is needed. A hunk applies where all of its old lines are found: at the stated
line, or else in exactly one place below the hunk before it. Where they are found more than once, the heading
behind the hunk's line numbers (the function that it belongs to, as git and `diff -p` write it) decides.
Anything else is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from spikequant_gguf.errors import BuildError

_HUNK = re.compile(rb"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(?: (.*))?")
_HEADING = re.compile(rb"[A-Za-z_$]")
_HEADING_BYTES = 80  # what git keeps of a heading
_NO_NEWLINE = b"\\ No newline at end of file"
_UNSUPPORTED = (
    b"rename from ",
    b"rename to ",
    b"copy from ",
    b"GIT binary patch",
    b"Binary files ",
    b"deleted file",
)


@dataclass
class Hunk:
    """Lines (with their line ends) before and after; ``start`` is the 1-based first old line, 0 in a new
    file. ``heading``: see the function of that name; empty if the patch states none.
    """

    start: int
    heading: bytes = b""
    old: list[bytes] = field(default_factory=list)
    new: list[bytes] = field(default_factory=list)


@dataclass
class FilePatch:
    """All hunks of one file. ``path`` is relative to the tree; ``creates`` is true for a new file."""

    path: str
    creates: bool
    hunks: list[Hunk] = field(default_factory=list)


def parse(content: bytes, name: str) -> list[FilePatch]:
    """Parse a patch as `git format-patch` or `diff -u` write it; the text around the diffs is ignored.

    ``name`` is used in messages. Raises BuildError for anything that is not understood completely.
    """
    if b"\r\n" in content:
        raise BuildError(f"patch {name} has CRLF line ends", "check it out again with LF line ends")
    lines = split_lines(content)
    patches: list[FilePatch] = []
    at = 0
    in_diff = False
    while at < len(lines):
        line = lines[at]
        in_diff = in_diff or line.startswith(b"diff ")
        if in_diff and line.startswith(_UNSUPPORTED):
            raise _broken(name, at, "only changed and new text files are supported")
        if line.startswith(b"--- ") and at + 1 < len(lines) and lines[at + 1].startswith(b"+++ "):
            patches.append(_file_header(line, lines[at + 1], name, at))
            at += 2
        elif line.startswith(b"@@ "):
            if not patches:
                raise _broken(name, at, "a hunk stands before the name of its file")
            at = _read_hunk(lines, at, patches[-1], name)
        else:
            at += 1
    if not patches:
        raise BuildError(f"patch {name} changes nothing", "remove it from the series or write it again")
    for patch in patches:
        if not patch.hunks:
            raise BuildError(f"patch {name} has no hunk for {patch.path}", "write the patch again")
    return patches


def apply_hunks(content: bytes, patch: FilePatch, name: str) -> bytes:
    """``content`` of ``patch.path`` with all hunks applied. Raises BuildError naming patch, file and line."""
    for hunk, place in zip(patch.hunks, place_hunks(split_lines(content), patch), strict=True):
        if place is None:
            raise BuildError(
                f"patch {name} does not apply to {patch.path} at line {hunk.start}",
                "the tree is not the pinned source package, or the series must be regenerated",
            )
    return apply_fitting(content, patch)


def apply_fitting(content: bytes, patch: FilePatch) -> bytes:
    """``content`` of ``patch.path`` with the hunks that fit, without the others."""
    lines = split_lines(content)
    result: list[bytes] = []
    done = 0
    for hunk, place in zip(patch.hunks, place_hunks(lines, patch), strict=True):
        if place is not None:
            result += lines[done:place]
            result += hunk.new
            done = place + len(hunk.old)
    return b"".join(result + lines[done:])


def place_hunks(lines: list[bytes], patch: FilePatch) -> list[int | None]:
    """Index of the first old line of each hunk, None where it does not fit."""
    places: list[int | None] = []
    done = offset = 0
    for hunk in patch.hunks:
        place = _find(lines, hunk, done, offset)
        places.append(place)
        if place is not None:
            offset = place - max(hunk.start - 1, 0)
            done = place + len(hunk.old)
    return places


def split_lines(content: bytes) -> list[bytes]:
    """Split at LF only (bytes.splitlines would split at a lone CR, too), keeping the line ends."""
    return re.findall(rb"[^\n]*\n|[^\n]+", content)


def heading(lines: list[bytes], at: int) -> bytes:
    """The line above ``at`` that names its function, by git's default rule; empty if there is none."""
    for line in reversed(lines[:at]):
        if _HEADING.match(line):
            return line[:_HEADING_BYTES].rstrip()
    return b""


def _find(lines: list[bytes], hunk: Hunk, done: int, offset: int) -> int | None:
    """Index of the hunk's first old line, or None if it is nowhere or ambiguous."""
    size = len(hunk.old)
    if not size:  # without context only a new file's content has a certain place
        return None if lines else 0
    places = [at for at in range(done, len(lines) - size + 1) if lines[at : at + size] == hunk.old]
    if hunk.heading and len(places) > 1:
        places = [at for at in places if heading(lines, at) == hunk.heading]
    stated = hunk.start - 1 + offset
    if stated in places:
        return stated
    return places[0] if len(places) == 1 else None


def _file_header(old: bytes, new: bytes, name: str, at: int) -> FilePatch:
    before, after = (_path(line, name, at) for line in (old, new))
    if after is None or (before is not None and before != after):
        raise _broken(name, at, "only changed and new text files are supported")
    return FilePatch(after, creates=before is None)


def _path(line: bytes, name: str, at: int) -> str | None:
    text = line[4:].rstrip(b"\n").split(b"\t")[0].decode("utf-8", "surrogateescape")
    if text == "/dev/null":
        return None
    prefix, _, path = text.partition("/")
    parts = path.split("/")
    if prefix not in ("a", "b") or not path or ".." in parts or "" in parts:
        raise _broken(name, at, f"'{text}' is not a path below a/ or b/")
    return path


def _read_hunk(lines: list[bytes], at: int, patch: FilePatch, name: str) -> int:
    """Read the hunk whose header is ``lines[at]``; returns the index behind it."""
    header = _HUNK.match(lines[at])
    if header is None:
        raise _broken(name, at, "the hunk header is malformed")
    start, old_count, _, new_count = (1 if number is None else int(number) for number in header.groups()[:4])
    hunk = Hunk(start, (header.group(5) or b"").rstrip())
    first = at
    at += 1
    last: tuple[list[bytes], ...] = ()
    while len(hunk.old) < old_count or len(hunk.new) < new_count:
        if at == len(lines):
            raise _broken(name, first, "the hunk is cut short")
        line = lines[at]
        if line.startswith(_NO_NEWLINE) and last:
            _drop_newline(last)
            at += 1
            continue
        mark, body = line[:1], line[1:]
        if line == b"\n":  # an empty context line whose space an editor removed
            mark, body = b" ", line
        sides = {b" ": (hunk.old, hunk.new), b"-": (hunk.old,), b"+": (hunk.new,)}.get(mark)
        if sides is None:
            raise _broken(name, at, "the hunk is cut short")
        for side in sides:
            side.append(body)
        last = sides
        at += 1
    if at < len(lines) and lines[at].startswith(_NO_NEWLINE):
        _drop_newline(last)
        at += 1
    if len(hunk.old) != old_count or len(hunk.new) != new_count:
        raise _broken(name, first, "the hunk's line counts are wrong")
    patch.hunks.append(hunk)
    return at


def _drop_newline(sides: tuple[list[bytes], ...]) -> None:
    for side in sides:
        side[-1] = side[-1].rstrip(b"\n")


def _broken(name: str, at: int, why: str) -> BuildError:
    return BuildError(
        f"patch {name}, line {at + 1}: {why}", "write it again with regenerate.py or git format-patch"
    )
