"""A study's curves that explain: what a longer step costs in variety, and how many pictures an auditor needs."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from singreg.analysis.study.results import AUDITOR, ArmSummary, StudyReport
from singreg.reporting.plots import drawable
from singreg.reporting.study_plots import colour, style


def draw_tradeoff(report: StudyReport) -> Figure:
    """What harder steering costs: the step to the fixed image score (share of the norm) against IS (degrees), arm by arm.

    A null component that natural pictures already have moves the meaning by IS; no attacker needs more than it for the same angle.
    """
    arms = [arm for arm in report.arms if math.isfinite(arm.mean.get(f"steering_step/{AUDITOR}", math.nan))]
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    plain = report.by_name(report.reference)
    for axes, key, title, factor in (
        (left, f"steering_step/{AUDITOR}", "step to IS 40°, share of |f| (high is hard)", 3.0),
        (right, f"AS_abs25/{AUDITOR}", "|AS| ° towards the target at a 25 % step (low is hard)", 0.5),
    ):
        for arm in arms:
            axes.plot(arm.mean[f"IS/{AUDITOR}"], arm.mean[key], "o", color=colour(arm, report.reference), markersize=6)
        _name_extremes(axes, arms, key, report.reference)
        axes.axhline(factor * plain.mean[key], color="black", linewidth=0.8, linestyle="--")
        axes.axvline(0.8 * plain.mean[f"IS/{AUDITOR}"], color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="IS °, the variety that is kept (high is good)", ylabel=title)
        style(axes)
    figure.suptitle(
        f"harder steering against variety; dashed: 3× the step and half the |AS| of {drawable(report.reference, 20)}, dotted: 80 % "
        "of its IS",
        fontsize=10,
    )
    return figure


def _name_extremes(axes: Axes, arms: list[ArmSummary], key: str, reference: str, count: int = 7) -> None:
    """Names at points far from each other, where they can be read: the reference first, then always the one farthest from all named."""
    points = np.array([[arm.mean[f"IS/{AUDITOR}"], arm.mean[key]] for arm in arms])
    scaled = points / np.maximum(points.std(0), 1e-12)
    named = [next(place for place, arm in enumerate(arms) if arm.arm == reference)]
    while len(named) < min(count, len(arms)):
        distance = np.linalg.norm(scaled[:, None] - scaled[named][None], axis=-1).min(1)
        distance[named] = -1.0
        named.append(int(distance.argmax()))
    for place in named:
        arm = arms[place]
        axes.annotate(
            drawable(arm.arm, 24), points[place], textcoords="offset points", xytext=(5, 5), fontsize=8, color=colour(arm, reference)
        )
    axes.margins(0.18, 0.12)


def draw_auditor_need(report: StudyReport) -> Figure:
    """Two auditors of N pictures each, N by N: agreement of their class directions, held-out cosine, and their AS⁻ (degrees)."""
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    sizes = [point.images for point in report.agreement]
    columns = (
        ("agreement of class directions", [[point.agreement] for point in report.agreement]),
        ("held-out cosine to the embeddings", [point.cosine for point in report.agreement]),
        ("AS⁻ ° each reads", [point.AS_neg for point in report.agreement]),
    )
    for axes, (title, values) in zip(panels, columns, strict=True):
        for column in zip(*values, strict=True):
            axes.plot(sizes, column, "o-", color="#2563eb", alpha=0.7, markersize=4)
        axes.axvline(report.auditor_images, color="#d97706", linewidth=1)
        axes.axvline(report.images_needed, color="#b91c1c", linewidth=1, linestyle="--")
        axes.set(xscale="log", xlabel="pictures behind each auditor", title=title)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=40, fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.title.set_fontsize(9)
        style(axes)
    figure.suptitle(
        f"how many pictures an auditor needs; solid: this study's {report.auditor_images}, dashed: no claim below "
        f"{report.images_needed:.0f}",
        fontsize=10,
    )
    return figure
