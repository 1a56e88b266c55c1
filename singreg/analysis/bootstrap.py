"""Bootstrap intervals over images: of means and of paired differences and ratios of means (METHOD section 8.7)."""

from __future__ import annotations

import numpy as np

Interval = tuple[float, float, float]


def resampled_means(columns: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of each column over images drawn with replacement, the same draw for every column (paired).

    Shapes: columns (N, k) to (resamples, k), float64. Memory O(N) a draw, however many there are.
    """
    rng = np.random.default_rng(seed)
    count = len(columns)
    means = np.empty((resamples, columns.shape[1]))
    for row in range(resamples):
        weights = np.bincount(rng.integers(0, count, count), minlength=count)
        means[row] = weights @ columns / count
    return means


def mean_interval(values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """(mean, low, high) of values (N,) with the 95 % percentile interval, in the unit of `values`."""
    low, high = np.quantile(resampled_means(values[:, None], resamples=resamples, seed=seed), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def paired_difference(after: np.ndarray, before: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """(mean(after) - mean(before), low, high), paired by image; both (N,) in the same order and unit."""
    return mean_interval(np.asarray(after, np.float64) - before, resamples=resamples, seed=seed)


def paired_ratio(after: np.ndarray, before: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """(mean(after) / mean(before), low, high): a ratio of means, never a mean of ratios; both (N,), no unit."""
    columns = np.stack([after, before], axis=1).astype(np.float64)
    means = resampled_means(columns, resamples=resamples, seed=seed)
    ratios = means[:, 0] / np.maximum(means[:, 1], np.finfo(np.float64).tiny)
    low, high = np.quantile(ratios, [0.025, 0.975])
    top, bottom = columns.mean(0)
    return float(top / max(bottom, np.finfo(np.float64).tiny)), float(low), float(high)
