"""Directions that are null only nearly: small singular values of the head, and how far they may move a logit (METHOD section 9d)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from singreg.geometry.nullspace import NullSpace


@dataclass(frozen=True)
class NearNull:
    """Right singular directions of W below a share of σ_1 that are not null, and the box |ΔW f|_∞ <= τ they must stay in.

    basis (m, k) orthonormal, orthogonal to the null space; effect (C, k) = W basis, with the mean over classes taken off where
    probabilities and not logits are to stay; tolerance τ in logits. k may be 0. All float64.
    """

    basis: Tensor
    effect: Tensor
    tolerance: float

    @classmethod
    def below(cls, weight: Tensor, null_space: NullSpace, *, ratio: float, tolerance: float) -> NearNull:
        """The directions with σ <= ratio · σ_1 in the row space of W (C, m), which `null_space` was made from.

        Raises:
            ValueError: a ratio outside (0, 1], or a tolerance that is not positive.

        Example:
            >>> W = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.02, 0.0]])
            >>> near = NearNull.below(W, NullSpace.from_weight(W), ratio=0.05, tolerance=0.1)
            >>> near.basis.abs().T.tolist(), near.retract(torch.tensor([[50.0]]).double()).abs().round(decimals=6).tolist()
            ([[0.0, 1.0, 0.0]], [[5.0]])
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"the share of the largest singular value must be in (0, 1], got {ratio}")
        if not tolerance > 0:
            raise ValueError(f"the logit tolerance must be positive, got {tolerance}; for 0 use the null space itself")
        directions, sigma = null_space.singular_directions()
        basis = directions[:, sigma <= ratio * sigma[:1]]
        effect = weight.detach().to(basis) @ basis
        if null_space.invariance == "softmax":
            effect = effect - effect.mean(0, keepdim=True)
        return cls(basis, effect, tolerance)

    def retract(self, coordinates: Tensor) -> Tensor:
        """Coordinates b scaled until |effect b|_∞ <= τ; those within stay. Shapes: (..., k) to (..., k)."""
        if not self.basis.shape[1]:
            return coordinates
        moved = (coordinates @ self.effect.T).abs().amax(-1, keepdim=True)
        # a hair inside, so that adding b to a feature and reading logits again does not round over the tolerance
        scale = self.tolerance * (1 - 1e-9) / moved.clamp_min(torch.finfo(moved.dtype).tiny)
        return coordinates * scale.clamp_max(1)
