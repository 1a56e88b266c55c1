"""Steering features through the null space (METHOD sections 4 and 9)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from singreg.functional import angle
from singreg.nullspace import NullSpace

AnyTranslator = Callable[[Tensor], Tensor]
"""Anything that maps features (..., m) to translated ones (..., n), row by row."""
FIRST_STEP = 2.0**-10  # of the feature norm: where the search for a bracket begins
LARGEST_STEP = 1e3  # of the feature norm: where it ends

@dataclass(frozen=True)
class Steered:
    """Steered features and what they took. features (B, m), step (B,) in feature units, reachable (B,) bool."""

    features: Tensor
    step: Tensor
    reachable: Tensor


def steering_direction(
    features: Tensor,
    text: Tensor,
    *,
    null_space: NullSpace,
    matrix: Tensor | None = None,
    offset: Tensor | None = None,
    translator: AnyTranslator | None = None,
) -> Tensor:
    """Unit null direction d̂ that raises cos(T f, t) fastest: Π_n ∇_f cos(T f, t), normalised (paper eq. 10-12).

    The translator is either linear, given by matrix A and offset a (gradient Aᵀ(t̂ - s ẑ)/|z|), or any callable (autograd).

    Shapes: features (B, m), text (n,) or (B, n), matrix (n, m), offset (n,); returns (B, m). Zero where the gradient has no
    null part.

    Raises:
        ValueError: both or neither kind of translator, or a module whose dropout or batch norm is in training mode.

    Example:
        >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0]]))
        >>> steering_direction(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0]), matrix=torch.eye(2),
        ...                    offset=torch.zeros(2), null_space=space).tolist()
        [[0.0, 1.0]]
    """
    gradient = similarity_gradient(features, text, matrix=matrix, offset=offset, translator=translator)
    return unit_in_null(null_space.component(gradient), gradient)


def similarity_gradient(
    features: Tensor,
    text: Tensor,
    *,
    matrix: Tensor | None = None,
    offset: Tensor | None = None,
    translator: AnyTranslator | None = None,
) -> Tensor:
    """∇_f cos(T f, t) of every feature, before any projection (paper eq. 11); the translator as in `steering_direction`.

    Shapes: features (B, m), text (n,) or (B, n); returns (B, m).
    """
    translator = _one_translator(matrix, offset, translator)
    gradient: Tensor
    if translator is not None:
        with torch.enable_grad():
            leaf = features.detach().requires_grad_()
            similarity = torch.nn.functional.cosine_similarity(translator(leaf), text, dim=-1)
            (gradient,) = torch.autograd.grad(similarity.sum(), leaf)
        return gradient
    assert matrix is not None
    assert offset is not None
    z = features @ matrix.T + offset
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    unit, target = z / length, text / torch.linalg.vector_norm(text, dim=-1, keepdim=True)
    similarity = (unit * target).sum(-1, keepdim=True)
    gradient = ((target - similarity * unit) / length) @ matrix
    return gradient


def unit_in_null(direction: Tensor, gradient: Tensor) -> Tensor:
    """A null direction scaled to length 1, and 0 where it is rounding only beside its whole gradient. Shapes: (..., m) each."""
    norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    # Relative to the whole gradient: what is left of rounding is not a direction.
    negligible = norm <= 1e-6 * torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return torch.where(negligible, torch.zeros_like(direction), direction / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def _one_translator(matrix: Tensor | None, offset: Tensor | None, translator: AnyTranslator | None) -> AnyTranslator | None:
    """The callable, or None for a linear map; refuses what is ambiguous or not a fixed function."""
    if (translator is None) == (matrix is None) or (matrix is None) != (offset is None):
        raise ValueError("give the translator either as matrix= and offset= (linear) or as translator= (any callable)")
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    if isinstance(translator, nn.Module) and any(isinstance(m, random) and m.training for m in translator.modules()):
        raise ValueError(f"{type(translator).__name__} is in training mode, so it is no fixed function; call .eval() first")
    return translator


def step_for_image_score(z: Tensor, u: Tensor, degrees: float) -> Tensor:
    """Smallest ε > 0 with angle(z, z + ε u) = θ, in closed form; NaN where θ is out of reach (θ >= angle(z, u)).

    Solves ε²(β² - γαk) + 2αβ(1-k)ε + α²(1-k) = 0 with α = |z|², β = z·u, γ = |u|², k = cos²θ (METHOD section 4), in float64.

    Shapes: z (..., n) translated features, u = A d̂ (..., n); degrees θ in (0, 180); returns (...) in the dtype of z.

    Raises:
        ValueError: θ is not in (0, 180) degrees.

    Example:
        >>> step_for_image_score(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 45.0).item()
        1.0
    """
    _check_degrees(degrees)
    dtype, z, u = z.dtype, z.to(torch.float64), u.to(torch.float64)
    theta = math.radians(degrees)
    alpha, beta, gamma = (z * z).sum(-1), (z * u).sum(-1), (u * u).sum(-1)
    # In the plane of z and u: tan θ = ε p / (|z| + ε q), q = u·ẑ, p = |u - q ẑ|. The quadratic's wanted root is
    # ε = |z| sin θ / (p cos θ - q sin θ), which has no cancellation and no sign to choose.
    along = beta / alpha.sqrt()
    across = (gamma - along * along).clamp_min(0).sqrt()
    denominator = across * math.cos(theta) - along * math.sin(theta)
    step = alpha.sqrt() * math.sin(theta) / denominator
    reachable = (denominator > 1e-12 * gamma.sqrt()) & (alpha > 0) & (gamma > 0)
    return torch.where(reachable, step, torch.full_like(step, math.nan)).to(dtype)


def bisect_step(
    translator: AnyTranslator, features: Tensor, direction: Tensor, degrees: float, *, largest: float = LARGEST_STEP
) -> Tensor:
    """First ε > 0 found with angle(T f, T(f + ε d̂)) = θ for any translator; NaN where it is out of reach.

    Doubles ε from |f|/1024 until the angle is passed, at most to `largest` · |f|, then halves the bracket down to the dtype's
    resolution, all rows at once. For a linear translator the angle grows with ε, so this is `step_for_image_score`'s root.

    Shapes: features, direction (B, m); degrees θ in (0, 180); returns (B,) in units of the features.

    Raises:
        ValueError: θ is not in (0, 180) degrees, or `largest` is not above 1/1024.

    Example:
        >>> f, d = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(bisect_step(lambda f: f, f, d, 45.0).item(), 4)
        1.0
    """
    _check_degrees(degrees)
    if not largest > FIRST_STEP:
        raise ValueError(f"the largest step must be above {FIRST_STEP} of the feature norm, where the search begins, got {largest}")
    with torch.no_grad():
        z = translator(features)

        def below(step: Tensor) -> Tensor:
            return angle(z, translator(features + step[:, None] * direction)) < degrees

        norm = torch.linalg.vector_norm(features, dim=-1)
        scale = torch.where(norm > 0, norm, torch.ones_like(norm))
        low, high = torch.zeros_like(scale), FIRST_STEP * scale
        short = below(high)
        while bool((short & (high < largest * scale)).any()):
            low = torch.where(short, high, low)
            high = torch.where(short, torch.minimum(2 * high, largest * scale), high)
            short = below(high)
        for _ in range(round(-math.log2(torch.finfo(features.dtype).eps))):
            middle = (low + high) / 2
            less = below(middle)
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return torch.where(short, torch.full_like(high, math.nan), high)


def _check_degrees(degrees: float) -> None:
    if not 0 < degrees < 180:
        raise ValueError(f"the wanted image score must be in (0, 180) degrees, got {degrees}")


def steer(
    features: Tensor,
    text: Tensor,
    *,
    null_space: NullSpace,
    image_score: float,
    matrix: Tensor | None = None,
    offset: Tensor | None = None,
    translator: AnyTranslator | None = None,
) -> Steered:
    """Move features through the null space towards a text until the image score is `image_score` degrees (eq. 13).

    The logits do not change. A linear translator (matrix, offset) has a closed-form step; any other (`translator`) is
    differentiated by autograd and its step found by `bisect_step`. Features that cannot reach the angle are returned unmoved
    with `reachable` False.

    Shapes: features (B, m), text (n,) or (B, n), matrix (n, m), offset (n,); returns Steered.

    Example:
        >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0]]))
        >>> steer(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0]), matrix=torch.eye(2), offset=torch.zeros(2),
        ...       null_space=space, image_score=45.0).features.tolist()
        [[1.0, 1.0]]
    """
    direction = steering_direction(
        features, text, matrix=matrix, offset=offset, translator=translator, null_space=null_space
    )
    if translator is not None:
        step = bisect_step(translator, features, direction, image_score)
    else:
        assert matrix is not None
        assert offset is not None
        step = step_for_image_score(features @ matrix.T + offset, direction @ matrix.T, image_score)
    reachable = torch.isfinite(step)
    moved = features + torch.where(reachable, step, torch.zeros_like(step))[:, None] * direction
    return Steered(moved, step, reachable)


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
