"""Unique information: can anything be read from f that cannot be read from Π_p f? (METHOD section 8.5)"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from singreg.analysis.features import FeatureBatch
from singreg.analysis.statistics import ENDS, resampled_means
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeSolution, RidgeStatistics
from singreg.utils import all_reduce_sum, gather_rows, plain

VALIDATION_EVERY = 5  # every fifth image chooses λ
BLOCKS = ("features", "row_space", "null_space")
"""What a fit was given: f, Π_p f or Π_n f."""


# A ridge regression on one-hot targets masks classes that lie between others; a discriminant needs the same sums.
@dataclass(frozen=True)
class LinearProbe:
    """Class scores g = f Bᵀ + b with B (C, k) and b (C,) in float64; a class never seen has -inf and is never named."""

    matrix: Tensor
    offset: Tensor
    majority: int  # the class seen most often
    ridge: float

    def predict(self, features: Tensor) -> Tensor:
        """Return the class of every feature. Shape: (B, k) to (B,) int64."""
        return (features.to(self.matrix) @ self.matrix.T + self.offset).argmax(1)


def fit_probe(statistics: RidgeStatistics, ridge: float) -> LinearProbe:
    """Fit linear discriminant analysis from the sums of features (k) with one-hot targets (C).

    B = M Σ⁻¹, b_c = log π_c - μ_c·Σ⁻¹μ_c / 2, with Σ the scatter within classes over N plus ridge · (mean variance), M
    the class means (C, k), π the class shares.
    """
    counts = statistics.z
    seen = int((counts > 0).sum())
    if seen < 2:
        raise ValueError(f"a probe for the class needs images of at least 2 classes, got {seen} of {len(counts)}")
    means = (statistics.fz / counts.clamp_min(1)).T
    total, _, _ = statistics.centred()
    within = statistics.ff - (means.T * counts) @ means
    penalty = ridge * torch.diagonal(total).mean()
    covariance = ((within + within.T) / 2 + penalty * torch.eye(len(within)).to(within)) / statistics.count
    factor, failed = torch.linalg.cholesky_ex(covariance)
    matrix = torch.cholesky_solve(means.T, factor).T
    if bool(failed) or ridge < 1e-9:  # without a penalty a singular scatter may pass a Cholesky by rounding alone
        matrix = means @ torch.linalg.pinv(covariance, hermitian=True)
    offset = (counts / statistics.count).log() - (matrix * means).sum(1) / 2
    return LinearProbe(matrix, offset, int(counts.argmax()), ridge)


@dataclass(frozen=True)
class BlockFits:
    """Fits on f, Π_p f and Π_n f by name, in coordinates of `basis` (m, k)."""

    basis: dict[str, Tensor]
    solutions: dict[str, RidgeSolution]
    probes: dict[str, LinearProbe]
    target_mean: Tensor


def fit_blocks(batches: Iterable[FeatureBatch], *, null_space: NullSpace, classes: int, target_dim: int) -> BlockFits:
    """Fit z and the class on f, Π_p f and Π_n f, in one pass over this process's batches; every fifth image chooses λ.

    For f each block is standardised as a whole, so a null space shrunk or turned gives the same fits.
    """
    width, device = null_space.basis.shape[0], null_space.basis.device
    sizes = (target_dim, classes)
    embedding, label = ([RidgeStatistics(width, size, device=device) for _ in range(2)] for size in sizes)
    for batch in batches:
        held_out = (batch.indices % VALIDATION_EVERY == 0).to(batch.features.device)
        known = batch.labels >= 0
        for place, chosen in enumerate((~held_out, held_out)):
            embedding[place].update(batch.features[chosen], batch.embeddings[chosen])
            both = chosen & known
            label[place].update(batch.features[both], one_hot(batch.labels[both], classes))
    for statistics in (*embedding, *label):
        statistics.reduce()
    whole, labels = embedding[0] + embedding[1], label[0] + label[1]
    basis = _bases(whole, null_space)
    solutions = {name: _chosen(embedding, columns) for name, columns in basis.items()}
    probes = {name: fit_probe(labels.mapped(each), _chosen(label, each).ridge) for name, each in basis.items()}
    return BlockFits(basis, solutions, probes, whole.z / whole.count)


def _bases(whole: RidgeStatistics, space: NullSpace) -> dict[str, Tensor]:
    """Coordinates of every block: Q, N, and for f both side by side, each over its root mean standard deviation."""
    row, null = space.basis, space.null_basis()
    scatter, _, _ = whole.centred()
    level = [((scatter @ part) * part).sum() / max(part.shape[1], 1) for part in (row, null)]
    # A block that does not vary stays as it is: whatever its scale, ridge gives it nothing.
    least = torch.finfo(scatter.dtype).eps * torch.diagonal(whole.ff).sum()
    pairs = zip((row, null), level, strict=True)
    scaled = [part / (value / whole.count).sqrt() if bool(value > least) else part for part, value in pairs]
    return dict(zip(BLOCKS, (torch.cat(scaled, dim=1), row, null), strict=True))


def _chosen(pair: Sequence[RidgeStatistics], basis: Tensor) -> RidgeSolution:
    """λ by the held-out R² of the pair's second, then the fit to all images."""
    fit, held_out = (statistics.mapped(basis) for statistics in pair)
    return (fit + held_out).solve(fit.validated(held_out))


