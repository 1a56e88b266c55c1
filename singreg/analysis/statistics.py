"""Bootstrap intervals over images clustered in classes (METHOD section 8.7)."""

from typing import Any

import numpy as np

Interval = tuple[float, float, float]
ENDS = (0.025, 0.975)  # of a 95 % interval
NORMAL = 1.959963984540054  # the normal distribution's upper end


def resampled_means(
    columns: np.ndarray, *, groups: np.ndarray | None = None, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Means of each column over the images, then over images drawn with replacement, one draw for every column.

    With `groups` (N,), the images' classes, classes are drawn first, then images within each (METHOD section 8.7).

    Shape: columns (N, k) to (1 + resamples, k), float64.
    """
    rng, count = np.random.default_rng(seed), len(columns)
    means = np.empty((1 + resamples, columns.shape[1]))
    means[0] = columns.mean(0)
    if groups is None:
        for row in range(1, 1 + resamples):
            means[row] = np.bincount(rng.integers(0, count, count), minlength=count) @ columns / count
        return means
    order, sizes = np.argsort(groups, kind="stable"), np.unique(groups, return_counts=True)[1]
    starts = np.cumsum(sizes) - sizes
    for row in range(1, 1 + resamples):
        drawn = rng.integers(0, len(sizes), len(sizes))
        within = np.repeat(sizes[drawn], sizes[drawn])
        places = np.repeat(starts[drawn], sizes[drawn]) + (rng.random(len(within)) * within).astype(np.int64)
        weights = np.bincount(order[places], minlength=count)
        means[row] = weights @ columns / weights.sum()
    return means


def ends(drawn: np.ndarray) -> Interval:
    """Return (value, low, high), the 95 % percentile interval, of a figure (1 + resamples,): its own value is first."""
    defined = drawn[1:][np.isfinite(drawn[1:])]
    low, high = np.quantile(defined, ENDS) if len(defined) else (np.nan, np.nan)
    return float(drawn[0]), float(low), float(high)


def mean_interval(values: np.ndarray, **how: Any) -> Interval:
    """Return (mean, low, high) of values (N,); groups, resamples and seed are those of `resampled_means`."""
    return ends(resampled_means(values[:, None], **how)[:, 0])


def ratio_interval(above: np.ndarray, below: np.ndarray) -> Interval:
    """Return `ends` of one figure over another, both (1 + resamples,), what is infinite kept; NaN where `below` is 0.

    Between two infinite draws the interval is infinite too.
    """
    if not below.any():
        return np.nan, np.nan, np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = above / below
        bounds = np.quantile(ratios[1:][~np.isnan(ratios[1:])], ENDS)
    low, high = np.where(np.isnan(bounds), np.inf, bounds)
    return float(ratios[0]), float(low), float(high)


def paired_ratio(after: np.ndarray, before: np.ndarray, **how: Any) -> Interval:
    """(mean(after) / mean(before), low, high), a ratio of means; NaN where `before` (at least 0) is 0 everywhere."""
    return ratio_interval(*resampled_means(np.stack([after, before], axis=1).astype(np.float64), **how).T)


def share_interval(count: int, total: int) -> list[float]:
    """Return [share, low, high] by Wilson's 95 % interval, which does not shrink to nothing at 0 or at 1."""
    share, square = count / total, NORMAL**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = NORMAL / (1 + square / total) * (share * (1 - share) / total + square / (4 * total**2)) ** 0.5
    return [share, 0.0 if count == 0 else middle - half, 1.0 if count == total else middle + half]


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
