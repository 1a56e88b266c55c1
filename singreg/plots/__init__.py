"""What all plots share: figures without pyplot's global state, and names that can be drawn."""

from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from singreg.utils import atomic_write

GREY, BLUE, ORANGE, RED = "#6b7280", "#2563eb", "#d97706", "#c2410c"
CYCLE = (BLUE, ORANGE, "#059669", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d")


def panels(columns: int = 1, rows: int = 1, *, width: float = 4.2, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes row by row, each panel `width` x `height` inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def styled(axes: Axes, title: str = "") -> Axes:
    """Give axes a title, a light grid and no frame at the top and right."""
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def show(axes: Axes, pixels: np.ndarray, title: str, below: str = "") -> None:
    """Draw an image with words above and below it."""
    axes.imshow(pixels)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=7, pad=2)
    axes.set_xlabel(below, fontsize=7)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and return its path."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def drawable(name: str, limit: int = 40) -> str:
    """Return a name as text in a figure: one line of at most `limit` characters, no formula, nothing unprintable.

    A letter that the figures' font does not have is written as its number, so that two such names stay two.
    """
    letters = "".join(x if ord(x) in _glyphs() else ascii(x)[1:-1] for x in " ".join(name.split()))
    return (letters if len(letters) <= limit else letters[: limit - 1] + "…").replace("$", "\\$")


@cache
def _glyphs() -> frozenset[int]:
    """The code points that the figures' font has a glyph for."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