def measure_information(batches: Iterable[FeatureBatch], fits: BlockFits) -> dict[str, Any]:
    """Measure R² and class accuracy of the fits on other images than theirs, with paired bootstrap intervals.

    R² is against the mean of these images' embeddings.

    Returns:
        r2 and accuracy by block; unique, R²(z|f) - R²(z|Π_p f), what only the null space tells of the image embedding,
        and unique_accuracy; chance, the accuracy of always naming the class most frequent in the fit; intervals of
        "r2 BLOCK", "accuracy BLOCK" and "unique".
    """
    rows, target_sum = [], torch.zeros_like(fits.target_mean)
    for batch in batches:
        targets = batch.embeddings.to(target_sum)
        target_sum += targets.sum(0)
        spread = (targets - fits.target_mean).square().sum(1)
        figures = {"index": batch.indices, "label": batch.labels, "spread": spread}
        for name, basis in fits.basis.items():
            inside = batch.features.to(basis) @ basis
            solution = fits.solutions[name]
            figures[f"r2 {name}"] = (targets - inside @ solution.matrix.T - solution.offset).square().sum(1)
            figures[f"accuracy {name}"] = (fits.probes[name].predict(inside) == batch.labels).double()
        rows.append({name: value.cpu().numpy() for name, value in figures.items()})
    table = gather_rows(rows, sort_by="index")
    known = table["label"] >= 0
    labels = table["label"][known]
    # Σ|z - z̄|² about these images' own mean, from the sums about the fit's.
    shift = float((all_reduce_sum(target_sum) / len(table["label"]) - fits.target_mean).square().sum())
    residuals = np.stack([table[f"r2 {name}"] for name in BLOCKS] + [table["spread"]], axis=1)
    means = resampled_means(residuals, groups=table["label"])
    r2 = 1 - means[:, :3] / (means[:, 3:] - shift)
    hits = resampled_means(np.stack([table[f"accuracy {name}"][known] for name in BLOCKS], axis=1), groups=labels)
    values = {f"r2 {name}": r2[:, place] for place, name in enumerate(BLOCKS)} | {"unique": r2[:, 0] - r2[:, 1]}
    values |= {f"accuracy {name}": hits[:, place] for place, name in enumerate(BLOCKS)}
    found: dict[str, Any] = {
        "r2": dict(zip(BLOCKS, r2[0], strict=True)),
        "unique": values["unique"][0],
        "accuracy": dict(zip(BLOCKS, hits[0], strict=True)),
        "unique_accuracy": hits[0, 0] - hits[0, 1],
        "chance": (labels == fits.probes["features"].majority).mean(),
        "intervals": {name: np.quantile(value[1:], ENDS) for name, value in values.items()},
    }
    return plain(found)
