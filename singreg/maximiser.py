"""The largest cosine with a text that a null displacement of bounded length can reach (METHOD section 9c, d)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.functional import unit_rows
from singreg.nullspace import NullSpace, helmert_contrasts
from singreg.translator import LinearTranslator

STEPS, RESTARTS = 60, 2  # gradient steps from every start, and random starts where one could help
FIRST_STEP, GROW, SHRINK, LAST_STEP = 0.5, 1.5, 0.4, 1e-12  # of the budget: the search for a step that helps
HALVINGS, NEWTON = 44, 5
SCALES = (-20.0, 20.0)  # log2 of p beside 1 / (|z| + σ_1 ε): where the best scale is looked for
SEEN = 1e-10  # of the translator's own size: a direction that it sees less than this is one it does not see
INSIDE = 1 - 1e-9  # of a tolerance, so that adding to a feature and reading logits again does not round over it
LEFT = 0.01  # of |z|: what a translated feature keeps at least where it is turned round; 0 has no direction
ALIKE = 1e-13  # cosines this near are equal, and a share of |z|² this small is rounding
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class NearNull:
    """Right singular directions of W that are not null but below a share of σ_1, and a limit |ΔW f|_∞ <= τ on them."""

    basis: Tensor  # (m, k), orthonormal and orthogonal to the null space; k may be 0
    effect: Tensor  # (C, k): W basis, without the mean over classes where only probabilities are to stay
    tolerance: float  # τ in logits

    @classmethod
    def below(cls, weight: Tensor, null_space: NullSpace, *, ratio: float, tolerance: float) -> "NearNull":
        """Take the directions with σ <= ratio · σ_1 in the row space of W (C, m), which `null_space` was made from."""
        exact, inside, softmax = weight.detach().double(), null_space.basis, null_space.invariance == "softmax"
        rows = helmert_contrasts(exact) if softmax else exact
        _, sigma, right = torch.linalg.svd(rows @ inside, full_matrices=False)
        basis = inside @ right[sigma <= ratio * sigma[:1]].T
        effect = exact @ basis
        return cls(basis, effect - effect.mean(0) * softmax, tolerance)

    def retract(self, coordinates: Tensor) -> Tensor:
        """Scale coordinates b (..., k) until |effect b|_∞ <= τ; those within stay."""
        moved = (coordinates @ self.effect.T).abs().amax(-1, keepdim=True)
        return coordinates * (self.tolerance * INSIDE / moved.clamp_min(TINY)).clamp_max(1)


class Maximiser:
    """argmax of cos(T(f + d), t) over null d, |d| <= ε, for a linear T in float64; never below the gradient step.

    Where many d turn all that T sees of the null space to the text, the shortest is taken, or rounding would choose.

    One SVD serves all features and budgets: T(f + d) = z + U S a + G b, with coordinates a in the singular basis of
    A Π_n, and b nearly null. `near`: nearly null directions beside the null space.
    """

    def __init__(self, translator: LinearTranslator, null_space: NullSpace, near: NearNull | None = None) -> None:
        self.matrix, self.offset, self.near = translator.matrix.double(), translator.offset.double(), near
        left, singular, right = torch.linalg.svd(null_space.component(self.matrix), full_matrices=False)
        kept = int((singular > SEEN * torch.linalg.vector_norm(self.matrix)).sum())
        left, self.singular, lift = left[:, :kept], singular[:kept], null_space.component(right[:kept]).T
        beside = self.matrix.new_zeros(len(lift), 0) if near is None else near.basis
        self.lift = torch.cat([lift, beside], dim=1)
        # a QR may turn a column round; the first ones must stay what the singular values belong to
        moved = self.matrix @ beside
        self.left = torch.cat([left, torch.linalg.qr(torch.cat([left, moved], dim=1)).Q[:, kept:]], dim=1)
        self.dense = self.left.T @ moved

    @torch.no_grad()
    def maximise(
        self, features: Tensor, text: Tensor, limit: Tensor, *, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Climb from the best of: the closed form, nothing, the single gradient step and `start`; then restart.

        Args:
            start: coordinates of a smaller budget, so that a larger one is never worse.

        Shape: features (R, m), text (R, n), the budget ε as limit (R,), all float64; returns d (R, m) and its
        coordinates (R, k), whose length is bounded.
        """
        problem = _Problem(self, features, normalize(text, dim=-1), limit)
        nothing = problem.at(features.new_zeros(len(features), self.lift.shape[1]))
        best = _better(problem.at(problem.closed_form()), nothing)
        best = _better(best, problem.at(limit[:, None] * unit_rows(nothing[2])))
        best = problem.climb(best if start is None else _better(best, problem.at(start)))
        # There is no other maximum once every cosine is positive: a convex cone.
        alone = self.near is None and bool((best[1] > 0).all())
        for turn in range(0 if alone else RESTARTS):
            # one direction for all rows: what is found for an image must not hang on which others are in its chunk
            generator = torch.Generator().manual_seed(turn)
            drawn = torch.randn(self.lift.shape[1], generator=generator, dtype=torch.float64).to(features)
            ahead = unit_rows(problem.retract(drawn.expand(len(features), -1)))
            best = _better(best, problem.climb(problem.at(limit[:, None] * ahead)))
        return best[0] @ self.lift.T, best[0]


