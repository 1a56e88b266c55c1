"""Gradient ascent on 8-bit images that turns what a translator reads while the logits stay (METHOD section 9).

Every forward pass sees an image that an 8-bit PNG can hold, and the gradient passes straight through the rounding: the
logits found are those of the file. An L-infinity step of a level or two already moves a logit by more than its
tolerance, so where few things are held, passes go along the tangent of what holds them, the pixel counterpart of the
null space. The augmented Lagrangian takes turns with them, and stands alone where too many things are held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

LEVELS = 255
TANGENT, LAGRANGIAN = "tangent passes", "Lagrangian passes"
"""Kinds of pass."""
MARGIN = 0.999  # of every constraint and L2 budget: another batch size moves a logit in its last bits
MOMENTUM = 0.9
PENALTY, GROWTH = 0.02, 1.03
PATH = 4.0  # radii that all steps of a pass make together
TANGENT_PATH = 2.0  # shorter, for it wastes none of it on breaking and restoring
TIGHTER = 0.1  # of the tolerance; aiming inside it leaves more of the last steps feasible
MOST_HELD = 64  # gradients a tangent takes; 1,000 classes would take 1,000
RENEWED = 2  # steps that one Jacobian serves: k backward passes are the cost of it
DAMPING = 1e-6  # of the mean of diag(JJᵀ): two held quantities may have the same gradient
HALVINGS = 6  # of the single step's length


@dataclass(frozen=True)
class Reading:
    """What an attacker reads of images.

    Attributes:
        value: (B,) the objective.
        held: (B, k) signed distances from where something was, over their tolerance; each must stay in [-1, 1].
        bounds: (B, j), each must stay at most 1.
    """

    value: Tensor
    held: Tensor
    bounds: Tensor

    @classmethod
    def free(cls, value: Tensor) -> Reading:
        """Return an objective (B,) under no constraint."""
        return cls(value, value.new_zeros(len(value), 0), value.new_zeros(len(value), 0))

    @property
    def constraints(self) -> Tensor:
        """All of them, (B, k + j), each holding where it is at most 1."""
        return torch.cat([self.held.abs(), self.bounds], dim=1)

    @property
    def feasible(self) -> Tensor:
        """Whether all constraints hold, with the margin, (B,) bool."""
        return (self.constraints.detach() <= MARGIN).all(1)


Judged = Callable[[Tensor], Reading]
"""From images (B, 3, H, W) in [0, 1] to what an attacker reads of them."""


@dataclass(frozen=True)
class Budget:
    """How far an image may be moved: L-infinity in 255ths, or L2 in pixel values of [0, 1] over the whole image."""

    norm: Literal["linf", "l2"]
    size: float

    @property
    def label(self) -> str:
        """Its name in reports."""
        return f"linf {self.size:g}/{LEVELS}" if self.norm == "linf" else f"l2 {self.size:g}"

    @property
    def radius(self) -> float:
        """Its size in pixel values of [0, 1]."""
        return self.size / LEVELS if self.norm == "linf" else self.size

    def lengths(self, moved: Tensor) -> Tensor:
        """Return norms (B,) float64 of displacements (B, 3, H, W)."""
        flat = moved.double().flatten(1)
        return flat.abs().amax(1) if self.norm == "linf" else torch.linalg.vector_norm(flat, dim=1)

    def project(self, moved: Tensor) -> Tensor:
        """Return the nearest displacement within the budget, (B, 3, H, W)."""
        if self.norm == "linf":
            return moved.clamp(-self.radius, self.radius)
        return moved * _column((self.radius / self.lengths(moved).clamp_min(1e-12)).clamp_max(1.0), moved)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the displacement within the budget that gains most along a gradient (B, 3, H, W)."""
        if self.norm == "linf":
            return self.radius * gradient.sign()
        return gradient * _column(self.radius / self.lengths(gradient).clamp_min(1e-30), gradient)

    def along(self, direction: Tensor) -> Tensor:
        """Return a displacement along a direction (B, 3, H, W), as long as the radius; in L-infinity on average."""
        return self.steepest(direction) if self.norm == "l2" else self.radius * _unit_mean(direction)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like)[:, None, None, None]


def _unit_mean(direction: Tensor) -> Tensor:
    """Scale it so that pixels move by 1 on average."""
    return direction / direction.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)


def on_grid(x: Tensor, moved: Tensor, budget: Budget) -> Tensor:
    """Round x + moved (B, 3, H, W) to 8-bit values in [0, 1], still within the budget; x lies on the grid itself."""
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


