"""Steering at equal effort: AS and success against the relative step and the Mahalanobis radius (METHOD section 9a)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.old_steering.plan import Along, PairPlan, SteeringRows
from singreg.analysis.old_steering.results import NaturalRadii, SteeringCurve
from singreg.analysis.results import Rows
from singreg.analysis.statistics import resampled_means
from singreg.analysis.steering import outranks, own_prompt, steering_arguments
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, ConditionalGaussian, similarity_gradient, unit_in_null
from singreg.utils import gather_rows

FIGURES = ("AS", "AS_abs", "success")
BUDGETS = ("step", "radius", "on-manifold")
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Budgets:
    """What is allowed: steps (G,) as shares of |f|, radii (H,) as multiples of the natural median, and how radii are measured."""

    steps: Tensor
    radii: Tensor
    gaussian: ConditionalGaussian
    natural: NaturalRadii

    @classmethod
    def over(
        cls, steps: Sequence[float], radii: Sequence[float], gaussian: ConditionalGaussian, natural: NaturalRadii
    ) -> Budgets:
        """Grids in increasing order, the natural percentiles among the radii, so that every curve can be read there.

        Raises:
            ValueError: fewer than two different steps: there is no curve.
        """
        if len(set(steps)) < 2:
            raise ValueError(f"a curve needs at least two different steps, got {list(steps)}")
        marked = sorted({*radii, *natural.marks.values()})
        as_row = gaussian.mean.new_tensor
        return cls(as_row(sorted(set(steps))), as_row(marked), gaussian, natural)

    def grid(self, budget: str) -> list[float]:
        """The grid of a budget by its name (no unit)."""
        found: list[float] = (self.steps if budget == "step" else self.radii).tolist()
        return found

    def steps_along(self, rows: SteeringRows, attacker: AnyTranslator, null_space: NullSpace) -> Iterable[tuple[str, Tensor, Tensor]]:
        """(budget, unit direction (R, m), largest allowed ε (R, G), NaN where none is) for one attacker."""
        arguments = steering_arguments(attacker, rows.features)
        gradient = similarity_gradient(rows.features, rows.text, **arguments)
        direction = unit_in_null(null_space.component(gradient), gradient)
        length = torch.linalg.vector_norm(rows.features, dim=-1)
        yield "step", direction, length[:, None] * self.steps
        radii = self.natural.median * self.radii
        yield "radius", direction, self.gaussian.step_for_radius(rows.features, direction, radii)
        natural = self.gaussian.on_manifold(direction)  # in units of a variance: it may be tiny without being rounding
        natural = torch.nn.functional.normalize(natural, dim=-1, eps=torch.finfo(natural.dtype).tiny)
        yield "on-manifold", natural, self.gaussian.step_for_radius(rows.features, natural, radii)


def steer_curves(
    batches: Iterable[FeatureBatch],
    plan: PairPlan,
    budgets: Budgets,
    *,
    texts: Tensor,
    null_space: NullSpace,
    attackers: Mapping[str, AnyTranslator],
    judges: Mapping[str, AnyTranslator] | None = None,
) -> list[SteeringCurve]:
    """AS towards the target and success against the budget, for every attacker, judge (default: the attackers) and budget.

    One gradient step at the untouched feature, so every curve is a lower bound. A picture that lies outside a radius, and that
    no step along its direction brings back, stays where it is and counts as that. Exact over processes, in float64.

    Shapes: texts (C, n) unit rows of all class prompts. AS in degrees.
    """
    judges = judges or attackers
    exact = texts.double()
    columns: list[Rows] = []
    for batch in batches:
        pictures = plan.select(batch)
        targets = plan.wanted.to(exact.device)[pictures.source].sum(1)
        sums: dict[str, Tensor] = {}
        for rows in pictures.rows(plan, len(texts)):
            for attacker, translator in attackers.items():
                for budget, direction, steps in budgets.steps_along(rows, translator, null_space):
                    outside = _sum_by_image(steps.isnan().to(exact), rows, len(targets))
                    _add(sums, f"{attacker}|{budget}", outside)
                    for judge, reader in judges.items():
                        read = read_along(rows, direction, torch.nan_to_num(steps), reader, exact)
                        for name, values in zip(FIGURES, read, strict=True):
                            _add(sums, f"{attacker}|{judge}|{budget}|{name}", _sum_by_image(values, rows, len(targets)))
        if sums:
            means = {key: (value / targets[:, None]).float().cpu().numpy() for key, value in sums.items()}
            columns.append({"index": pictures.indices.numpy(), "class": pictures.source.cpu().numpy(), **means})
    rows_of_all = gather_rows(columns, sort_by="index")
    return [
        _curve(rows_of_all, attacker, judge, budget, budgets.grid(budget))
        for budget in BUDGETS
        for attacker in attackers
        for judge in judges
    ]


def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _sum_by_image(values: Tensor, rows: SteeringRows, images: int) -> Tensor:
    """(R, G) summed over each picture's rows: (b, G)."""
    return values.new_zeros(images, values.shape[1]).index_add_(0, rows.image, values)


def read_along(rows: SteeringRows, direction: Tensor, steps: Tensor, judge: AnyTranslator, texts: Tensor) -> list[Tensor]:
    """AS, |AS| (degrees) and success of every row at every step: direction (R, m), steps (R, G), texts (C, n) to three (R, G)."""
    path, same = Along(judge, rows.features, direction, rows.text, texts), own_prompt(rows.text, texts)

    def to_target(cosines: Tensor) -> Tensor:
        return torch.rad2deg(torch.arccos(cosines[:, 0].clamp(-1, 1)))

    before = to_target(path.cosines(torch.zeros_like(steps[:, 0])))
    moved, won = torch.empty_like(steps), torch.empty_like(steps)
    for place in range(steps.shape[1]):
        cosines = path.cosines(steps[:, place])
        moved[:, place] = before - to_target(cosines)
        won[:, place] = outranks(cosines[:, 0], cosines[:, 1:], same).to(steps)
    return [moved, moved.abs(), won]


def _curve(rows: Rows, attacker: str, judge: str, budget: str, grid: list[float]) -> SteeringCurve:
    """Means, intervals and area over pictures of one curve; rows hold (N, G) by name."""
    values = np.stack([rows[f"{attacker}|{judge}|{budget}|{name}"] for name in FIGURES], axis=1).astype(np.float64)
    drawn = resampled_means(values.reshape(len(values), -1), groups=rows["class"])
    mean, resampled = values.mean(0), drawn.reshape(-1, *values.shape[1:])
    # The area is linear in the curve, so the same draws give its interval.
    area, areas = mean_height(mean, grid), mean_height(resampled, grid)
    bands, area_bands = np.quantile(resampled, INTERVAL, axis=0), np.quantile(areas, INTERVAL, axis=0)
    return SteeringCurve(
        attacker=attacker,
        judge=judge,
        budget=budget,
        grid=grid,
        figures={name: mean[place].tolist() for place, name in enumerate(FIGURES)},
        intervals={name: bands[:, place].T.tolist() for place, name in enumerate(FIGURES)},
        area={name: [float(area[place]), *area_bands[:, place].tolist()] for place, name in enumerate(FIGURES)},
        outside=rows[f"{attacker}|{budget}"].mean(0).tolist(),
    )


def mean_height(curves: np.ndarray, grid: list[float]) -> np.ndarray:
    """Trapezoidal area under curves (..., G) over the width of the grid: (...), in the curves' unit."""
    height: np.ndarray = (curves[..., 1:] + curves[..., :-1]) / 2 @ np.diff(grid) / (grid[-1] - grid[0])
    return height
