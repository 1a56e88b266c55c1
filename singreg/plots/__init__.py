"""What all plots share: figures without pyplot's global state, and names that can be drawn."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from singreg import report
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


def arrows(axes: Axes, moved: Sequence[Mapping[Any, Any]], name_length: int) -> None:
    """Draw an arrow from the angle before to that after for every concept: red where it went away, blue if closer."""
    for place, row in enumerate(moved):
        colour = RED if row["AS"] < 0 else BLUE
        axes.plot(row["before"], place, "o", markersize=4.5, markerfacecolor="white", markeredgecolor=colour, zorder=3)
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 2.5, "shrinkB": 0}
        axes.annotate("", (row["after"], place), (row["before"], place), arrowprops=arrow)
    axes.set_yticks(range(len(moved)), [drawable(row["concept"], name_length) for row in moved], fontsize=8)
    axes.set_ylim(len(moved) - 0.4, -0.6)
    ends = [row[side] for row in moved for side in ("before", "after")] or [0.0, 1.0]
    room = 0.08 * max(max(ends) - min(ends), 0.5)
    axes.set_xlim(min(ends) - room, max(ends) + room)


def band(axes: Axes, curve: Mapping[str, Any], figure: str, factor: float = 100.0, **look: Any) -> None:
    """Draw a figure of a curve of `measure_curves` over its grid, with the band of its interval."""
    values, ends = (factor * np.array(curve[kind][figure], float) for kind in ("figures", "intervals"))
    axes.plot(curve["grid"], values, marker="o", markersize=3, **look)
    axes.fill_between(curve["grid"], *ends.T, color=look["color"], alpha=0.13, linewidth=0)


def save(figure: Figure, path: Path, caption: str) -> report.Figure:
    """Write a figure as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return report.Figure(path, caption)


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
