"""The program itself: what all commands share, and the list of commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from ..console import remember_command
from . import energy, evaluate, files, report, setup, sweep

__all__ = ["app", "main"]

app = typer.Typer(
    name="spikequant",
    help="4-bit GGUF models whose linear layers are integrate-and-fire neurons: exact, additions only.",
    epilog="Start with `spikequant build`, then `spikequant demo`. Every command has --help with examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spikequant {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


for _module in (setup, files, evaluate, energy, sweep, report):
    _module.add_commands(app)


def main() -> None:
    """Entry point of the `spikequant` program."""
    remember_command("spikequant", sys.argv[1:])
    app()
