"""Class level: distributions of AS and IS by class, the leakiest classes first, and what leakage has to do with accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from singreg.analysis.levels.class_results import (
    DISTRIBUTION_POINTS,
    FIGURES,
    ClassMeasurement,
    ClassScore,
    Correlation,
)
from singreg.analysis.results import CENTRED, Rows
from singreg.analysis.statistics import Interval, resampled_means

LEAST_CLASSES = 3  # for a correlation over classes


def analyze_classes(
    rows: Rows, class_names: Sequence[str], *, translator: str = "auditor", centred: bool = False, resamples: int = 1000, seed: int = 0
) -> ClassMeasurement:
    """AS and IS of every class by one translator: means with bootstrap intervals, distributions, ranks, ties to accuracy.

    `rows` are one value a picture as `analyze_model(...).rows` has them: "label", "correct", "AS/NAME", "IS/NAME", "kappa/NAME".
    Intervals resample a class's pictures; those of the rank correlations resample classes. METHOD sections 3 and 8.7.

    Shapes: every column (N,); angles in degrees. Classes without pictures are listed in `empty`, pictures without a label are
    counted in `unlabelled`; neither is scored.

    Raises:
        ValueError: a column that is missing (all are named), no labelled picture, a label without a class name, a blank class name.

    Example:
        >>> rows = {"label": np.array([0, 0, 1]), "correct": np.ones(3), "AS/auditor": np.array([-2.0, -4.0, 1.0]),
        ...         "IS/auditor": np.full(3, 9.0), "kappa/auditor": np.zeros(3)}
        >>> found = analyze_classes(rows, ["cat", "dog", "eel"])
        >>> [(score.name, score.means["AS_neg"]) for score in found.classes], found.empty
        ([('cat', 3.0), ('dog', 0.0)], ('eel',))
    """
    columns, labels = _columns(rows, class_names, translator, CENTRED if centred else "")
    known = labels >= 0
    order = np.argsort(labels[known], kind="stable")
    sorted_labels, table = labels[known][order], columns[known][order]
    bounds = np.searchsorted(sorted_labels, np.arange(len(class_names) + 1))
    scores = [
        _score(label, class_names[label], table[start:stop], resamples, seed)
        for label, (start, stop) in enumerate(pairwise(bounds))
        if stop > start
    ]
    scores.sort(key=lambda score: (-score.means["AS_neg"], score.label))
    accuracy = np.array([score.means["accuracy"] for score in scores])
    return ClassMeasurement(
        translator=translator,
        centred=centred,
        images=int(known.sum()),
        unlabelled=int((~known).sum()),
        classes=tuple(scores),
        empty=tuple(class_names[label] for label in range(len(class_names)) if bounds[label] == bounds[label + 1]),
        correlations={
            name: _correlation(np.array([score.means[name] for score in scores]), accuracy, resamples, seed)
            for name in ("AS_neg", "AS_abs", "IS")
        },
    )


def _columns(rows: Rows, class_names: Sequence[str], translator: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The figures of every picture (N, 7) in the order of FIGURES, and its label (N,)."""
    needed = ("label", "correct", *(f"{kind}{name}/{translator}" for name in ("AS", "IS", "kappa")))
    missing = [name for name in needed if name not in rows]
    if missing:
        raise ValueError(f"the rows have no {', '.join(map(repr, missing))}; they have {', '.join(rows) or 'nothing'}")
    labels = np.asarray(rows["label"]).astype(np.int64)
    if not (labels >= 0).any():
        raise ValueError(f"no class can be measured: none of the {len(labels)} pictures has a label")
    if labels.max() >= len(class_names):
        raise ValueError(f"a picture has label {labels.max()}, but there are {len(class_names)} class names")
    blank = [label for label, name in enumerate(class_names) if not name.strip()]
    if blank:
        raise ValueError(f"classes without a name at positions {blank} of {len(class_names)}: give every class one")
    correct, attribute, image, kappa = (np.asarray(rows[name], dtype=np.float64) for name in needed[1:])
    columns = [attribute, np.maximum(-attribute, 0), np.maximum(attribute, 0), np.abs(attribute), image, kappa, correct]
    return np.stack(columns, axis=1), labels


def _score(label: int, name: str, table: np.ndarray, resamples: int, seed: int) -> ClassScore:
    """One class's pictures (n, 7) as means, intervals (None for a single picture) and evenly spaced quantiles."""
    intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(FIGURES)
    if len(table) > 1:
        low, high = np.quantile(resampled_means(table, resamples=resamples, seed=seed + label), [0.025, 0.975], axis=0)
        intervals = {name: (float(a), float(b)) for name, a, b in zip(FIGURES, low, high, strict=True)}
    points = np.linspace(0, 1, DISTRIBUTION_POINTS)
    return ClassScore(
        label=label,
        name=name,
        images=len(table),
        means=dict(zip(FIGURES, table.mean(0).tolist(), strict=True)),
        intervals=intervals,
        distribution={key: np.quantile(table[:, FIGURES.index(key)], points).tolist() for key in ("AS", "IS")},
    )


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank. Shapes: (N,) to (N,) float64.

    Example:
        >>> average_ranks(np.array([3.0, 1.0, 3.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of x and y (N,), ties at their mean rank; NaN where one of them does not vary (no unit).

    Example:
        >>> round(spearman(np.array([1.0, 2.0, 30.0]), np.array([5.0, 4.0, 3.0])), 6)
        -1.0
    """
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(x), average_ranks(y)))
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 0 else float("nan")


def _correlation(figure: np.ndarray, accuracy: np.ndarray, resamples: int, seed: int) -> Correlation:
    """Spearman over classes with the 95 % interval of resampled classes; undefined ones (nothing varies) are counted."""
    if len(figure) < LEAST_CLASSES:
        return Correlation(None, None, None, len(figure), 0)
    found, low, high, undefined = _bootstrap_spearman(figure, accuracy, resamples, seed)
    if np.isnan(found):
        return Correlation(None, None, None, len(figure), undefined)
    return Correlation(found, low, high, len(figure), undefined)


def _bootstrap_spearman(x: np.ndarray, y: np.ndarray, resamples: int, seed: int) -> tuple[float, float, float, int]:
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(x), len(x)) for _ in range(resamples))
    values = np.array([spearman(x[draw], y[draw]) for draw in draws])
    defined = values[~np.isnan(values)]
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
    interval: Interval = (spearman(x, y), float(low), float(high))
    return (*interval, len(values) - len(defined))
