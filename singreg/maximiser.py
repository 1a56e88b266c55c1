"""The largest cosine with a text that a null displacement of bounded length can reach (METHOD section 9c, d)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from singreg.functional import unit_rows
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, check_fixed
from singreg.translator import LinearTranslator

STEPS, RESTARTS = 60, 2  # gradient steps from every start, and random starts where one could help
FIRST_STEP, GROW, SHRINK, LAST_STEP = 0.5, 1.5, 0.4, 1e-12  # of the budget: the search for a step that helps
HALVINGS, NEWTON = 44, 5
SCALES = (-20.0, 20.0)  # log2 of p beside 1 / (|z| + σ_1 ε): where the best scale is looked for
SEEN = 1e-10  # of the translator's own size: a direction that it sees less than this is one it does not see
FAINT = 1e-6  # of the largest singular value: the displacement that a fainter direction needs rounds away in the logits
ROUNDED = 1e-16  # of |z|²: a rest so small is the rounding of one that is not there
FAR = 1e4  # lengths of z, that stand for infinity: further on the direction of a reading hardly changes
INSIDE = 1 - 1e-9  # of a tolerance, so that adding to a feature and reading logits again does not round over it
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class NearNull:
    """Right singular directions of W that are not null but below a share of σ_1, and a limit |ΔW f|_∞ <= τ on them.

    Attributes:
        basis: (m, k) orthonormal, orthogonal to the null space; k may be 0.
        effect: (C, k) W basis, without the mean over classes where only probabilities are to stay.
        tolerance: τ in logits.
    """

    basis: Tensor
    effect: Tensor
    tolerance: float

    @classmethod
    def below(cls, weight: Tensor, null_space: NullSpace, *, ratio: float, tolerance: float) -> NearNull:
        """Take the directions with σ <= ratio · σ_1 in the row space of W (C, m), which `null_space` was made from."""
        directions, sigma = null_space.singular_directions()
        basis = directions[:, sigma <= ratio * sigma[:1]]
        effect = weight.detach().to(basis) @ basis
        if null_space.invariance == "softmax":
            effect = effect - effect.mean(0, keepdim=True)
        return cls(basis, effect, tolerance)

    def retract(self, coordinates: Tensor) -> Tensor:
        """Scale coordinates b (..., k) until |effect b|_∞ <= τ; those within stay."""
        moved = (coordinates @ self.effect.T).abs().amax(-1, keepdim=True)
        return coordinates * (self.tolerance * INSIDE / moved.clamp_min(TINY)).clamp_max(1)


@dataclass(frozen=True)
class Directions:
    """Where an attacker may go, and which length is bounded: either `null_space` or `basis`.

    Attributes:
        null_space: any null displacement d, |d| <= ε.
        basis: or d = basis u, |u| <= ε, for a basis (m, k) such as the colouring of a `ConditionalGaussian`.
        near: nearly null directions beside the null space.
    """

    null_space: NullSpace | None = None
    basis: Tensor | None = None
    near: NearNull | None = None

    def inside(self, d: Tensor) -> Tensor:
        """The exactly null part of d (R, m)."""
        assert self.null_space is not None
        return self.null_space.component(d) if self.null_space.nullity else torch.zeros_like(d)

    def near_basis(self, like: Tensor) -> Tensor:
        """The nearly null basis (m, k'); k' may be 0."""
        return like.new_zeros(like.shape[-1], 0) if self.near is None else self.near.basis.to(like)


class Maximised(NamedTuple):
    """Displacements d (R, m), their coordinates (R, k), whose length is bounded, and the cosines (R,) reached."""

    displacement: Tensor
    coordinates: Tensor
    similarity: Tensor


class Maximiser:
    """argmax of cos(T(f + d), t) over the directions, |d| <= ε, in float64; never below the single gradient step.

    One SVD of a `LinearTranslator` serves all features and budgets; any other translator is differentiated by autograd.
    """

    def __init__(self, directions: Directions, translator: AnyTranslator) -> None:
        check_fixed(translator)
        self.directions, self.translator = directions, translator
        self.reach = _AffineReach(translator, directions) if isinstance(translator, LinearTranslator) else None

    @torch.no_grad()
    def maximise(
        self, features: Tensor, text: Tensor, budget: float | Tensor, *, start: Tensor | None = None
    ) -> Maximised:
        """Climb from the best of: nothing, the single gradient step, the closed form and `start`; then restart.

        Args:
            start: coordinates (R, k) of a smaller budget, so that a larger one is never worse.

        Shape: features (R, m), text (n,) or (R, n), budget ε () or (R,).
        """
        exact = features.to(torch.float64)
        limit = torch.as_tensor(budget, dtype=torch.float64).to(exact.device).expand(len(exact))
        problem = self._problem(exact, text)
        nothing = _at(problem, limit, limit.new_zeros(len(limit), problem.size))
        best = _better(_at(problem, limit, limit[:, None] * unit_rows(nothing[2])), nothing)
        if isinstance(problem, _AffineProblem):
            best = _better(best, _at(problem, limit, problem.closed_form(limit)))
        if start is not None:
            best = _better(best, _at(problem, limit, start.to(limit)))
        best = _climb(problem, limit, best)
        # An affine map has no other maximum once every cosine is positive: a convex cone.
        alone = self.reach is not None and self.directions.near is None and bool((best[1] > 0).all())
        for turn in range(0 if alone else RESTARTS):
            # one direction for all rows: what is found for an image must not hang on which others are in its chunk
            drawn = torch.randn(problem.size, generator=torch.Generator().manual_seed(turn), dtype=torch.float64)
            ahead = unit_rows(problem.retract(drawn.to(limit).expand(len(limit), -1)))
            best = _better(best, _climb(problem, limit, _at(problem, limit, limit[:, None] * ahead)))
        return Maximised(problem.to_features(best[0]), best[0], best[1])

    @torch.no_grad()
    def unbounded(self, features: Tensor, text: Tensor) -> Tensor | None:
        """Return coordinates (R, k) of the largest cosine at any length, `FAR` on the way where it lies at infinity.

        None for a translator that is not affine.
        """
        problem = self._problem(features.to(torch.float64), text)
        return problem.unbounded() if isinstance(problem, _AffineProblem) else None

    def _problem(self, features: Tensor, text: Tensor) -> Problem:
        unit = normalize(text.to(features), dim=-1).expand(len(features), -1)
        if self.reach is not None:
            return _AffineProblem(self.reach, features, unit)
        return _FreeProblem(self.translator, self.directions, features, unit)


class _AffineReach:
    """T(f + d) = z + U S a + G b: coordinates a in the singular basis of A over the directions, b nearly null."""

    def __init__(self, translator: LinearTranslator, directions: Directions) -> None:
        self.matrix, self.offset, self.directions = translator.matrix.double(), translator.offset.double(), directions
        size, basis = torch.linalg.vector_norm(self.matrix), directions.basis
        if basis is not None:
            size = size * torch.linalg.matrix_norm(basis.to(self.matrix), 2)
        seen = directions.inside(self.matrix) if basis is None else self.matrix @ basis.to(self.matrix)
        left, singular, right = torch.linalg.svd(seen, full_matrices=False)
        kept = int((singular > SEEN * size).sum())
        left, self.singular, right = left[:, :kept], singular[:kept], right[:kept].T
        self.lift = right if basis is None else basis.to(right) @ right
        self.near = directions.near_basis(self.matrix)
        beside = self.matrix @ self.near
        # a QR may turn a column round; the first ones must stay what the singular values belong to
        self.left = torch.cat([left, torch.linalg.qr(torch.cat([left, beside], dim=1)).Q[:, kept:]], dim=1)
        self.dense = self.left.T @ beside

    def to_features(self, u: Tensor) -> Tensor:
        thin = len(self.singular)
        moved = u[:, :thin] @ self.lift.T
        if self.directions.null_space is not None:
            moved = self.directions.inside(moved)  # without what the SVD's rounding left in the row space
        displacement: Tensor = moved + u[:, thin:] @ self.near.T
        return displacement


class _AffineProblem:
    """cos(z + U S a + G b, t) of R rows and its gradient in u = (a, b), (R, r + k'), without touching features."""

    def __init__(self, reach: _AffineReach, features: Tensor, text: Tensor) -> None:
        self.reach, self.thin, self.to_features = reach, len(reach.singular), reach.to_features
        self.size = self.thin + reach.dense.shape[1]
        z = features @ reach.matrix.T + reach.offset
        self.start, self.target = z @ reach.left, text @ reach.left
        self.rest = (z.square().sum(1) - self.start.square().sum(1)).clamp_min(0)
        self.along = (z * text).sum(1) - (self.start * self.target).sum(1)

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        reach, thin = self.reach, self.thin
        y = self.start + u[:, thin:] @ reach.dense.T
        y[:, :thin] += reach.singular * u[:, :thin]
        length = (y.square().sum(1) + self.rest).clamp_min(TINY).sqrt()
        cosine = ((y * self.target).sum(1) + self.along) / length
        slope = (self.target - (cosine / length)[:, None] * y) / length[:, None]
        return cosine, torch.cat([reach.singular * slope[:, :thin], slope @ reach.dense], dim=1)

    def retract(self, u: Tensor) -> Tensor:
        near = self.reach.directions.near
        return u if near is None else torch.cat([u[:, : self.thin], near.retract(u[:, self.thin :])], dim=1)

    def closed_form(self, budget: Tensor) -> Tensor:
        """The global maximum over a, b = 0, wherever the best cosine is positive; elsewhere a good start only."""
        # sin²θ* = min over p >= 0 and |c| <= pε of |p z + S c - t|², with c = p a, is jointly convex. The inner minimum
        # is ridge regression, c = S (t - p z) / (S² + μ) with μ from |c| = pε; p by bisection of the derivative.
        thin, singular = self.thin, self.reach.singular
        found = self.start.new_zeros(len(self.start), self.size)
        if not thin:
            return found
        # what the nearly null directions alone reach is at rest while b = 0
        outside, aside = self.start[:, thin:], self.target[:, thin:]
        rest, along = self.rest + outside.square().sum(1), self.along + (outside * aside).sum(1)
        start, target = self.start[:, :thin], self.target[:, :thin]
        length = (start.square().sum(1) + rest).sqrt() + singular.max() * budget
        low, high = (torch.full_like(budget, scale) for scale in SCALES)
        multiplier = torch.zeros_like(budget)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            p = torch.exp2(middle) / length.clamp_min(TINY)
            wanted = singular * (target - p[:, None] * start)
            c, multiplier = _within(wanted, singular.square(), p * budget, multiplier)
            residual = p[:, None] * start + singular * c - target
            slope = p * rest - along + (start * residual).sum(1) - multiplier * p * budget.square()
            low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
        found[:, :thin] = c / p[:, None]
        return found

    def unbounded(self) -> Tensor:
        singular, thin = self.reach.singular, self.thin
        seen = singular > FAINT * singular[:1]
        start, target = self.start[:, :thin][:, seen], self.target[:, :thin][:, seen]
        length = (self.start.square().sum(1) + self.rest).sqrt()
        rest = (length.square() - start.square().sum(1)).clamp_min(0)
        along = self.along + (self.start * self.target).sum(1) - (start * target).sum(1)
        far = FAR * length / torch.linalg.vector_norm(target, dim=1).clamp_min(TINY)
        there = (along > 0) & (rest > ROUNDED * length.square())
        scale = torch.where(there, rest / along.clamp_min(TINY), far).minimum(far)
        found = length.new_zeros(len(length), self.size)
        found[:, :thin][:, seen] = (scale[:, None] * target - start) / singular[seen]
        return found


def _within(wanted: Tensor, square: Tensor, radius: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """c = wanted / (S² + μ), |c| <= radius, of the least μ >= 0, by Newton steps on 1/|c|, which is nearly straight."""
    # |c| >= |wanted| / (S_max² + μ), so the root is not below this
    least = torch.linalg.vector_norm(wanted, dim=1) / radius.clamp_min(TINY) - square.max()
    multiplier = torch.maximum(multiplier, least).clamp_min(0)
    for _ in range(NEWTON):
        below = square + multiplier[:, None]
        c = wanted / below
        norm = torch.linalg.vector_norm(c, dim=1)
        slope = (c.square() / below).sum(1).clamp_min(TINY)
        multiplier = (multiplier + (norm / radius.clamp_min(TINY) - 1) * norm.square() / slope).clamp_min(0)
    return wanted / (square + multiplier[:, None]), multiplier


class _FreeProblem:
    """cos(T(f + d), t) for any translator, by autograd; coordinates are d itself, or u with d = basis u."""

    def __init__(self, translator: AnyTranslator, directions: Directions, features: Tensor, text: Tensor) -> None:
        self.translator, self.directions, self.features, self.text = translator, directions, features, text
        self.near = directions.near_basis(features)
        self.size = features.shape[1] if directions.basis is None else directions.basis.shape[1]

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            cosine = cosine_similarity(self.translator(self.features + self._spread(leaf)), self.text, dim=-1)
            (gradient,) = torch.autograd.grad(cosine.sum(), leaf)
        if self.directions.basis is None:
            gradient = self.directions.inside(gradient) + (gradient @ self.near) @ self.near.T
        return cosine.detach(), gradient

    def retract(self, u: Tensor) -> Tensor:
        if self.directions.basis is not None:
            return u
        near, inside = self.directions.near, self.directions.inside(u)
        return inside if near is None else inside + near.retract(u @ self.near) @ self.near.T

    def to_features(self, u: Tensor) -> Tensor:
        return self._spread(self.retract(u))

    def _spread(self, u: Tensor) -> Tensor:
        return u if self.directions.basis is None else u @ self.directions.basis.to(u).T


Problem = _AffineProblem | _FreeProblem
Found = tuple[Tensor, Tensor, Tensor]  # coordinates (R, k), their cosine (R,) and its gradient (R, k)


def _at(problem: Problem, limit: Tensor, u: Tensor) -> Found:
    """Coordinates retracted to what is allowed, with value and gradient."""
    u = problem.retract(u)
    scale = limit / torch.linalg.vector_norm(u, dim=1).clamp_min(TINY)
    u = scale.clamp_max(1)[:, None] * u
    return u, *problem.value_and_gradient(u)


def _climb(problem: Problem, limit: Tensor, found: Found) -> Found:
    """Projected gradient steps, each row's length growing while it helps; the end is never below the start."""
    step = FIRST_STEP * limit
    for _ in range(STEPS):
        if not bool((step > LAST_STEP * limit).any()):
            break
        u, cosine, gradient = found
        tried = _at(problem, limit, u + step[:, None] * unit_rows(_tangent(u, gradient, limit)))
        higher = tried[1] > cosine
        found = _better(found, tried)
        step = torch.where(higher, GROW * step, SHRINK * step).minimum(2 * limit)
    return found


def _tangent(u: Tensor, gradient: Tensor, limit: Tensor) -> Tensor:
    """The gradient without its part out of the ball where u is at its edge: the retraction would only undo that."""
    length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    outward = (gradient * u).sum(1, keepdim=True) / length.clamp_min(TINY)
    edge = (length >= INSIDE * limit[:, None]) & (outward > 0)
    return torch.where(edge, gradient - outward * u / length.clamp_min(TINY), gradient)


def _better(a: Found, b: Found) -> Found:
    """Row by row the one of the higher cosine; the first where they are equal."""
    higher = b[1] > a[1]
    wide = higher[:, None]
    return torch.where(wide, b[0], a[0]), torch.where(higher, b[1], a[1]), torch.where(wide, b[2], a[2])
