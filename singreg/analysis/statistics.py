"""Bootstrap intervals over images clustered in classes (METHOD section 8.7)."""

from __future__ import annotations

import numpy as np

Interval = tuple[float, float, float]
ENDS = (0.025, 0.975)  # of a 95 % interval


def resampled_means(
    columns: np.ndarray, *, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Means of each column over images drawn with replacement, the same draw for every column (paired).

    With `groups` (N,), the images' classes, classes are drawn first, then images within each (METHOD section 8.7).

    Shape: columns (N, k) to (resamples, k), float64.
    """
    rng, count = np.random.default_rng(seed), len(columns)
    means = np.empty((resamples, columns.shape[1]))
    if groups is None:
        for row in range(resamples):
            means[row] = np.bincount(rng.integers(0, count, count), minlength=count) @ columns / count
        return means
    if len(groups) != count:
        raise ValueError(f"expected a group for each of {count} images, got {len(groups)}")
    order, sizes = np.argsort(groups, kind="stable"), np.unique(groups, return_counts=True)[1]
    starts = np.cumsum(sizes) - sizes
    for row in range(resamples):
        drawn = rng.integers(0, len(sizes), len(sizes))
        within = np.repeat(sizes[drawn], sizes[drawn])
        places = np.repeat(starts[drawn], sizes[drawn]) + (rng.random(len(within)) * within).astype(np.int64)
        weights = np.bincount(order[places], minlength=count)
        means[row] = weights @ columns / weights.sum()
    return means


def mean_interval(
    values: np.ndarray, *, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return (mean, low, high) of values (N,), the 95 % percentile interval; groups as in `resampled_means`."""
    drawn = resampled_means(values[:, None], groups=groups, resamples=resamples, seed=seed)
    low, high = np.quantile(drawn, ENDS)
    return float(values.mean()), float(low), float(high)


def paired_difference(
    after: np.ndarray, before: np.ndarray, *, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> Interval:
    """(mean(after) - mean(before), low, high), paired by image; both (N,) in the same order and unit."""
    return mean_interval(np.asarray(after, np.float64) - before, groups=groups, resamples=resamples, seed=seed)


def paired_ratio(
    after: np.ndarray, before: np.ndarray, *, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> Interval:
    """(mean(after) / mean(before), low, high), a ratio of means; NaN where `before` (at least 0) is 0 everywhere."""
    columns = np.stack([after, before], axis=1).astype(np.float64)
    drawn = resampled_means(columns, groups=groups, resamples=resamples, seed=seed)
    return ratio_interval(columns.mean(0), drawn) if columns[:, 1].any() else (np.nan, np.nan, np.nan)


def paired_proportions(after: np.ndarray, before: np.ndarray) -> Interval:
    """(p_after - p_before, low, high) of two proportions on the same images, Tango's score interval (1998).

    Unlike a bootstrap's it does not shrink to a point where no image differs: 1.96² / (N + 1.96²) to both sides. It is
    over images alone: top-1 speaks of the classes that the head has. Shape: hits (N,) of 0 and 1, twice.
    """
    count, gained, lost = len(after), float((after > before).sum()), float((after < before).sum())

    def statistic(delta: float) -> float:
        b = (2 * count + lost - gained) * delta - gained - lost
        root = np.sqrt(max(b * b + 8 * count * lost * delta * (1 - delta), 0))
        variance = count * ((root - b) / (2 * count) + delta * (1 - delta))
        return float((gained - lost - count * delta) / np.sqrt(max(variance, 1e-300)))

    def end(side: int) -> float:
        inside, outside = (gained - lost) / count, float(side)
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(statistic(middle)) <= 1.96 else (inside, middle)
        return inside

    return (gained - lost) / count, end(-1), end(1)


def ratio_interval(means: np.ndarray, drawn: np.ndarray) -> Interval:
    """(first / second, low, high) of two means (2,) and their resampled ones (resamples, 2)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, ratios = means[0] / means[1], drawn[:, 0] / drawn[:, 1]
        defined = ratios[~np.isnan(ratios)]
        if not len(defined):
            return np.nan, np.nan, np.nan
        ends = np.quantile(defined, ENDS)
    low, high = np.where(np.isnan(ends), np.inf, ends)  # between two infinite draws numpy interpolates to NaN
    return float(value), float(low), float(high)
