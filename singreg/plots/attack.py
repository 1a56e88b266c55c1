"""Figures of an attack: rises by judge, attacked images, feature space, natural twins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from PIL import Image

from singreg.analysis.attack_images import ATTACK, RANDOM
from singreg.analysis.attackers import MAXIMISER, SINGLE
from singreg.analysis.attackers import RANDOM as RANDOM_DIRECTION
from singreg.attack_tables import largest_budget
from singreg.data.datasets import ImageSplit
from singreg.plots import CYCLE, GREY, drawable, panels, save, styled
from singreg.report import Figure

SHOWN = 6  # images or pairs a model
AMPLIFIED = 20
LINES = {  # (attack, judge, defence): colour, line, width, label
    (MAXIMISER, "fitted", "drop_null"): (
        "#a7f3d0",
        "-",
        6.0,
        "maximiser, null space dropped",
    ),  # below: others lie on it
    (MAXIMISER, "fitted", ""): ("#2563eb", "-", 1.5, "maximiser"),
    (MAXIMISER, "auditor", ""): ("#d97706", "-", 1.5, "maximiser, the auditor judges"),
    (SINGLE, "fitted", ""): ("#2563eb", "--", 1.5, "single gradient step"),
    (RANDOM_DIRECTION, "fitted", ""): ("#6b7280", ":", 1.5, "random direction"),
}
PANELS = (  # budget, figure, factor, unit
    ("step", "success", 100.0, "target first, %"),
    ("step", "AS", 1.0, "AS towards the target, °"),
    ("radius", "success", 100.0, "target first, %"),
)


def save_attack_plots(
    figures: Mapping[str, Any], judged: pd.DataFrame, split: ImageSplit, folder: Path
) -> dict[str, Figure]:
    """Draw every figure of an attack into plots/ of the run's folder, by name, from report.json's figures and rows."""
    plots = folder / "plots"
    found = {"rises": _rises(figures, plots), "attacked": _attacked(figures, judged, folder)}
    shown = {label: each for label, each in figures["features"].items() if label not in figures["dropped"]}
    if shown:
        found["features"] = _features(shown, plots)
    if twins := [each for each in figures["twins"] if each["shown"] and each["model"] not in figures["dropped"]]:
        found["twins"] = _twins([each for each in twins if each["encoder"] == twins[0]["encoder"]], split, plots)
    return found


def _rises(figures: Mapping[str, Any], folder: Path) -> Figure:
    models = [model["label"] for model in figures["models"]]
    figure, axes = panels(len(models))
    highest = 0.0
    for ax, label in zip(axes, models, strict=True):
        mine = [s for s in figures["summaries"] if (s["model"], s["arm"]) == (label, ATTACK)]
        random = [s for s in figures["summaries"] if (s["model"], s["arm"]) == (label, RANDOM)]
        judges = list(mine[0]["rise"])
        for place, name in enumerate(judges):
            x = np.arange(len(mine)) + 0.8 * (place + 0.5) / len(judges) - 0.4
            rise, low, high = np.array([s["rise"][name] for s in mine]).T
            ax.bar(x, rise, 0.75 / len(judges), color=CYCLE[place % len(CYCLE)], label=drawable(name, 24))
            spread = np.maximum([rise - low, high - rise], 0)
            ax.errorbar(x, rise, spread, fmt="none", color="black", capsize=2, lw=1)
            heights = [s["rise"][name][0] for s in random]
            ax.scatter(x, heights, facecolors="white", edgecolors="black", s=14, zorder=3)
            highest = max(highest, float(high.max()))
        ax.set_xticks(range(len(mine)), [s["budget"] for s in mine])
        styled(ax, drawable(label, 34))
    for ax in axes:
        ax.set_ylim(top=1.05 * max(highest, 1.0))
    axes[0].set_ylabel("rise towards the target's prompt, °")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    caption = (
        f"rise towards the target's prompt by budget and judge, logits within {figures['tau']:g}; 95 % intervals over "
        f"{figures['images']} images; dots: random directions of the same length"
    )
    return Figure(save(figure, folder / "rises.png"), caption)


def _attacked(figures: Mapping[str, Any], judged: pd.DataFrame, folder: Path) -> Figure:
    models, attacks = [model["label"] for model in figures["models"]], judged[judged["arm"] == ATTACK]
    budget = largest_budget(figures)
    encoder = next(reversed(figures["zero_shot"]))
    at = attacks[attacks["budget"] == budget]
    height, columns = min(SHOWN, len(at[at["model"] == models[0]])), 1 + 2 * len(models)
    figure, flat = panels(columns, height, width=1.6, height=1.8)
    grid = np.array(flat).reshape(height, columns)
    for place, label in enumerate(models):
        rows = at[at["model"] == label].head(height).to_dict("records")
        for line, row in enumerate(rows):
            original, attacked = (np.asarray(Image.open(folder / row[name])) for name in ("original", "file"))
            moved = (127.5 + AMPLIFIED * (attacked.astype(float) - original)).clip(0, 255).astype(np.uint8)
            _show(grid[line, 0], original, "original" if line == 0 else "")
            _show(grid[line, 1 + 2 * place], attacked, drawable(label, 24) if line == 0 else "")
            _show(grid[line, 2 + 2 * place], moved, f"moved × {AMPLIFIED}" if line == 0 else "")
            rises = f"{round(row['rise fitted']):+d}°, {round(row[f'rise {encoder}']):+d}°"
            grid[line, 1 + 2 * place].set_xlabel(rises if row["kept"] else "not kept", fontsize=7)
    caption = f"attacked at {budget}; below: rise by the attacked translator, and by {encoder}, which nobody attacked"
    return Figure(save(figure, folder / "plots" / "attacked.png"), caption)


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)


def _features(shown: Mapping[str, Any], folder: Path) -> Figure:
    figure, flat = panels(len(shown), len(PANELS), height=3.0)
    grid = np.array(flat).reshape(len(PANELS), len(shown))
    for column, (label, found) in enumerate(shown.items()):
        curves = {
            (c["attack"], c["judge"], c["defence"], c["budget"]): c
            for c in found["curves"]
            if c["crafted_on"] == "fitted"
        }
        for ax, (budget, name, factor, unit) in zip(grid[:, column], PANELS, strict=True):
            for key, (colour, line, width, said) in LINES.items():
                if (curve := curves.get((*key, budget))) is not None:
                    values, band = (factor * np.array(curve[kind][name], float) for kind in ("figures", "intervals"))
                    ax.plot(curve["grid"], values, line, color=colour, lw=width, marker="o", ms=3, label=said)
                    ax.fill_between(curve["grid"], *band.T, color=colour, alpha=0.12, linewidth=0)
            if budget == "radius":
                for place in (found["natural"] or {}).values():
                    ax.axvline(place, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
            styled(ax, drawable(label, 34) if ax is grid[0, column] else "")
            ax.set_xlabel("ε / |f|" if budget == "step" else "Mahalanobis radius / natural median")
            ax.set_ylabel(unit if column == 0 else "")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    caption = (
        "the same images steered in feature space, crafted on the attacked translator; bands: 95 % over images; "
        "upright lines: radii of natural images (median, 95th and 99th percentile)"
    )
    return Figure(save(figure, folder / "features.png"), caption)


def _twins(twins: list[dict[str, Any]], split: ImageSplit, folder: Path) -> Figure:
    columns = min(SHOWN, max(len(each["shown"]) for each in twins))
    figure, flat = panels(columns, 2 * len(twins), width=1.7, height=1.9)
    grid = np.array(flat).reshape(2 * len(twins), columns)
    for ax in flat:
        ax.axis("off")
    for place, each in enumerate(twins):
        for column, pair in enumerate(each["shown"][:columns]):
            for half, index in enumerate((pair["first"], pair["second"])):
                ax = grid[2 * place + half, column]
                ax.axis("on")
                name = drawable(split.class_names[int(split.labels[index])], 18)
                _show(ax, np.asarray(split.image(index).convert("RGB")), name)
                if half:
                    ax.set_xlabel(f"Δlogit {pair['logit_distance']:.1f}, {pair['angle']:.0f}°", fontsize=7)
        grid[2 * place, 0].set_ylabel(drawable(each["model"], 24), fontsize=8)
    caption = (
        f"natural twins: two classes, alike in logits and far apart for {twins[0]['encoder']}; nobody attacked them"
    )
    return Figure(save(figure, folder / "twins.png"), caption)
