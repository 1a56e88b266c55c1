"""8-bit pictures, budgets, and what an attacker reads of them (METHOD section 9).

Every forward pass sees a picture that an 8-bit PNG can hold, and the gradient passes straight through the rounding. So what is kept
needs no repair afterwards: its logits are those of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

LEVELS = 255
MARGIN = 0.999
"""Constraints and L2 budgets are kept with this margin: another batch size moves a logit in its last bits."""


@dataclass(frozen=True)
class Reading:
    """What an attacker wants and must hold: objective value (B,); held (B, k), each to stay in [-1, 1]; bounds (B, j), each at most 1.

    Held are signed distances from where something was (a logit over its tolerance), so that their gradients say where they stay.
    """

    value: Tensor
    held: Tensor
    bounds: Tensor

    @classmethod
    def free(cls, value: Tensor) -> Reading:
        """An objective (B,) under no constraint."""
        return cls(value, value.new_zeros(len(value), 0), value.new_zeros(len(value), 0))

    @property
    def constraints(self) -> Tensor:
        """All of them as (B, k + j), each holding where it is at most 1."""
        return torch.cat([self.held.abs(), self.bounds], dim=1)

    @property
    def feasible(self) -> Tensor:
        """Whether all constraints hold, with the margin, (B,) bool."""
        return (self.constraints.detach() <= MARGIN).all(1)


Judged = Callable[[Tensor], Reading]
"""Pictures (B, 3, H, W) in [0, 1] to what an attacker reads of them."""


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
    began: (B,) the best objective before any pass; alone: (B,) by kind of pass, the best that its own steps reached.
    """

    images: Tensor
    before: Tensor
    after: Tensor
    began: Tensor | None = None
    alone: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rose(self) -> Tensor:
        """Whether anything better was found, (B,) bool."""
        return self.after > self.before

    def look(self, judged: Judged, x: Tensor, moved: Tensor, budget: Budget, *, start: bool) -> tuple[Tensor, Reading]:
        """Offer x + moved as the 8-bit picture it would be; the leaf whose gradient passes straight through the rounding, and its reading.

        The start of a pass is not offered: what was found before must not pass for what the pass found.
        Shapes: x, moved and the leaf (B, 3, H, W).
        """
        rounded = on_grid(x, moved, budget)
        free = (x + moved).detach().requires_grad_()
        reading = judged(free + (rounded - free).detach())
        if not start:
            self.offer(rounded, reading)
        return free, reading

    def offer(self, images: Tensor, reading: Reading) -> None:
        """Keep what is feasible and better than the best so far. Shapes: images (B, 3, H, W), their reading."""
        values = reading.value.detach().double()
        better = reading.feasible & (values > self.after)
        self._keep(images, values, better)

    def take(self, found: Ascent, kind: str) -> None:
        """Keep what one pass of this kind found alone, where it is better, and remember how far it got (B pictures)."""
        self.alone[kind] = torch.maximum(self.alone.get(kind, found.after), found.after)
        self._keep(found.images, found.after, found.after > self.after)

    def _keep(self, images: Tensor, values: Tensor, better: Tensor) -> None:
        self.after = torch.where(better, values, self.after)
        self.images = torch.where(better[:, None, None, None], images, self.images)


def random_pictures(x: Tensor, budget: Budget, generator: torch.Generator) -> Tensor:
    """Pictures moved by the whole budget in a random direction, held to nothing else. Shapes: (B, 3, H, W) to the same."""
    return on_grid(x, budget.steepest(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)), budget)
