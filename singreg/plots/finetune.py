"""A fine-tuning run's report: the models side by side, their distributions and their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from singreg.analysis.classes import joint_distribution
from singreg.analysis.comparison import Measured
from singreg.plots import bar, drawable, panels, save, styled
from singreg.plots.scores import COLOURS, STAGES, plot_joint
from singreg.report import Figure, Section
from singreg.tables import score_table

COMPARED_CLASSES = 40
Found = Mapping[str, Any]
READING = (
    "Means over the same test images with 95 % bootstrap intervals. AS⁻: what removing the null space takes from the "
    "true class (lower is better); IS: how far it moves the image's meaning (to be kept). frozen: the translator "
    "fitted before training; loop: the one the loss saw last; auditor: fitted on images training never used."
)


def plot_finetune(measured: Mapping[str, Measured], class_names: Sequence[str], folder: Path) -> list[Figure]:
    """Draw every figure of recipes/finetune.py below a folder, the summary first."""
    rows = {stage: table for stage, (table, _) in measured.items()}
    figures = {stage: found for stage, (_, found) in measured.items()}
    joints = {stage: joint_distribution(table) for stage, table in rows.items()}
    return [
        Figure(plot_summary(figures, folder / "summary.png"), "the models side by side"),
        Figure(plot_joint(joints, folder / "joint.png", separate=True), "AS against IS of every test image"),
        Figure(plot_distributions(rows, folder / "distributions.png"), "AS and IS over test images"),
        Figure(plot_class_leakage(figures, class_names, folder / "classes.png"), "AS⁻ of every class"),
    ]


def finetune_sections(
    figures: Mapping[str, Found], comparisons: pd.DataFrame, plots: Sequence[Figure]
) -> list[Section]:
    """Arrange a run's tables and plots (`plot_finetune`) as the sections of its report."""
    results = score_table({STAGES[stage]: found for stage, found in figures.items()})
    return [
        Section("Results", [results, READING, *plots[:1]]),
        Section("SingLoss against the control", [comparisons, "Ratios of means; intervals are paired by image."]),
        Section("Images and classes", plots[1:]),
    ]


def plot_summary(measurements: Mapping[str, Found], path: Path) -> Path:
    """Draw AS⁻, |AS|, IS and top-1 of every stage with 95 % intervals, by the auditor and the frozen translator.

    Args:
        measurements: what `analyze_model` returned, by stage.
    """
    figure, (*scores, right) = panels(4, width=3.2)
    titles = {"AS_neg": "AS⁻ (leakage)", "AS_abs": "|AS|", "IS": "IS (variety)"}
    for axes, (key, title) in zip(scores, titles.items(), strict=True):
        for x, (stage, measured) in enumerate(measurements.items()):
            for place, (name, alpha) in enumerate((("auditor", 1.0), ("frozen", 0.4))):
                by = measured["translators"][name]
                bar(axes, x - 0.2 + 0.4 * place, 0.38, by["overall"][key], by["intervals"][key], COLOURS[stage], alpha)
        styled(axes, title).set_ylabel("degrees")
    for x, (stage, measured) in enumerate(measurements.items()):
        bar(right, x, 0.6, 100 * measured["top1"], [100 * v for v in measured["top1_interval"]], COLOURS[stage])
    styled(right, "top-1").set_ylabel("%")
    for axes in (*scores, right):
        axes.set_xticks(range(len(measurements)), [STAGES[name].split(" ")[0] for name in measurements])
    images = next(iter(measurements.values()))["images"]
    note = f"{images} test images, 95 % intervals; full colour: auditor, pale: frozen translator"
    figure.suptitle(note, fontsize=9)
    return save(figure, path)


def plot_distributions(rows: Mapping[str, pd.DataFrame], path: Path, *, translator: str = "auditor") -> Path:
    """Draw violins of AS and IS over test images by one translator, the mean marked, for every stage."""
    figure, drawn = panels(2, width=5.0)
    for axes, key in zip(drawn, ("AS", "IS"), strict=True):
        values = [table[f"{key}/{translator}"].to_numpy() for table in rows.values()]
        found: Any = axes.violinplot(values, showmeans=True, showextrema=False, widths=0.8)
        for body, name in zip(found["bodies"], rows, strict=True):
            body.set(facecolor=COLOURS[name], alpha=0.6)
        if key == "AS":
            axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(1, len(rows) + 1), [STAGES[name] for name in rows])
        styled(axes, f"{key} by the {translator}").set_ylabel("degrees")
    return save(figure, path)


def plot_class_leakage(measurements: Mapping[str, Found], class_names: Sequence[str], path: Path) -> Path:
    """Draw AS⁻ of every class in each stage by the auditor, leakiest first; at most 40 classes."""
    per_class = {stage: measured["translators"]["auditor"]["per_class"] for stage, measured in measurements.items()}
    table = pd.DataFrame({stage: found["AS_neg"] for stage, found in per_class.items()}, dtype=float)
    shown = table.sort_values(str(table.columns[0]), ascending=False, kind="stable").dropna(how="all")[
        :COMPARED_CLASSES
    ]
    figure, (axes,) = panels(width=7.0, height=max(2.5, 0.24 * len(shown) + 1.2))
    places = range(len(shown))
    axes.hlines(places, shown.min(axis=1), shown.max(axis=1), color="#d1d5db", linewidth=2, zorder=1)
    for stage in shown:
        axes.scatter(shown[stage], places, s=28, color=COLOURS[str(stage)], label=STAGES[str(stage)], zorder=2)
    axes.set_yticks(places, [drawable(class_names[label]) for label in shown.index], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("AS⁻ °")
    part = "" if len(shown) == len(table) else f" ({len(shown)} of {len(table)} classes)"
    styled(axes, f"leakage by class{part}, by the auditor").legend(fontsize=8)
    return save(figure, path)
