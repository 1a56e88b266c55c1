"""The scale in which ridge regression penalises features: as they are, feature by feature, or block by block of a head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Standardize = bool | Tensor
"""False: features as they are. True: each divided by its standard deviation. A basis (m, r) of a head's row space: the
row-space and the null part of the features, each divided by the root of its own energy-weighted variance."""

FeatureScale = Callable[[Tensor], Tensor]
"""A symmetric map L of feature space, applied to the columns of (m, k)."""

DEAD_FEATURE = 1e-11  # of the raw second moment: what the rounding of float64 sums leaves of a constant
DEAD_BLOCK = 1e-11  # of the whole second moment; the rounding of float32 features is 4e-15 of it


def feature_scale(scatter: Tensor, raw: Tensor, count: Tensor, standardize: Standardize) -> FeatureScale:
    """L with L f of unit scale, from the sums of a fit; a constant feature or block is mapped to 0.

    Feature by feature, the penalty Σ_j σ_j² |A_j|² depends on the axes: it ignores a rescaling of single features, but turning
    or shrinking the null block of a head that is not aligned with the axes changes every σ_j, and so the fit (METHOD section
    8.6). Block by block the penalty is s_p |A Π_p|² + s_n |A Π_n|², with s = tr(S²)/tr(S) of a block's covariance S: it moves along
    with any rotation and any rescaling of either block, so T(f) does not change at all. That mean variance is weighted by variance: a
    plain mean over 1,264 null directions, most of them almost empty, would leave the null block far cheaper than the row space.

    Shapes: scatter about the mean (m, m), raw second moments Σ f fᵀ (m, m), count ().

    Raises:
        ValueError: a basis that is not (m, r), or something else than a boolean and a basis.
    """
    if not isinstance(standardize, bool | Tensor):
        raise ValueError(
            "standardize: expected False, True or a row-space basis (m, r) such as NullSpace.from_weight(W).basis, got "
            f"{standardize!r}; names are what fit_on_part takes"
        )
    if isinstance(standardize, Tensor):
        return _by_block(scatter, raw, count, standardize)
    variance = torch.diagonal(scatter) / count
    alive = variance > DEAD_FEATURE * torch.diagonal(raw) / count
    inverse = variance.clamp_min(torch.finfo(variance.dtype).tiny).rsqrt() if standardize else torch.ones_like(variance)
    inverse = torch.where(alive, inverse, torch.zeros_like(inverse))
    return lambda columns: inverse[:, None] * columns


def _by_block(scatter: Tensor, raw: Tensor, count: Tensor, basis: Tensor) -> FeatureScale:
    width = len(scatter)
    if basis.ndim != 2 or len(basis) != width or basis.shape[1] > width:
        raise ValueError(f"expected a row-space basis ({width}, r) to standardise by, got {tuple(basis.shape)}")
    basis = basis.to(scatter)
    rank = basis.shape[1]
    across = scatter @ basis
    row = basis.T @ across
    energy = torch.diagonal(row).sum()
    # Π_n S Π_n itself, not a difference of sums of squares, in which a block shrunk to a thousandth would drown.
    half = scatter - basis @ across.T
    null = half - (half @ basis) @ basis.T
    whole = torch.diagonal(raw).sum()
    row_scale = _inverse_deviation(energy, row.square().sum(), rank, whole, count)
    null_scale = _inverse_deviation(torch.diagonal(null).sum(), null.square().sum(), width - rank, whole, count)
    # Thin: L = n I + (p - n) Q Qᵀ, never an m x m matrix.
    return lambda columns: null_scale * columns + (row_scale - null_scale) * (basis @ (basis.T @ columns))


def _inverse_deviation(energy: Tensor, squares: Tensor, size: int, raw: Tensor, count: Tensor) -> Tensor:
    """1 / root of the energy-weighted variance |B|²/(N tr B) of a block's scatter B, 0 for an empty or constant one. All ()."""
    if not size or not bool(energy > DEAD_BLOCK * raw):
        return torch.zeros_like(energy)
    return (energy * count / squares).sqrt()
