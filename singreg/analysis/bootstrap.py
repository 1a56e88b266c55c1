"""Bootstrap intervals over images: of means and of paired differences and ratios of means (METHOD section 8.7)."""

from __future__ import annotations

import numpy as np

Interval = tuple[float, float, float]
DRAWN_TOGETHER = 2**16


def resampled_means(columns: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of each column over images drawn with replacement, the same draw for every column (paired).

    Shapes: columns (N, k) to (resamples, k), float64. Memory O(N), however many draws there are.
    """
    rng = np.random.default_rng(seed)
    count = len(columns)
    means = np.empty((resamples, columns.shape[1]))
    together = max(1, DRAWN_TOGETHER // max(count, 1))  # the draws are the same however many are taken at a time
    for start in range(0, resamples, together):
        draws = rng.integers(0, count, (min(together, resamples - start), count))
        places = draws + count * np.arange(len(draws))[:, None]
        weights = np.bincount(places.ravel(), minlength=draws.size).reshape(draws.shape)
        means[start : start + len(draws)] = weights @ columns / count
    return means


def mean_interval(values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """(mean, low, high) of values (N,) with the 95 % percentile interval, in the unit of `values`."""
    low, high = np.quantile(resampled_means(values[:, None], resamples=resamples, seed=seed), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def paired_difference(after: np.ndarray, before: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """(mean(after) - mean(before), low, high), paired by image; both (N,) in the same order and unit."""
    return mean_interval(np.asarray(after, np.float64) - before, resamples=resamples, seed=seed)


def paired_ratio(after: np.ndarray, before: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """(mean(after) / mean(before), low, high): a ratio of means, never a mean of ratios; both (N,), no unit.

    `before` is not negative. NaN where it is 0 everywhere; infinite at an end that the pictures do not bound.
    """
    columns = np.stack([after, before], axis=1).astype(np.float64)
    means = np.concatenate([columns.mean(0, keepdims=True), resampled_means(columns, resamples=resamples, seed=seed)])
    with np.errstate(divide="ignore", invalid="ignore"):
        value, *ratios = means[:, 0] / means[:, 1]
        defined = np.array(ratios)[~np.isnan(ratios)]
        if not columns[:, 1].any() or not len(defined):
            return np.nan, np.nan, np.nan
        ends = np.quantile(defined, [0.025, 0.975])
    low, high = np.where(np.isnan(ends), np.inf, ends)  # between two infinite draws numpy interpolates to NaN
    return float(value), float(low), float(high)
