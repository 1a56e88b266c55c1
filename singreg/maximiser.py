"""The largest cosine with a text that a null displacement of bounded length can reach (METHOD section 9c)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, _one_translator

HALVINGS, NEWTON = 44, 5
SCALES = (-20.0, 20.0)  # log2 of p beside 1 / (|z| + σ_1 ε): where the best scale is looked for


def affine_maximum(start: Tensor, target: Tensor, rest: Tensor, along_rest: Tensor, singular: Tensor, budget: Tensor) -> Tensor:
    """a that maximises cos(z + S a, t) over |a| <= ε, in the basis of A's singular vectors, by one bisection.

    Where the best cosine is positive: sin²θ* = min over p >= 0 and |b| <= pε of |p z + S b - t|², with b = p a. That is jointly
    convex, so what is found is the global maximum. The inner minimum is ridge regression, b = S (t - p z) / (S² + μ) with μ
    from |b| = pε; p by bisection of the derivative. Elsewhere (no positive cosine within reach) it is a good start only.

    Shapes: start z, target t (R, r) in the left singular basis; rest |z_⊥|², along_rest z_⊥·t_⊥ (R,) outside it; singular S (r,)
    positive; budget ε (R,). t of unit length over both parts. Returns (R, r) float64.

    Example:
        >>> one = torch.ones(1).double()
        >>> affine_maximum(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double(), 0 * one, 0 * one,
        ...                torch.ones(2).double(), 0.5 * one).round(decimals=4).abs().tolist()
        [[0.25, 0.433]]
    """
    if not singular.numel():
        return start
    square = singular.square()
    length = (start.square().sum(1) + rest).sqrt() + singular.max() * budget
    low, high = (torch.full_like(budget, scale) for scale in SCALES)
    multiplier = torch.zeros_like(budget)
    found = start * 0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        p = torch.exp2(middle) / length.clamp_min(torch.finfo(length.dtype).tiny)
        wanted = singular * (target - p[:, None] * start)
        b, multiplier = _within(wanted, square, p * budget, multiplier)
        residual = p[:, None] * start + singular * b - target
        slope = p * rest - along_rest + (start * residual).sum(1) - multiplier * p * budget.square()
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
        found = b / p[:, None]
    length = torch.linalg.vector_norm(found, dim=1)
    scale = (budget / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)
    within: Tensor = found * scale[:, None]
    return within


def _within(wanted: Tensor, square: Tensor, radius: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """b = wanted / (S² + μ) with the least μ >= 0 that keeps |b| <= radius, by Newton steps on 1/|b|, which is nearly straight."""
    tiny = torch.finfo(wanted.dtype).tiny
    # |b| >= |wanted| / (S_max² + μ), so the root is not below this
    least = torch.linalg.vector_norm(wanted, dim=1) / radius.clamp_min(tiny) - square.max()
    multiplier = torch.maximum(multiplier, least).clamp_min(0)
    for _ in range(NEWTON):
        below = square + multiplier[:, None]
        b = wanted / below
        norm = torch.linalg.vector_norm(b, dim=1)
        slope = (b.square() / below).sum(1).clamp_min(tiny)
        multiplier = (multiplier + (norm / radius.clamp_min(tiny) - 1) * norm.square() / slope).clamp_min(0)
    return wanted / (square + multiplier[:, None]), multiplier


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


Constraint = Literal["ball", "sphere"]
FIRST_STEP, GROW, SHRINK, LAST_STEP = 0.5, 1.5, 0.4, 1e-12  # of the budget: the search for a step that raises the cosine
FAINT = 1e-6  # of the largest singular value: the displacement that a fainter direction needs rounds away in the logits
ROUNDED = 1e-16  # of |z|²: a rest so small is the rounding of one that is not there
FAR = 1e4  # lengths of z, that stand for infinity: further on the direction of a reading hardly changes
Problem = AffineProblem | FreeProblem


@dataclass(frozen=True)
class Maximised:
    """Features moved as far towards a text as the budget allows. All float64.

    features (R, m) = f + displacement (R, m); coordinates (R, k) as the budget bounds them, length (R,) theirs; similarity (R,)
    the cosine reached, single (R,) that of the paper's one gradient step of the whole budget.
    """

    features: Tensor
    displacement: Tensor
    coordinates: Tensor
    length: Tensor
    similarity: Tensor
    single: Tensor


class Maximiser:
    """A translator and directions prepared for `maximise`: for an affine translator one SVD serves all features and budgets.

    matrix (n, m) and offset (n,), or translator: any callable in float64 (autograd). directions: `singreg.maximiser`.
    """

    def __init__(
        self,
        directions: Directions,
        *,
        matrix: Tensor | None = None,
        offset: Tensor | None = None,
        translator: AnyTranslator | None = None,
        constraint: Constraint = "ball",
        steps: int = 60,
        restarts: int = 2,
        seed: int = 0,
    ) -> None:
        if constraint not in ("ball", "sphere"):
            raise ValueError(f'constraint must be "ball" (length <= budget) or "sphere" (length = budget), got {constraint!r}')
        if steps < 1 or restarts < 0:
            raise ValueError(f"at least one step and no negative number of restarts, got steps={steps}, restarts={restarts}")
        self.translator = _one_translator(matrix, offset, translator)
        self.directions, self.constraint, self.steps, self.restarts, self.seed = directions, constraint, steps, restarts, seed
        self.reach: AffineReach | None = None
        if matrix is not None and offset is not None:
            self.reach = AffineReach(matrix, offset, directions)

    @torch.no_grad()
    def maximise(self, features: Tensor, text: Tensor, budget: float | Tensor, *, start: Tensor | None = None) -> Maximised:
        """Start from nothing, the single gradient step, the closed form and `start`; climb from the best; restart; keep the best.

        Shapes: features (R, m), text (n,) or (R, n), budget scalar or (R,) >= 0 in the unit of the coordinates, start (R, k).
        """
        exact = features.to(torch.float64)
        unit = torch.nn.functional.normalize(text.to(exact), dim=-1).expand(len(exact), -1)
        limit = torch.as_tensor(budget, dtype=torch.float64).to(exact.device).expand(len(exact))
        if not bool((limit >= 0).all() and torch.isfinite(limit).all()):
            raise ValueError("the budget must be finite and not negative: the largest length of a displacement, in feature units")
        problem: Problem
        if self.reach is not None:
            problem = self.reach.of(exact, unit)
        else:
            assert self.translator is not None
            problem = FreeProblem(self.translator, self.directions, exact, unit)
        ascent = _Ascent(problem, limit, self.constraint == "sphere" and self._unseen() is None)
        best, single = self._first(ascent, problem, limit, start)
        best = ascent.climb(best, self.steps)
        for turn in range(self.restarts if self._may_be_local(best[1]) else 0):
            best = _better(best, ascent.climb(ascent.at(self._random(problem, limit, turn)), self.steps))
        return self._moved(exact, problem, limit, best, single)

    @torch.no_grad()
    def unbounded(self, features: Tensor, text: Tensor) -> Tensor | None:
        """Coordinates of the largest cosine without any budget, in closed form; None for a translator that is not affine.

        Where it lies at infinity, a point `FAR` on the way there. Shapes: features (R, m), text (n,) or (R, n), to (R, k).
        """
        if self.reach is None:
            return None
        exact = features.to(torch.float64)
        problem = self.reach.of(exact, torch.nn.functional.normalize(text.to(exact), dim=-1).expand(len(exact), -1))
        thin = self.reach.thin
        seen = self.reach.singular > FAINT * self.reach.singular.max() if thin else self.reach.singular > 0
        start, target = problem.start[:, :thin][:, seen], problem.target[:, :thin][:, seen]
        length = (problem.start.square().sum(1) + problem.rest).sqrt()
        rest = (length.square() - start.square().sum(1)).clamp_min(0)
        along = problem.along + (problem.start * problem.target).sum(1) - (start * target).sum(1)
        far = FAR * length / torch.linalg.vector_norm(target, dim=1).clamp_min(TINY)
        there = (along > 0) & (rest > ROUNDED * length.square())
        scale = torch.where(there, rest / along.clamp_min(TINY), far).minimum(far)
        found: Tensor = length.new_zeros(len(length), problem.size)
        found[:, :thin][:, seen] = (scale[:, None] * target - start) / self.reach.singular[seen]
        return found

    def _first(self, ascent: _Ascent, problem: Problem, limit: Tensor, start: Tensor | None) -> tuple[Found, Tensor]:
        """The best start, and the cosine of the single gradient step."""
        nothing = limit.new_zeros(len(limit), problem.size)
        gradient = problem.value_and_gradient(nothing)[1]
        one = ascent.at(limit[:, None] * _unit(gradient))
        best = _better(one, ascent.at(nothing)) if not ascent.on_sphere else one
        if isinstance(problem, AffineProblem):
            best = _better(best, ascent.at(problem.closed_form(limit)))
        if start is not None:
            best = _better(best, ascent.at(start.to(limit)))
        return best, one[1]

    def _may_be_local(self, similarity: Tensor) -> bool:
        """Whether a restart could find more: not for an affine map over a ball once every cosine is positive (a convex cone)."""
        convex = self.reach is not None and self.directions.near is None and (self.constraint == "ball" or self._unseen() is not None)
        return not (convex and bool((similarity > 0).all()))

    def _random(self, problem: Problem, limit: Tensor, turn: int) -> Tensor:
        # one direction for all rows: what is found for a picture must not hang on which others are in its chunk
        generator = torch.Generator().manual_seed(self.seed * 1000 + turn)
        drawn = torch.randn(problem.size, generator=generator, dtype=torch.float64).to(limit).expand(len(limit), -1)
        start: Tensor = limit[:, None] * _unit(problem.retract(drawn))
        return start

    def _unseen(self) -> Tensor | None:
        return None if self.reach is None else self.reach.unseen(self.seed)

    def _moved(self, features: Tensor, problem: Problem, limit: Tensor, best: Found, single: Tensor) -> Maximised:
        """Back to features; on the sphere what is left of the budget goes where the translator does not see it."""
        u, similarity, _ = best
        displacement, length = problem.to_features(u), torch.linalg.vector_norm(u, dim=1)
        unseen = self._unseen() if self.constraint == "sphere" else None
        if unseen is not None:
            displacement = displacement + (limit.square() - length.square()).clamp_min(0).sqrt()[:, None] * unseen
            length = limit.clone()
        return Maximised(features + displacement, displacement, u, length, similarity, single)


Found = tuple[Tensor, Tensor, Tensor]
"""Coordinates (R, k), their cosine (R,) and its gradient (R, k)."""


class _Ascent:
    """Projected gradient steps of R rows, each with a step length of its own that grows while it helps and shrinks otherwise."""

    def __init__(self, problem: Problem, limit: Tensor, on_sphere: bool) -> None:
        self.problem, self.limit, self.on_sphere = problem, limit, on_sphere

    def at(self, u: Tensor) -> Found:
        """Retracted to what is allowed, with value and gradient."""
        u = self._retract(u)
        return u, *self.problem.value_and_gradient(u)

    def _retract(self, u: Tensor) -> Tensor:
        u = self.problem.retract(u)
        length = torch.linalg.vector_norm(u, dim=1)
        scale = self.limit / length.clamp_min(TINY)
        if self.on_sphere:
            # a part that a tolerance has shortened must not be scaled up again
            u = scale[:, None] * u
            return self.problem.retract(u)
        inside: Tensor = scale.clamp_max(1)[:, None] * u
        return inside

    def climb(self, found: Found, steps: int) -> Found:
        """At most `steps` steps; a step is taken only where it raises the cosine, so the end is never below the start."""
        step = FIRST_STEP * self.limit
        for _ in range(steps):
            if not bool((step > LAST_STEP * self.limit).any()):
                break
            u, cosine, gradient = found
            tried = self.at(u + step[:, None] * _unit(self._tangent(u, gradient)))
            higher = tried[1] > cosine
            found = _better(found, tried)
            step = torch.where(higher, GROW * step, SHRINK * step).minimum(2 * self.limit)
        return found

    def _tangent(self, u: Tensor, gradient: Tensor) -> Tensor:
        """The gradient without its part out of the ball where u is at its edge: the retraction would only undo that."""
        length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        outward = (gradient * u).sum(1, keepdim=True) / length.clamp_min(TINY)
        edge = (length >= (1 - 1e-9) * self.limit[:, None]) & ((outward > 0) | self.on_sphere)
        return torch.where(edge, gradient - outward * u / length.clamp_min(TINY), gradient)


def _better(a: Found, b: Found) -> Found:
    """Row by row the one of the higher cosine; the first where they are equal."""
    higher = b[1] > a[1]
    return torch.where(higher[:, None], b[0], a[0]), torch.where(higher, b[1], a[1]), torch.where(higher[:, None], b[2], a[2])


def _unit(direction: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return direction / length.clamp_min(TINY)


def maximise_similarity(
    features: Tensor,
    text: Tensor,
    *,
    budget: float | Tensor,
    null_space: NullSpace | None = None,
    basis: Tensor | None = None,
    near_null: NearNull | None = None,
    matrix: Tensor | None = None,
    offset: Tensor | None = None,
    translator: AnyTranslator | None = None,
    constraint: Constraint = "ball",
    steps: int = 60,
    restarts: int = 2,
    seed: int = 0,
) -> Maximised:
    """argmax of cos(T(f + d), t) over d in a null space (or d = basis u), |d| <= ε ("ball") or = ε ("sphere"), in float64.

    An affine T (matrix, offset) over a ball has one maximum wherever a positive cosine is within reach, and it is found in closed
    form; any other T by projected gradient steps from the single step and from random directions. Never below the single step.
    With `near_null` directions of small singular value are allowed too, as far as no logit moves by more than their tolerance.

    Shapes: features (R, m), text (n,) or (R, n), budget ε scalar or (R,) in feature units; returns Maximised.

    Raises:
        ValueError: a negative budget, both or neither kind of directions or translator, or an unknown constraint.

    Example:
        >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0]]))
        >>> found = maximise_similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 1.0]), budget=3.0, null_space=space,
        ...                             matrix=torch.eye(2), offset=torch.zeros(2))
        >>> [round(float(x), 4) for x in (found.similarity, found.single, *found.displacement[0])]
        [1.0, 0.8944, 0.0, 1.0]
    """
    maximiser = Maximiser(
        Directions(null_space, basis, near_null),
        matrix=matrix, offset=offset, translator=translator, constraint=constraint, steps=steps, restarts=restarts, seed=seed,
    )  # fmt: skip
    return maximiser.maximise(features, text, budget)
