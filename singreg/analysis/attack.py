"""Gradient ascent on 8-bit images that turns what a translator reads while the logits stay (METHOD section 9)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEVELS = 255
TANGENT, LAGRANGIAN, SIGNED = "tangent passes", "Lagrangian passes", "signed Lagrangian passes"
MARGIN = 0.999  # of every constraint: another batch size moves a logit in its last bits
MOMENTUM = 0.9
PENALTY, GROWTH = 0.02, 1.03
PATH = {TANGENT: 2.0, LAGRANGIAN: 4.0, SIGNED: 4.0}  # radii that all steps of a pass make together
TIGHTER = 0.1  # of the tolerance; aiming inside it leaves more of the last steps feasible
MOST_HELD = 64  # gradients a tangent takes; 1,000 classes would take 1,000
RENEWED = 2  # steps that one Jacobian serves: k backward passes are the cost of it
DAMPING = 1e-6  # of the mean of diag(JJᵀ): two held quantities may have the same gradient
HALVINGS = 6  # of the single step's length


@dataclass(frozen=True)
class Reading:
    """What an attacker reads of images."""

    value: Tensor  # (B,) the objective
    held: Tensor  # (B, k) signed distances from where something was, over their tolerance; each must stay in [-1, 1]
    bounds: Tensor  # (B, j), each must stay at most 1

    @property
    def constraints(self) -> Tensor:
        """All of them, (B, k + j), each holding where it is at most 1."""
        return torch.cat([self.held.abs(), self.bounds], dim=1)


Judged = Callable[[Tensor], Reading]
"""From images (B, 3, H, W) in [0, 1] to what an attacker reads of them."""


@dataclass
class Best:
    """The best feasible images so far and their objective (B,) in float64; at first the originals."""

    images: Tensor
    value: Tensor

    def offer(self, images: Tensor, reading: Reading) -> None:
        """Keep what is feasible, with the margin, and better than the best so far."""
        self.keep(images, reading.value.detach().double(), (reading.constraints.detach() <= MARGIN).all(1))

    def keep(self, images: Tensor, values: Tensor, allowed: Tensor) -> None:
        """Keep what is allowed (B,) and better than the best so far."""
        better = allowed & (values > self.value)
        self.value = torch.where(better, values, self.value)
        self.images = torch.where(better[:, None, None, None], images, self.images)


@dataclass(frozen=True)
class Tangent:
    """Directions that move none of the held quantities, to first order: I - Jᵀ(JJᵀ)⁻¹J over the free pixels."""

    jacobian: Tensor  # J (B, k, P), gradients of the held quantities by pixel
    free: Tensor  # (B, P), 1 where a pixel may move, 0 where it may not

    @classmethod
    def of(cls, held: Tensor, images: Tensor) -> "Tangent":
        """Take J by one backward pass for each of the held (B, k); the graph is kept."""
        rows = [torch.autograd.grad(column.sum(), images, retain_graph=True)[0].flatten(1) for column in held.unbind(1)]
        jacobian = torch.stack(rows, dim=1)
        return cls(jacobian, torch.ones_like(jacobian[:, 0]))

    def within(self, moved: Tensor, gradient: Tensor, low: Tensor, high: Tensor) -> "Tangent":
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
        return (solved * open_rows).sum(1)


def on_grid(x: Tensor, moved: Tensor, size: int) -> Tensor:
    """Round x + moved (B, 3, H, W) to 8-bit values in [0, 1] at most `size` levels away; x lies on the grid itself."""
    levels = (LEVELS * moved).round().clamp(-size, size)
    return ((LEVELS * x).round() + levels).clamp(0, LEVELS) / LEVELS


def random_images(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Move every pixel of images (B, 3, H, W) by `size` levels up or down at random, held to nothing else."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return on_grid(x, size / LEVELS * noise.sign(), size)


def _unit_mean(direction: Tensor) -> Tensor:
    """Scale it so that pixels move by 1 on average."""
    return direction / direction.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)


def ascend(
    judged: Judged, x: Tensor, size: int, start: Tensor | None, *, steps: int, restarts: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Maximise the objective within L-infinity `size` / 255 while all constraints hold; a search, no optimum.

    Every reading is of an image that an 8-bit file can hold. A step of a level or two already breaks a constraint, so
    passes go along the tangent of what is held, the pixel counterpart of the null space, and take turns with an
    augmented Lagrangian. Where more than 64 things are held it stands alone, along the gradient, which keeps tight
    constraints, and along its sign, which fills the budget. The first pass starts from the better of the single step
    and `start`, each further one from random points.

    Shape: x and start (B, 3, H, W) in [0, 1] on the 8-bit grid.

    Returns:
        The best images, and objectives (B,): before, one_step, began (before any pass), and by kind of pass what its
        own steps reached, their start not counted: a dead pass cannot hide behind what it began from.
    """
    best, before, tangent = one_step(judged, x, size)
    found = {"before": before, "one_step": best.value}
    if start is not None:
        with torch.no_grad():
            best.offer(start, judged(start))
    found["began"] = best.value
    for restart in range(restarts):
        kind = ((TANGENT, LAGRANGIAN) if tangent else (LAGRANGIAN, SIGNED))[restart % 2]
        moved = best.images - x
        if restart:
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) * 2 - 1
            moved = size / LEVELS * noise / 2
        own = climb(judged, x, moved, size, Best(x, before), steps=steps, kind=kind)
        found[kind] = torch.maximum(found.get(kind, own.value), own.value)
        best.keep(own.images, own.value, torch.ones_like(before, dtype=torch.bool))
    return best.images, found


