"""Steering features through the null space (METHOD sections 4 and 9)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator

AnyTranslator = Callable[[Tensor], Tensor]
"""Anything that maps features (..., m) to translated ones (..., n), row by row."""
FIRST_STEP, LARGEST_STEP = 2.0**-10, 1e3  # of the feature norm: where the search for a bracket begins and ends


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
    a `LinearTranslator`; any other translator is differentiated by autograd, and its step found by bisection.

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
    gradient = similarity_gradient(features, text, translator)
    direction = unit_in_null(null_space.component(gradient), gradient)
    if isinstance(translator, LinearTranslator):
        matrix, offset = translator.matrix.to(features), translator.offset.to(features)
        step = step_for_image_score(features @ matrix.T + offset, direction @ matrix.T, image_score)
    else:
        step = bisect_step(translator, features, direction, image_score)
    reachable = torch.isfinite(step)
    moved = features + torch.where(reachable, step, torch.zeros_like(step))[:, None] * direction
    return Steered(moved, step, reachable)


def similarity_gradient(features: Tensor, text: Tensor, translator: AnyTranslator) -> Tensor:
    """Return ∇_f cos(T f, t), (B, m), before any projection: Aᵀ(t̂ - s ẑ)/|z|, or by autograd (eq. 11)."""
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)  # in training mode no fixed function
    if isinstance(translator, nn.Module) and any(isinstance(m, random) and m.training for m in translator.modules()):
        raise ValueError(f"{type(translator).__name__} is in training mode, so no fixed function; call .eval() first")
    if not isinstance(translator, LinearTranslator):
        with torch.enable_grad():
            leaf = features.detach().requires_grad_()
            cosine = nn.functional.cosine_similarity(translator(leaf), text, dim=-1)
            return torch.autograd.grad(cosine.sum(), leaf)[0]
    matrix = translator.matrix.to(features)
    z = features @ matrix.T + translator.offset.to(features)
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    unit, target = z / length, text / torch.linalg.vector_norm(text, dim=-1, keepdim=True)
    cosine = (unit * target).sum(-1, keepdim=True)
    return ((target - cosine * unit) / length) @ matrix


def unit_in_null(direction: Tensor, gradient: Tensor) -> Tensor:
    """Scale a null direction (..., m) to length 1; 0 where it is only rounding beside its gradient (..., m)."""
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
