"""What an attacker's coordinates do to a translated feature: affine translators reduced by one SVD, any other by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from singreg.geometry.affine_maximum import affine_maximum
from singreg.geometry.near_null import NearNull
from singreg.geometry.nullspace import NullSpace

TINY = torch.finfo(torch.float64).tiny
SEEN = 1e-10  # of the translator's own size: a direction that it sees less than this is one it does not see


@dataclass(frozen=True)
class Directions:
    """Where an attacker may go: the null space (d itself is bounded) or the span of a basis (its coordinates are), and nearly null.

    basis (m, k): d = basis u, |u| <= ε; orthonormal for a bound on |d|, a colouring matrix for a Mahalanobis radius. Exactly one
    of null_space and basis; near goes with a null space.
    """

    null_space: NullSpace | None = None
    basis: Tensor | None = None
    near: NearNull | None = None

    def __post_init__(self) -> None:
        if (self.null_space is None) == (self.basis is None):
            raise ValueError("give the directions either as null_space= or as basis=, an (m, k) matrix")
        if self.basis is not None and self.near is not None:
            raise ValueError("nearly null directions go with null_space=, not with basis=")

    @property
    def dimension(self) -> int:
        """k, without the nearly null ones."""
        if self.null_space is not None:
            return self.null_space.nullity
        assert self.basis is not None
        return self.basis.shape[1]

    @property
    def near_basis(self) -> Tensor:
        """(m, k') orthonormal; k' may be 0."""
        if self.near is not None:
            return self.near.basis
        like = self.null_space.basis if self.null_space is not None else self.basis
        assert like is not None
        return like.new_zeros(len(like), 0)


class AffineReach:
    """T(f + d) = z + U (S a) + G b in the singular basis of A over the directions: coordinates u = (a, b), a thin as A's rank.

    Prepared once for a translator and directions, used for any number of features. matrix (n, m), offset (n,).
    """

    def __init__(self, matrix: Tensor, offset: Tensor, directions: Directions) -> None:
        self.matrix, self.offset = matrix.to(torch.float64), offset.to(torch.float64)
        self.directions = directions
        space, basis = directions.null_space, directions.basis
        if space is not None:
            seen = space.component(self.matrix)
        else:
            assert basis is not None
            seen = self.matrix @ basis.to(torch.float64)
        left, singular, right = torch.linalg.svd(seen, full_matrices=False)
        size = torch.linalg.vector_norm(self.matrix) * (1 if basis is None else torch.linalg.matrix_norm(basis.to(seen), 2))
        kept = int((singular > SEEN * size).sum()) if directions.dimension else 0
        kept = min(kept, directions.dimension)
        self.singular, self._right = singular[:kept], right[:kept].T
        self.lift = self._right if space is not None else basis.to(torch.float64) @ self._right  # type: ignore[union-attr]
        beside = self.matrix @ directions.near_basis.to(self.matrix)
        self.left = torch.linalg.qr(torch.cat([left[:, :kept], beside], dim=1)).Q if beside.shape[1] else left[:, :kept]
        # a QR may turn a column round; the first ones must stay what the singular values belong to
        self.left = torch.cat([left[:, :kept], self.left[:, kept:]], dim=1)
        self.dense = self.left.T @ beside

    @property
    def thin(self) -> int:
        """r, the coordinates a."""
        return len(self.singular)

    def to_features(self, u: Tensor) -> Tensor:
        """Displacements d of coordinates. Shapes: (R, r + k') to (R, m)."""
        moved = u[:, : self.thin] @ self.lift.T
        if self.directions.null_space is not None:
            moved = self.directions.null_space.component(moved)  # what the SVD's rounding left in the row space
        displacement: Tensor = moved + u[:, self.thin :] @ self.directions.near_basis.to(u).T
        return displacement

    def unseen(self, seed: int) -> Tensor | None:
        """d (m,) of a unit coordinate direction that the translator does not see; None where it sees all of them."""
        if self.directions.dimension <= self.thin:
            return None
        generator = torch.Generator().manual_seed(seed)
        space, basis = self.directions.null_space, self.directions.basis
        size = len(self._right)
        guess = torch.randn(size, generator=generator, dtype=torch.float64).to(self.matrix)
        for _ in range(2):
            guess = guess if space is None else space.component(guess)
            guess = guess - self._right @ (self._right.T @ guess)
            guess = guess / torch.linalg.vector_norm(guess)
        return guess if space is not None else basis.to(guess) @ guess  # type: ignore[union-attr]

    def of(self, features: Tensor, text: Tensor) -> AffineProblem:
        """The problem of some rows. Shapes: features (R, m) float64, text (R, n) unit rows."""
        return AffineProblem(self, features @ self.matrix.T + self.offset, text)


class AffineProblem:
    """cos(z + U S a + G b, t) of R rows and its gradient in u = (a, b), without touching features."""

    def __init__(self, reach: AffineReach, z: Tensor, text: Tensor) -> None:
        self.reach, self.size = reach, reach.thin + reach.dense.shape[1]
        self.start, self.target = z @ reach.left, text @ reach.left
        self.rest = (z.square().sum(1) - self.start.square().sum(1)).clamp_min(0)
        self.along = (z * text).sum(1) - (self.start * self.target).sum(1)

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """cosines (R,) and their gradient (R, r + k') at coordinates (R, r + k')."""
        reach, thin = self.reach, self.reach.thin
        y = self.start + u[:, thin:] @ reach.dense.T
        y[:, :thin] += reach.singular * u[:, :thin]
        length = (y.square().sum(1) + self.rest).clamp_min(TINY).sqrt()
        cosine = ((y * self.target).sum(1) + self.along) / length
        slope = (self.target - (cosine / length)[:, None] * y) / length[:, None]
        return cosine, torch.cat([reach.singular * slope[:, :thin], slope @ reach.dense], dim=1)

    def retract(self, u: Tensor) -> Tensor:
        """Nearly null coordinates brought within the logit tolerance. Shapes: (R, r + k') to the same."""
        near = self.reach.directions.near
        return u if near is None else torch.cat([u[:, : self.reach.thin], near.retract(u[:, self.reach.thin :])], dim=1)

    def closed_form(self, budget: Tensor) -> Tensor:
        """The global maximum over a (b = 0), wherever the best cosine is positive. Shapes: (R,) to (R, r + k')."""
        thin = self.reach.thin
        # what the nearly null directions alone reach is at rest while b = 0
        outside, aside = self.start[:, thin:], self.target[:, thin:]
        rest, along = self.rest + outside.square().sum(1), self.along + (outside * aside).sum(1)
        a = affine_maximum(self.start[:, :thin], self.target[:, :thin], rest, along, self.reach.singular, budget)
        return torch.cat([a, a.new_zeros(len(a), self.size - thin)], dim=1)

    def to_features(self, u: Tensor) -> Tensor:
        """Displacements (R, m)."""
        return self.reach.to_features(u)


class FreeProblem:
    """cos(T(f + d), t) for any translator, by autograd; coordinates are d itself (null space) or u with d = basis u."""

    def __init__(
        self, translator: Callable[[Tensor], Tensor], directions: Directions, features: Tensor, text: Tensor
    ) -> None:
        self.translator, self.directions, self.features, self.text = translator, directions, features, text
        self.size = features.shape[1] if directions.null_space is not None else directions.dimension

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """cosines (R,) and their gradient (R, size) within the directions, at coordinates (R, size)."""
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            cosine = torch.nn.functional.cosine_similarity(self.translator(self.features + self._spread(leaf)), self.text, dim=-1)
            (gradient,) = torch.autograd.grad(cosine.sum(), leaf)
        return cosine.detach(), self._allowed(gradient)

    def _spread(self, u: Tensor) -> Tensor:
        basis = self.directions.basis
        return u if basis is None else u @ basis.to(u).T

    def _allowed(self, d: Tensor) -> Tensor:
        space = self.directions.null_space
        if space is None:
            return d
        near = self.directions.near_basis.to(d)
        inside = space.component(d) if space.nullity else torch.zeros_like(d)
        return inside + (d @ near) @ near.T

    def retract(self, u: Tensor) -> Tensor:
        """Within the directions, and nearly null parts within the logit tolerance. Shapes: (R, size) to the same."""
        space, near = self.directions.null_space, self.directions.near
        if space is None:
            return u
        inside = space.component(u) if space.nullity else torch.zeros_like(u)
        return inside if near is None else inside + near.retract(u @ near.basis.to(u)) @ near.basis.to(u).T

    def to_features(self, u: Tensor) -> Tensor:
        """Displacements (R, m)."""
        return self._spread(self.retract(u))