def random_images(x: Tensor, budget: Budget, generator: torch.Generator) -> Tensor:
    """Move images (B, 3, H, W) by the whole budget in a random direction, held to nothing else."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return on_grid(x, budget.steepest(noise), budget)


@dataclass
class Ascent:
    """The best feasible images so far; an image for which nothing better was found is the original.

    Attributes:
        images: (B, 3, H, W) on the 8-bit grid.
        before: (B,) float64, the objective of the originals.
        after: (B,) float64, the objective of the images.
        began: (B,) the best objective before any pass.
        alone: by kind of pass, (B,) the best that its own steps reached, their start not counted.
    """

    images: Tensor
    before: Tensor
    after: Tensor
    began: Tensor | None = None
    alone: dict[str, Tensor] = field(default_factory=dict)

    def look(self, judged: Judged, x: Tensor, moved: Tensor, budget: Budget, *, start: bool) -> tuple[Tensor, Reading]:
        """Offer x + moved as the 8-bit image it would be, and return the leaf of its gradient and its reading.

        The start of a pass is not offered: what was found before must not pass for what the pass found.
        """
        rounded = on_grid(x, moved, budget)
        free = (x + moved).detach().requires_grad_()
        reading = judged(free + (rounded - free).detach())
        if not start:
            self.offer(rounded, reading)
        return free, reading

    def offer(self, images: Tensor, reading: Reading) -> None:
        """Keep what is feasible and better than the best so far."""
        values = reading.value.detach().double()
        self._keep(images, values, reading.feasible & (values > self.after))

    def take(self, found: Ascent, kind: str) -> None:
        """Keep what one pass found alone, where it is better, and note how far it got."""
        self.alone[kind] = torch.maximum(self.alone.get(kind, found.after), found.after)
        self._keep(found.images, found.after, found.after > self.after)

    def _keep(self, images: Tensor, values: Tensor, better: Tensor) -> None:
        self.after = torch.where(better, values, self.after)
        self.images = torch.where(better[:, None, None, None], images, self.images)


@dataclass(frozen=True)
class Tangent:
    """Directions that move none of the held quantities, to first order: I - Jᵀ(JJᵀ)⁻¹J over the free pixels.

    Attributes:
        jacobian: J (B, k, P), gradients of the held quantities by pixel.
        free: (B, P), 1 where a pixel may move, 0 where it may not.
    """

    jacobian: Tensor
    free: Tensor

    @classmethod
    def of(cls, held: Tensor, images: Tensor) -> Tangent:
        """Take J by one backward pass for each of the held (B, k); the graph is kept."""
        rows = [torch.autograd.grad(column.sum(), images, retain_graph=True)[0].flatten(1) for column in held.unbind(1)]
        jacobian = torch.stack(rows, dim=1)
        return cls(jacobian, torch.ones_like(jacobian[:, 0]))

    def within(self, moved: Tensor, gradient: Tensor, low: Tensor, high: Tensor) -> Tangent:
        """Hold the pixels still that are at an edge and pushed over it; all (B, 3, H, W)."""
        slack = 1e-6
        stuck = ((moved >= high - slack) & (gradient > 0)) | ((moved <= low + slack) & (gradient < 0))
        return Tangent(self.jacobian, (~stuck).flatten(1).to(self.jacobian))

    def along(self, direction: Tensor) -> Tensor:
        """Return what of a direction (B, 3, H, W) moves free pixels only and none of the held."""
        flat = direction.flatten(1) * self.free
        return (flat - self._lift((self.jacobian @ flat[:, :, None])[:, :, 0])).view_as(direction)

    def back(self, held: Tensor, like: Tensor) -> Tensor:
        """Return the smallest displacement of free pixels that takes the held (B, k) back to 0 (Gauss-Newton)."""
        return -self._lift(held).view_as(like)

    def _lift(self, held: Tensor) -> Tensor:
        """Jᵀ(JJᵀ)⁻¹ held, (B, P)."""
        open_rows = self.jacobian * self.free[:, None]
        gram = (open_rows @ self.jacobian.transpose(1, 2)).double()
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        gram = gram + DAMPING * scale[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        solved = torch.linalg.solve(gram, held.double()[:, :, None]).to(open_rows)
        lifted: Tensor = (solved * open_rows).sum(1)
        return lifted


def ascend(
    judged: Judged,
    x: Tensor,
    budget: Budget,
    *,
    steps: int,
    restarts: int = 1,
    generator: torch.Generator,
    start: Tensor | None = None,
) -> Ascent:
    """Maximise the objective within the budget while every constraint holds; a search, no claim of optimality.

    The first pass starts from the better of the single step and `start`, each further one from random points. Where 1
    to 64 things are held, the first pass and every third after it go along their tangent; all others are an augmented
    Lagrangian, whose L-infinity steps take turns: along the gradient itself, which keeps tight constraints, then along
    its sign, which fills the budget. What the passes of each kind reach by themselves is kept apart (`alone`), so that
    a dead pass cannot hide behind the single step or the smaller budget that it began from.

    Args:
        steps: gradient steps a pass.
        restarts: passes.
        start: images to begin with, such as a smaller budget's.

    Shape: x and start (B, 3, H, W) in [0, 1] on the 8-bit grid.

    Raises:
        ValueError: x is not on the 8-bit grid, or steps or restarts below 1.

    Example:
        >>> x, up = torch.full((1, 3, 2, 2), 100 / 255), Budget("linf", 2)
        >>> found = ascend(lambda p: Reading.free(p.sum((1, 2, 3))), x, up, steps=4, generator=torch.Generator())
        >>> round(float(255 * (found.images - x).max()))
        2
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected at least 1 step and 1 restart, got {steps} and {restarts}")
    if bool(((LEVELS * x - (LEVELS * x).round()).abs() > 1e-3).any()) or bool((x < 0).any()) or bool((x > 1).any()):
        raise ValueError("expected images on the 8-bit grid in [0, 1], got others; use PixelModel.image")
    best = one_step(judged, x, budget)
    with torch.no_grad():
        if start is not None:
            best.offer(start, judged(start))
        tangent = 0 < judged(x).held.shape[1] <= MOST_HELD
    best.began = best.after.clone()
    for restart in range(restarts):
        moved = best.images - x
        if restart:
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) * 2 - 1
            moved = budget.steepest(noise) / 2 if budget.norm == "l2" else budget.radius * noise / 2
        own = Ascent(x.clone(), best.before, best.before.clone())
        if tangent and restart % 3 == 0:
            tangent_pass(judged, x, moved, budget, own, steps=steps, size=TANGENT_PATH / steps)
            best.take(own, TANGENT)
            continue
        turn = restart - restart // 3 - 1 if tangent else restart  # among the passes of this kind
        size = PATH / steps * 0.5 ** (turn // 2)
        lagrangian_pass(judged, x, moved, budget, own, steps=steps, size=size, signed=turn % 2 == 1)
        best.take(own, LAGRANGIAN)
    return best


def tangent_pass(
    judged: Judged, x: Tensor, moved: Tensor, budget: Budget, own: Ascent, *, steps: int, size: float
) -> None:
    """Ascend from x + moved along the tangent, offering what it finds to `own`; size: of the mean step, in radii."""
    speed = torch.zeros_like(x)
    tangent: Tangent | None = None
    low, high = -x, 1 - x  # in L2 only [0, 1] limits a single pixel
    if budget.norm == "linf":
        low, high = low.clamp_min(-budget.radius), high.clamp_max(budget.radius)
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
        moved = budget.project(moved + now * budget.along(speed) + open_to.back(reading.held.detach(), x))
        moved = (x + moved).clamp(0, 1) - x


def lagrangian_pass(
    judged: Judged, x: Tensor, moved: Tensor, budget: Budget, own: Ascent, *, steps: int, size: float, signed: bool
) -> None:
    """Ascend from x + moved with constraints c ≤ 1 as -(ρ/2) Σ relu(c - 1 + λ/ρ)²; λ ← relu(λ + ρ (c - 1)).

    ρ grows for images that still break a constraint. `signed` steps along the sign of the gradient in L-infinity.
    """
    weight = torch.full((len(x), 1), PENALTY, dtype=x.dtype, device=x.device)
    multipliers: Tensor | None = None
    speed = torch.zeros_like(x)
    for step in range(steps + 1):
        free, reading = own.look(judged, x, moved, budget, start=step == 0)
        if step == steps:
            return
        excess = reading.constraints - (1 - TIGHTER)
        multipliers = torch.zeros_like(excess).detach() if multipliers is None else multipliers
        lagrangian = reading.value - (weight / 2 * (excess + multipliers / weight).relu().square()).sum(1)
        (gradient,) = torch.autograd.grad(lagrangian.sum(), free)
        multipliers = (multipliers + weight * excess.detach()).relu()
        weight = torch.where((excess.detach() > 0).any(1, keepdim=True), GROWTH * weight, weight)
        speed = MOMENTUM * speed + _unit_mean(gradient)
        now = size * (1 + float(np.cos(np.pi * step / steps)))
        stride = budget.steepest(speed) if signed or not excess.shape[1] else budget.along(speed)
        moved = budget.project(moved + now * stride)
        moved = (x + moved).clamp(0, 1) - x


def one_step(judged: Judged, x: Tensor, budget: Budget) -> Ascent:
    """Take the single gradient step at the best feasible of the lengths 1, 1/2, ..., 1/64 of the budget.

    Where 1 to 64 things are held it goes along their tangent, as the paper's goes along the null space.
    """
    free = x.detach().clone().requires_grad_()
    reading = judged(free)
    value = reading.value.detach().double()
    best = Ascent(x.clone(), value, value.clone())
    tangent = Tangent.of(reading.held, free) if 0 < reading.held.shape[1] <= MOST_HELD else None
    (gradient,) = torch.autograd.grad(reading.value.sum(), free)
    whole = budget.steepest(gradient) if tangent is None else budget.along(tangent.along(gradient))
    with torch.no_grad():
        for halving in range(HALVINGS + 1):
            images = on_grid(x, budget.project(whole * 0.5**halving), budget)
            best.offer(images, judged(images))
    return best
