"""A study's two figures: all arms side by side, and top-1 against leakage with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from singreg.analysis.study.results import AUDITOR, ArmSummary, StudyReport
from singreg.reporting.plots import drawable

COLOURS = {"reference": "#d97706", "method": "#2563eb", "baseline": "#6b7280", "placebo": "#b91c1c"}
"""By role; the reference has a colour of its own."""
PANELS = (
    ("top-1, %", "top1", 100.0),
    ("AS⁻ °", f"AS_neg/{AUDITOR}", 1.0),
    ("|AS| °", f"AS_abs/{AUDITOR}", 1.0),
    ("IS °", f"IS/{AUDITOR}", 1.0),
    ("null probe, %", "null_probe", 100.0),
    ("step to IS 40°, share of |f|", f"steering_step/{AUDITOR}", 1.0),
    ("success at a 25 % step, %", f"success25/{AUDITOR}", 100.0),
)


def colour(arm: ArmSummary, reference: str) -> str:
    """The colour of an arm by its role (no shapes)."""
    return COLOURS["reference" if arm.arm == reference else arm.role]


def draw_study(report: StudyReport) -> Figure:
    """A panel a figure, a line an arm: mean over seeds with the 95 % interval over pictures, and the spread over seeds as a wider bar."""
    arms = [arm for arm in report.arms if arm.omitted is None]
    figure = Figure(figsize=(2.1 * len(PANELS) + 2.4, max(3.0, 0.3 * len(arms) + 1.6)), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    places = np.arange(len(arms))
    plain = next(arm for arm in arms if arm.arm == report.reference)
    for panel, (title, key, scale) in zip(np.atleast_1d(axes), PANELS, strict=True):
        for place, arm in zip(places, arms, strict=True):
            _point(panel, float(place), arm, key, scale, colour(arm, report.reference))
        if math.isfinite(plain.mean.get(key, math.nan)):
            panel.axvline(scale * plain.mean[key], color=COLOURS["reference"], linewidth=0.8, linestyle=":")
        panel.set_title(title, fontsize=9)
        style(panel)
    first = np.atleast_1d(axes)[0]
    first.set_yticks(places, [drawable(arm.arm, 28) for arm in arms], fontsize=8)
    first.set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(
        f"{report.images} test pictures, by an auditor of {report.auditor_images} others; thin: 95 % over classes and pictures, "
        f"thick: ± one standard deviation over seeds; dotted: {drawable(report.reference, 20)}",
        fontsize=9,
    )
    return figure


def _point(axes: Axes, place: float, arm: ArmSummary, key: str, scale: float, ink: str) -> None:
    value, spread = arm.mean.get(key, math.nan), arm.spread.get(key, math.nan)
    if not math.isfinite(value):
        return
    if key in arm.intervals:
        low, high = arm.intervals[key]
        axes.plot([scale * low, scale * high], [place, place], color=ink, linewidth=1)
    if math.isfinite(spread):
        axes.plot([scale * (value - spread), scale * (value + spread)], [place, place], color=ink, linewidth=4, alpha=0.4)
    axes.plot(scale * value, place, "o", color=ink, markersize=5)


def draw_pareto(report: StudyReport) -> Figure:
    """Top-1 (%) against auditor AS⁻ (degrees): to the right and below is better; the front is a line, names stand in a column."""
    arms = [arm for arm in report.arms if arm.omitted is None]
    figure = Figure(figsize=(9.0, max(4.5, 0.26 * len(arms) + 1.5)), layout="constrained")
    axes = figure.subplots()
    x = np.array([100 * arm.mean["top1"] for arm in arms])
    y = np.array([arm.mean[f"AS_neg/{AUDITOR}"] for arm in arms])
    for arm, left, harm in zip(arms, x, y, strict=True):
        ink = colour(arm, report.reference)
        (low, high), (bottom, top) = (arm.intervals[key] for key in ("top1", f"AS_neg/{AUDITOR}"))
        axes.plot([100 * low, 100 * high], [harm, harm], color=ink, linewidth=0.7, alpha=0.35)
        axes.plot([left, left], [bottom, top], color=ink, linewidth=0.7, alpha=0.35)
        axes.plot(left, harm, "o", color=ink, markersize=6, zorder=3)
    front = sorted((left, harm) for arm, left, harm in zip(arms, x, y, strict=True) if arm.front)
    axes.plot(*zip(*front, strict=True), color="black", linewidth=1, linestyle="--", zorder=2)
    _names(axes, arms, x, y, report.reference)
    axes.set(xlabel="top-1 %", ylabel="AS⁻ ° by the auditor")
    axes.set_title("leakage against accuracy; dashed: no arm is better in both (right and low is good)", fontsize=10)
    style(axes)
    return figure


def _names(axes: Axes, arms: Sequence[ArmSummary], x: np.ndarray, y: np.ndarray, reference: str) -> None:
    """A column of names at the right in the order of the points' heights, evenly spread, each with a line to its point."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    order = np.lexsort((x, y))
    heights = bottom + (top - bottom) * (np.arange(len(arms)) + 0.5) / len(arms)
    edge = right + 0.02 * (right - left)
    for height, place in zip(heights, order, strict=True):
        ink = colour(arms[place], reference)
        axes.plot([x[place], edge], [y[place], height], color=ink, linewidth=0.5, alpha=0.5, zorder=1)
        axes.text(edge, height, f" {drawable(arms[place].arm, 28)}", fontsize=8, va="center", color=ink)
    axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])
    axes.set_xlim(left, edge + 0.32 * (right - left))
    axes.set_ylim(bottom, top)


def style(axes: Axes) -> None:
    """The look of every panel (no shapes)."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
