"""Commands about the installation: build, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from ..ggml_patch.upstream import load_releases, load_upstream
from .common import command, examples

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(
        epilog=examples(
            "spikequant build",
            "spikequant build --wheel dist   # a wheel for machines without a compiler",
            "spikequant build --sdist llama_cpp_python-0.3.36.tar.gz   # without network",
            "spikequant build --release 0.3.35   # an older llama-cpp-python",
        )
    )(build)
    app.command(epilog=examples("spikequant doctor", "spikequant doctor --json > report.json"))(doctor)


@command
def build(
    console: Console,
    release: Annotated[
        str | None,
        typer.Option(
            "--release",
            metavar="VERSION",
            help="Build another llama-cpp-python that the patch is made for: "
            f"{' or '.join(upstream.version for upstream in load_releases()[1:])}.",
            show_default=load_upstream().version,
        ),
    ] = None,
    portable: Annotated[
        bool,
        typer.Option(
            "--portable", help="Use no instructions newer than AVX2, so that it runs on other CPUs."
        ),
    ] = False,
    unpatched: Annotated[
        bool,
        typer.Option("--unpatched", help="Make the unpatched library, for comparisons; it is not installed."),
    ] = False,
    wheel: Annotated[
        Path | None,
        typer.Option(
            "--wheel",
            metavar="FOLDER",
            help="Put a portable wheel there, to install on other machines; nothing is installed here.",
            show_default=False,
        ),
    ] = None,
    sdist: Annotated[
        Path | None, typer.Option("--sdist", help="Source package got by hand.", show_default="downloaded")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Compile jobs at once.", show_default="CPUs")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again from a fresh tree.")] = False,
) -> None:
    """Build the patched llama-cpp-python and install it into this environment.

    Downloads the pinned source package (77 MB) through pip, checks it, applies the patch and compiles, which
    takes some minutes once; later calls find the result in the cache.
    """
    from ..ggml_patch.build import build as run
    from .tables import show_build

    with console.progress() as progress:
        report = run(
            release=release,
            portable=portable,
            unpatched=unpatched,
            wheel=wheel,
            sdist=sdist,
            jobs=jobs,
            force=force,
            progress=progress,
        )
    console.result(report.to_json, lambda out: show_build(out, report))


@command
def doctor(console: Console) -> None:
    """Show what is installed, whether it fits together, and what to do if not. Exit status 1 if not."""
    from ..doctor import doctor as run
    from .tables import show_doctor

    report = run()
    console.result(report.to_json, lambda out: show_doctor(out, report))
    if not report.ok:
        raise typer.Exit(1)
