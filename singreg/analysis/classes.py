"""Class level: AS and IS by class, what leakage has to do with accuracy; and the joint distribution of AS and IS."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.scores import CENTRED
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
    centred: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure AS and IS of every class by one translator (METHOD sections 3 and 8.7).

    Intervals resample a class's images; those of the rank correlations resample classes. Angles in degrees.

    Args:
        rows: one an image, as `analyze_model` returns them: "label", "correct", "AS/NAME", "IS/NAME", "kappa/NAME".

    Returns:
        translator, centred, images, unlabelled, empty (names of classes without images); classes, the leakiest (AS⁻)
        first, each with label, name, images, means and intervals by figure (None for a single image) and distribution
        (51 quantiles of AS and IS); correlations of AS_neg, AS_abs and IS with accuracy over classes (Spearman's ρ,
        None where not defined; undefined counts resamples in which nothing varied).

    Raises:
        ValueError: a column that is missing (all are named), no labelled image, or a label without a class name.

    Example:
        >>> rows = pd.DataFrame({"label": [0, 0, 1], "AS/T": [-2.0, -4.0, 1.0]})
        >>> rows = rows.assign(**{"correct": 1.0, "IS/T": 9.0, "kappa/T": 0.0})
        >>> found = analyze_classes(rows, ["cat", "dog", "eel"], translator="T")
        >>> [(score["name"], score["means"]["AS_neg"]) for score in found["classes"]], found["empty"]
        ([('cat', 3.0), ('dog', 0.0)], ['eel'])
    """
    table, labels = _figures(rows, class_names, translator, CENTRED if centred else "")
    known = labels >= 0
    order = np.argsort(labels[known], kind="stable")
    sorted_labels, table = labels[known][order], table[known][order]
    bounds = np.searchsorted(sorted_labels, np.arange(len(class_names) + 1))
    scores = [
        _score(label, class_names[label], table[start:stop], resamples, seed)
        for label, (start, stop) in enumerate(pairwise(bounds))
        if stop > start
    ]
    scores.sort(key=lambda score: (-score["means"]["AS_neg"], score["label"]))
    means = {name: np.array([score["means"][name] for score in scores]) for name in FIGURES}
    found: dict[str, Any] = {
        "translator": translator,
        "centred": centred,
        "images": known.sum(),
        "unlabelled": (~known).sum(),
        "classes": scores,
        "empty": [name for name, (start, stop) in zip(class_names, pairwise(bounds), strict=True) if start == stop],
        "correlations": {n: _correlation(means[n], means["accuracy"], resamples, seed) for n in CORRELATED},
    }
    return {name: plain(value) for name, value in found.items()}


def _figures(
    rows: pd.DataFrame, class_names: Sequence[str], translator: str, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """The figures of every image (N, 7) in the order of FIGURES, and its label (N,)."""
    needed = ("label", "correct", *(f"{kind}{name}/{translator}" for name in ("AS", "IS", "kappa")))
    missing = [name for name in needed if name not in rows]
    if missing:
        raise ValueError(
            f"the rows have no {', '.join(map(repr, missing))}; they have {', '.join(map(str, rows)) or 'nothing'}"
        )
    labels = rows["label"].to_numpy().astype(np.int64)
    if not (labels >= 0).any():
        raise ValueError(f"no class can be measured: none of the {len(labels)} images has a label")
    if labels.max() >= len(class_names):
        raise ValueError(f"an image has label {labels.max()}, but there are {len(class_names)} class names")
    correct, attribute, image, kappa = (rows[name].to_numpy(np.float64) for name in needed[1:])
    columns = [attribute, np.maximum(-attribute, 0), np.maximum(attribute, 0), np.abs(attribute), image, kappa, correct]
    return np.stack(columns, axis=1), labels


def _score(label: int, name: str, table: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """One class's images (n, 7) as means, intervals and evenly spaced quantiles."""
    intervals: dict[str, Any] = dict.fromkeys(FIGURES)
    if len(table) > 1:
        drawn = resampled_means(table, resamples=resamples, seed=seed + label)
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


def _correlation(figure: np.ndarray, accuracy: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Spearman's ρ over classes with the interval of resampled classes; undefined ones (nothing varies) are counted."""
    nothing = {"value": None, "low": None, "high": None, "classes": len(figure), "undefined": 0}
    if len(figure) < LEAST_CLASSES:
        return nothing
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(figure), len(figure)) for _ in range(resamples))
    values = np.array([spearman(figure[draw], accuracy[draw]) for draw in draws])
    defined = values[~np.isnan(values)]
    value, undefined = spearman(figure, accuracy), len(values) - len(defined)
    if np.isnan(value):
        return {**nothing, "undefined": undefined}
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
    return {"value": value, "low": low, "high": high, "classes": len(figure), "undefined": undefined}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation of x and y (N,), ties at their mean rank; NaN where one does not vary.

    Example:
        >>> round(spearman(np.array([1.0, 2.0, 30.0]), np.array([5.0, 4.0, 3.0])), 6)
        -1.0
    """
    a, b = (ranks - ranks.mean() for ranks in (_average_ranks(x), _average_ranks(y)))
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 0 else float("nan")


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def joint_distribution(rows: pd.DataFrame, *, translator: str = "auditor", centred: bool = False) -> dict[str, Any]:
    """Describe the joint distribution of IS and AS by one translator (METHOD section 3, paper figure 4).

    Returns:
        images; mean and std of (IS, AS) in degrees; ratio, mean IS / mean |AS|; correlation, None where one does not
        vary; ellipses at 1 and 2 sigma (none for fewer than three images): full width and height, tilt in degrees and
        the share of images inside; up to 2,000 evenly taken points (IS, AS).

    Raises:
        ValueError: the rows have no such columns, or no image.

    Example:
        >>> found = joint_distribution(pd.DataFrame({"AS/auditor": [-1.0, 3.0], "IS/auditor": [9.0, 11.0]}))
        >>> found["mean"], found["ratio"]
        ([10.0, 1.0], 5.0)
    """
    names = [f"{CENTRED if centred else ''}{figure}/{translator}" for figure in ("IS", "AS")]
    if not set(names) <= set(rows) or rows.empty:
        raise ValueError(
            f"expected rows with {names} of at least one image, got {', '.join(map(str, rows)) or 'nothing'}"
        )
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
