"""Steering at equal effort: AS and success against the relative step and the Mahalanobis radius (METHOD section 9a)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.features import FeatureBatch, PassSettings, gathered, iterate_features
from singreg.analysis.statistics import resampled_means
from singreg.analysis.steering import PairPlan, SteeringRows, in_its_own_dtype, own_prompt, read
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.steering import AnyTranslator, ConditionalGaussian, similarity_gradient, unit_in_null
from singreg.translator import LinearTranslator
from singreg.utils import gather_rows, plain

FIGURES = ("AS", "AS_abs", "success")
BUDGETS = ("step", "radius", "on-manifold")
INTERVAL = (0.025, 0.975)
STEPS = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
RADII = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)


def fit_conditional(
    classifier: Classifier, split: ImageSplit, embeddings: np.ndarray, null_space: NullSpace, *, settings: PassSettings
) -> ConditionalGaussian:
    """Fit the Gaussian of Π_n f given Π_p f on a split's images: one pass, O(m²) memory, exact over processes."""
    # The ridge's own sums, without a target.
    moments = RidgeStatistics(classifier.feature_dim, 0, device=classifier.weight.device)
    for batch in gathered(iterate_features(classifier, split, embeddings, settings, "second moments")):
        moments.update(batch.features, batch.features.new_zeros(len(batch.features), 0))
    scatter, _, _ = moments.reduce().centred()
    return ConditionalGaussian.from_moments(moments.f / moments.count, scatter / (moments.count - 1), null_space)


def natural_radii(
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    gaussian: ConditionalGaussian,
    *,
    fit_images: int,
    settings: PassSettings,
) -> dict[str, Any]:
    """Measure percentiles of the radius over held-out images; to those of its own fit a covariance is too near."""
    columns = [
        {"index": batch.indices.numpy(), "radius": gaussian.radius(batch.features).cpu().numpy()}
        for batch in iterate_features(classifier, split, embeddings, settings, "natural radii")
    ]
    radii = gather_rows(columns, sort_by="index")["radius"]
    median, p95, p99 = (float(value) for value in np.quantile(radii, (0.5, 0.95, 0.99)))
    sizes = {"images": len(radii), "dimensions": len(gaussian.whitening), "fit_images": fit_images}
    return {"median": median, "p95": p95, "p99": p99, **sizes, "floor": gaussian.floor, "floored": gaussian.floored}


def natural_marks(natural: Mapping[str, Any]) -> dict[str, float]:
    """Return the natural percentiles as multiples of the median, which is the curves' unit."""
    return {"50 %": 1.0, "95 %": natural["p95"] / natural["median"], "99 %": natural["p99"] / natural["median"]}


