"""Figures of steering: source x target heat maps and curves at equal effort."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from singreg import report
from singreg.analysis.steering_curves import natural_marks
from singreg.plots import CYCLE, GREY, band, drawable, panels, save, styled

CLASSES_SHOWN, NUMBERS_UP_TO, NAME_LENGTH = 60, 20, 22
PAGE_WIDTH = 12.0  # inches: a report shows that at four fifths of its size
FIGURES = {"success": (100.0, "target outranks all classes, %"), "AS": (1.0, "AS towards the target, °")}
BUDGETS = {
    "step": ("relative step", "ε / |f|"),
    "radius": ("radius", "Mahalanobis radius / natural median"),
}
STYLES = {"fitted": "--", "auditor": "-"}
Found = Mapping[str, Any]


def plot_steering(found: Found, folder: Path) -> dict[str, report.Figure]:
    """Draw the figures of recipes/steer.py below a folder."""
    return {"curves": _curves(found, folder / "curves.png"), "pairs": _pairs(found, folder / "pairs.png")}


def _pairs(found: Found, path: Path) -> report.Figure:
    """Heat maps, sources down and targets across: |AS| by the fitted translator and the auditor, and success."""
    read = {pair["judge"]: pair["matrices"] for pair in found["pairs"] if pair["attacker"] == "fitted"}
    at, shown = f"at an image score of {found['image_score']:g}°", slice(CLASSES_SHOWN)
    own, audited = (np.array(read[name]["AS_abs"], dtype=float)[shown, shown] for name in ("fitted", "auditor"))
    success = 100 * np.array(read["auditor"]["success"], dtype=float)[shown, shown]
    both = np.concatenate([own, audited])  # one scale of colours, not from 0: they differ by a few degrees
    maps = [
        (f"|AS| ° {at},\nthe fitted translator reads its own", own, both),
        (f"|AS| ° {at},\nthe auditor reads", audited, both),
        (f"success % {at},\nthe auditor reads", success, np.array([0.0, 100.0])),
    ]
    rows, columns = success.shape
    # Side by side while that is no wider than a page, else one below the other: numbers must stay large enough to read.
    numbered = max(rows, columns) <= NUMBERS_UP_TO
    width = max(3.6, (0.42 if numbered else 0.16) * columns + 1.6)
    height = max(1.8, (0.3 if numbered else 0.16) * rows) + 1.9
    across = len(maps) if len(maps) * width <= PAGE_WIDTH else 1
    figure, axes = panels(across, len(maps) // across, width=width, height=height)
    for panel, (title, values, scale) in zip(axes, maps, strict=True):
        _heat_map(panel, values, (found["sources"], found["targets"]), scale[np.isfinite(scale)])
        panel.set_title(title, fontsize=10)
    said = f"steered from (down) to (across), at most {CLASSES_SHOWN} each; empty: not steered, or out of reach"
    figure.suptitle(said, fontsize=9)
    return save(figure, path, f"every source and target {at}")


def _heat_map(axes: Axes, values: np.ndarray, names: Sequence[Sequence[str]], scale: np.ndarray) -> None:
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


def _curves(found: Found, path: Path) -> report.Figure:
    """Success and AS against every budget, by attacker (colour) and judge (line), with 95 % bands."""
    figure, axes = panels(len(BUDGETS), len(FIGURES), width=4.8, height=3.6)
    attackers = list(dict.fromkeys(curve["attacker"] for curve in found["curves"]))
    for column, (budget, (name, unit)) in enumerate(BUDGETS.items()):
        for row, (figure_name, (factor, label)) in enumerate(FIGURES.items()):
            panel = styled(axes[row * len(BUDGETS) + column])
            if column:
                panel.sharey(axes[row * len(BUDGETS)])
            panel.set_title(name if row == 0 else "", fontsize=10, pad=26)  # above the names of the percentiles
            for curve in (curve for curve in found["curves"] if curve["budget"] == budget):
                colour = CYCLE[attackers.index(curve["attacker"]) % len(CYCLE)]
                said = f"{curve['attacker']} attacks, {curve['judge']} judges" if (row, column) == (0, 0) else None
                band(panel, curve, figure_name, factor, color=colour, linestyle=STYLES[curve["judge"]], label=said)
            panel.set_ylabel(label if column == 0 else "")
            panel.set_xlabel(unit if row else "")
            marks = {} if budget == "step" else natural_marks(found["natural"])
            for said, value in marks.items():  # named above the panel, where no curve is
                panel.axvline(value, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
                where = panel.get_xaxis_transform()
                panel.text(value, 1.01, said, transform=where, fontsize=7, rotation=45, va="bottom")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    caption = "success and AS against every budget; bands: 95 % over classes and images; one step, so a lower bound"
    return save(figure, path, caption)