def one_step(judged: Judged, x: Tensor, size: int) -> tuple[Best, Tensor, bool]:
    """Take the single gradient step, along the tangent where there is one, at the best feasible of seven lengths.

    Returns:
        What was found, the objective of the originals, and whether there is a tangent.
    """
    free = x.detach().clone().requires_grad_()
    reading = judged(free)
    before = reading.value.detach().double()
    tangent = Tangent.of(reading.held, free) if reading.held.shape[1] <= MOST_HELD else None
    (gradient,) = torch.autograd.grad(reading.value.sum(), free)
    direction = gradient.sign() if tangent is None else _unit_mean(tangent.along(gradient))
    best = Best(x, before)
    with torch.no_grad():
        for halving in range(HALVINGS + 1):
            images = on_grid(x, size / LEVELS * direction * 0.5**halving, size)
            best.offer(images, judged(images))
    return best, before, tangent is not None


def climb(judged: Judged, x: Tensor, moved: Tensor, size: int, best: Best, *, steps: int, kind: str) -> Best:
    """Ascend from x + moved, and return `best` with what the steps found; the start itself is not offered.

    The Lagrangian takes constraints c ≤ 1 as -(ρ/2) Σ relu(c - 1 + λ/ρ)², with λ ← relu(λ + ρ (c - 1)) and ρ growing
    for images that still break one.
    """
    radius, speed, tangent = size / LEVELS, torch.zeros_like(x), None
    low, high = (-x).clamp_min(-radius), (1 - x).clamp_max(radius)
    weight = torch.full((len(x), 1), PENALTY, dtype=x.dtype, device=x.device)
    multipliers = torch.zeros_like(weight)
    for step in range(steps + 1):
        rounded = on_grid(x, moved, size)
        free = (x + moved).detach().requires_grad_()
        reading = judged(free + (rounded - free).detach())
        if step:
            best.offer(rounded, reading)
        if step == steps:
            break
        length = PATH[kind] / steps * (1 + float(np.cos(np.pi * step / steps)))
        if kind == TANGENT:
            if tangent is None or step % RENEWED == 0:
                tangent = Tangent.of(reading.held, free)
            (gradient,) = torch.autograd.grad(reading.value.sum(), free)
            open_to = tangent.within(moved, gradient, low, high)
            open_to = open_to.within(moved, open_to.along(gradient), low, high)
            speed = open_to.along(MOMENTUM * speed + _unit_mean(open_to.along(gradient)))
            moved = moved + length * (radius * _unit_mean(speed)) + open_to.back(reading.held.detach(), x)
        else:
            excess = reading.constraints - (1 - TIGHTER)
            lagrangian = reading.value - (weight / 2 * (excess + multipliers / weight).relu().square()).sum(1)
            (gradient,) = torch.autograd.grad(lagrangian.sum(), free)
            multipliers = (multipliers + weight * excess.detach()).relu()
            weight = torch.where((excess.detach() > 0).any(1, keepdim=True), GROWTH * weight, weight)
            speed = MOMENTUM * speed + _unit_mean(gradient)
            moved = moved + length * (radius * (speed.sign() if kind == SIGNED else _unit_mean(speed)))
        moved = moved.clamp(-radius, radius)
        moved = (x + moved).clamp(0, 1) - x
    return best
