"""Ascent along the tangent of what must be held: projected gradient steps in pixels, the pixel counterpart of the null space.

With J the gradients of k held quantities by pixel, a step goes along (I - Jᵀ(JJᵀ)⁻¹J) g, which moves none of them to first order, and
-Jᵀ(JJᵀ)⁻¹h takes back what curvature and rounding have moved (Gauss-Newton). Pixels at the edge of the budget take no part in either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.pixels.budgets import Ascent, Budget, Judged

MOMENTUM = 0.9
RENEWED = 2  # steps that one J serves: k backward passes are the cost of it
DAMPING = 1e-6  # of the mean of diag(JJᵀ): two held quantities may have the same gradient


@dataclass(frozen=True)
class Tangent:
    """Gradients J (B, k, P) of held quantities by pixel; free (B, P) is 1 where a pixel may move, 0 where it may not."""

    jacobian: Tensor
    free: Tensor

    @classmethod
    def of(cls, held: Tensor, pictures: Tensor) -> Tangent:
        """By one backward pass for each of the held (B, k), through pictures (B, 3, H, W); the graph is kept."""
        rows = [torch.autograd.grad(column.sum(), pictures, retain_graph=True)[0].flatten(1) for column in held.unbind(1)]
        jacobian = torch.stack(rows, dim=1)
        return cls(jacobian, torch.ones_like(jacobian[:, 0]))

    def within(self, moved: Tensor, gradient: Tensor, low: Tensor, high: Tensor) -> Tangent:
        """With the pixels that are at an edge and pushed over it held still. Shapes: all (B, 3, H, W)."""
        slack = 1e-6
        stuck = ((moved >= high - slack) & (gradient > 0)) | ((moved <= low + slack) & (gradient < 0))
        return Tangent(self.jacobian, (~stuck).flatten(1).to(self.jacobian))

    def along(self, direction: Tensor) -> Tensor:
        """What of a direction (B, 3, H, W) moves free pixels only and none of the held."""
        flat = direction.flatten(1) * self.free
        return (flat - self._lift((self.jacobian @ flat[:, :, None])[:, :, 0])).view_as(direction)

    def back(self, held: Tensor, like: Tensor) -> Tensor:
        """The smallest displacement of free pixels, shaped like (B, 3, H, W), that takes the held (B, k) back to 0."""
        return -self._lift(held).view_as(like)

    def _lift(self, held: Tensor) -> Tensor:
        """Jᵀ(JJᵀ)⁻¹ held (B, P), over the free pixels."""
        open_rows = self.jacobian * self.free[:, None]
        gram = (open_rows @ self.jacobian.transpose(1, 2)).double()
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        gram = gram + DAMPING * scale[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        solved = torch.linalg.solve(gram, held.double()[:, :, None]).to(open_rows)
        lifted: Tensor = (solved * open_rows).sum(1)
        return lifted


def tangent_pass(judged: Judged, x: Tensor, moved: Tensor, budget: Budget, own: Ascent, *, steps: int, size: float) -> None:
    """One ascent from x + moved (B, 3, H, W) along the tangent; what it finds goes to `own`. size: of the mean step, in radii."""
    speed = torch.zeros_like(x)
    tangent: Tangent | None = None
    low, high = _edges(x, budget)
    for step in range(steps + 1):
        free, reading = own.look(judged, x, moved, budget, start=step == 0)
        if step == steps:
            return
        if tangent is None or step % RENEWED == 0:
            tangent = Tangent.of(reading.held, free)
        (gradient,) = torch.autograd.grad(reading.value.sum(), free)
        open_to = tangent.within(moved, gradient, low, high)
        open_to = open_to.within(moved, open_to.along(gradient), low, high)
        speed = open_to.along(MOMENTUM * speed + _unit_mean(open_to.along(gradient)))
        now = size * (1 + float(np.cos(np.pi * step / steps)))
        stride = budget.radius * _unit_mean(speed) if budget.norm == "linf" else budget.steepest(speed)
        moved = budget.project(moved + now * stride + open_to.back(reading.held.detach(), x))
        moved = (x + moved).clamp(0, 1) - x


def _edges(x: Tensor, budget: Budget) -> tuple[Tensor, Tensor]:
    """How far each pixel may be moved down and up; in L2 only [0, 1] limits a single one. Shapes: (B, 3, H, W)."""
    if budget.norm == "l2":
        return -x, 1 - x
    return (-x).clamp_min(-budget.radius), (1 - x).clamp_max(budget.radius)


def _unit_mean(direction: Tensor) -> Tensor:
    """Scaled so that pixels move by 1 on average. Shapes: (B, 3, H, W)."""
    return direction / direction.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
