"""Projected gradient ascent on 8-bit pictures, within a budget and under constraints (METHOD section 9).

Every forward pass sees a picture that an 8-bit PNG can hold, and the gradient passes straight through the rounding. So what is kept
needs no repair afterwards: its logits are those of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

LEVELS = 255
MARGIN = 0.999
"""Constraints and L2 budgets are kept with this margin: another batch size moves a logit in its last bits."""
MOMENTUM = 0.9
GROWTH = 1.03
PATH = 4.0  # radii that all steps of a pass make together
TIGHTER = 0.1  # of the tolerance; aiming inside it leaves more of the last steps feasible

Judged = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pictures (B, 3, H, W) in [0, 1] to an objective (B,) and constraints (B, k), each of which holds where it is at most 1."""


@dataclass(frozen=True)
class Budget:
    """How far a picture may be moved: L-infinity in 255ths, or L2 in pixel values of [0, 1] over the whole picture.

    Example:
        >>> Budget("linf", 4).label, Budget("l2", 0.5).label
        ('linf 4/255', 'l2 0.5')
    """

    norm: Literal["linf", "l2"]
    size: float

    @property
    def label(self) -> str:
        """How it is called wherever people read it (no shapes)."""
        return f"linf {self.size:g}/{LEVELS}" if self.norm == "linf" else f"l2 {self.size:g}"

    @property
    def radius(self) -> float:
        """In pixel values of [0, 1] (no shapes)."""
        return self.size / LEVELS if self.norm == "linf" else self.size

    def lengths(self, moved: Tensor) -> Tensor:
        """Norms of displacements (B, 3, H, W) in pixel values, (B,) float64."""
        flat = moved.double().flatten(1)
        return flat.abs().amax(1) if self.norm == "linf" else torch.linalg.vector_norm(flat, dim=1)

    def project(self, moved: Tensor) -> Tensor:
        """The nearest displacement within the budget. Shapes: (B, 3, H, W) to the same."""
        if self.norm == "linf":
            return moved.clamp(-self.radius, self.radius)
        return moved * _column((self.radius / self.lengths(moved).clamp_min(1e-12)).clamp_max(1.0), moved)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The displacement within the budget that gains most along the gradient (B, 3, H, W); none where it is 0."""
        if self.norm == "linf":
            return self.radius * gradient.sign()
        return gradient * _column(self.radius / self.lengths(gradient).clamp_min(1e-30), gradient)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like)[:, None, None, None]


def on_grid(x: Tensor, moved: Tensor, budget: Budget) -> Tensor:
    """x + moved as 8-bit values in [0, 1], still within the budget: shrunk, and at last cut towards x, where rounding outgrew it.

    Shapes: x (B, 3, H, W), itself on the grid, moved likewise.

    Example:
        >>> x = torch.full((1, 3, 2, 2), 100 / 255)
        >>> (255 * on_grid(x, torch.full_like(x, 0.013), Budget("linf", 3)))[0, 0, 0].round().tolist()
        [103.0, 103.0]
    """
    levels = (LEVELS * moved).round()
    if budget.norm == "linf":
        most = float(np.floor(budget.size + 1e-6))
        levels = levels.clamp(-most, most)
    else:
        for _ in range(4):
            lengths = budget.lengths(levels / LEVELS)
            if not bool((lengths > budget.radius).any()):
                break
            moved = moved * _column((MARGIN * budget.radius / lengths.clamp_min(1e-12)).clamp_max(1.0), moved)
            levels = (LEVELS * moved).round()
        outside = budget.lengths(levels / LEVELS) > budget.radius
        levels = torch.where(outside[:, None, None, None], (LEVELS * budget.project(moved)).trunc(), levels)
    return ((LEVELS * x).round() + levels).clamp(0, LEVELS) / LEVELS


@dataclass
class Ascent:
    """The best feasible pictures (B, 3, H, W) in [0, 1] on the 8-bit grid; the objective before and after, (B,) float64.

    A picture for which nothing feasible and better was found is the original: no rise, and never a success.
    """

    images: Tensor
    before: Tensor
    after: Tensor

    @property
    def rose(self) -> Tensor:
        """Whether anything better was found, (B,) bool."""
        return self.after > self.before

    def offer(self, images: Tensor, values: Tensor, feasible: Tensor) -> None:
        """Keep what is feasible (B,) and better than the best so far. Shapes: images (B, 3, H, W), values (B,)."""
        better = feasible & (values.double() > self.after)
        self.after = torch.where(better, values.double(), self.after)
        self.images = torch.where(better[:, None, None, None], images, self.images)


def holds(constraints: Tensor) -> Tensor:
    """Whether all constraints (B, k) hold, with the margin, (B,) bool."""
    return (constraints <= MARGIN).all(1)


def ascend(
    judged: Judged,
    x: Tensor,
    budget: Budget,
    *,
    steps: int,
    restarts: int = 1,
    generator: torch.Generator,
    start: Tensor | None = None,
    penalty: float = 0.02,
) -> Ascent:
    """Maximise the objective within the budget while every constraint holds, by an augmented Lagrangian (no claim of optimality).

    Constraints c ≤ 1 enter as −(ρ/2) Σ relu(c − 1 + λ/ρ)²; after every step λ ← relu(λ + ρ (c − 1)), and ρ grows for pictures that
    still break one. The first pass starts from x or from `start`, each further one from random points in the budget; in a pass
    the step shrinks along a cosine, and every second restart halves it. In L-infinity passes take turns: steps along the gradient
    itself, which keep tight constraints, then along its sign, which fill the budget where there are none or loose ones. The best
    feasible picture of all passes is kept, to begin with x.

    Shapes: x and start (B, 3, H, W) in [0, 1] on the 8-bit grid; the gradient is taken to the pictures only.

    Raises:
        ValueError: x is not on the 8-bit grid, or steps or restarts below 1.

    Example:
        >>> x, up = torch.full((1, 3, 2, 2), 100 / 255), Budget("linf", 2)
        >>> found = ascend(lambda p: (p.sum((1, 2, 3)), p[:, :1, 0, 0] * 0), x, up, steps=4, generator=torch.Generator())
        >>> round(float(255 * (found.images - x).max()))
        2
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected at least 1 step and 1 restart, got {steps} and {restarts}")
    if bool(((LEVELS * x - (LEVELS * x).round()).abs() > 1e-3).any()) or bool((x < 0).any()) or bool((x > 1).any()):
        raise ValueError("expected pictures on the 8-bit grid in [0, 1], as pixel_picture gives them")
    with torch.no_grad():
        before = judged(x)[0].double()
    best = Ascent(x.clone(), before, before.clone())
    for restart in range(restarts):
        moved = torch.zeros_like(x) if start is None else start - x
        if restart:
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) * 2 - 1
            moved = budget.steepest(noise) / 2 if budget.norm == "l2" else budget.radius * noise / 2
        size = PATH / steps * 0.5 ** (restart // 2)
        _one_pass(judged, x, moved, budget, best, steps=steps, size=size, penalty=penalty, signed=restart % 2 == 1)
    return best


def _one_pass(
    judged: Judged, x: Tensor, moved: Tensor, budget: Budget, best: Ascent, *, steps: int, size: float, penalty: float,
    signed: bool,
) -> None:  # fmt: skip
    """One ascent from x + moved (B, 3, H, W); what is best goes to `best`. `size`: of the mean step, a share of the radius."""
    weight = torch.full((len(x), 1), penalty, dtype=x.dtype, device=x.device)
    multipliers: Tensor | None = None
    speed = torch.zeros_like(x)
    for step in range(steps + 1):
        rounded = on_grid(x, moved, budget)
        free = (x + moved).detach().requires_grad_()
        value, constraints = judged(free + (rounded - free).detach())
        best.offer(rounded, value.detach(), holds(constraints.detach()))
        if step == steps:
            return
        excess = constraints - (1 - TIGHTER)
        multipliers = torch.zeros_like(excess).detach() if multipliers is None else multipliers
        lagrangian = value - (weight / 2 * (excess + multipliers / weight).relu().square()).sum(1)
        (gradient,) = torch.autograd.grad(lagrangian.sum(), free)
        multipliers = (multipliers + weight * excess.detach()).relu()
        weight = torch.where((excess.detach() > 0).any(1, keepdim=True), GROWTH * weight, weight)
        speed = MOMENTUM * speed + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
        now = size * (1 + float(np.cos(np.pi * step / steps)))
        moved = budget.project(moved + now * _direction(speed, budget, signed=signed or not excess.shape[1]))
        moved = (x + moved).clamp(0, 1) - x


def _direction(speed: Tensor, budget: Budget, *, signed: bool) -> Tensor:
    """A displacement as long as the radius: in L2, or in L-infinity along the sign, or along the gradient and as long on average."""
    if budget.norm == "linf" and not signed:
        return budget.radius * speed / speed.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
    return budget.steepest(speed)


def one_step(judged: Judged, x: Tensor, budget: Budget, *, halvings: int = 4) -> Ascent:
    """The single gradient step (the paper's kind of attack), at the best feasible of the lengths 1, 1/2, 1/4, ... of the budget.

    Shapes: x (B, 3, H, W) in [0, 1] on the 8-bit grid.
    """
    free = x.detach().clone().requires_grad_()
    value, _ = judged(free)
    (gradient,) = torch.autograd.grad(value.sum(), free)
    best = Ascent(x.clone(), value.detach().double(), value.detach().double().clone())
    with torch.no_grad():
        for halving in range(halvings + 1):
            images = on_grid(x, budget.steepest(gradient) * 0.5**halving, budget)
            values, constraints = judged(images)
            best.offer(images, values, holds(constraints))
    return best


def random_pictures(x: Tensor, budget: Budget, generator: torch.Generator) -> Tensor:
    """Pictures moved by the whole budget in a random direction, held to nothing else. Shapes: (B, 3, H, W) to the same."""
    return on_grid(x, budget.steepest(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)), budget)