@dataclass(frozen=True)
class Budgets:
    """What a displacement may cost: shares of |f|, and Mahalanobis radii in natural medians given a Gaussian."""

    steps: tuple[float, ...]
    radii: tuple[float, ...]
    gaussian: ConditionalGaussian
    natural: Mapping[str, Any]

    @classmethod
    def over(
        cls, steps: Sequence[float], radii: Sequence[float], gaussian: ConditionalGaussian, natural: Mapping[str, Any]
    ) -> Budgets:
        """Add the natural percentiles to the radii, so that every curve can be read there."""
        return cls(tuple(steps), tuple(sorted({*radii, *natural_marks(natural).values()})), gaussian, natural)

    @property
    def marks(self) -> dict[str, float]:
        """The natural percentiles in the unit of the radii."""
        return natural_marks(self.natural)

    def grid(self, budget: str) -> tuple[float, ...]:
        """Return the grid of a budget by its name."""
        return self.steps if budget == "step" else self.radii

    def largest(self, budget: str, features: Tensor, direction: Tensor) -> Tensor:
        """Return the largest ε >= 0 along unit directions for each point of the grid, NaN where there is none.

        Shape: features and direction (R, m); returns (R, G) float64.
        """
        if budget == "step":
            length: Tensor = torch.linalg.vector_norm(features, dim=-1)
            return length[:, None] * features.new_tensor(self.steps)
        radii = self.natural["median"] * self.gaussian.mean.new_tensor(self.radii)
        return self.gaussian.step_for_radius(features, direction, radii)

    def steps_along(
        self, rows: SteeringRows, attacker: AnyTranslator, null_space: NullSpace
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (budget, unit direction (R, m), largest allowed ε (R, G), NaN where none is) of one gradient step."""
        gradient = similarity_gradient(rows.features, rows.text, in_its_own_dtype(attacker))
        direction = unit_in_null(null_space.component(gradient), gradient)
        natural = self.gaussian.on_manifold(direction)  # in units of a variance: may be tiny without being rounding
        natural = normalize(natural, dim=-1, eps=torch.finfo(natural.dtype).tiny)
        for budget in BUDGETS:
            along = natural if budget == "on-manifold" else direction
            yield budget, along, self.largest(budget, rows.features, along)


@torch.no_grad()
def steer_curves(
    batches: Iterable[FeatureBatch],
    plan: PairPlan,
    budgets: Budgets,
    *,
    texts: Tensor,
    null_space: NullSpace,
    attackers: Mapping[str, AnyTranslator],
    judges: Mapping[str, AnyTranslator],
) -> list[dict[str, Any]]:
    """Read AS towards the target and success against the budget, for every attacker, judge and budget.

    One gradient step at the untouched feature, so every curve is a lower bound. An image outside a radius, that no step
    along its direction brings back, stays where it is and counts as that. Exact over processes, in float64.

    Shape: texts (C, n) unit rows of all class prompts.

    Returns:
        For each budget ("step" in ε / |f|; "radius" and "on-manifold" in natural medians, along the gradient's null
        part or Σ times the gradient), attacker and judge: grid; figures AS, AS_abs (degrees) and success, means over
        images, each over its targets; their 95 % intervals over source classes and images; area, [mean height over the
        grid, low, high].
    """
    exact, columns = texts.double(), []
    for batch in batches:
        for rows in plan.rows(batch, len(texts)):
            found = {}
            for attacker, translator in attackers.items():
                for budget, direction, steps in budgets.steps_along(rows, translator, null_space):
                    for judge, reader in judges.items():
                        along = read_along(rows, direction, torch.nan_to_num(steps), reader, exact)
                        found[f"{attacker}|{judge}|{budget}"] = torch.stack(along, dim=1)
            columns.append(sum_by_image(rows, found))
    table, curves = gather_rows(columns, sort_by="image"), []
    for budget in BUDGETS:
        grid = budgets.grid(budget)
        for attacker in attackers:
            for judge in judges:
                values = table[f"{attacker}|{judge}|{budget}"] / table["rows"][:, None, None]
                drawn = resampled_means(values.reshape(len(values), -1), groups=table["source"])
                found = curve_figures(FIGURES, values.mean(0), drawn.reshape(-1, *values.shape[1:]), grid)
                names = {"attacker": attacker, "judge": judge, "budget": budget, "grid": grid}
                curves.append(plain({**names, **found}))
    return curves


def sum_by_image(rows: SteeringRows, found: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Sum columns (R, ...) over the rows of each image, with the image, its source and its number of rows."""
    image, source = rows.image.cpu().numpy(), rows.source.cpu().numpy()
    image, first, place, count = np.unique(image, return_index=True, return_inverse=True, return_counts=True)
    columns = {"image": image, "source": source[first], "rows": count.astype(float)}
    for name, values in found.items():
        summed = values.new_zeros(len(image), *values.shape[1:])
        columns[name] = summed.index_add_(0, torch.from_numpy(place).to(values.device), values).cpu().numpy()
    return columns


def read_along(
    rows: SteeringRows, direction: Tensor, steps: Tensor, judge: AnyTranslator, texts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Read AS, |AS| (degrees) and success of every row at every step.

    Shape: direction (R, m), steps (R, G), texts (C, n); returns three (R, G).
    """
    same, translate = own_prompt(rows.text, texts), in_its_own_dtype(judge)
    z = translate(rows.features)
    before, _ = read(z, rows.text, texts, same)
    travel = direction @ judge.matrix.to(direction).T if isinstance(judge, LinearTranslator) else None
    moved, won = torch.empty_like(steps), torch.empty_like(steps)
    for place, step in enumerate(steps.T[:, :, None]):
        there = translate(rows.features + step * direction) if travel is None else z + step * travel
        after, won[:, place] = read(there, rows.text, texts, same)
        moved[:, place] = before - after
    return moved, moved.abs(), won


def curve_figures(names: Sequence[str], mean: np.ndarray, drawn: np.ndarray, grid: Sequence[float]) -> dict[str, Any]:
    """Return figures, their 95 % intervals and area [mean height over the grid, low, high] of curves, by name.

    Shape: mean (F, G), drawn (resamples, F, G); NaN where a draw is not defined.
    """
    # The area is linear in the curve, so the same draws give its interval.
    bands, area, area_bands = _interval(drawn), mean_height(mean, grid), _interval(mean_height(drawn, grid))
    return {
        "figures": {name: mean[place] for place, name in enumerate(names)},
        "intervals": {name: bands[:, place].T for place, name in enumerate(names)},
        "area": {name: [area[place], *area_bands[:, place]] for place, name in enumerate(names)},
    }


def _interval(drawn: np.ndarray) -> np.ndarray:
    """The 95 % interval over draws (B, ...) that are defined: (2, ...), NaN where none is."""
    defined = ~np.isnan(drawn).all(0)
    ends = np.full((2, *drawn.shape[1:]), np.nan)
    ends[:, defined] = np.nanquantile(drawn[:, defined], INTERVAL, axis=0)
    return ends


def mean_height(curves: np.ndarray, grid: Sequence[float]) -> np.ndarray:
    """Return the trapezoidal area under curves over the width of the grid. Shape: (..., G) to (...)."""
    height: np.ndarray = (curves[..., 1:] + curves[..., :-1]) / 2 @ np.diff(grid) / (grid[-1] - grid[0])
    return height


def at(curve: Mapping[str, Any], value: float, figure: str) -> Any:
    """Return a curve's figure at one point of its grid."""
    return curve["figures"][figure][curve["grid"].index(value)]


def the_curve(curves: Iterable[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    """Return the only curve with these values, such as attacker="fitted", budget="step"."""
    (found,) = (curve for curve in curves if all(curve[name] == value for name, value in wanted.items()))
    return found
