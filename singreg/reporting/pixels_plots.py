"""A pixel attack's pictures: rises by judge, attacked pictures beside originals, natural twins, ordinary robustness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from singreg.analysis.pixels.results import ATTACK, JudgedPicture, PixelReport
from singreg.analysis.pixels.twins import TwinReport
from singreg.data.datasets import ImageSplit
from singreg.reporting.pixels_features import draw_feature_curves, draw_feature_pairs
from singreg.reporting.plots import drawable, save_figure

JUDGES = ("#2563eb", "#93c5fd", "#d97706", "#059669", "#9333ea", "#dc2626")
SHOWN = 6
AMPLIFIED = 20


def save_pixel_plots(report: PixelReport, folder: Path, part: ImageSplit) -> dict[str, Path]:
    """Draw every plot below the run's folder (path); returns the path by plot name."""
    figures = {"rises": draw_rises(report), "attacked": draw_attacked(report, folder), "robustness": draw_robustness(report)}
    if set(report.features) - set(report.dropped):
        figures |= {"features": draw_feature_curves(report), "feature_pairs": draw_feature_pairs(report)}
    if _shown_twins(report):
        figures["twins"] = draw_twins(report, part)
    paths = {}
    for name, figure in figures.items():
        paths[name] = folder / "plots" / f"{name}.png"
        save_figure(figure, paths[name])
    return paths


def draw_rises(report: PixelReport) -> Figure:
    """Rise towards the target (degrees) by budget and judge with 95 % intervals, a panel a model; hollow: a random direction."""
    count = len(report.models)
    figure = Figure(figsize=(max(5.0, 4.2 * count), 4.2), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, report.models, strict=True):
        mine = [s for s in report.summaries if s.model == model.label and s.arm == ATTACK]
        judges = list(mine[0].rise)
        for place, (name, colour) in enumerate(zip(judges, JUDGES * len(judges), strict=False)):
            x = np.arange(len(mine)) + 0.8 * (place + 0.5) / len(judges) - 0.4
            table = np.array([s.rise[name] for s in mine])
            axes.bar(x, table[:, 0], 0.75 / len(judges), color=colour, label=name if model is report.models[0] else None)
            spread = np.maximum([table[:, 0] - table[:, 1], table[:, 2] - table[:, 0]], 0)
            axes.errorbar(x, table[:, 0], spread, fmt="none", color="black", capsize=2, lw=1)
            random = [report.of(model.label, s.budget, "random") for s in mine]
            heights = [np.nan if s is None else s.rise[name][0] for s in random]
            axes.scatter(x, heights, facecolors="white", edgecolors="black", s=14, zorder=3)
        axes.set_xticks(range(len(mine)), [s.budget for s in mine])
        _style(axes, drawable(model.label))
    panels[0].set_ylabel("rise towards the target prompt, °")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"logits within {report.tau:g}; {report.pictures} pictures, 95 % over pictures; dots: a random direction", fontsize=9)
    return figure


def draw_attacked(report: PixelReport, folder: Path) -> Figure:
    """Originals, attacked pictures at the largest budget and their differences (20 times), a row a picture, by model."""
    last = {m.label: report.largest(m.label).budget for m in report.models}
    by_model = {
        label: [r for r in report.rows if (r.attacked.model, r.attacked.budget, r.attacked.arm) == (label, budget, ATTACK)][:SHOWN]
        for label, budget in last.items()
    }
    height = len(next(iter(by_model.values())))
    figure = Figure(figsize=(1.6 * (1 + 2 * len(by_model)), 1.75 * height + 0.6), layout="constrained")
    grid = figure.subplots(height, 1 + 2 * len(by_model), squeeze=False)
    for line in range(height):
        for place, (label, rows) in enumerate(by_model.items()):
            row = rows[line]
            original, attacked = (_pixels(folder / name) for name in (row.attacked.original, row.attacked.file))
            if place == 0:
                _show(grid[line, 0], original, "original" if line == 0 else "")
            _show(grid[line, 1 + 2 * place], attacked, drawable(label, 22) if line == 0 else "")
            moved = 127.5 + AMPLIFIED * (attacked.astype(float) - original)
            _show(grid[line, 2 + 2 * place], moved.clip(0, 255).astype(np.uint8), f"moved × {AMPLIFIED}" if line == 0 else "")
            grid[line, 1 + 2 * place].set_xlabel(_said(row), fontsize=7)
    figure.suptitle(f"at {next(iter(last.values()))}; below: rise by the attacked translator, and by the last image encoder", fontsize=9)
    return figure


def _said(row: JudgedPicture) -> str:
    names = list(row.rise)
    return f"{row.rise['fitted']:+.0f}°, {row.rise[names[-1]]:+.0f}°" if row.kept else "not kept"


def draw_twins(report: PixelReport, part: ImageSplit) -> Figure:
    """The closest natural twins of every model by the first encoder that sees any: the two pictures, Δlogit and angle (degrees)."""
    shown = _shown_twins(report)
    columns = min(SHOWN, max(len(twins.shown) for twins in shown))
    figure = Figure(figsize=(1.7 * columns + 0.6, 3.5 * len(shown) + 0.4), layout="constrained")
    grid = figure.subplots(2 * len(shown), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for place, twins in enumerate(shown):
        for column, pair in enumerate(twins.shown[:columns]):
            for half, index in enumerate((pair.first, pair.second)):
                picture = part.image(index).convert("RGB")
                name = part.class_names[int(part.labels[index])]
                axes = grid[2 * place + half, column]
                axes.axis("on")
                title = drawable(name, 18) + (f"\n{drawable(twins.model, 20)}" if half == 0 and column == 0 else "")
                _show(axes, np.asarray(picture), title)
                if half:
                    axes.set_xlabel(f"Δlogit {pair.logit_distance:.1f}, {pair.angle:.0f}°", fontsize=7)
    figure.suptitle(f"nobody attacked: two classes, alike in logits, far apart for {drawable(shown[0].encoder)}", fontsize=9)
    return figure


def _shown_twins(report: PixelReport) -> list[TwinReport]:
    """Of the first encoder by which any model has twins (no shapes)."""
    some = [twins for twins in report.twins if twins.shown]
    return [twins for twins in some if twins.encoder == some[0].encoder]


def draw_robustness(report: PixelReport) -> Figure:
    """Ordinary robustness: top-1 under PGD by budget, and corrupted, by model (%)."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (found, colour) in enumerate(zip(report.robustness, JUDGES * len(report.robustness), strict=False)):
        values = [100 * found.clean, *(100 * share for share in found.adversarial.values())]
        left.plot(["0", *found.adversarial], values, marker="o", color=colour, label=drawable(found.model))
        x = np.arange(len(found.corrupted)) + 0.8 * (place + 0.5) / len(report.robustness) - 0.4
        right.bar(x, [100 * share for share in found.corrupted.values()], 0.75 / len(report.robustness), color=colour)
    right.set_xticks(range(len(report.robustness[0].corrupted)), list(report.robustness[0].corrupted))
    left.set(xlabel="L-infinity budget, 255ths", ylabel="top-1, %", ylim=(0, 100))
    left.legend(fontsize=8)
    _style(left, "adversarial pictures (PGD)")
    _style(right, "corrupted pictures")
    return figure


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels)
    axes.set_xticks([])
    axes.set_yticks([])
    if title:
        axes.set_title(title, fontsize=8)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
