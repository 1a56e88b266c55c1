"""How natural a null component is: the Gaussian of Π_n f given Π_p f, its Mahalanobis radius and steps (METHOD section 9a)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from singreg.geometry.nullspace import NullSpace


@dataclass(frozen=True)
class ConditionalGaussian:
    """The normal distribution of the null component given the row-space component, from a mean and covariance of features.

    mean (m,); whitening (d, m) maps f - mean to a vector w that is standard normal under it, so the Mahalanobis radius is |w|;
    colouring (m, d) maps back into the null space; d is the nullity. floor: variances below floor · (mean variance) count as
    that; floored: how many of the d did. All float64.
    """

    mean: Tensor
    whitening: Tensor
    colouring: Tensor
    floor: float
    floored: int

    @classmethod
    def from_moments(
        cls, mean: Tensor, covariance: Tensor, null_space: NullSpace, *, floor: float = 1e-3
    ) -> ConditionalGaussian:
        """Condition a Gaussian of features on the head's row space.

        Directions in which features hardly vary, or fewer images than dimensions, make the covariance (nearly) singular and a
        radius meaningless: variances are kept above `floor` times their mean, in the row space before the regression and in
        the conditional covariance after it.

        Shapes: mean (m,), covariance (m, m).

        Raises:
            ValueError: shapes that do not fit, NaN or infinity, a floor outside (0, 1], no null space, or no variance in it.

        Example:
            >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0]]))
            >>> correlated = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
            >>> gaussian = ConditionalGaussian.from_moments(torch.zeros(2), correlated, space, floor=1e-6)
            >>> [round(r, 3) for r in gaussian.radius(torch.tensor([[1.0, 0.8], [0.0, 1.2]])).tolist()]
            [0.0, 2.0]
        """
        width = null_space.basis.shape[0]
        _check(mean, covariance, width, null_space.nullity, floor)
        mean, covariance = mean.to(null_space.basis), covariance.to(null_space.basis)
        row, null = null_space.basis, null_space.null_basis()
        within, across = row.T @ covariance @ row, null.T @ covariance @ row
        level = torch.diagonal(within).mean() if null_space.rank else within.new_zeros(())
        within = within + floor * level * torch.eye(null_space.rank).to(within)
        regression = across @ torch.linalg.pinv(within, hermitian=True)
        # The residual's own covariance, which no choice of regression can make negative.
        residual = null.T - regression @ row.T
        variances, vectors = torch.linalg.eigh(residual @ covariance @ residual.T)
        least = floor * float(variances.mean())
        if not least > 0:
            raise ValueError("the features do not vary in the null space at all, so no radius can be measured in it")
        deviation = variances.clamp_min(least).sqrt()
        return cls(
            mean=mean,
            whitening=(vectors / deviation).T @ residual,
            colouring=null @ (vectors * deviation),
            floor=floor,
            floored=int((variances < least).sum()),
        )

    def whiten(self, features: Tensor) -> Tensor:
        """w with |w| the radius; 0 at the null component expected from the row-space one. Shapes: (..., m) to (..., d)."""
        return (features.to(self.mean) - self.mean) @ self.whitening.T

    def radius(self, features: Tensor) -> Tensor:
        """Mahalanobis radius of Π_n f given Π_p f, about √d for natural features (no unit). Shapes: (..., m) to (...)."""
        radius: Tensor = torch.linalg.vector_norm(self.whiten(features), dim=-1)
        return radius

    def on_manifold(self, gradient: Tensor) -> Tensor:
        """Σ g: the null direction that gains most along a gradient at equal Mahalanobis length. Shapes: (..., m) to (..., m)."""
        return (gradient.to(self.mean) @ self.colouring) @ self.colouring.T

    def step_for_radius(self, features: Tensor, direction: Tensor, radii: Tensor) -> Tensor:
        """Largest ε >= 0 with radius(f + ε d) <= R for every R, in closed form; NaN where no such ε exists.

        NaN: the feature lies outside R already and the direction does not lead back in, or the direction has no length.

        Shapes: features and direction (B, m), the direction in the null space; radii (G,) >= 0; returns (B, G) float64.

        Example:
            >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0]]))
            >>> gaussian = ConditionalGaussian.from_moments(torch.zeros(2), torch.eye(2), space)
            >>> step = gaussian.step_for_radius(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([1.0, 3.0]))
            >>> [round(float(s), 3) for s in step[0]]
            [nan, 1.0]
        """
        start = self.whiten(features)
        travel = direction.to(self.mean) @ self.whitening.T
        squared, mixed, length = (start * start).sum(-1), (start * travel).sum(-1), (travel * travel).sum(-1)
        # ε² γ + 2 ε β + α - R² = 0, the larger root; β < 0 leads towards the middle of the distribution first.
        excess = squared[:, None] - radii.to(self.mean).square()
        discriminant = mixed.square()[:, None] - length[:, None] * excess
        root = (discriminant.clamp_min(0).sqrt() - mixed[:, None]) / length[:, None]
        exists = (discriminant >= 0) & (root >= 0) & (length > 0)[:, None]
        return torch.where(exists, root, torch.full_like(root, math.nan))


def _check(mean: Tensor, covariance: Tensor, width: int, nullity: int, floor: float) -> None:
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(
            f"expected mean ({width},) and covariance ({width}, {width}), got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError("the mean or covariance of the features holds NaN or infinity")
    if not 0 < floor <= 1:
        raise ValueError(f"the floor must be a share of the mean variance in (0, 1], got {floor}")
    if nullity == 0:
        raise ValueError("this head has no null space, so there is no null component whose radius could be measured")
