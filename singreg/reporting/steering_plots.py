"""A steering report's pictures: source x target heat maps, and curves with the natural percentiles marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from singreg.analysis.old_steering.curves import BUDGETS
from singreg.analysis.old_steering.results import Matrix, SteeringCurve, SteerReport
from singreg.reporting.plots import drawable, save_figure

COLOURS = {"fitted": "#2563eb", "auditor": "#d97706", "mlp3": "#059669", "mlp4": "#9333ea", "residual": "#dc2626"}
STYLES = {"fitted": "--", "auditor": "-"}
CLASSES_SHOWN = 60
NUMBERS_UP_TO = 20
NAME_LENGTH = 22
PAGE_WIDTH = 12.0  # inches: a report shows that at four fifths of its size
FIGURES_DRAWN = {"success": (100.0, "target outranks all classes, %"), "AS": (1.0, "AS towards the target, °")}
PANELS = {
    "step": "relative step, along the gradient",
    "radius": "Mahalanobis radius, along the gradient",
    "on-manifold": "Mahalanobis radius, on-manifold direction",
}


def save_steering_plots(report: SteerReport, folder: Path) -> dict[str, Path]:
    """Draw every plot of a steering report to the path `folder`; returns the path by plot name."""
    drawings: dict[str, Callable[[SteerReport], Figure]] = {"curves": draw_curves, "pairs": draw_pairs}
    paths = {}
    for name, draw in drawings.items():
        paths[name] = folder / f"{name}.png"
        save_figure(draw(report), paths[name])
    return paths


def draw_pairs(report: SteerReport) -> Figure:
    """Heat maps, sources down and targets across: |AS| in degrees at the wanted IS by each judge, and success by the auditor."""
    read = {(p.attacker, p.judge): p for p in report.pairs}
    at = f"at IS {report.image_score:g}°"
    panels = [
        (f"|AS| towards the target °, {at},\nthe fitted translator reads its own", read["fitted", "fitted"].matrices["AS_abs"], 1.0),
        (f"|AS| towards the target °, {at},\nthe auditor reads", read["fitted", "auditor"].matrices["AS_abs"], 1.0),
        (f"success %, {at},\nthe auditor reads", read["fitted", "auditor"].matrices["success"], 100.0),
    ]
    rows, columns = min(len(report.sources), CLASSES_SHOWN), min(len(report.targets), CLASSES_SHOWN)
    figure, axes = heat_panels(len(panels), rows, columns)
    angles = [value for _, matrix, _ in panels[:2] for row in matrix for value in row if value is not None]
    reach = (min(angles), max(angles)) if angles else (0.0, 1.0)  # the same for both, not from 0: they differ by a few degrees
    for panel, (title, matrix, factor) in zip(axes, panels, strict=True):
        heat_map(panel, report.sources, report.targets, matrix, factor, (0.0, 100.0) if factor > 1 else reach)
        panel.set_title(title, fontsize=10)
    shown = "" if (rows, columns) == (len(report.sources), len(report.targets)) else f"; the first {rows} × {columns} are drawn"
    figure.suptitle(f"steered from (down) to (across); empty: not steered, or out of reach{shown}", fontsize=9)
    return figure


def heat_panels(count: int, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Side by side while that is no wider than a page, else one below the other, so that numbers stay large enough to read."""
    numbered = max(rows, columns) <= NUMBERS_UP_TO
    width, height = max(3.2, (0.42 if numbered else 0.16) * columns + 1.6), max(1.8, (0.3 if numbered else 0.16) * rows) + 1.9
    beside = count * width <= PAGE_WIDTH
    figure = Figure(figsize=(count * width, height) if beside else (max(width, 6.0), count * height), layout="constrained")
    return figure, list(figure.subplots(1 if beside else count, count if beside else 1, squeeze=False).flat)


def heat_map(
    axes: Axes, sources: Sequence[str], targets: Sequence[str], matrix: Matrix, factor: float, reach: tuple[float, float]
) -> None:
    """Draw a source x target matrix (S, K), None where nothing was steered, times a factor, coloured over `reach`."""
    values = np.array([[np.nan if v is None else factor * v for v in row] for row in matrix], dtype=float)
    values = values[:CLASSES_SHOWN, :CLASSES_SHOWN]
    image = axes.imshow(values, cmap="cividis", vmin=reach[0], vmax=max(reach[1], reach[0] + 1e-6), aspect="auto")
    dark = reach[0] + 0.6 * (reach[1] - reach[0])
    axes.set_facecolor("#f3f4f6")
    across, down = ([drawable(name, NAME_LENGTH) for name in names[:CLASSES_SHOWN]] for names in (targets, sources))
    axes.set_xticks(range(values.shape[1]), across, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(values.shape[0]), down, fontsize=8)
    if max(values.shape) <= NUMBERS_UP_TO:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if value < dark else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)


def draw_curves(report: SteerReport) -> Figure:
    """Success and AS against every budget, by attacker (colour) and judge (line), with 95 % bands and natural percentiles."""
    figure = Figure(figsize=(PAGE_WIDTH, 7.0), layout="constrained")
    panels = figure.subplots(2, len(BUDGETS), sharey="row", sharex="col", squeeze=False)
    for column, budget in enumerate(BUDGETS):
        curves = [curve for curve in report.curves if curve.budget == budget]
        for row, (name, (factor, label)) in enumerate(FIGURES_DRAWN.items()):
            axes = panels[row, column]
            _draw_lines(axes, curves, name, factor)
            _style(axes, PANELS[budget] if row == 0 else "", label if column == 0 else "")
            if budget != "step":
                _mark_natural(axes, report.natural.marks, named=row == 0)
        if budget == "step":
            panels[0, column].legend(fontsize=8, loc="upper left")
        panels[1, column].set_xlabel("ε / |f|" if budget == "step" else "radius of the null component / natural median")
    reach = f"{len(report.sources)} sources, {len(report.targets)} targets, {report.pairs[0].overall['images']:.0f} pictures"
    figure.suptitle(f"steering at equal effort: {reach}; bands: 95 % over classes and pictures; one step, so a lower bound", fontsize=9)
    return figure


def _draw_lines(axes: Axes, curves: Sequence[SteeringCurve], name: str, factor: float) -> None:
    for curve in curves:
        colour = COLOURS.get(curve.attacker, "#6b7280")
        values = factor * np.array(curve.figures[name])
        band = factor * np.array(curve.intervals[name])
        label = f"{curve.attacker} attacks, {curve.judge} judges"
        axes.plot(curve.grid, values, color=colour, linestyle=STYLES.get(curve.judge, ":"), marker="o", markersize=3, label=label)
        axes.fill_between(curve.grid, band[:, 0], band[:, 1], color=colour, alpha=0.15, linewidth=0)


def _mark_natural(axes: Axes, marks: dict[str, float], *, named: bool) -> None:
    for place, (name, value) in enumerate(marks.items()):
        axes.axvline(value, color="#6b7280", linewidth=0.9, linestyle=(0, (2, 2)))
        if named:
            height = 0.02 + 0.05 * place  # one above the other: the percentiles lie close together; the curves are higher up there
            axes.text(
                value, height, f" {name} of natural", transform=axes.get_xaxis_transform(), fontsize=8, va="bottom", color="#374151",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, zorder=5,
            )  # fmt: skip


def _style(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
