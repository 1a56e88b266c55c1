"""Figures of steering: source x target heat maps, curves at equal effort, drawn embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from singreg import report
from singreg.analysis.steering_curves import natural_marks
from singreg.plots import CYCLE, GREY, drawable, panels, save, styled

CLASSES_SHOWN, NUMBERS_UP_TO, NAME_LENGTH = 60, 20, 22
PAGE_WIDTH = 12.0  # inches: a report shows that at four fifths of its size
FIGURES = {"success": (100.0, "target outranks all classes, %"), "AS": (1.0, "AS towards the target, °")}
BUDGETS = {
    "step": ("relative step, along the gradient", "ε / |f|"),
    "radius": ("radius, along the gradient", "Mahalanobis radius / natural median"),
    "on-manifold": ("radius, on-manifold direction", "Mahalanobis radius / natural median"),
}
STYLES = {"fitted": "--", "auditor": "-"}


def plot_steering(found: Mapping[str, Any], folder: Path) -> dict[str, report.Figure]:
    """Draw the figures of recipes/steer.py below a folder."""
    names, degrees = (found["sources"], found["targets"]), found["image_score"]
    curves = draw_curves(found["curves"], natural_marks(found["natural"]), folder / "curves.png")
    pairs = draw_pairs(found["pairs"], names, degrees, folder / "pairs.png")
    said = "success and AS against every budget; bands: 95 % over classes and images; one step, so a lower bound"
    return {
        "curves": report.Figure(curves, said),
        "pairs": report.Figure(pairs, f"every source and target at an image score of {degrees:g}°"),
    }


PairNames = tuple[Sequence[str], Sequence[str]]
"""Names of the sources and of the targets."""


def draw_pairs(pairs: Sequence[Mapping[str, Any]], names: PairNames, degrees: float, path: Path) -> Path:
    """Draw heat maps, sources down and targets across: |AS| by the fitted translator and the auditor, and success.

    Args:
        pairs: what `steer_pairs` returns.
    """
    read = {(p["attacker"], p["judge"]): p["matrices"] for p in pairs}
    own, audited = read["fitted", "fitted"], read["fitted", "auditor"]
    at, shown = f"at an image score of {degrees:g}°", slice(CLASSES_SHOWN)
    angles = [np.array(matrices["AS_abs"], dtype=float)[shown, shown] for matrices in (own, audited)]
    success = 100 * np.array(audited["success"], dtype=float)[shown, shown]
    both = np.concatenate(angles)  # one scale of colours, not from 0: they differ by a few degrees
    maps = [
        (f"|AS| ° {at},\nthe fitted translator reads its own", angles[0], both),
        (f"|AS| ° {at},\nthe auditor reads", angles[1], both),
        (f"success % {at},\nthe auditor reads", success, np.array([0.0, 100.0])),
    ]
    rows, columns = success.shape
    # Side by side while that is no wider than a page, else one below the other: numbers must stay large enough to read.
    numbered = max(rows, columns) <= NUMBERS_UP_TO
    width = max(3.6, (0.42 if numbered else 0.16) * columns + 1.6)
    height = max(1.8, (0.3 if numbered else 0.16) * rows) + 1.9
    beside = len(maps) * width <= PAGE_WIDTH
    figure, axes = panels(len(maps) if beside else 1, 1 if beside else len(maps), width=width, height=height)
    for panel, (title, values, scale) in zip(axes, maps, strict=True):
        _heat_map(panel, values, names, scale[np.isfinite(scale)])
        panel.set_title(title, fontsize=10)
    left_out = "" if (rows, columns) == (len(names[0]), len(names[1])) else f"; the first {rows} × {columns} are drawn"
    figure.suptitle(f"steered from (down) to (across); empty: not steered, or out of reach{left_out}", fontsize=9)
    return save(figure, path)


def _heat_map(axes: Axes, values: np.ndarray, names: PairNames, scale: np.ndarray) -> None:
    low, high = (float(scale.min()), float(scale.max())) if len(scale) else (0.0, 1.0)
    image = axes.imshow(values, cmap="cividis", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
    axes.set_facecolor("#f3f4f6")
    down, across = ([drawable(name, NAME_LENGTH) for name in some[:CLASSES_SHOWN]] for some in names)
    axes.set_xticks(range(len(across)), across, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(down)), down, fontsize=8)
    if max(values.shape) <= NUMBERS_UP_TO:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if value < low + 0.6 * (high - low) else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)


def draw_curves(curves: Sequence[Mapping[str, Any]], marks: Mapping[str, float], path: Path) -> Path:
    """Draw success and AS against every budget, by attacker (colour) and judge (line), with 95 % bands.

    Args:
        curves: what `steer_curves` returns.
        marks: natural percentiles among the radii, drawn upright.
    """
    figure, axes = panels(len(BUDGETS), len(FIGURES), width=PAGE_WIDTH / 3, height=3.6)
    attackers = list(dict.fromkeys(curve["attacker"] for curve in curves))
    for column, (budget, (name, unit)) in enumerate(BUDGETS.items()):
        for row, (figure_name, (factor, label)) in enumerate(FIGURES.items()):
            panel = styled(axes[row * len(BUDGETS) + column])
            if column:
                panel.sharey(axes[row * len(BUDGETS)])
            panel.set_title(name if row == 0 else "", fontsize=10, pad=26)  # above the names of the percentiles
            for curve in (curve for curve in curves if curve["budget"] == budget):
                values, band = (factor * np.array(curve[kind][figure_name]) for kind in ("figures", "intervals"))
                colour = CYCLE[attackers.index(curve["attacker"]) % len(CYCLE)]
                look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3}
                said = f"{curve['attacker']} attacks, {curve['judge']} judges" if (row, column) == (0, 0) else None
                panel.plot(curve["grid"], values, **look, linestyle=STYLES.get(curve["judge"], ":"), label=said)
                panel.fill_between(curve["grid"], *band.T, color=colour, alpha=0.13, linewidth=0)
            panel.set_ylabel(label if column == 0 else "")
            panel.set_xlabel(unit if row else "")
            if budget != "step":
                _mark(panel, marks)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return save(figure, path)


def _mark(axes: Axes, marks: Mapping[str, float]) -> None:
    """Upright lines at the natural percentiles, named above the panel, where no curve is."""
    where = axes.get_xaxis_transform()
    for name, value in marks.items():
        axes.axvline(value, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        axes.text(value, 1.01, name, transform=where, fontsize=7, rotation=45, va="bottom")


def draw_sheet(columns: Mapping[str, np.ndarray], captions: Iterable[str], path: Path) -> Path:
    """Draw a sheet with a row for every image and a column for every kind of drawing, (N, H, W, 3) in [0, 1] each."""
    captions = list(captions)
    figure = Figure(figsize=(2.2 * len(columns), 2.35 * len(captions) + 0.4), layout="constrained")
    axes = figure.subplots(len(captions), len(columns), squeeze=False)
    for place, (title, drawn) in enumerate(columns.items()):
        for row, caption in enumerate(captions):
            axes[row, place].imshow(drawn[row].clip(0, 1))
            axes[row, place].set(xticks=[], yticks=[], title=title if row == 0 else "")
            if place == 0:
                axes[row, place].set_ylabel(drawable(caption), fontsize=8)
    return save(figure, path)
