"""Steering inside the null space: closed forms for a linear translator (METHOD section 4, paper eq. 10-13)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from singreg.geometry.nullspace import NullSpace


@dataclass(frozen=True)
class Steered:
    """Steered features and what they took. features (B, m), step (B,) in feature units, reachable (B,) bool."""

    features: Tensor
    step: Tensor
    reachable: Tensor


def steering_direction(features: Tensor, text: Tensor, *, matrix: Tensor, offset: Tensor, null_space: NullSpace) -> Tensor:
    """Unit null direction d̂ that raises cos(T f, t) fastest: Π_n Aᵀ(t̂ - s ẑ)/|z|, normalised (paper eq. 10-12).

    Shapes: features (B, m), text (n,) or (B, n), matrix A (n, m), offset a (n,); returns (B, m). Zero where the gradient has
    no null part.

    Example:
        >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0]]))
        >>> steering_direction(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0]), matrix=torch.eye(2),
        ...                    offset=torch.zeros(2), null_space=space).tolist()
        [[0.0, 1.0]]
    """
    z = features @ matrix.T + offset
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    unit, target = z / length, text / torch.linalg.vector_norm(text, dim=-1, keepdim=True)
    similarity = (unit * target).sum(-1, keepdim=True)
    gradient = ((target - similarity * unit) / length) @ matrix
    direction = null_space.component(gradient)
    norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    # Relative to the whole gradient: what is left of rounding is not a direction.
    negligible = norm <= 1e-6 * torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return torch.where(negligible, torch.zeros_like(direction), direction / norm.clamp_min(torch.finfo(norm.dtype).tiny))


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
    if not 0 < degrees < 180:
        raise ValueError(f"the wanted image score must be in (0, 180) degrees, got {degrees}")
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


def steer(
    features: Tensor, text: Tensor, *, matrix: Tensor, offset: Tensor, null_space: NullSpace, image_score: float
) -> Steered:
    """Move features through the null space towards a text until the image score is `image_score` degrees (eq. 13).

    The logits do not change. Features that cannot reach the angle are returned unmoved with `reachable` False.

    Shapes: features (B, m), text (n,) or (B, n), matrix (n, m), offset (n,); returns Steered.

    Example:
        >>> space = NullSpace.from_weight(torch.tensor([[1.0, 0.0]]))
        >>> steer(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0]), matrix=torch.eye(2), offset=torch.zeros(2),
        ...       null_space=space, image_score=45.0).features.tolist()
        [[1.0, 1.0]]
    """
    direction = steering_direction(features, text, matrix=matrix, offset=offset, null_space=null_space)
    step = step_for_image_score(features @ matrix.T + offset, direction @ matrix.T, image_score)
    reachable = torch.isfinite(step)
    moved = features + torch.where(reachable, step, torch.zeros_like(step))[:, None] * direction
    return Steered(moved, step, reachable)
