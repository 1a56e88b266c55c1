"""What all plots share: figures without pyplot's global state, drawable names, labels that do not overprint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.transforms import Bbox

from singreg.utils import atomic_write

GREY, BLUE, ORANGE, RED = "#6b7280", "#2563eb", "#d97706", "#c2410c"
CYCLE = (BLUE, ORANGE, "#059669", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d")
HEIGHTS = (0, 9, -9, 18, -18, 27, -27)
PLACES = [place for dy in HEIGHTS for place in ((6, dy, "left"), (-6, dy, "right"))]  # in the order they are tried


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


def label_points(axes: Axes, x: Sequence[float], y: Sequence[float], names: Sequence[str]) -> None:
    """Write a name beside each point, on the side where it lies on no other label; call it when the limits are set."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    points = axes.transData.transform(np.column_stack([x, y]))
    taken = [Bbox.from_bounds(px - 4, py - 4, 8, 8) for px, py in points]
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "va": "center"}
    for place, name in enumerate(names):
        text, others, hits = (
            axes.annotate(drawable(name), (x[place], y[place]), (0, 0), **style),
            taken.copy(),
            list[int](),
        )
        del others[place]
        for dx, dy, side in PLACES:
            text.set(position=(dx, dy), ha=side)
            box = text.get_window_extent()
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            hits.append(sum(map(box.overlaps, others)) + (not inside))
        dx, dy, side = PLACES[int(np.argmin(hits))]
        text.set(position=(dx, dy), ha=side)
        taken.append(text.get_window_extent())