Found = tuple[Tensor, Tensor, Tensor]  # coordinates (R, k), their cosine (R,) and its gradient (R, k)


class _Problem:
    """cos(z + U S a + G b, t) of R rows in u = (a, b), (R, r + k'), |u| <= limit, without touching features."""

    def __init__(self, of: Maximiser, features: Tensor, text: Tensor, limit: Tensor) -> None:
        self.of, self.thin, self.limit = of, len(of.singular), limit
        z = features @ of.matrix.T + of.offset
        self.start, self.target = z @ of.left, text @ of.left
        self.rest = (z.square().sum(1) - self.start.square().sum(1)).clamp_min(0)
        self.along = (z * text).sum(1) - (self.start * self.target).sum(1)

    def retract(self, u: Tensor) -> Tensor:
        near = self.of.near
        return u if near is None else torch.cat([u[:, : self.thin], near.retract(u[:, self.thin :])], dim=1)

    def at(self, u: Tensor) -> Found:
        """Coordinates retracted to what is allowed, with value and gradient."""
        singular, dense, u = self.of.singular, self.of.dense, self.retract(u)
        u = (self.limit / torch.linalg.vector_norm(u, dim=1).clamp_min(TINY)).clamp_max(1)[:, None] * u
        y = self.start + u[:, self.thin :] @ dense.T
        y[:, : self.thin] += singular * u[:, : self.thin]
        length = (y.square().sum(1) + self.rest).clamp_min(TINY).sqrt()
        cosine = ((y * self.target).sum(1) + self.along) / length
        slope = (self.target - (cosine / length)[:, None] * y) / length[:, None]
        return u, cosine, torch.cat([singular * slope[:, : self.thin], slope @ dense], dim=1)

    def climb(self, found: Found) -> Found:
        """Projected gradient steps, each row's length growing while it helps; the end is never below the start."""
        step = FIRST_STEP * self.limit
        for _ in range(STEPS):
            if not bool((step > LAST_STEP * self.limit).any()):
                break
            u, cosine, gradient = found
            # at the edge of the ball without the part that leads out of it: the retraction would only undo that
            length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
            outward = (gradient * u).sum(1, keepdim=True) / length.clamp_min(TINY)
            edge = (length >= INSIDE * self.limit[:, None]) & (outward > 0)
            ahead = torch.where(edge, gradient - outward * u / length.clamp_min(TINY), gradient)
            tried = self.at(u + step[:, None] * unit_rows(ahead))
            found = _better(found, tried)
            step = torch.where(tried[1] > cosine + ALIKE, GROW * step, SHRINK * step).minimum(2 * self.limit)
        return found

    def closed_form(self) -> Tensor:
        """The global maximum over a, b = 0, wherever the best cosine is positive; elsewhere a good start only."""
        # sin²θ* = min over p >= 0 and |c| <= pε of |p z + S c - t|², with c = p a, is jointly convex. The inner minimum
        # is ridge regression, c = S (t - p z) / (S² + μ) with μ from |c| = pε; p by bisection of the derivative.
        thin, singular, budget = self.thin, self.of.singular, self.limit
        found = self.start.new_zeros(len(self.start), self.of.lift.shape[1])
        if not thin:
            return found
        # what the nearly null directions alone reach is at rest while b = 0
        outside, aside = self.start[:, thin:], self.target[:, thin:]
        rest, along = self.rest + outside.square().sum(1), self.along + (outside * aside).sum(1)
        start, target = self.start[:, :thin], self.target[:, :thin]
        whole = (start.square().sum(1) + rest).sqrt()
        length = whole + singular.max() * budget
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
        # Where z has no part aside, every a = (q t - z) / S with q > 0 turns it to t as far as S can: the shortest one.
        q = (target * start / singular.square()).sum(1) / (target / singular).square().sum(1).clamp_min(TINY)
        q = torch.maximum(q, LEFT * whole)
        exact = (q[:, None] * target - start) / singular
        ends = (rest <= ALIKE * whole.square()) & (torch.linalg.vector_norm(exact, dim=1) <= budget)
        found[:, :thin] = torch.where(ends[:, None], exact, c / p[:, None])
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


def _better(a: Found, b: Found) -> Found:
    """Row by row the one of the higher cosine; the first where they are alike."""
    higher = b[1] > a[1] + ALIKE
    wide = higher[:, None]
    return torch.where(wide, b[0], a[0]), torch.where(higher, b[1], a[1]), torch.where(wide, b[2], a[2])
