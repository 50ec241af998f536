"""A neuron's trace as a picture or a page of its own."""

from __future__ import annotations

import html
from pathlib import Path

from .errors import InputError
from .files import atomic_path, check_writable
from .neuron import NeuronTrace

__all__ = ["SUFFIXES", "check_picture_path", "write_neuron"]

SUFFIXES = (".png", ".svg", ".html")
_WIDTH = 7.0  # inches

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
body {{ margin: 0 auto; max-width: 900px; padding: 16px; color: #1f2933; }}
body {{ font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
svg {{ display: block; width: 100%; height: auto; }}
p {{ overflow-wrap: anywhere; color: #5b6672; font-size: .85rem; margin: 4px 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
{svg}
{origin}
</body>
</html>
"""


def check_picture_path(path: Path, force: bool) -> None:
    """Raises InputError for another kind of file, OutputError if it is there already."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{path} is of no kind of picture", f"give a name that ends in {', '.join(SUFFIXES)}"
        )
    check_writable(path, force)


def write_neuron(trace: NeuronTrace, path: Path) -> None:
    """Write PNG, SVG or HTML, by the suffix. Raises OutputError, and UnsupportedError without matplotlib."""
    from .report.spikes import neuron_picture

    picture = neuron_picture(trace, _WIDTH)
    content: bytes | str
    if path.suffix.lower() == ".png":
        content = picture.png
    elif path.suffix.lower() == ".svg":
        content = picture.svg
    else:
        lines = "\n".join(
            f"<p><b>{html.escape(what)}</b> {html.escape(value)}</p>"
            for what, value in picture.origin.lines()
        )
        svg = picture.svg[picture.svg.index("<svg") :]
        content = _PAGE.format(title=html.escape(picture.title), svg=svg, origin=lines)
    with atomic_path(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())
