"""Pictures of chance levels, unique information, perturbations and passports."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from singreg.analysis.chance_results import FIGURES, KINDS, ChanceReport, ChanceScores
from singreg.analysis.information_results import BLOCKS, UniqueInformation
from singreg.analysis.passport import VISIBLE, HeadPassport
from singreg.analysis.perturbation import PerturbationReport
from singreg.reporting.plots import _axes, _styled, drawable
from singreg.reporting.validation_tables import BLOCK_TITLES, KIND_TITLES, PERTURBATION_TITLES, TITLES

REMOVALS = {"paper": ("#2563eb", "the paper's removal"), "centred": ("#d97706", "the centred removal")}
KIND_COLOURS = {"null": "#2563eb", "random": "#6b7280", "principal": "#dc2626"}
LINES = ("-", "--", ":", "-.")
NAME_LENGTH = 44


def draw_chance(report: ChanceReport, translator: str = "") -> Figure:
    """Every score (filled) beside its chance levels (bars: ± 1 sd over draws), one panel a score; degrees, κ without unit."""
    figure = Figure(figsize=(9.6, 7.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    kinds = ("observed", *KINDS)
    for axes, name in zip(panels.flat, FIGURES, strict=True):
        for side, (removal, (colour, label)) in enumerate(REMOVALS.items()):
            _draw_levels(axes, getattr(report, removal), name, colour, label, 0.24 * side - 0.12)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(kinds)), [KIND_TITLES[kind] for kind in kinds], rotation=30, ha="right", fontsize=9)
        axes.set_xlim(-0.6, len(kinds) - 0.4)
        _styled(axes, TITLES[name])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    reader = f"by the {translator} translator, " if translator else ""
    figure.suptitle(
        f"scores (filled) beside chance (± 1 sd over {report.draws} draws): {reader}{report.images} pictures; null space of "
        f"{report.dimensions} of {report.features} dimensions",
        fontsize=9,
    )
    return figure


def _draw_levels(axes: Axes, scores: ChanceScores, name: str, colour: str, label: str, shift: float) -> None:
    axes.plot([shift], [scores.observed[name]], marker="D", markersize=8, color=colour, linestyle="none", label=label)
    places = np.arange(1, len(KINDS) + 1) + shift
    mean, spread = (np.array([getattr(scores.levels[kind], what)[name] for kind in KINDS]) for what in ("mean", "spread"))
    axes.errorbar(places, mean, spread, fmt="o", markersize=5, markerfacecolor="white", color=colour, capsize=4)
    axes.axhline(scores.observed[name], color=colour, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7)


def draw_information(information: UniqueInformation) -> Figure:
    """Bars with 95 % intervals: R² of the image embedding and class accuracy from f, Π_p f and Π_n f; chance is marked."""
    figure, (left, right) = _axes(2, width=4.4, height=3.6)
    names, colours = [BLOCK_TITLES[name] for name in BLOCKS], ("#6b7280", "#dc2626", "#2563eb")
    for axes, values, prefix, factor in (
        (left, information.r2, "r2", 1.0),
        (right, information.accuracy, "accuracy", 100.0),
    ):
        heights = factor * np.array([values[name] for name in BLOCKS])
        bounds = factor * np.array([information.intervals[f"{prefix} {name}"] for name in BLOCKS])
        axes.bar(range(len(BLOCKS)), heights, 0.6, color=colours)
        axes.errorbar(range(len(BLOCKS)), heights, _reach(heights, bounds), fmt="none", color="black", capsize=4, lw=1)
        axes.set_xticks(range(len(BLOCKS)), names, fontsize=9)
    low, high = information.intervals["unique"]
    _styled(left, f"image embedding; only in the null space: {information.unique:.3f} [{low:.3f}, {high:.3f}]").set_ylabel("R², held out")
    right.axhline(100 * information.chance, color="black", linewidth=1.2, linestyle="--", label="always the most frequent class")
    right.set_ylim(0, 1.2 * max(100 * max(high for _, high in _accuracies(information)), 100 * information.chance))
    right.legend(fontsize=8, loc="upper right")
    _styled(right, "class, by a fresh linear probe").set_ylabel("accuracy, held out, %")
    return figure


def _accuracies(information: UniqueInformation) -> list[list[float]]:
    return [information.intervals[f"accuracy {name}"] for name in BLOCKS]


def _reach(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Lengths of error bars down and up, (2, k), from values (k,) and intervals (k, 2)."""
    lengths: np.ndarray = np.maximum(np.stack([values - bounds[:, 0], bounds[:, 1] - values]), 0)
    return lengths


