"""A study's arms as a figure: leakage against accuracy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from singreg.plots import BLUE, GREY, ORANGE, RED, drawable, panels, save, styled
from singreg.report import Figure
from singreg.study.results import HARM, Summary

COLOURS = {"reference": ORANGE, "method": BLUE, "baseline": GREY, "placebo": RED}


def save_pareto(arms: Sequence[Summary], reference: str, path: Path) -> Figure:
    """Draw top-1 against class-score variance (%), arms that differ in λ alone joined; names stand in a column."""
    inks = [COLOURS["reference" if arm["arm"] == reference else arm["role"]] for arm in arms]
    figure, (axes,) = panels(1, width=9.0, height=max(4.5, 0.26 * len(arms) + 1.5))
    x, y = (100 * np.array([arm["mean"][key] for arm in arms]) for key in ("top1", HARM))
    across, along = (100 * np.array([arm["intervals"][key] for arm in arms]).T for key in ("top1", HARM))
    axes.hlines(y, across[0], across[1], colors=inks, linewidth=0.7, alpha=0.35)
    axes.vlines(x, along[0], along[1], colors=inks, linewidth=0.7, alpha=0.35)
    axes.scatter(x, y, c=inks, s=36, zorder=3)
    front = np.array(sorted((a, b) for arm, a, b in zip(arms, x, y, strict=True) if arm["front"]))
    axes.plot(*front.T, color="black", linewidth=1, linestyle="--", zorder=2)
    curve = sorted((arm["weight"], a, b) for arm, a, b in zip(arms, x, y, strict=True) if arm["weight"] is not None)
    axes.plot([a for _, a, _ in curve], [b for _, _, b in curve], color=BLUE, linewidth=1, zorder=2)
    axes.set(xlabel="top-1 %", ylabel="class-score variance in the null space, %")
    styled(axes, "leakage against accuracy")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    edge = right + 0.02 * (right - left)
    heights = bottom + (top - bottom) * (np.arange(len(arms)) + 0.5) / len(arms)
    for height, place in zip(heights, np.lexsort((x, y)), strict=True):  # in the order of the points' heights
        axes.plot([x[place], edge], [y[place], height], color=inks[place], linewidth=0.5, alpha=0.5, zorder=1)
        name = f" {drawable(arms[place]['arm'], 28)}"
        axes.text(edge, height, name, fontsize=8, va="center", color=inks[place])
    axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])
    axes.set(xlim=(left, edge + 0.32 * (right - left)), ylim=(bottom, top))
    caption = (
        "Right and low is good. Dashed: no arm is better in both. Blue: the same arm at growing λ, from plain's 0."
    )
    return save(figure, path, caption)
