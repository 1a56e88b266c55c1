"""Attacks on features for a grid of budgets, and what any attack can reach at all (METHOD section 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.steering import SteeringRows, in_its_own_dtype, outranks
from singreg.analysis.steering_curves import Budgets
from singreg.maximiser import FAINT, FAR, ROUNDED, Directions, Maximiser, NearNull
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, similarity_gradient, unit_in_null
from singreg.translator import LinearTranslator

SINGLE, MAXIMISER, RANDOM = "single step", "maximiser", "random direction"
EXACT = 1e-6  # logits: what a null direction may move them by, in float64 with features of any usual size
LIMIT = 100.0  # relative step that stands for any budget; where the best displacement is longer, its length is taken
NEAR_RATIOS = (0.05, 1.0)  # of σ_1: below it a direction counts as nearly null; 1: held by the logit tolerance alone
TINY = torch.finfo(torch.float64).tiny

Displace = Callable[[SteeringRows, np.ndarray, str], Iterator[Tensor]]


@dataclass(frozen=True)
class Attack:
    """What makes displacements of features.

    Attributes:
        crafted_on: name of its translator.
        displace: rows, their images' indices (R,) and a kind of budget to d (R, m) float64 for each point of its grid;
            the maximiser adds one for any budget at all.
        budgets: kinds it can keep, "step" or "radius".
        tolerance: largest |Δlogit| it promises; None where it cannot promise any.
    """

    name: str
    crafted_on: str
    translator: AnyTranslator
    displace: Displace
    budgets: tuple[str, ...] = ("step",)
    tolerance: float | None = EXACT


@dataclass(frozen=True)
class Outsider:
    """Another model's translator and null space in the same feature width, such as the pretrained one's."""

    translator: AnyTranslator
    null_space: NullSpace


def straight(
    name: str, on: str, translator: AnyTranslator, null_space: NullSpace, budgets: Budgets, *, random: bool = False
) -> Attack:
    """Make the attack that takes one null direction and the whole budget along it.

    Args:
        random: a random direction for each image and target instead of the gradient (paper eq. 12).
    """

    def displace(rows: SteeringRows, index: np.ndarray, budget: str) -> Iterator[Tensor]:
        if random:
            guess = _random_directions(rows, index)
        else:
            guess = similarity_gradient(rows.features, rows.text, in_its_own_dtype(translator))
        direction = unit_in_null(null_space.component(guess), guess)
        # A row that no step brings within a radius stays where it is.
        steps = torch.nan_to_num(budgets.largest(budget, rows.features, direction))
        for place in range(steps.shape[1]):
            yield steps[:, place, None] * direction

    return Attack(name, on, translator, displace, ("step",) if budgets.gaussian is None else ("step", "radius"))


def _random_directions(rows: SteeringRows, index: np.ndarray) -> Tensor:
    """(R, m), fixed by image and target: the same in any order and on any number of processes."""
    width = rows.features.shape[1]
    seeds = [[0, int(image), target] for image, target in zip(index, rows.target.tolist(), strict=True)]
    drawn = [np.random.default_rng(seed).standard_normal(width) for seed in seeds]
    return torch.from_numpy(np.array(drawn).reshape(-1, width)).to(rows.features)


def climb(
    name: str,
    on: str,
    translator: AnyTranslator,
    directions: Directions,
    budgets: Budgets,
    *,
    tolerance: float | None = EXACT,
) -> Attack:
    """Make the attack that maximises the cosine; each budget begins from the one below it and is never worse."""
    gaussian, natural, attacked = budgets.gaussian, budgets.natural, in_its_own_dtype(translator)
    step = Maximiser(directions, attacked)
    radius = None
    if name == MAXIMISER and gaussian is not None:
        radius = Maximiser(Directions(basis=gaussian.colouring), attacked)

    def displace(rows: SteeringRows, index: np.ndarray, budget: str) -> Iterator[Tensor]:
        start: Tensor | None = None
        if budget == "step":
            norm = torch.linalg.vector_norm(rows.features, dim=1)
            for share in (*budgets.steps, LIMIT) if name == MAXIMISER else budgets.steps:
                limit = share * norm
                if share == LIMIT and (unbounded := step.unbounded(rows.features, rows.text)) is not None:
                    start = unbounded
                    limit = torch.maximum(limit, (1 + 1e-9) * torch.linalg.vector_norm(unbounded, dim=1))
                found = step.maximise(rows.features, rows.text, limit, start=start)
                start = found.coordinates
                yield found.displacement
            return
        assert radius is not None
        assert gaussian is not None
        assert natural is not None
        middle = -gaussian.whiten(rows.features) @ gaussian.colouring.T  # to what the row space predicts
        for share in budgets.radii:
            found = radius.maximise(rows.features + middle, rows.text, share * natural["median"], start=start)
            start = found.coordinates
            yield middle + found.displacement

    return Attack(name, on, translator, displace, ("step",) if radius is None else ("step", "radius"), tolerance)


def near_null_name(ratio: float, tolerance: float) -> str:
    """Return the name of the maximiser that takes nearly null directions too."""
    return f"near-null {100 * ratio:g} %, τ {tolerance:g}"


def usual_attacks(
    translators: Mapping[str, AnyTranslator],
    weight: Tensor,
    null_space: NullSpace,
    budgets: Budgets,
    *,
    outsiders: Mapping[str, Outsider] | None = None,
    near_ratios: Sequence[float] = NEAR_RATIOS,
    tolerances: Sequence[float] = (0.1,),
) -> tuple[list[Attack], dict[str, str]]:
    """Make all attacks, and name those that cannot be made with the reason.

    On every translator the single step and the maximiser; on the first a random direction, the maximiser with nearly
    null directions, and for each outsider its null space with this translator ("null space of NAME"); and the
    outsider's own translator and null space ("transfer from NAME").
    """
    attacks, absent = [], {}
    for name, translator in translators.items():
        attacks.append(straight(SINGLE, name, translator, null_space, budgets))
        attacks.append(climb(MAXIMISER, name, translator, Directions(null_space), budgets))
    on, mine = next(iter(translators.items()))
    attacks.append(straight(RANDOM, on, mine, null_space, budgets, random=True))
    for ratio in near_ratios:
        for tolerance in tolerances:
            name, near = (
                near_null_name(ratio, tolerance),
                NearNull.below(weight, null_space, ratio=ratio, tolerance=tolerance),
            )
            if near.basis.shape[1]:
                attacks.append(climb(name, on, mine, Directions(null_space, near=near), budgets, tolerance=tolerance))
            else:
                least = float(null_space.singular_values[null_space.rank - 1] / null_space.singular_values[0])
                smallest = f"its smallest singular value is {least:.1%} of the largest"
                absent[name] = f"no direction of the head is nearly null: {smallest}"
    for name, other in (outsiders or {}).items():
        there = Directions(other.null_space)
        attacks.append(climb(f"transfer from {name}", name, other.translator, there, budgets, tolerance=None))
        attacks.append(climb(f"null space of {name}", on, mine, there, budgets, tolerance=None))
    return attacks, absent


def reach_basis(translator: AnyTranslator, null_space: NullSpace | None) -> Tensor | None:
    """Return the directions in which displacements move T(f): the span of A Π_n, or of A without a null space.

    Returns:
        (n, r) orthonormal; None for a translator that is not linear.
    """
    like = torch.zeros((), dtype=torch.float64) if null_space is None else null_space.basis.double()
    if not isinstance(translator, LinearTranslator):
        return None
    matrix = translator.matrix.to(like)
    allowed = matrix if null_space is None else null_space.component(matrix)
    left, singular, _ = torch.linalg.svd(allowed, full_matrices=False)
    basis: Tensor = left[:, singular > FAINT * singular.max().clamp_min(TINY)]
    return basis


def best_reading(z: Tensor, text: Tensor, basis: Tensor) -> Tensor:
    """Return the point of z + span(basis) with the largest cosine to the text.

    With z = z_v + z_o and t = t_v + t_o it is z_o + t_v |z_o|² / (z_o·t); where z_o·t is not positive it lies at
    infinity along t_v.

    Shape: z (R, n) float64, text (R, n) unit rows, basis (n, r); returns (R, n).

    Example:
        >>> z, text = torch.tensor([[-1.0, 4.0]]).double(), torch.tensor([[0.6, 0.8]]).double()
        >>> best_reading(z, text, torch.eye(2)[:, :1].double()).round(decimals=4).tolist()
        [[3.0, 4.0]]
    """
    inside = (text @ basis) @ basis.T
    rest = z - (z @ basis) @ basis.T
    along, size = (rest * text).sum(1), rest.square().sum(1)
    length = torch.linalg.vector_norm(z, dim=1)
    far = FAR * torch.where(length > 0, length, torch.ones_like(length))
    far = far / torch.linalg.vector_norm(inside, dim=1).clamp_min(TINY)
    there = (along > 0) & (size > ROUNDED * z.square().sum(1))
    scale = torch.where(there, size / along.clamp_min(TINY), far).minimum(far)
    reached: Tensor = rest + scale[:, None] * inside
    return reached


def reachable(z: Tensor, text: Tensor, texts: Tensor, same: Tensor, basis: Tensor | None) -> Tensor:
    """Whether displacements of any length can put the target first: not all can in a small null space.

    Of a network nobody knows, so everything counts as reachable.

    Shape: z and text (R, n), texts (C, n) unit rows, same (R, C) from `own_prompt`; returns (R,) bool.
    """
    if basis is None:
        return torch.ones(len(z), dtype=torch.bool, device=z.device)
    unit = torch.nn.functional.normalize(best_reading(z.double(), text, basis), dim=-1)
    return outranks((unit * text).sum(-1), unit @ texts.T, same)
