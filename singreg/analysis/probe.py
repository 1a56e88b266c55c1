"""A fresh linear probe for the class, in closed form from streamed sums (METHOD section 8.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from singreg.ridge import RidgeStatistics

# Why not logistic regression: it needs every feature in memory or many passes over them, a stopping rule, and answers in the last
# digits by how it was run. Linear discriminant analysis needs only the sums of a ridge regression on one-hot targets: one pass,
# exact over processes, no iteration. The regression itself would do, but its largest output masks classes that lie between others
# (three in a row in one dimension: the middle one never wins), and a null space may have far fewer dimensions than classes; the
# discriminant on the same sums does not.


@dataclass(frozen=True)
class LinearProbe:
    """Class scores g = f Bᵀ + b; the largest one is the class. matrix B (C, k), offset b (C,), float64.

    A class that was never seen has offset -inf, so it is never named. majority: the class seen most often.
    """

    matrix: Tensor
    offset: Tensor
    majority: int
    ridge: float

    def predict(self, features: Tensor) -> Tensor:
        """Shapes: (B, k) to (B,) int64."""
        return (features.to(self.matrix) @ self.matrix.T + self.offset).argmax(1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (B,) as targets (B, C) float64, for `RidgeStatistics.update`."""
    return torch.nn.functional.one_hot(labels, classes).double()


def fit_probe(statistics: RidgeStatistics, ridge: float) -> LinearProbe:
    """Linear discriminant analysis from the sums of features (k) with one-hot targets (C): classes share one covariance.

    B = M Σ⁻¹, b_c = log π_c - μ_c·Σ⁻¹μ_c / 2, with Σ the scatter within classes over N plus ridge · (mean variance), M the class
    means (C, k), π the class shares.

    Raises:
        ValueError: fewer than two classes were seen.

    Example:
        >>> f, y = torch.tensor([[0.0], [0.2], [1.0], [1.2], [2.0], [2.2]]), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> probe = fit_probe(RidgeStatistics(1, 3).update(f, one_hot(y, 3)), ridge=0.0)
        >>> probe.predict(f).tolist()
        [0, 0, 1, 1, 2, 2]
    """
    counts = statistics.z
    seen = counts > 0
    if int(seen.sum()) < 2:
        raise ValueError(f"a probe for the class needs pictures of at least 2 classes, got {int(seen.sum())} of {len(counts)}")
    means = (statistics.fz / counts.clamp_min(1)).T
    total, _, _ = statistics.centred()
    within = statistics.ff - (means.T * counts) @ means
    penalty = ridge * torch.diagonal(total).mean()
    covariance = ((within + within.T) / 2 + penalty * torch.eye(len(within)).to(within)) / statistics.count
    factor, failed = torch.linalg.cholesky_ex(covariance)
    # Without a penalty a singular scatter may pass a Cholesky by rounding alone.
    singular = bool(failed) or ridge < 1e-9
    matrix = means @ torch.linalg.pinv(covariance, hermitian=True) if singular else torch.cholesky_solve(means.T, factor).T
    offset = (counts / statistics.count).log() - (matrix * means).sum(1) / 2
    return LinearProbe(matrix, offset, int(counts.argmax()), ridge)
