"""Says whether the patch series fits another llama-cpp-python, and which hunk does not.

    python -m spikequant_gguf.ggml_patch.canary 0.3.35 0.3.34        # releases, downloaded through pip
    python -m spikequant_gguf.ggml_patch.canary PACKAGE.tar.gz ...   # source packages, or unpacked ones
    python -m spikequant_gguf.ggml_patch.canary --write TREE         # and patches a folder, to compile it

To be run against each new release, before the pin moves. Exit status 1 if a hunk does not fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from spikequant_gguf.errors import InputError, SpikeQuantError

from . import unidiff
from .apply import read_version
from .progress import print_error
from .upstream import PatchSource, Upstream, load_upstream

__all__ = ["CanaryReport", "HunkOutcome", "check_series"]


@dataclass(frozen=True)
class HunkOutcome:
    """Where one hunk of the series belongs in another source package.

    Attributes:
        patch: file name of the patch.
        path: of the file that it changes.
        line: first line of the hunk in the pinned file, from 1.
        moved: how many lines further down it was found; None if it does not fit.
        reason: why it does not fit, or "".
        text: the first line that it changes, for those who have to find its place.
    """

    patch: str
    path: str
    line: int
    moved: int | None
    reason: str
    text: str

    @property
    def fits(self) -> bool:
        return self.moved is not None

    def line_of_text(self) -> str:
        """One line for a listing."""
        place = f"{self.patch}: {self.path}, line {self.line}"
        if not self.fits:
            return f"FAILS  {place}: {self.reason}: {self.text}"
        return f"fits   {place}" + (f" ({self.moved:+d} lines)" if self.moved else "")


@dataclass(frozen=True)
class CanaryReport:
    """What became of every hunk.

    Attributes:
        version: of the llama-cpp-python that was looked at.
        hunks: in the order of the series.
    """

    version: str
    hunks: tuple[HunkOutcome, ...]

    @property
    def ok(self) -> bool:
        return all(hunk.fits for hunk in self.hunks)


def check_series(
    read: Callable[[str], bytes | None],
    upstream: Upstream | None = None,
    source: PatchSource | None = None,
) -> tuple[CanaryReport, dict[str, bytes]]:
    """Tries each hunk of the series; those that do not fit are left out.

    Args:
        read: content of a file of the package by its path there; None if there is no such file.
        upstream, source: pin and patch; None for those of this package.

    Returns:
        The report, and the content of each changed file as far as its hunks fit, spike/ included.

    Raises:
        InputError: it is no llama-cpp-python.
    """
    upstream, source = upstream or load_upstream(), source or PatchSource()
    version = read_version(read("llama_cpp/__init__.py") or b"")
    if version is None:
        raise InputError(
            "this is no source package of llama-cpp-python", "give its version, its .tar.gz or its folder"
        )
    outcomes: list[HunkOutcome] = []
    contents: dict[str, bytes] = {}
    for patch in source.patches():
        for change in unidiff.parse(patch.read_bytes(), patch.name):
            content = contents.get(change.path) or read(change.path)
            outcomes += _outcomes(patch.name, change, content)
            if content is not None or change.creates:
                contents[change.path] = unidiff.apply_fitting(content or b"", change)
    for name, file in source.spike_files().items():
        contents[f"{upstream.spike_folder}/{name}"] = file.read_bytes()
    return CanaryReport(version, tuple(outcomes)), contents


def _outcomes(patch: str, change: unidiff.FilePatch, content: bytes | None) -> Iterable[HunkOutcome]:
    missing = content is None and not change.creates
    places = unidiff.place_hunks(unidiff.split_lines(content or b""), change)
    for hunk, place in zip(change.hunks, places, strict=True):
        fits = place is not None and not missing
        reason = (
            "" if fits else "there is no such file" if missing else "its lines are not there, or not once"
        )
        changed = next((line for line in hunk.new if line not in hunk.old), b"")
        yield HunkOutcome(
            patch,
            change.path,
            hunk.start,
            place - max(hunk.start - 1, 0) if fits else None,
            reason,
            changed.decode("utf-8", "replace").strip(),
        )


# ---- where packages come from


def _reader(package: Path) -> Callable[[str], bytes | None]:
    """Reads files of an unpacked tree, or of an archive."""
    if package.is_dir():
        return lambda name: (package / name).read_bytes() if (package / name).is_file() else None
    if not package.is_file():
        raise InputError(f"there is no {package}", "give a version, a source package or its folder")
    top = package.name.removesuffix(".tar.gz")
    archive = tarfile.open(package)  # noqa: SIM115, read until the program ends

    def read(name: str) -> bytes | None:
        try:
            member = archive.extractfile(f"{top}/{name}")
        except KeyError:
            return None
        return member.read() if member is not None else None

    return read


def _download(version: str, folder: Path) -> Path:
    """The source package of a release, by pip."""
    project = load_upstream().project
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", project]
    result = subprocess.run(
        [*command, "--dest", str(folder), f"{project}=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(folder.glob(f"*-{version}.tar.gz"))
    if not found:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [
            "pip said nothing"
        ]
        raise InputError(
            f"{project} {version} cannot be downloaded: {lines[-1]}", "check version and network"
        )
    return found[0]


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m spikequant_gguf.ggml_patch.canary",
        description="Try the patch series on other llama-cpp-python packages, hunk by hunk.",
    )
    parser.add_argument("packages", nargs="+", help="versions, source packages, or folders of unpacked ones")
    parser.add_argument("--all", action="store_true", help="list the hunks that fit, too")
    parser.add_argument("--write", action="store_true", help="patch the given folders as far as hunks fit")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    reports = []
    try:
        with tempfile.TemporaryDirectory(prefix="spikequant-") as folder:
            for given in options.packages:
                path = Path(given)
                is_version = given[:1].isdigit() and not path.exists()
                path = _download(given, Path(folder)) if is_version else path
                report, contents = check_series(_reader(path))
                reports.append(report)
                if options.write and path.is_dir():
                    _write(path, contents)
    except SpikeQuantError as error:
        return print_error(error)
    if options.json:
        print(json.dumps([asdict(report) | {"ok": report.ok} for report in reports], indent=1))
    for report in () if options.json else reports:
        fitting = sum(hunk.fits for hunk in report.hunks)
        print(f"llama-cpp-python {report.version}: {fitting} of {len(report.hunks)} hunks fit")
        shown = [hunk for hunk in report.hunks if options.all or not hunk.fits]
        print("".join(f"  {hunk.line_of_text()}\n" for hunk in shown), end="")
    return 0 if all(report.ok for report in reports) else 1


def _write(tree: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
