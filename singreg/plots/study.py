"""Figures of a study's arms and of compared models. Angles in degrees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from singreg.analysis.models_compared import PRIMARY, lowest_tau
from singreg.analysis.study import AUDITOR, Summary, pareto_front
from singreg.plots import BLUE, GREY, ORANGE, RED, drawable, label_points, panels, save, styled
from singreg.report import Figure

COLOURS = {"reference": ORANGE, "method": BLUE, "baseline": GREY, "placebo": RED}
PANELS = (
    ("top-1, %", "top1", 100.0),
    ("AS⁻ °", f"AS_neg/{AUDITOR}", 1.0),
    ("|AS| °", f"AS_abs/{AUDITOR}", 1.0),
    ("IS °", f"IS/{AUDITOR}", 1.0),
    ("null probe, %", "null_probe", 100.0),
    ("step to IS 40°, of |f|", f"steering_step/{AUDITOR}", 1.0),
    ("success at 25 %, %", f"success25/{AUDITOR}", 100.0),
)
VIEW_LENGTH = 80  # two names, one above the other


def save_study_plots(
    arms: Sequence[Summary],
    reference: str,
    facts: Mapping[str, Any],
    agreement: Sequence[Mapping[str, Any]],
    folder: Path,
) -> list[Figure]:
    """Draw all arms side by side, top-1 against leakage, steering against variety, and what an auditor needs.

    Args:
        arms: see `summarize_study`.
        facts: auditor_images and images_needed.
        agreement: see `agreement_curve`; no figure without it.
    """
    shown = [arm for arm in arms if arm["omitted"] is None]
    inks = [COLOURS["reference" if arm["arm"] == reference else arm["role"]] for arm in shown]
    every = "Every arm by the auditor. Thin: 95 % over classes and images; thick: ± one standard deviation over seeds."
    front = "Top-1 against the auditor's AS⁻; dashed: no arm is better in both (right and low is good)."
    cost = "What harder steering costs in image score: named are the reference and what no arm beats in both."
    need = "How many images an auditor needs. Solid: this study's; dashed: no claim below it."
    found = [
        Figure(save_arms(shown, inks, folder / "study.png"), every),
        Figure(save_pareto(shown, inks, folder / "pareto.png"), front),
        Figure(save_tradeoff(shown, inks, reference, folder / "tradeoff.png"), cost),
    ]
    auditor = [Figure(save_auditor_need(agreement, facts, folder / "auditor.png"), need)] if agreement else []
    return found + auditor


def _values(arms: Sequence[Summary], key: str, of: str = "mean") -> np.ndarray:
    """A figure of every arm (A,), or its intervals (A, 2); NaN where there is none."""
    nothing = [math.nan] * 2 if of == "intervals" else math.nan
    return np.array([arm[of].get(key, nothing) for arm in arms])


def save_arms(arms: Sequence[Summary], inks: list[str], path: Path) -> Path:
    """Draw a panel a figure and a line an arm: mean, interval over images, spread over seeds."""
    figure, axes = panels(len(PANELS), width=2.3, height=max(3.0, 0.3 * len(arms) + 1.2))
    places = np.arange(len(arms))
    for panel, (title, key, scale) in zip(axes, PANELS, strict=True):
        value, spread, ends = (scale * _values(arms, key, of) for of in ("mean", "spread", "intervals"))
        panel.hlines(places, ends[:, 0], ends[:, 1], colors=inks, linewidth=1)
        panel.hlines(places, value - spread, value + spread, colors=inks, linewidth=4, alpha=0.4)
        panel.scatter(value, places, c=inks, s=25, zorder=3)
        panel.set_yticks(places, [drawable(arm["arm"], 28) if panel is axes[0] else "" for arm in arms], fontsize=8)
        panel.set_ylim(len(arms) - 0.5, -0.5)
        styled(panel, title)
    return save(figure, path)


def save_pareto(arms: Sequence[Summary], inks: list[str], path: Path) -> Path:
    """Draw top-1 (%) against auditor AS⁻ with the front as a line; the names stand in a column, evenly spread."""
    figure, (axes,) = panels(1, width=9.0, height=max(4.5, 0.26 * len(arms) + 1.5))
    x, y = 100 * _values(arms, "top1"), _values(arms, f"AS_neg/{AUDITOR}")
    across, along = (_values(arms, key, "intervals").T for key in ("top1", f"AS_neg/{AUDITOR}"))
    axes.hlines(y, 100 * across[0], 100 * across[1], colors=inks, linewidth=0.7, alpha=0.35)
    axes.vlines(x, along[0], along[1], colors=inks, linewidth=0.7, alpha=0.35)
    axes.scatter(x, y, c=inks, s=36, zorder=3)
    front = np.array(sorted((top1, harm) for arm, top1, harm in zip(arms, x, y, strict=True) if arm["front"]))
    axes.plot(*front.T, color="black", linewidth=1, linestyle="--", zorder=2)
    axes.set(xlabel="top-1 %", ylabel="AS⁻ ° by the auditor")
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
    return save(figure, path)


def save_tradeoff(arms: Sequence[Summary], inks: list[str], reference: str, path: Path) -> Path:
    """Draw the step to the fixed image score, and |AS| at a 25 % step, against IS.

    A null component that natural images already have moves the meaning by IS; no attacker needs a longer step than it.
    """
    figure, axes = panels(2, width=5.4, height=4.6)
    for panel, key, title, sign in (
        (axes[0], f"steering_step/{AUDITOR}", "step to IS 40°, share of |f| (high is hard)", -1),
        (axes[1], f"AS_abs25/{AUDITOR}", "|AS| ° towards the target at a 25 % step (low is hard)", 1),
    ):
        kept, hard = _values(arms, f"IS/{AUDITOR}"), _values(arms, key)
        panel.scatter(kept, hard, c=inks, s=36)
        panel.set(xlabel="IS °, the variety that is kept (high is good)")
        panel.margins(0.18, 0.12)
        styled(panel, title)
        front = pareto_front({arm["arm"]: (x, sign * y) for arm, x, y in zip(arms, kept, hard, strict=True)})
        names = [arm["arm"] if arm["arm"] in {*front, reference} else "" for arm in arms]
        label_points(panel, kept.tolist(), hard.tolist(), names)
    return save(figure, path)


def save_auditor_need(agreement: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> Path:
    """Draw two auditors of N images each, N by N: agreement of class directions, held-out cosine, and their AS⁻."""
    figure, axes = panels(3, width=3.6, height=3.6)
    sizes = [point["images"] for point in agreement]
    columns = (
        ("agreement of class directions", [[point["agreement"]] for point in agreement]),
        ("held-out cosine to the embeddings", [point["cosine"] for point in agreement]),
        ("AS⁻ ° each reads", [point["AS_neg"] for point in agreement]),
    )
    for panel, (title, values) in zip(axes, columns, strict=True):
        panel.plot(sizes, values, "o-", color=BLUE, alpha=0.7, markersize=4)
        panel.axvline(facts["auditor_images"], color=ORANGE, linewidth=1)
        panel.axvline(facts["images_needed"], color=RED, linewidth=1, linestyle="--")
        panel.set(xscale="log", xlabel="images behind each auditor")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=40, fontsize=8)
        panel.xaxis.set_minor_locator(NullLocator())
        styled(panel, title)
    return save(figure, path)


def save_comparison_plot(
    measured: Mapping[str, Mapping[str, Mapping[str, Any]]], orders: Sequence[Mapping[str, Any]], path: Path
) -> Figure:
    """Draw mean IS over mean |AS| in every space, bubbles by AS⁻, and the ranks by AS⁻ in all views.

    Args:
        measured: figures of `analyze_model` by space and model.
        orders: see `order_check`; the first is that by AS⁻.
    """
    names = list(next(iter(measured.values())))
    palette = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"](np.arange(len(names)))
    colours = dict(zip(names, palette, strict=True))
    figure, axes = panels(len(measured) + bool(orders), width=4.6, height=max(4.2, 0.3 * len(names) + 1.5))
    for panel, (space, models) in zip(axes, measured.items(), strict=False):
        _draw_space(panel, space, models, colours)
    if orders:
        order, places = orders[0], np.arange(len(orders[0]["views"]))
        for name, colour in colours.items():
            ranks = [row.index(name) + 1 for row in order["orders"]]
            axes[-1].plot(places, ranks, "o-", color=colour, linewidth=1.8)
        views = [drawable(view, VIEW_LENGTH).replace(", ", "\n") for view in order["views"]]
        axes[-1].set_xticks(places, views, fontsize=8)
        axes[-1].set_yticks(range(1, len(names) + 1))
        axes[-1].set(xlim=(-0.4, len(places) - 0.6), ylim=(len(names) + 0.4, 0.6), ylabel="rank by AS⁻, 1 leaks least")
        styled(axes[-1], f"order in every view (lowest τ {lowest_tau(order):.2f})")
    handles = [axes[0].plot([], [], "o", color=colour, label=drawable(name))[0] for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    caption = "IS against |AS| of every model in every space (area: AS⁻), and its rank by AS⁻ in every view."
    return Figure(save(figure, path), caption)


def _draw_space(
    axes: Axes, space: str, models: Mapping[str, Mapping[str, Any]], colours: Mapping[str, np.ndarray]
) -> None:
    largest = max(found["translators"][PRIMARY]["overall"]["AS_neg"] for found in models.values())
    for name, found in models.items():
        scores, ink = found["translators"][PRIMARY], colours[name]
        x, y, harm = (scores["overall"][key] for key in ("AS_abs", "IS", "AS_neg"))
        axes.plot(scores["intervals"]["AS_abs"], [y, y], color=ink, linewidth=1)
        axes.plot([x, x], scores["intervals"]["IS"], color=ink, linewidth=1)
        axes.scatter(x, y, s=30 + 170 * harm / max(largest, 1e-9), color=ink, alpha=0.75, zorder=3)
    axes.set(xlabel="mean |AS| °", ylabel="mean IS °", xlim=(0, None), ylim=(0, None))
    styled(axes, f"{drawable(space)}, by the {PRIMARY}")
