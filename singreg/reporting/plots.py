"""A report's pictures: distributions, models side by side, classes. Figures are drawn without pyplot's global state."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Ellipse

from singreg.analysis.results import FinetuneReport, ModelMeasurement
from singreg.reporting.tables import STAGES
from singreg.utils import atomic_write

COLOURS = {"before": "#6b7280", "control": "#d97706", "sing": "#2563eb"}
CLASSES_SHOWN = 40
POINTS_SHOWN = 3000
NAME_LENGTH = 40  # characters of a class's name; longer ones would leave no room for the plot


def save_plots(report: FinetuneReport, folder: Path) -> dict[str, Path]:
    """Draw every plot of a report to `folder`; returns the path by plot name. Angles in degrees."""
    drawings: dict[str, Callable[[FinetuneReport], Figure]] = {
        "summary": draw_summary,
        "joint": draw_joint,
        "distributions": draw_distributions,
        "classes": draw_classes,
    }
    paths = {}
    for name, draw in drawings.items():
        paths[name] = folder / f"{name}.png"
        save_figure(draw(report), paths[name])
    return paths


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG to the path, whole or not at all (no shapes)."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def drawable(name: str, limit: int = NAME_LENGTH) -> str:
    """A name as text in a figure: one line, at most `limit` characters, no formula, nothing that cannot be printed (no shapes).

    A letter that the figures' font does not have is written as its number, so that two such names stay two.

    Example:
        >>> drawable("a\\tprice in $", limit=9)
        'a price …'
        >>> print(drawable("\\u732b cat"))
        \\u732b cat
    """
    letters = [_letter(letter) for letter in " ".join(name.split())[: limit + 1]]
    while sum(map(len, letters)) > limit:
        letters = [*letters[: -1 if letters[-1] != "…" else -2], "…"]
    return "".join(letters).replace("$", "\\$")


def _letter(letter: str) -> str:
    if not letter.isprintable():
        return "\ufffd"
    return letter if ord(letter) in _glyphs(findfont(FontProperties())) else letter.encode("ascii", "backslashreplace").decode()


@cache
def _glyphs(font: str) -> frozenset[int]:
    """The code points that a font file (path) has a picture for."""
    return frozenset(get_font(font).get_charmap())


def _axes(columns: int, width: float = 4.2, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def _styled(axes: Axes, title: str) -> Axes:
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def draw_summary(report: FinetuneReport) -> Figure:
    """Bars with 95 % intervals: AS⁻, |AS| and IS in degrees by the auditor (full) and the frozen translator (pale), and top-1."""
    figure, panels = _axes(4, width=3.2)
    names = list(report.measurements)
    for axes, (key, title) in zip(panels, {"AS_neg": "AS⁻ (leakage)", "AS_abs": "|AS|", "IS": "IS (variety)"}.items(), strict=False):
        for place, (translator, alpha) in enumerate((("auditor", 1.0), ("frozen", 0.4))):
            for x, stage in enumerate(names):
                scores = report.measurements[stage].translators[translator]
                value, (low, high) = scores.overall[key], scores.intervals[key]
                left = x - 0.2 + 0.4 * place
                axes.bar(left, value, 0.38, color=COLOURS[stage], alpha=alpha)
                axes.errorbar(left, value, [[max(value - low, 0)], [max(high - value, 0)]], color="black", capsize=3, lw=1)
        _styled(axes, title).set_ylabel("degrees")
    for x, stage in enumerate(names):
        measured = report.measurements[stage]
        low, high = measured.top1_interval
        value = 100 * measured.top1
        panels[3].bar(x, value, 0.6, color=COLOURS[stage])
        panels[3].errorbar(x, value, [[max(value - 100 * low, 0)], [max(100 * high - value, 0)]], color="black", capsize=3, lw=1)
    _styled(panels[3], "top-1").set_ylabel("%")
    for axes in panels:
        axes.set_xticks(range(len(names)), [STAGES[name].split(" ")[0] for name in names])
    images = report.measurements["before"].images
    figure.suptitle(f"{images} test pictures, 95 % intervals; full colour: auditor, pale: frozen translator", fontsize=9)
    return figure


def _ellipse(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """The 2σ ellipse of a point cloud and its mean."""
    values, vectors = np.linalg.eigh(np.cov(x, y) + 1e-12 * np.eye(2))
    tilt = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
    width, height = (4 * np.sqrt(np.maximum(values[::-1], 0))).tolist()
    centre = (float(x.mean()), float(y.mean()))
    axes.add_patch(Ellipse(centre, width, height, angle=tilt, fill=False, edgecolor=colour, linewidth=1.6))
    axes.plot(*centre, marker="o", color=colour, markeredgecolor="white", markersize=8)


def draw_joint(report: FinetuneReport) -> Figure:
    """AS against IS of every test image, by the auditor, one panel a model, with the 2σ ellipse (paper figure 4; degrees)."""
    figure, panels = _axes(len(report.measurements))
    bounds = _limits(report, "IS"), _limits(report, "AS")
    for axes, (stage, measured) in zip(panels, report.measurements.items(), strict=True):
        x, y = measured.rows["IS/auditor"], measured.rows["AS/auditor"]
        shown = slice(None, None, max(1, len(x) // POINTS_SHOWN))
        axes.scatter(x[shown], y[shown], s=8, alpha=0.35, color=COLOURS[stage], linewidths=0)
        if len(x) > 2:
            _ellipse(axes, x, y, COLOURS[stage])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="IS °", ylabel="AS °", xlim=bounds[0], ylim=bounds[1])
        _styled(axes, STAGES[stage])
    figure.suptitle("every test picture, by the auditor; below the line removing the null space hurt the true class", fontsize=9)
    return figure


def _limits(report: FinetuneReport, figure: str) -> tuple[float, float]:
    """Common axis range over all models, without the outermost 0.2 % of points."""
    values = np.concatenate([m.rows[f"{figure}/auditor"] for m in report.measurements.values()])
    low, high = np.quantile(values, (0.002, 0.998))
    margin = 0.08 * max(high - low, 1e-3)
    return float(low - margin), float(high + margin)


def draw_distributions(report: FinetuneReport) -> Figure:
    """Violins of AS and IS over test images by the auditor, the mean marked (degrees)."""
    figure, panels = _axes(2, width=5.0)
    names = list(report.measurements)
    for axes, key in zip(panels, ("AS", "IS"), strict=True):
        values = [report.measurements[name].rows[f"{key}/auditor"] for name in names]
        drawn = axes.violinplot(values, positions=range(len(names)), showmeans=True, showextrema=False, widths=0.8)
        for body, name in zip(drawn["bodies"], names, strict=True):  # type: ignore[arg-type, call-overload]
            body.set_facecolor(COLOURS[name])
            body.set_alpha(0.6)
        if key == "AS":
            axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(names)), [STAGES[name] for name in names])
        _styled(axes, f"{key} by the auditor").set_ylabel("degrees")
    return figure


def _class_values(measured: ModelMeasurement) -> np.ndarray:
    values = measured.translators["auditor"].per_class["AS_neg"]
    return np.array([np.nan if value is None else value for value in values])


def draw_classes(report: FinetuneReport) -> Figure:
    """AS⁻ of every class in each model by the auditor, leakiest first; at most 40 classes are drawn (degrees)."""
    values = {stage: _class_values(measured) for stage, measured in report.measurements.items()}
    first = np.nan_to_num(values["before"], nan=-1.0)
    order = np.argsort(-first)[: min(CLASSES_SHOWN, int((first >= 0).sum()))]
    figure, (axes,) = _axes(1, width=7.0, height=max(2.5, 0.24 * len(order) + 1.2))
    places = np.arange(len(order))
    table = np.stack([value[order] for value in values.values()])
    axes.hlines(places, np.nanmin(table, 0), np.nanmax(table, 0), color="#d1d5db", linewidth=2, zorder=1)
    for stage, value in values.items():
        axes.scatter(value[order], places, s=28, color=COLOURS[stage], label=STAGES[stage], zorder=2)
    axes.set_yticks(places, [drawable(report.class_names[c]) for c in order], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("AS⁻ °")
    shown = "" if len(order) == len(first) else f" ({len(order)} of {len(first)} classes)"
    _styled(axes, f"leakage by class{shown}, by the auditor").legend(fontsize=8)
    return figure
