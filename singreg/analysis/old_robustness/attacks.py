"""Attacks on features, each a list of displacements for a grid of budgets (METHOD section 9c, d and f)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.old_steering.curves import Budgets
from singreg.analysis.old_steering.plan import SteeringRows
from singreg.analysis.steering import steering_arguments
from singreg.maximiser import Directions, Maximiser, NearNull
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, similarity_gradient, unit_in_null

SINGLE, MAXIMISER, RANDOM = "single step", "maximiser", "random direction"
NEAR = "near-null"
EXACT = 1e-6  # logits: what a null direction may move them by, in float64 with features of any usual size


@dataclass(frozen=True)
class Grids:
    """Budgets of one run: relative steps (G,), and radii with their Gaussian where they are asked for.

    limit: the relative step that stands for any budget at all; where the best displacement is known and longer, its length is taken.
    """

    steps: tuple[float, ...]
    radii: Budgets | None = None
    limit: float = 100.0

    def of(self, budget: str) -> list[float]:
        """The grid of "step" or "radius" (no unit)."""
        if budget == "step":
            return list(self.steps)
        assert self.radii is not None
        return self.radii.grid("radius")


class Attack(Protocol):
    """What makes displacements: named, crafted on a translator by name, for some kinds of budget.

    tolerance: largest |Δlogit| it promises, None where it cannot promise any.
    """

    name: str
    crafted_on: str
    budgets: tuple[str, ...]
    tolerance: float | None

    def displacements(self, rows: SteeringRows, index: np.ndarray, budget: str, grid: Sequence[float]) -> Iterator[Tensor]:
        """d (R, m) float64 for every point of the grid, in order; index (R,) is each row's picture in the part."""
        ...


class Straight:
    """One direction a row, the whole budget along it: the paper's single gradient step."""

    def __init__(self, name: str, crafted_on: str, translator: AnyTranslator, null_space: NullSpace, grids: Grids) -> None:
        self.name, self.crafted_on = name, crafted_on
        self.tolerance: float | None = EXACT
        self.budgets: tuple[str, ...] = ("step",) if grids.radii is None else ("step", "radius")
        self.translator, self.null_space, self.grids = translator, null_space, grids

    def direction(self, rows: SteeringRows, index: np.ndarray) -> Tensor:
        """Unit null directions (R, m), 0 where there is none."""
        gradient = similarity_gradient(rows.features, rows.text, **steering_arguments(self.translator, rows.features))
        return unit_in_null(self.null_space.component(gradient), gradient)

    def displacements(self, rows: SteeringRows, index: np.ndarray, budget: str, grid: Sequence[float]) -> Iterator[Tensor]:
        """As in `Attack`: (R, m) for every grid point; a row that no step brings within a radius stays where it is."""
        direction = self.direction(rows, index)
        allowed = direction.new_tensor(list(grid))
        if budget == "step":
            steps = torch.linalg.vector_norm(rows.features, dim=1)[:, None] * allowed
        else:
            assert self.grids.radii is not None
            limits = self.grids.radii.natural.median * allowed
            steps = torch.nan_to_num(self.grids.radii.gaussian.step_for_radius(rows.features, direction, limits))
        for place in range(len(grid)):
            yield steps[:, place, None] * direction


class RandomDirection(Straight):
    """A random null direction for every picture and target, the same in any order and on any number of processes."""

    seed: int = 0

    def direction(self, rows: SteeringRows, index: np.ndarray) -> Tensor:
        """Unit null directions (R, m)."""
        width = rows.features.shape[1]
        drawn = [
            np.random.default_rng([self.seed, int(image), int(target)]).standard_normal(width)
            for image, target in zip(index, rows.target.tolist(), strict=True)
        ]
        guess = torch.from_numpy(np.array(drawn).reshape(-1, width)).to(rows.features)
        return unit_in_null(self.null_space.component(guess), guess)


class Climb:
    """The maximiser, each budget begun from the one below it, so that a larger budget is never worse in cosine."""

    def __init__(
        self, name: str, crafted_on: str, step: Maximiser, *, radius: Maximiser | None = None, grids: Grids, tolerance: float | None = EXACT
    ) -> None:
        self.name, self.crafted_on, self.tolerance, self.grids = name, crafted_on, tolerance, grids
        self.budgets: tuple[str, ...] = ("step",) if radius is None or grids.radii is None else ("step", "radius")
        self.step, self.radius = step, radius

    def displacements(self, rows: SteeringRows, index: np.ndarray, budget: str, grid: Sequence[float]) -> Iterator[Tensor]:
        """As in `Attack`: (R, m) for every grid point."""
        start: Tensor | None = None
        if budget == "step":
            norm = torch.linalg.vector_norm(rows.features, dim=1)
            for share in grid:
                limit = share * norm
                if share == self.grids.limit and (unbounded := self.step.unbounded(rows.features, rows.text)) is not None:
                    start = unbounded
                    limit = torch.maximum(limit, (1 + 1e-9) * torch.linalg.vector_norm(unbounded, dim=1))
                found = self.step.maximise(rows.features, rows.text, limit, start=start)
                start = found.coordinates
                yield found.displacement
            return
        assert self.grids.radii is not None
        assert self.radius is not None
        gaussian = self.grids.radii.gaussian
        middle = -gaussian.whiten(rows.features) @ gaussian.colouring.T  # to the null component that the row space predicts
        for share in grid:
            limit = share * self.grids.radii.natural.median
            found = self.radius.maximise(rows.features + middle, rows.text, limit, start=start)
            start = found.coordinates
            yield middle + found.displacement