def draw_perturbations(report: PerturbationReport) -> Figure:
    """Paper figure 9: largest |Δlogit|, flipped decisions (%) and translated angle (degrees) against the perturbation's size."""
    figure, panels = _axes(3, width=4.2, height=4.6)
    for kind, curve in report.curves.items():
        style = {"color": KIND_COLOURS[kind], "marker": "o", "markersize": 4}
        title = PERTURBATION_TITLES[kind]
        panels[0].plot(report.sizes, _positive(curve.mean["logit_change"]), label=f"{title}, float64", **style)  # type: ignore[arg-type]
        if kind == "null":
            rounded = _positive(curve.mean["logit_change_float32"])
            panels[0].plot(report.sizes, rounded, label=f"{title}, float32", linestyle="--", **style)  # type: ignore[arg-type]
        panels[1].plot(report.sizes, 100 * np.array(curve.mean["flipped"]), label=title, **style)  # type: ignore[arg-type]
        for name, line in zip(report.translators, LINES * len(report.translators), strict=False):
            key = f"angle {name}"
            panels[2].plot(report.sizes, curve.mean[key], linestyle=line, label=f"{title}, {name}", **style)  # type: ignore[arg-type]
            if kind == "null":
                panels[2].fill_between(report.sizes, curve.low[key], curve.high[key], color=KIND_COLOURS[kind], alpha=0.1, linewidth=0)
    panels[0].axhline(report.margin, color="black", linewidth=1, linestyle=":", label="mean margin of the top-1")
    panels[0].set_yscale("log")
    titles = ("largest |Δlogit| of a picture", "top-1 flipped", "angle between T(f) and T(f + δ)")
    for axes, title, unit in zip(panels, titles, ("logits", "%", "degrees"), strict=True):
        axes.set_xscale("log")
        axes.set_xlabel("size of the perturbation, |δ| / |f|")
        _styled(axes, title).set_ylabel(unit)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    bands = "; band: 5 % to 95 % of the pictures, null space" if "null" in report.curves else "; this head has no null space"
    figure.suptitle(f"perturbations of equal norm, mean of {report.images} pictures{bands}", fontsize=9)
    return figure


def _positive(values: Sequence[float]) -> list[float]:
    """For a logarithmic axis: an exact 0 is not drawn."""
    return [value if value > 0 else math.nan for value in values]


def draw_passports(passports: Sequence[HeadPassport]) -> Figure:
    """Heads side by side: null share of the dimensions (%) with the limit of what can be seen, and σ_min/σ_max."""
    figure, (left, right) = _axes(2, width=5.4, height=max(2.6, 0.42 * len(passports) + 1.5))
    places = np.arange(len(passports))
    for shift, (invariance, colour) in zip((-0.2, 0.2), (("logits", "#2563eb"), ("softmax", "#93c5fd")), strict=True):
        shares = [100 * passport.shares[invariance] for passport in passports]
        left.barh(places + shift, shares, 0.38, color=colour, label=f"null space of the {invariance}")
    for place, passport in enumerate(passports):
        largest = 100 * max(passport.shares.values())
        left.text(max(largest, 4) + 1.5, place, _size(passport), va="center", fontsize=8)
    limit = f"below: a random removal turns a feature by less than {VISIBLE:g}°"
    left.axvline(100 * math.sin(math.radians(VISIBLE)) ** 2, color="black", linewidth=1, linestyle="--", label=limit)
    left.set_xlim(0, 135)
    left.set_xticks(range(0, 101, 25))
    left.set_xlabel("% of the dimensions")
    _styled(left, "null share")
    right.plot([passport.summary.conditioning for passport in passports], places, "o", color="#6b7280")
    right.set_xscale("log")
    right.set_xlim(right=1.5)
    _styled(right, "σ_min / σ_max of the row space")
    for axes in (left, right):
        axes.set_yticks(places, [drawable(passport.summary.tag, NAME_LENGTH) for passport in passports], fontsize=8)
        axes.set_ylim(len(passports) - 0.4, -0.6)
    right.set_yticklabels([])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _size(passport: HeadPassport) -> str:
    summary = passport.summary
    return f"{summary.nullity} of {summary.features}" if summary.nullity else f"none: rank {summary.rank} of {summary.features}"
