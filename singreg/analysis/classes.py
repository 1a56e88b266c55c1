"""Class level: AS and IS by class, what leakage has to do with accuracy; and the joint distribution of AS and IS."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.statistics import resampled_means
from singreg.utils import plain

FIGURES = ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "kappa", "accuracy")
CORRELATED = ("AS_neg", "AS_abs", "IS")
DISTRIBUTION_POINTS = 51
LEAST_CLASSES = 3  # for a correlation over classes
POINTS = 2000
SIGMAS = (1.0, 2.0)


def analyze_classes(
    rows: pd.DataFrame,
    class_names: Sequence[str],
    *,
    translator: str = "auditor",
    resamples: int = 1000,
) -> dict[str, Any]:
    """Measure AS and IS of every class by one translator (METHOD sections 3 and 8.7).

    Intervals resample a class's images; those of the rank correlations resample classes.

    Args:
        rows: one an image, as `analyze_model` returns them.

    Returns:
        The names of empty classes; classes, the leakiest (AS⁻) first, with means and intervals by figure (None for a
        single image) and 51 quantiles of AS and IS; Spearman's ρ of AS_neg, AS_abs and IS with accuracy over classes
        (None where not defined; undefined counts resamples in which nothing varied).
    """
    labels = rows["label"].to_numpy().astype(np.int64)
    attribute, image, kappa = (rows[f"{name}/{translator}"].to_numpy(np.float64) for name in ("AS", "IS", "kappa"))
    columns = [attribute, np.maximum(-attribute, 0), np.maximum(attribute, 0), np.abs(attribute), image, kappa]
    table = np.stack([*columns, rows["correct"].to_numpy(np.float64)], axis=1)
    known = labels >= 0
    order = np.argsort(labels[known], kind="stable")
    sorted_labels, table = labels[known][order], table[known][order]
    bounds = np.searchsorted(sorted_labels, np.arange(len(class_names) + 1))
    scores = [
        _score(label, class_names[label], table[start:stop], resamples)
        for label, (start, stop) in enumerate(pairwise(bounds))
        if stop > start
    ]
    scores.sort(key=lambda score: (-score["means"]["AS_neg"], score["label"]))
    means = {name: np.array([score["means"][name] for score in scores]) for name in FIGURES}
    found: dict[str, Any] = {
        "translator": translator,
        "centred": False,
        "images": known.sum(),
        "unlabelled": (~known).sum(),
        "classes": scores,
        "empty": [name for name, (start, stop) in zip(class_names, pairwise(bounds), strict=True) if start == stop],
        "correlations": {n: _correlation(means[n], means["accuracy"], resamples) for n in CORRELATED},
    }
    return {name: plain(value) for name, value in found.items()}


def _score(label: int, name: str, table: np.ndarray, resamples: int) -> dict[str, Any]:
    """One class's images (n, 7) as means, intervals and evenly spaced quantiles."""
    intervals: dict[str, Any] = dict.fromkeys(FIGURES)
    if len(table) > 1:
        drawn = resampled_means(table, resamples=resamples, seed=label)
        intervals = dict(zip(FIGURES, np.quantile(drawn, [0.025, 0.975], axis=0).T, strict=True))
    points = np.linspace(0, 1, DISTRIBUTION_POINTS)
    return {
        "label": label,
        "name": name,
        "images": len(table),
        "means": dict(zip(FIGURES, table.mean(0), strict=True)),
        "intervals": intervals,
        "distribution": {key: np.quantile(table[:, FIGURES.index(key)], points) for key in ("AS", "IS")},
    }


def _correlation(figure: np.ndarray, accuracy: np.ndarray, resamples: int) -> dict[str, Any]:
    """Spearman's ρ over classes with the interval of resampled classes; undefined ones (nothing varies) are counted."""
    nothing = {"value": None, "low": None, "high": None, "classes": len(figure), "undefined": 0}
    if len(figure) < LEAST_CLASSES:
        return nothing
    rng = np.random.default_rng(0)
    draws = (rng.integers(0, len(figure), len(figure)) for _ in range(resamples))
    values = np.array([spearman(figure[draw], accuracy[draw]) for draw in draws])
    defined = values[~np.isnan(values)]
    value, undefined = spearman(figure, accuracy), len(values) - len(defined)
    if np.isnan(value):
        return {**nothing, "undefined": undefined}
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
    return {"value": value, "low": low, "high": high, "classes": len(figure), "undefined": undefined}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation of x and y (N,), ties at their mean rank; NaN where one does not vary."""
    a, b = (pd.Series(values).rank().to_numpy() for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 0 else float("nan")


def joint_distribution(rows: pd.DataFrame, *, translator: str = "auditor") -> dict[str, Any]:
    """Describe the joint distribution of IS and AS by one translator (METHOD section 3, paper figure 4).

    Returns:
        images; mean and std of (IS, AS) in degrees; ratio, mean IS / mean |AS|; correlation; ellipses at 1 and 2 sigma
        (full width and height, tilt in degrees, share of images inside); up to 2,000 evenly taken points (IS, AS).
    """
    names = [f"{figure}/{translator}" for figure in ("IS", "AS")]
    cloud = rows[names].to_numpy(np.float64)
    mean, std = cloud.mean(0), cloud.std(0)
    absolute = np.abs(cloud[:, 1]).mean()
    found: dict[str, Any] = {
        "images": len(cloud),
        "mean": mean,
        "std": std,
        "ratio": mean[0] / absolute if absolute > 0 else None,
        "correlation": (cloud - mean).prod(1).mean() / std.prod() if std.min() > 0 else None,
        "ellipses": _ellipses(cloud) if len(cloud) > 2 else [],
        "points": cloud[:: max(1, -(-len(cloud) // POINTS))].round(4),
    }
    return {name: plain(value) for name, value in found.items()}


def _ellipses(cloud: np.ndarray) -> list[dict[str, Any]]:
    """From the eigenvectors of the covariance of the cloud (N, 2); an axis without variance has no length."""
    values, vectors = np.linalg.eigh(np.cov(cloud.T))
    values = np.maximum(values, 0)
    along = (cloud - cloud.mean(0)) @ vectors
    floor = np.finfo(np.float64).eps * max(float(values.max()), np.finfo(np.float64).tiny)
    radius = np.sqrt((along**2 / np.maximum(values, floor)).sum(1))
    tilt = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
    height, width = 2 * np.sqrt(values)
    return [
        {"sigma": s, "width": s * width, "height": s * height, "tilt": tilt, "share": (radius <= s).mean()}
        for s in SIGMAS
    ]