@dataclass(frozen=True)
class Outsider:
    """Another model's translator and null space, in the same feature width: the pretrained one's, say, held by an attacker."""

    translator: AnyTranslator
    null_space: NullSpace


@dataclass(frozen=True)
class Effort:
    """How hard the maximiser tries: gradient steps, random restarts, seed."""

    steps: int = 60
    restarts: int = 2
    seed: int = 0


def null_attacks(
    translators: Mapping[str, AnyTranslator], null_space: NullSpace, grids: Grids, effort: Effort, *, random_on: str
) -> list[Attack]:
    """The single step and the maximiser crafted on every translator, and the random direction beside `random_on`."""
    attacks: list[Attack] = []
    for name, translator in translators.items():
        attacks.append(Straight(SINGLE, name, translator, null_space, grids))
        step = _maximiser(translator, Directions(null_space), effort)
        radius = None
        if grids.radii is not None:
            radius = _maximiser(translator, Directions(basis=grids.radii.gaussian.colouring), effort)
        attacks.append(Climb(MAXIMISER, name, step, radius=radius, grids=grids))
    random = RandomDirection(RANDOM, random_on, translators[random_on], null_space, grids)
    random.seed = effort.seed
    return [*attacks, random]


def near_null_attacks(
    translator: AnyTranslator, crafted_on: str, weight: Tensor, null_space: NullSpace, grids: Grids, effort: Effort,
    *, ratios: Sequence[float], tolerances: Sequence[float],
) -> tuple[list[Attack], dict[str, str]]:  # fmt: skip
    """The maximiser with nearly null directions, for every share of σ_1 and logit tolerance; and those that cannot be, with why."""
    attacks: list[Attack] = []
    absent: dict[str, str] = {}
    for ratio in ratios:
        for tolerance in tolerances:
            name, near = near_null_name(ratio, tolerance), NearNull.below(weight, null_space, ratio=ratio, tolerance=tolerance)
            if near.basis.shape[1]:
                step = _maximiser(translator, Directions(null_space, near=near), effort)
                attacks.append(Climb(name, crafted_on, step, grids=grids, tolerance=tolerance))
            else:
                least = float(null_space.singular_values[null_space.rank - 1] / null_space.singular_values[0])
                absent[name] = f"no direction of the head is nearly null: its smallest singular value is {least:.1%} of the largest"
    return attacks, absent


def near_null_name(ratio: float, tolerance: float) -> str:
    """How such an attack is called (no shapes)."""
    return f"{NEAR} {100 * ratio:g} %, τ {tolerance:g}"


def outsider_attacks(
    outsiders: Mapping[str, Outsider], translator: AnyTranslator, crafted_on: str, grids: Grids, effort: Effort
) -> list[Attack]:
    """For every other model: its translator and null space (transfer), and its null space with this model's translator (adaptive)."""
    attacks: list[Attack] = []
    for name, outsider in outsiders.items():
        own = _maximiser(outsider.translator, Directions(outsider.null_space), effort)
        mixed = _maximiser(translator, Directions(outsider.null_space), effort)
        attacks += [
            Climb(transfer_name(name), name, own, grids=grids, tolerance=None),
            Climb(adaptive_name(name), crafted_on, mixed, grids=grids, tolerance=None),
        ]
    return attacks


def transfer_name(outsider: str) -> str:
    """How an attack with another model's translator and null space is called (no shapes)."""
    return f"transfer from {outsider}"


def adaptive_name(outsider: str) -> str:
    """How an attack with this model's translator in another model's null space is called (no shapes)."""
    return f"null space of {outsider}"


def _maximiser(translator: AnyTranslator, directions: Directions, effort: Effort) -> Maximiser:
    like = directions.null_space.basis if directions.null_space is not None else directions.basis
    assert like is not None
    arguments = steering_arguments(translator, like.double())
    return Maximiser(directions, **arguments, steps=effort.steps, restarts=effort.restarts, seed=effort.seed)
