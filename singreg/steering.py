"""Steering features through the null space: one step to an angle, natural radii, the true maximum (METHOD 4 and 9)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from singreg.functional import angle, unit_rows
from singreg.nullspace import NullSpace, helmert_contrasts
from singreg.translator import LinearTranslator

AnyTranslator = Callable[[Tensor], Tensor]
"""Anything that maps features (..., m) to translated ones (..., n), row by row."""
FIRST_STEP, LARGEST_STEP = 2.0**-10, 1e3  # of the feature norm: where the search for a bracket begins and ends
STEPS, RESTARTS = 60, 2  # gradient steps from every start, and random starts where one could help
CLIMB_STEP, GROW, SHRINK, LAST_STEP = 0.5, 1.5, 0.4, 1e-12  # of the budget: the search for a step that helps
HALVINGS, NEWTON = 44, 5
SCALES = (-20.0, 20.0)  # log2 of p beside 1 / (|z| + σ_1 ε): where the best scale is looked for
SEEN = 1e-10  # of the translator's own size: a direction that it sees less than this is one it does not see
INSIDE = 1 - 1e-9  # of a tolerance, so that adding to a feature and reading logits again does not round over it
LEFT = 0.01  # of |z|: what a translated feature keeps at least where it is turned round; 0 has no direction
ALIKE = 1e-13  # cosines this near are equal, and a share of |z|² this small is rounding
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Steered:
    """Steered features (B, m), the steps (B,) in their units, NaN out of reach, and whether the angle was reachable."""

    features: Tensor
    step: Tensor
    reachable: Tensor


def steer(
    features: Tensor, text: Tensor, *, null_space: NullSpace, translator: AnyTranslator, image_score: float
) -> Steered:
    """Move features through the null space towards a text until the image score is `image_score` degrees (eq. 13).

    The logits do not change. Features that cannot reach the angle are returned unmoved. The step has a closed form for
    a `LinearTranslator`, and is found by bisection for any other.

    Shape: features (B, m), text (n,) or (B, n).

    Raises:
        ValueError: an angle outside (0, 180), or a translator in training mode.

    Example:
        >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0]]))
        >>> T = LinearTranslator(torch.eye(2), torch.zeros(2))
        >>> f, t = torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0])
        >>> steer(f, t, null_space=space, translator=T, image_score=45.0).features.tolist()
        [[1.0, 1.0]]
    """
    if not 0 < image_score < 180:
        raise ValueError(f"the wanted image score must be in (0, 180) degrees, got {image_score}")
    direction = unit_in_null(similarity_gradient(features, text, translator), null_space)
    if isinstance(translator, LinearTranslator):
        matrix, offset = translator.matrix.to(features), translator.offset.to(features)
        step = step_for_image_score(features @ matrix.T + offset, direction @ matrix.T, image_score)
    else:
        step = bisect_step(translator, features, direction, image_score)
    reachable = torch.isfinite(step)
    moved = features + torch.where(reachable, step, torch.zeros_like(step))[:, None] * direction
    return Steered(moved, step, reachable)


def similarity_gradient(features: Tensor, text: Tensor, translator: AnyTranslator) -> Tensor:
    """Return ∇_f cos(T f, t), (B, m), before any projection (eq. 11)."""
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)  # in training mode no fixed function
    if isinstance(translator, nn.Module) and any(isinstance(m, random) and m.training for m in translator.modules()):
        raise ValueError(f"{type(translator).__name__} is in training mode, so no fixed function; call .eval() first")
    with torch.enable_grad():
        leaf = features.detach().requires_grad_()
        cosine = nn.functional.cosine_similarity(translator(leaf), text, dim=-1)
        return torch.autograd.grad(cosine.sum(), leaf)[0]


def unit_in_null(gradient: Tensor, null_space: NullSpace) -> Tensor:
    """Return the null part of a gradient (..., m) at length 1; 0 where it is only rounding beside the gradient."""
    direction = null_space.component(gradient)
    norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    negligible = norm <= 1e-6 * torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    scaled = direction / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.where(negligible, torch.zeros_like(direction), scaled)


def step_for_image_score(z: Tensor, u: Tensor, degrees: float) -> Tensor:
    """Return the smallest ε > 0 with angle(z, z + ε u) = θ, in closed form; NaN where θ >= angle(z, u) is out of reach.

    Shape: translated features z and directions u = A d̂ (..., n); returns (...) in the dtype of z, found in float64.
    """
    dtype, z, u = z.dtype, z.to(torch.float64), u.to(torch.float64)
    theta = math.radians(degrees)
    alpha, beta, gamma = (z * z).sum(-1), (z * u).sum(-1), (u * u).sum(-1)
    # In the plane of z and u: tan θ = ε p / (|z| + ε q), q = u·ẑ, p = |u - q ẑ|. The wanted root of METHOD section 4's
    # quadratic is ε = |z| sin θ / (p cos θ - q sin θ), which has no cancellation and no sign to choose.
    along = beta / alpha.sqrt()
    across = (gamma - along * along).clamp_min(0).sqrt()
    denominator = across * math.cos(theta) - along * math.sin(theta)
    step = alpha.sqrt() * math.sin(theta) / denominator
    reachable = (denominator > 1e-12 * gamma.sqrt()) & (alpha > 0) & (gamma > 0)
    return torch.where(reachable, step, torch.full_like(step, math.nan)).to(dtype)


@torch.no_grad()
def bisect_step(translator: AnyTranslator, features: Tensor, direction: Tensor, degrees: float) -> Tensor:
    """Return the first ε > 0 found with angle(T f, T(f + ε d̂)) = θ for any translator; NaN where it is out of reach.

    Doubles ε until the angle is passed, then halves the bracket down to the dtype's resolution, all rows at once.

    Shape: features, direction (B, m); returns (B,) in units of the features.
    """
    z = translator(features)

    def below(step: Tensor) -> Tensor:
        return angle(z, translator(features + step[:, None] * direction)) < degrees

    norm = torch.linalg.vector_norm(features, dim=-1)
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))
    low, high = torch.zeros_like(scale), FIRST_STEP * scale
    short = below(high)
    while bool((short & (high < LARGEST_STEP * scale)).any()):
        low = torch.where(short, high, low)
        high = torch.where(short, torch.minimum(2 * high, LARGEST_STEP * scale), high)
        short = below(high)
    for _ in range(round(-math.log2(torch.finfo(features.dtype).eps))):
        middle = (low + high) / 2
        less = below(middle)
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return torch.where(short, torch.full_like(high, math.nan), high)


@dataclass(frozen=True)
class ConditionalGaussian:
    """The normal distribution of the null component given the row-space component. All float64; d is the nullity."""

    mean: Tensor  # (m,), of the features
    whitening: Tensor  # (d, m): f - mean to w, standard normal under it, so that the Mahalanobis radius is |w|
    floor: float  # variances below this share of their mean count as that
    floored: int  # how many of the d did

    @classmethod
    def from_moments(
        cls, mean: Tensor, covariance: Tensor, null_space: NullSpace, *, floor: float = 1e-3
    ) -> "ConditionalGaussian":
        """Condition a Gaussian of features, mean (m,) and covariance (m, m), on the head's row space.

        A (nearly) singular covariance would make a radius meaningless: variances are kept above `floor` times their
        mean, in the row space before the regression and in the conditional covariance after it.
        """
        mean, covariance = mean.to(null_space.basis), covariance.to(null_space.basis)
        row, null = null_space.basis, null_space.null_basis()
        within, across = row.T @ covariance @ row, null.T @ covariance @ row
        within = within + floor * torch.diagonal(within).mean() * torch.eye(null_space.rank).to(within)
        regression = across @ torch.linalg.pinv(within, hermitian=True)
        # The residual's own covariance, which no choice of regression can make negative.
        residual = null.T - regression @ row.T
        variances, vectors = torch.linalg.eigh(residual @ covariance @ residual.T)
        least = floor * float(variances.mean())
        if not least > 0:
            raise ValueError("the features do not vary in the null space at all, so no radius can be measured in it")
        deviation = variances.clamp_min(least).sqrt()
        return cls(mean, (vectors / deviation).T @ residual, floor, floored=int((variances < least).sum()))

    def whiten(self, features: Tensor) -> Tensor:
        """Return w (..., d), 0 at the null component expected from the row-space one."""
        return (features.to(self.mean) - self.mean) @ self.whitening.T

    def radius(self, features: Tensor) -> Tensor:
        """Return the Mahalanobis radius |w| (...,), about √d for natural features."""
        return torch.linalg.vector_norm(self.whiten(features), dim=-1)

    def step_for_radius(self, features: Tensor, direction: Tensor, radii: Tensor) -> Tensor:
        """Return the largest ε >= 0 with radius(f + ε d) <= R for every R, in closed form; NaN where there is none.

        Shape: features and directions in the null space (B, m), radii (G,) >= 0; returns (B, G) float64.
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
        step = CLIMB_STEP * self.limit
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
