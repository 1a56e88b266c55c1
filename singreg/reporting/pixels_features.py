"""The feature half of a pixel report: curves, heat maps and a table of the attacks. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from singreg.analysis.pixels.results import PixelReport
from singreg.analysis.old_robustness.attacks import MAXIMISER, RANDOM, SINGLE
from singreg.analysis.old_robustness.results import RobustnessCurve, RobustnessFigures
from singreg.reporting.plots import drawable
from singreg.reporting.steering_plots import CLASSES_SHOWN, heat_map, heat_panels
from singreg.reporting.tables import escape, number, percent, render

LINES = {  # (attack, judge, defence): colour, line, label
    (MAXIMISER, "fitted", "drop_null"): ("#a7f3d0", "-", "maximiser, null space dropped"),  # broad and below: others lie on it
    (MAXIMISER, "fitted", ""): ("#2563eb", "-", "maximiser"),
    (MAXIMISER, "auditor", ""): ("#d97706", "-", "maximiser, the auditor judges"),
    (SINGLE, "fitted", ""): ("#2563eb", "--", "single gradient step"),
    (RANDOM, "fitted", ""): ("#6b7280", ":", "random direction"),
}
PANELS = (
    ("step", "success", 100.0, "target first, %"),
    ("step", "AS", 1.0, "AS towards the target, °"),
    ("radius", "success", 100.0, "target first, %"),
)


def draw_feature_curves(report: PixelReport) -> Figure:
    """Success and AS (degrees) over the relative step, success over the natural radius: a column a model, 95 % bands over pictures."""
    shown = {label: figures for label, figures in report.features.items() if label not in report.dropped}
    figure = Figure(figsize=(max(5.5, 4.0 * len(shown)), 9.0), layout="constrained")
    panels = figure.subplots(len(PANELS), len(shown), sharey="row", squeeze=False)
    for column, (label, figures) in enumerate(shown.items()):
        for row, (budget, name, factor, unit) in enumerate(PANELS):
            axes = panels[row, column]
            for (attack, judge, defence), (colour, line, said) in LINES.items():
                for curve in _curves(figures, attack, judge, defence, budget):
                    _draw(axes, curve, name, factor, colour, line, said if (row, column) == (0, 0) else None)
            if budget == "radius":
                _mark(axes, figures.natural or {})
            axes.set_title(drawable(label) if row == 0 else "", fontsize=10)
            axes.set_xlabel("ε / |f|" if budget == "step" else "Mahalanobis radius / natural median")
            axes.set_ylabel(unit if column == 0 else "")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    said = "the same pictures steered in feature space, crafted on the fitted translator; bands: 95 % over pictures; upright: natural radii"
    figure.suptitle(said, fontsize=9)
    return figure


def _mark(axes: Axes, natural: Mapping[str, float]) -> None:
    """Upright lines where untouched pictures lie: their percentiles, in natural medians."""
    for percentile, place in natural.items():
        axes.axvline(place, color="#9ca3af", linewidth=0.8, linestyle="--", zorder=0)
        axes.text(place, 1.0, percentile, transform=axes.get_xaxis_transform(), fontsize=6, ha="center", va="bottom")


def _curves(figures: RobustnessFigures, attack: str, judge: str, defence: str, budget: str) -> list[RobustnessCurve]:
    wanted = (attack, "fitted", judge, defence, budget)
    return [c for c in figures.curves if (c.attack, c.crafted_on, c.judge, c.defence, c.budget) == wanted]


def _draw(axes: Axes, curve: RobustnessCurve, name: str, factor: float, colour: str, line: str, label: str | None) -> None:
    values = factor * np.array(curve.figures[name], dtype=float)
    band = factor * np.array(curve.intervals[name], dtype=float)
    broad = 6.0 if curve.defence else 1.5
    axes.plot(curve.grid, values, color=colour, linestyle=line, linewidth=broad, marker="o", markersize=3, label=label)
    axes.fill_between(curve.grid, band[:, 0], band[:, 1], color=colour, alpha=0.12, linewidth=0)


def draw_feature_pairs(report: PixelReport) -> Figure:
    """Heat maps, sources down and targets across: AS (degrees) of the maximiser by the auditor at one relative step, a panel a model."""
    shown = {label: figures for label, figures in report.features.items() if label not in report.dropped}
    first = next(iter(shown.values()))
    figure, axes = heat_panels(len(shown), min(len(first.sources), CLASSES_SHOWN), min(len(first.targets), CLASSES_SHOWN))
    matrices = {
        label: next(m for m in figures.matrices if (m.attack, m.crafted_on, m.judge) == (MAXIMISER, "fitted", "auditor"))
        for label, figures in shown.items()
    }
    angles = [value for m in matrices.values() for row in m.AS for value in row if value is not None]
    reach = (min(angles), max(angles)) if angles else (0.0, 1.0)
    for panel, (label, matrix) in zip(axes, matrices.items(), strict=True):
        heat_map(panel, shown[label].sources, shown[label].targets, matrix.AS, 1.0, reach)
        panel.set_title(f"{drawable(label)}: AS towards the target °, step {matrix.step:g} of |f|", fontsize=10)
    figure.suptitle("steered in feature space from (down) to (across), the auditor reads; empty: not steered", fontsize=9)
    return figure


def feature_table(report: PixelReport) -> str:
    """Every attack on every model over the relative step: mean success, AS in degrees, largest |Δlogit| (Markdown).

    Success with the decision kept alone is given where the attack cannot promise that the logits stay.
    """
    rows = []
    for label, figures in report.features.items():
        for curve in figures.curves:
            if curve.budget == "step" and (label in report.dropped) == (curve.defence == "drop_null"):
                success, angle = curve.area["success"], curve.area["AS"]
                rows.append(
                    [
                        escape(label), escape(curve.attack), escape(curve.crafted_on), escape(curve.judge),
                        percent(success[0]), f"[{percent(success[1])}, {percent(success[2])}]",
                        percent(curve.area["decision_success"][0]) if curve.tolerance is None else "the same", number(angle[0]),
                        f"{max(curve.logit_change):.1g}",
                    ]
                )  # fmt: skip
    return render(rows, ["model", "attack", "crafted on", "judge", "mean success", "95 %", "decision kept alone", "AS °", "max Δlogit"])


def absent_table(report: PixelReport) -> str:
    """Attacks in feature space that could not be made, and why (Markdown); nothing where all of them could."""
    rows = [
        [escape(label), escape(attack), escape(reason)]
        for label, figures in report.features.items()
        for attack, reason in figures.absent.items()
    ]
    return render(rows, ["model", "attack not made", "why"]) if rows else ""
