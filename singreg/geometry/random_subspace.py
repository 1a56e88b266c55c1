"""Random subspaces in the null space's place: the removals that scores are held against (METHOD sections 8.2 and 8.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomSubspace:
    """A uniformly random subspace of feature space, by an orthonormal basis of the thinner of it and its complement.

    basis (m, k), k = min(d, m - d); complement: the basis spans what is kept, so P g = g - B Bᵀ g, else P g = B Bᵀ g.

    Example:
        >>> space = RandomSubspace.draw(5, 4, seed=0)
        >>> tuple(space.basis.shape), space.complement, space.dimension
        ((5, 1), True, 4)
    """

    basis: Tensor
    complement: bool

    @classmethod
    def draw(cls, width: int, dimension: int, *, seed: int | Sequence[int]) -> RandomSubspace:
        """A subspace of `dimension` d of the m = `width` features, the same for the same seed anywhere (float64).

        Raises:
            ValueError: d is not in 1..m.
        """
        if not 1 <= dimension <= width:
            raise ValueError(f"a random subspace of {width} features needs a dimension in 1..{width}, got {dimension}")
        thin = min(dimension, width - dimension)
        # NumPy's generator takes several numbers as a seed; torch's uses the lower 32 bits of one.
        gaussian = torch.from_numpy(np.random.default_rng(seed).standard_normal((width, thin)))
        return cls(torch.linalg.qr(gaussian).Q, complement=dimension > thin)

    @property
    def dimension(self) -> int:
        """d, of the subspace itself."""
        return self.basis.shape[0] - self.basis.shape[1] if self.complement else self.basis.shape[1]

    def to(self, like: Tensor) -> RandomSubspace:
        """On the device and in the dtype of a tensor of any shape (...)."""
        return RandomSubspace(self.basis.to(like), self.complement)

    def component(self, features: Tensor) -> Tensor:
        """P g, the part in the subspace. Shapes: (..., m) to (..., m)."""
        inside = (features @ self.basis) @ self.basis.T
        return features - inside if self.complement else inside


def matched_coefficients(null_share: Tensor, random_share: Tensor) -> tuple[Tensor, Tensor]:
    """(α, β) of the displacement δ = α g + β P g that is as long as Π_n g and at the same angle to g, image by image.

    With s² = |Π_n g|²/|g|² and p² = |P g|²/|g|²: β = √(s²(1-s²) / (p²(1-p²))), α = s² - β p². Then |δ|² = δ·g = s²|g|², as for
    an orthogonal projection that removes exactly the energy the null space removes. Its part across g has the direction of
    P g's, which for a uniformly random subspace is uniform: δ is Π_n g turned about g at random.

    Shapes: s², p² (...) in [0, 1] to two (...). Where P g has no part across g (p² 0 or 1), β = 0 and δ lies along g.

    Example:
        >>> [round(float(x), 3) for x in matched_coefficients(torch.tensor(0.5), torch.tensor(0.2))]
        [0.25, 1.25]
    """
    across = random_share * (1 - random_share)
    usable = across > torch.finfo(across.dtype).eps
    wanted = (null_share * (1 - null_share)).clamp_min(0)
    beta = torch.where(usable, wanted / torch.where(usable, across, torch.ones_like(across)), torch.zeros_like(across)).sqrt()
    return null_share - beta * random_share, beta
