"""Figures of steering: source x target heat maps, curves at equal effort, attacks on features, drawn embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from singreg import report
from singreg.analysis.steering_curves import natural_marks
from singreg.plots import BLUE, CYCLE, GREY, ORANGE, drawable, panels, save, styled

CLASSES_SHOWN, NUMBERS_UP_TO, NAME_LENGTH = 60, 20, 22
PAGE_WIDTH = 12.0  # inches: a report shows that at four fifths of its size
FIGURES = {"success": (100.0, "target outranks all classes, %"), "AS": (1.0, "AS towards the target, °")}
BUDGETS = {
    "step": ("relative step, along the gradient", "ε / |f|"),
    "radius": ("radius, along the gradient", "Mahalanobis radius / natural median"),
    "on-manifold": ("radius, on-manifold direction", "Mahalanobis radius / natural median"),
}
STYLES = {"fitted": "--", "auditor": "-"}
ATTACKS = {  # (attack, judge, defence): colour, line, width, label; the first is broad, since others lie on it
    ("maximiser", "fitted", "drop_null"): ("#a7f3d0", "-", 6.0, "maximiser, null space dropped"),
    ("maximiser", "fitted", ""): (BLUE, "-", 1.5, "maximiser"),
    ("maximiser", "auditor", ""): (ORANGE, "-", 1.5, "maximiser, the auditor judges"),
    ("single step", "fitted", ""): (BLUE, "--", 1.5, "single gradient step"),
    ("random direction", "fitted", ""): (GREY, ":", 1.5, "random direction"),
}
ATTACK_PANELS = (("step", "success"), ("step", "AS"), ("radius", "success"))


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
    at = f"at an image score of {degrees:g}°"
    maps = {
        f"|AS| ° {at},\nthe fitted translator reads its own": own["AS_abs"],
        f"|AS| ° {at},\nthe auditor reads": audited["AS_abs"],
        f"success % {at},\nthe auditor reads": 100 * np.array(audited["success"], dtype=float),
    }
    return draw_heat_maps(maps, names, path, scales=(0, 0, 1))


def draw_heat_maps(maps: Mapping[str, Any], names: PairNames, path: Path, scales: Sequence[int] | None = None) -> Path:
    """Draw source x target matrices (S, K) by title; NaN or None is left empty.

    Args:
        scales: maps with the same number share their colours; None lets all do so.
    """
    values = [np.array(matrix, dtype=float)[:CLASSES_SHOWN, :CLASSES_SHOWN] for matrix in maps.values()]
    rows, columns = values[0].shape
    # Side by side while that is no wider than a page, else one below the other: numbers must stay large enough to read.
    numbered = max(rows, columns) <= NUMBERS_UP_TO
    width = max(3.6, (0.42 if numbered else 0.16) * columns + 1.6)
    height = max(1.8, (0.3 if numbered else 0.16) * rows) + 1.9
    beside = len(values) * width <= PAGE_WIDTH
    figure, axes = panels(len(values) if beside else 1, 1 if beside else len(values), width=width, height=height)
    for place, (panel, title) in enumerate(zip(axes, maps, strict=True)):
        alike = [
            v for v, s in zip(values, scales or [0] * len(values), strict=True) if not scales or s == scales[place]
        ]
        _heat_map(panel, values[place], names, np.concatenate([v[np.isfinite(v)] for v in alike]))
        panel.set_title(title, fontsize=10)
    shown = "" if (rows, columns) == (len(names[0]), len(names[1])) else f"; the first {rows} × {columns} are drawn"
    figure.suptitle(f"steered from (down) to (across); empty: not steered, or out of reach{shown}", fontsize=9)
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
            panel.set_title(name if row == 0 else "", fontsize=10, pad=26)  # above the names of the percentiles
            for curve in curves:
                if curve["budget"] == budget:
                    colour = CYCLE[attackers.index(curve["attacker"]) % len(CYCLE)]
                    said = f"{curve['attacker']} attacks, {curve['judge']} judges" if (row, column) == (0, 0) else None
                    _line(panel, curve, figure_name, factor, colour, STYLES.get(curve["judge"], ":"), 1.5, said)
            panel.set_ylabel(label if column == 0 else "")
            panel.set_xlabel(unit if row else "")
            if budget != "step":
                _mark(panel, marks)
    _same_heights(axes, len(FIGURES))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return save(figure, path)


def draw_attacks(features: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Draw attacks on features over the step and the natural radius, a column a model, with 95 % bands over images.

    Args:
        features: what `measure_robustness` returns, by the model's name.
    """
    figure, axes = panels(len(features), len(ATTACK_PANELS), width=max(7.5 / len(features), 4.0), height=3.0)
    for column, (label, found) in enumerate(features.items()):
        curves = {
            (c["attack"], c["judge"], c["defence"], c["budget"]): c
            for c in found["curves"]
            if c["crafted_on"] == "fitted"
        }
        for row, (budget, name) in enumerate(ATTACK_PANELS):
            panel = styled(axes[row * len(features) + column], drawable(label) if row == 0 else "")
            for key, (colour, line, width, said) in ATTACKS.items():
                if (curve := curves.get((*key, budget))) is not None:
                    label_once = said if (row, column) == (0, 0) else None
                    _line(panel, curve, name, FIGURES[name][0], colour, line, width, label_once)
            if budget == "radius":
                _mark(panel, found["natural"] or {})
            panel.set_xlabel(BUDGETS[budget][1])
            panel.set_ylabel(("target first, %" if name == "success" else FIGURES[name][1]) if column == 0 else "")
    _same_heights(axes, len(ATTACK_PANELS))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(
        "images steered in feature space, crafted on the fitted translator; bands: 95 % over images", fontsize=9
    )
    return save(figure, path)


def _line(
    axes: Axes,
    curve: Mapping[str, Any],
    name: str,
    factor: float,
    colour: str,
    line: str,
    width: float,
    label: str | None,
) -> None:
    values, band = (factor * np.array(curve[kind][name], dtype=float) for kind in ("figures", "intervals"))
    axes.plot(
        curve["grid"], values, color=colour, linestyle=line, linewidth=width, marker="o", markersize=3, label=label
    )
    axes.fill_between(curve["grid"], band[:, 0], band[:, 1], color=colour, alpha=0.13, linewidth=0)


def _mark(axes: Axes, marks: Mapping[str, float]) -> None:
    """Upright lines at the natural percentiles, named above the panel, where no curve is."""
    where = axes.get_xaxis_transform()
    for name, value in marks.items():
        axes.axvline(value, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        axes.text(value, 1.01, name, transform=where, fontsize=7, rotation=45, va="bottom")


def _same_heights(axes: Sequence[Axes], rows: int) -> None:
    """Give the panels of a row one vertical axis."""
    columns = len(axes) // rows
    for row in range(rows):
        mine = axes[row * columns : (row + 1) * columns]
        ends = [end for panel in mine for end in panel.get_ylim()]
        for panel in mine:
            panel.set_ylim(min(ends), max(ends))


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
