"""Projected gradient ascent on 8-bit pictures under budgets and constraints (METHOD section 9 f: what a defence must face).

Every forward pass sees a picture that an 8-bit PNG can hold, and the gradient passes straight through the rounding. So what is kept
needs no repair afterwards: its logits are those of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from singreg.models.classifier import Classifier
from singreg.translation.base import Translator

LEVELS = 255
MARGIN = 0.999
"""Constraints are kept with this margin: another batch size moves a logit in its last bits."""

Judged = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pictures (B, 3, H, W) in [0, 1] to an objective (B,) and constraints (B, k), each of which holds where it is at most 1."""


@dataclass(frozen=True)
class Budget:
    """How far a picture may be moved: L-infinity in 255ths, or L2 in pixel values of [0, 1].

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
        return moved * (self.radius / self.lengths(moved).clamp_min(1e-12)).clamp_max(1.0).to(moved)[:, None, None, None]

    def step(self, gradient: Tensor, size: float) -> Tensor:
        """The step of that length (in this norm) that gains most along the gradient (B, 3, H, W); none where it is 0."""
        if self.norm == "linf":
            return size * gradient.sign()
        return gradient * (size / self.lengths(gradient).clamp_min(1e-30)).to(gradient)[:, None, None, None]


def on_grid(x: Tensor, moved: Tensor, budget: Budget) -> Tensor:
    """x + moved as 8-bit values in [0, 1], still within the budget: shrunk and at last cut towards x where rounding outgrew it.

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
            moved = moved * (MARGIN * budget.radius / lengths.clamp_min(1e-12)).clamp_max(1.0).to(moved)[:, None, None, None]
            levels = (LEVELS * moved).round()
        outside = budget.lengths(levels / LEVELS) > budget.radius
        levels = torch.where(outside[:, None, None, None], (LEVELS * moved).trunc(), levels)
    return ((LEVELS * x).round() + levels).clamp(0, LEVELS) / LEVELS


@dataclass(frozen=True)
class Ascent:
    """The best feasible pictures (B, 3, H, W) in [0, 1] on the 8-bit grid, objective before and after (B,), and whether it rose (B,).

    A picture for which nothing feasible and better was found is the original: no rise, and never a success.
    """

    images: Tensor
    before: Tensor
    after: Tensor

    @property
    def rose(self) -> Tensor:
        """(B,) bool."""
        return self.after > self.before


def ascend(
    judged: Judged,
    x: Tensor,
    budget: Budget,
    *,
    steps: int,
    restarts: int = 1,
    generator: torch.Generator,
    start: Tensor | None = None,
    penalty: float = 0.05,
) -> Ascent:
    """Maximise the objective within the budget while every constraint holds, by an augmented Lagrangian (no claim of optimality).

    Constraints c ≤ 1 enter as (ρ/2) Σ relu(c − 1 + λ/ρ)²; after every step λ ← relu(λ + ρ (c − 1)), and ρ grows for the pictures
    that still break one. The first restart starts from x, or from `start`; further ones from random points, with half the step
    of the one before. The step shrinks along a cosine. Best feasible picture of all passes is kept, x itself to begin with.

    Shapes: x and start (B, 3, H, W) in [0, 1] on the 8-bit grid; start must be feasible to be counted.

    Raises:
        ValueError: x is not on the 8-bit grid, or steps or restarts below 1.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected at least 1 step and 1 restart, got {steps} and {restarts}")
    if not bool(((LEVELS * x - (LEVELS * x).round()).abs() < 1e-3).all()) or bool((x < 0).any()) or bool((x > 1).any()):
        raise ValueError("expected pictures on the 8-bit grid in [0, 1]; make them by pixel_pictures or on_grid")
    with torch.no_grad():
        before, _ = judged(x)
    best = _Best(x.clone(), before.double().clone())
    for restart in range(restarts):
        moved = torch.zeros_like(x) if start is None else start - x
        if restart:
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
            moved = budget.project(budget.radius * noise.to(x.device)) / 2
        _one_ascent(judged, x, moved, budget, best, steps=steps, size=budget.radius * 0.5 ** (restart + 1), penalty=penalty)
    return Ascent(best.images, before.double(), best.values)


@dataclass
class _Best:
    """The best feasible pictures (B, 3, H, W) so far and their objective (B,)."""

    images: Tensor
    values: Tensor

    def offer(self, images: Tensor, values: Tensor, feasible: Tensor) -> None:
        better = feasible & (values.double() > self.values)
        self.values = torch.where(better, values.double(), self.values)
        self.images = torch.where(better[:, None, None, None], images, self.images)


def _one_ascent(
    judged: Judged, x: Tensor, moved: Tensor, budget: Budget, best: _Best, *, steps: int, size: float, penalty: float
) -> None:
    """One pass from `moved` (B, 3, H, W); what is best goes to `best`."""
    weight = torch.full((len(x), 1), penalty, dtype=x.dtype, device=x.device)
    multipliers: Tensor | None = None
    speed = torch.zeros_like(x)
    for step in range(steps + 1):
        free = (x + moved).detach().requires_grad_()
        rounded = on_grid(x, moved, budget)
        picture = free + (rounded - free).detach()
        value, constraints = judged(picture)
        broken = (constraints - 1).detach()
        best.offer(rounded, value.detach(), (broken <= MARGIN - 1).all(1))
        if step == steps:
            return
        multipliers = torch.zeros_like(broken) if multipliers is None else multipliers
        lagrangian = value - (weight / 2 * (constraints - 1 + multipliers / weight).relu().square()).sum(1)
        (gradient,) = torch.autograd.grad(lagrangian.sum(), free)
        multipliers = (multipliers + weight * broken).relu()
        weight = torch.where((broken > 0).any(1, keepdim=True), 1.3 * weight, weight)
        scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
        speed = 0.75 * speed + gradient / scale
        now = size * 0.5 * (1 + np.cos(np.pi * step / steps))
        moved = budget.project(moved + budget.step(speed, float(now)))
        moved = (x + moved).clamp(0, 1) - x
