"""How figures look, and how they become pictures."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UnsupportedError
from .documents import Origin

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ModuleNotFoundError as _error:
    raise UnsupportedError(
        "pictures need matplotlib, which is not installed", "pip install 'spikequant-gguf[report]'"
    ) from _error

__all__ = [
    "COLOURS",
    "MINUS",
    "PLUS",
    "Axes",
    "Canvas",
    "FuncFormatter",
    "LogLocator",
    "NullFormatter",
    "Picture",
    "colour",
    "plain",
    "render",
]

WIDTH = 4.4  # inches: as wide as a phone, so that letters need no magnifying glass there
_NOTES = ("Creator", "Date", "Format", "Type")  # what matplotlib would write into SVG
_INK, _GREY, _GRID = "#1f2933", "#6b7785", "#e4e8ec"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "spikequant",
}
COLOURS = {
    "spk4": "#d1495b",
    "q4_0": "#30638e",
    "q4_k": "#00798c",
    "q4_k_m": "#00798c",
    "iq4_xs": "#7a9e7e",
    "iq4_nl": "#7a9e7e",
    "q8_0": "#b08ea2",
    "f16": "#6b7785",
    "fp16_mac": "#3d4852",
    "w4a4": "#edae49",
    "rate": "#9c6ade",
    "spikellm": "#c77dff",
}
PLUS, MINUS = "#d1495b", "#30638e"  # excitatory, inhibitory
_OTHERS = ("#8d6e63", "#5c6bc0", "#26a69a", "#ef6c00", "#546e7a")


@dataclass(frozen=True)
class Picture:
    """One figure of the page.

    Attributes:
        name: for files and links.
        title: above it.
        alt: what it shows, in a sentence.
        origin: what it depends on.
        svg, png: the picture itself; the PNG carries its origin below.
    """

    name: str
    title: str
    alt: str
    origin: Origin
    svg: str
    png: bytes


def colour(kind: str, place: int = 0) -> str:
    """Of a type or system; `place` chooses among the others."""
    return COLOURS.get(kind.lower(), _OTHERS[place % len(_OTHERS)])


def plain(axes: Axes, x: str, y: str) -> None:
    """Names of the axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def render(
    name: str,
    title: str,
    alt: str,
    origin: Origin,
    draw: Callable[[Canvas], None],
    height: float = 3.0,
    width: float = WIDTH,
) -> Picture:
    """A picture by a function that draws on an empty canvas."""
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        draw(canvas)
        svg = io.BytesIO()
        canvas.savefig(svg, format="svg", metadata=dict.fromkeys(_NOTES))
        note = "\n".join(
            textwrap.fill(f"{what}: {value}", round(23 * width), subsequent_indent="    ")
            for what, value in origin.lines()
        )
        lines = note.count("\n") + 1
        canvas.set_figheight(height + 0.3 + 0.115 * lines)
        canvas.suptitle(title, fontsize=10, fontweight="bold", x=0.02, ha="left")
        canvas.supxlabel(note, fontsize=6, color=_GREY, x=0.02, ha="left")
        png = io.BytesIO()
        canvas.savefig(png, format="png", dpi=160, metadata={"Description": note})
    return Picture(name, title, alt, origin, svg.getvalue().decode(), png.getvalue())
