"""The largest cosine an affine map can reach over a ball, exactly: a convex problem in two scalars (METHOD section 9c)."""

from __future__ import annotations

import torch
from torch import Tensor

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
