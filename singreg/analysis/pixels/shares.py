"""Intervals of shares that do not shrink to nothing where nothing, or everything, was counted."""

from __future__ import annotations

NORMAL = 1.959963984540054  # the 97.5 % quantile


def share_interval(count: int, total: int) -> list[float]:
    """[share, low, high] by Wilson's 95 % interval: no success among 128 pictures still leaves up to 2.9 % (shares).

    Raises:
        ValueError: no pictures, or more successes than pictures.

    Example:
        >>> [round(value, 3) for value in share_interval(0, 128)]
        [0.0, 0.0, 0.029]
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"expected 0 to {total} of at least 1 picture, got {count} of {total}")
    share, square = count / total, NORMAL**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = NORMAL / (1 + square / total) * (share * (1 - share) / total + square / (4 * total**2)) ** 0.5
    low = 0.0 if count == 0 else middle - half
    high = 1.0 if count == total else middle + half
    return [share, low, high]
