"""Compared models and the arms of a study as figures. Angles in degrees."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from singreg.analysis.comparison import HARM
from singreg.analysis.crossfit import AUDITOR
from singreg.plots import BLUE, GREY, ORANGE, RED, drawable, panels, save, styled
from singreg.report import Figure

VIEW_LENGTH = 80  # two names, one above the other
COLOURS = {"reference": ORANGE, "method": BLUE, "baseline": GREY, "placebo": RED}


def save_comparison_plot(
    measured: Mapping[str, Mapping[str, Mapping[str, Any]]], order: Mapping[str, Any] | None, path: Path
) -> Figure:
    """Draw mean IS over mean |AS| in every space, bubbles by AS⁻, and the ranks by AS⁻ in all views.

    Args:
        measured: figures of `analyze_model` by space and model.
        order: see `order_check`.
    """
    names = list(next(iter(measured.values())))
    palette = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"](np.arange(len(names)))
    colours = dict(zip(names, palette, strict=True))
    figure, axes = panels(len(measured) + (order is not None), width=4.6, height=max(4.2, 0.3 * len(names) + 1.5))
    for panel, (space, models) in zip(axes, measured.items(), strict=False):
        _draw_space(panel, space, models, colours)
    if order is not None:
        places = np.arange(len(order["views"]))
        for name, colour in colours.items():
            ranks = [row.index(name) + 1 for row in order["orders"]]
            axes[-1].plot(places, ranks, "o-", color=colour, linewidth=1.8)
        views = [drawable(view, VIEW_LENGTH).replace(", ", "\n") for view in order["views"]]
        axes[-1].set_xticks(places, views, fontsize=8)
        axes[-1].set_yticks(range(1, len(names) + 1))
        axes[-1].set(xlim=(-0.4, len(places) - 0.6), ylim=(len(names) + 0.4, 0.6), ylabel="rank by AS⁻, 1 leaks least")
        styled(axes[-1], f"order in every view (lowest τ {order['lowest']:.2f})")
    handles = [axes[0].plot([], [], "o", color=colour, label=drawable(name))[0] for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    caption = "IS against |AS| of every model in every space (area: AS⁻), and its rank by AS⁻ in every view."
    return save(figure, path, caption)


def _draw_space(
    axes: Axes, space: str, models: Mapping[str, Mapping[str, Any]], colours: Mapping[str, np.ndarray]
) -> None:
    largest = max(found["translators"][AUDITOR]["overall"]["AS_neg"] for found in models.values())
    for name, found in models.items():
        scores, ink = found["translators"][AUDITOR], colours[name]
        x, y, harm = (scores["overall"][key] for key in ("AS_abs", "IS", "AS_neg"))
        axes.plot(scores["intervals"]["AS_abs"], [y, y], color=ink, linewidth=1)
        axes.plot([x, x], scores["intervals"]["IS"], color=ink, linewidth=1)
        axes.scatter(x, y, s=30 + 170 * harm / max(largest, 1e-9), color=ink, alpha=0.75, zorder=3)
    axes.set(xlabel="mean |AS| °", ylabel="mean IS °", xlim=(0, None), ylim=(0, 1.15 * axes.get_ylim()[1]))
    styled(axes, f"{drawable(space)}, by the {AUDITOR}")


def save_pareto(arms: Sequence[Mapping[str, Any]], reference: str, path: Path) -> Figure:
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
