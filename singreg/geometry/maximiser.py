"""The true maximiser of cos(T(f + d), t) over null directions of bounded length: many steps, not one (METHOD section 9c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from singreg.geometry.near_null import NearNull
from singreg.geometry.nullspace import NullSpace
from singreg.geometry.reach import TINY, AffineProblem, AffineReach, Directions, FreeProblem
from singreg.geometry.steering import AnyTranslator, _one_translator

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

    matrix (n, m) and offset (n,), or translator: any callable in float64 (autograd). directions: `singreg.geometry.reach`.
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
