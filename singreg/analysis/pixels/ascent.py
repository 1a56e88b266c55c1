"""Gradient ascent on 8-bit pictures within a budget and under constraints: tangent passes, Lagrangian passes, one step.

Constraints are tight beside a budget: an L-infinity step of a level or two moves a logit by more than its tolerance. So where few
things are held, passes go along the tangent of what holds them (`singreg.analysis.pixels.tangent`); the augmented Lagrangian takes
its turn, and stands alone where there are too many to take the gradient of each.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.pixels.budgets import LEVELS, Ascent, Budget, Judged, on_grid
from singreg.analysis.pixels.tangent import Tangent, tangent_pass

MOMENTUM = 0.9
GROWTH = 1.03
PATH = 4.0  # radii that all steps of a pass make together
TANGENT_PATH = 2.0  # shorter, for it wastes none of it on breaking and restoring
TIGHTER = 0.1  # of the tolerance; aiming inside it leaves more of the last steps feasible
TANGENT, LAGRANGIAN = "tangent passes", "Lagrangian passes"
"""Kinds of pass."""
MOST_HELD = 64  # gradients a tangent takes; 1,000 classes would take 1,000


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
    """Maximise the objective within the budget while every constraint holds (a search: no claim of optimality).

    The first pass starts from the better of the single step and `start`, each further one from random points in the budget. Where 1
    to 64 things are held the first pass and every third after it go along their tangent; the others, and all where more are held,
    are an augmented Lagrangian: constraints c ≤ 1 enter as −(ρ/2) Σ relu(c − 1 + λ/ρ)², after every step λ ← relu(λ + ρ (c − 1)),
    and ρ grows for pictures that still break one; the step shrinks along a cosine. In L-infinity these take turns: steps along the
    gradient itself, which keep tight constraints, then along its sign, which fill the budget where there are none or loose ones. The
    best feasible picture of all passes is kept, to begin with x. What the passes of each kind reach by themselves is kept apart
    (`alone`), so that a pass that does nothing cannot hide behind the single step or the smaller budget that it began from.

    Shapes: x and start (B, 3, H, W) in [0, 1] on the 8-bit grid; the gradient is taken to the pictures only.

    Raises:
        ValueError: x is not on the 8-bit grid, or steps or restarts below 1.

    Example:
        >>> from singreg.analysis.pixels.budgets import Reading
        >>> x, up = torch.full((1, 3, 2, 2), 100 / 255), Budget("linf", 2)
        >>> found = ascend(lambda p: Reading.free(p.sum((1, 2, 3))), x, up, steps=4, generator=torch.Generator())
        >>> round(float(255 * (found.images - x).max()))
        2
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected at least 1 step and 1 restart, got {steps} and {restarts}")
    if bool(((LEVELS * x - (LEVELS * x).round()).abs() > 1e-3).any()) or bool((x < 0).any()) or bool((x > 1).any()):
        raise ValueError("expected pictures on the 8-bit grid in [0, 1], as pixel_picture gives them")
    best = one_step(judged, x, budget)
    if start is not None:
        with torch.no_grad():
            best.offer(start, judged(start))
    best.began = best.after.clone()
    with torch.no_grad():
        tangent = 0 < judged(x).held.shape[1] <= MOST_HELD
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
        _one_pass(judged, x, moved, budget, own, steps=steps, size=size, penalty=penalty, signed=turn % 2 == 1)
        best.take(own, LAGRANGIAN)
    return best


def _one_pass(
    judged: Judged, x: Tensor, moved: Tensor, budget: Budget, own: Ascent, *, steps: int, size: float, penalty: float,
    signed: bool,
) -> None:  # fmt: skip
    """One ascent from x + moved (B, 3, H, W); what it finds goes to `own`. `size`: of the mean step, a share of the radius."""
    weight = torch.full((len(x), 1), penalty, dtype=x.dtype, device=x.device)
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
        speed = MOMENTUM * speed + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
        now = size * (1 + float(np.cos(np.pi * step / steps)))
        moved = budget.project(moved + now * _direction(speed, budget, signed=signed or not excess.shape[1]))
        moved = (x + moved).clamp(0, 1) - x


def _direction(speed: Tensor, budget: Budget, *, signed: bool) -> Tensor:
    """A displacement as long as the radius: in L2, or in L-infinity along the sign, or along the gradient and as long on average."""
    if budget.norm == "linf" and not signed:
        return budget.radius * speed / speed.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
    return budget.steepest(speed)


def one_step(judged: Judged, x: Tensor, budget: Budget, *, halvings: int = 6) -> Ascent:
    """The single gradient step (the paper's kind of attack), at the best feasible of the lengths 1, 1/2, 1/4, ... of the budget.

    Where 1 to 64 things are held, along their tangent, as the paper's goes along the null space.
    Shapes: x (B, 3, H, W) in [0, 1] on the 8-bit grid.
    """
    free = x.detach().clone().requires_grad_()
    reading = judged(free)
    best = Ascent(x.clone(), reading.value.detach().double(), reading.value.detach().double().clone())
    tangent = Tangent.of(reading.held, free) if 0 < reading.held.shape[1] <= MOST_HELD else None
    (gradient,) = torch.autograd.grad(reading.value.sum(), free)
    whole = budget.steepest(gradient) if tangent is None else _direction(tangent.along(gradient), budget, signed=False)
    with torch.no_grad():
        for halving in range(halvings + 1):
            images = on_grid(x, budget.project(whole * 0.5**halving), budget)
            best.offer(images, judged(images))
    return best
