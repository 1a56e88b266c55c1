"""Steering at equal effort: AS and success against the relative step and the Mahalanobis radius (METHOD section 9a)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, PassSettings, gathered, iterate_features
from singreg.analysis.statistics import resampled_means
from singreg.analysis.steering import PairPlan, SteeringRows, in_its_own_dtype, outranks, own_prompt
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
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    null_space: NullSpace,
    *,
    floor: float = 1e-3,
    settings: PassSettings | None = None,
) -> ConditionalGaussian:
    """Fit the Gaussian of Π_n f given Π_p f on a split's images: one pass, O(m²) memory, exact over processes.

    Args:
        floor: variances below this share of their mean count as that.

    Shape: embeddings (N, n), only for the pass.

    Raises:
        ValueError: features that do not vary in the null space.
    """
    # The ridge's own sums, without a target.
    moments = RidgeStatistics(classifier.feature_dim, 0, device=classifier.weight.device)
    for batch in gathered(
        iterate_features(classifier, split, embeddings, settings or PassSettings(), "second moments")
    ):
        moments.update(batch.features, batch.features.new_zeros(len(batch.features), 0))
    scatter, _, _ = moments.reduce().centred()
    mean, covariance = moments.f / moments.count, scatter / (moments.count - 1)
    return ConditionalGaussian.from_moments(mean, covariance, null_space, floor=floor)


def natural_radii(
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    gaussian: ConditionalGaussian,
    *,
    fit_images: int,
    settings: PassSettings | None = None,
) -> dict[str, Any]:
    """Measure percentiles of the radius over images that did not make the Gaussian.

    Held out on purpose: a covariance of few images calls its own images nearer than any others.

    Shape: embeddings (N, n).

    Returns:
        median, p95, p99 (no unit); images they are of; dimensions of the null space; fit_images; the variances' floor,
        and floored: how many were below it.
    """
    columns = [
        {"index": batch.indices.numpy(), "radius": gaussian.radius(batch.features).cpu().numpy()}
        for batch in iterate_features(classifier, split, embeddings, settings or PassSettings(), "natural radii")
    ]
    radii = gather_rows(columns, sort_by="index")["radius"]
    median, p95, p99 = (float(value) for value in np.quantile(radii, (0.5, 0.95, 0.99)))
    sizes = {"images": len(radii), "dimensions": len(gaussian.whitening), "fit_images": fit_images}
    return {"median": median, "p95": p95, "p99": p99, **sizes, "floor": gaussian.floor, "floored": gaussian.floored}


@dataclass(frozen=True)
class Budgets:
    """What a displacement may cost: shares of |f|, and Mahalanobis radii in natural medians given a Gaussian."""

    steps: tuple[float, ...]
    radii: tuple[float, ...] = ()
    gaussian: ConditionalGaussian | None = None
    natural: Mapping[str, Any] | None = None

    @classmethod
    def over(
        cls,
        steps: Sequence[float],
        radii: Sequence[float] = (),
        gaussian: ConditionalGaussian | None = None,
        natural: Mapping[str, Any] | None = None,
    ) -> Budgets:
        """Sort the grids and add the natural percentiles to the radii, so that every curve can be read there.

        Raises:
            ValueError: fewer than two different steps, or one below 0: there is no curve.
        """
        steps = tuple(sorted(set(steps)))
        if len(steps) < 2 or not all(np.isfinite(steps)) or steps[0] < 0:
            raise ValueError(f"a curve needs at least two different steps, each 0 or more, got {list(steps)}")
        marks = {} if natural is None else natural_marks(natural)
        return cls(steps, tuple(sorted({*radii, *marks.values()})) if gaussian else (), gaussian, natural)

    @property
    def marks(self) -> dict[str, float]:
        """The natural percentiles in the unit of the radii; empty without a Gaussian."""
        return {} if self.natural is None else natural_marks(self.natural)

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
        assert self.gaussian is not None
        assert self.natural is not None
        radii = self.natural["median"] * self.gaussian.mean.new_tensor(self.radii)
        return self.gaussian.step_for_radius(features, direction, radii)

    def steps_along(
        self, rows: SteeringRows, attacker: AnyTranslator, null_space: NullSpace
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (budget, unit direction (R, m), largest allowed ε (R, G), NaN where none is) of one gradient step."""
        gradient = similarity_gradient(rows.features, rows.text, in_its_own_dtype(attacker))
        direction = unit_in_null(null_space.component(gradient), gradient)
        yield "step", direction, self.largest("step", rows.features, direction)
        if self.gaussian is None:
            return
        yield "radius", direction, self.largest("radius", rows.features, direction)
        natural = self.gaussian.on_manifold(direction)  # in units of a variance: may be tiny without being rounding
        natural = torch.nn.functional.normalize(natural, dim=-1, eps=torch.finfo(natural.dtype).tiny)
        yield "on-manifold", natural, self.largest("on-manifold", rows.features, natural)


def natural_marks(natural: Mapping[str, Any]) -> dict[str, float]:
    """Return the natural percentiles as multiples of the median, which is the curves' unit.

    Example:
        >>> natural_marks({"median": 2.0, "p95": 3.0, "p99": 5.0})
        {'50 %': 1.0, '95 %': 1.5, '99 %': 2.5}
    """
    return {"50 %": 1.0, "95 %": natural["p95"] / natural["median"], "99 %": natural["p99"] / natural["median"]}


@torch.no_grad()
def steer_curves(
    batches: Iterable[FeatureBatch],
    plan: PairPlan,
    budgets: Budgets,
    *,
    texts: Tensor,
    null_space: NullSpace,
    attackers: Mapping[str, AnyTranslator],
    judges: Mapping[str, AnyTranslator] | None = None,
) -> list[dict[str, Any]]:
    """Read AS towards the target and success against the budget, for every attacker, judge and budget.

    One gradient step at the untouched feature, so every curve is a lower bound. An image outside a radius, that no step
    along its direction brings back, stays where it is and counts as that. Exact over processes, in float64.

    Args:
        judges: None takes the attackers.

    Shape: texts (C, n) unit rows of all class prompts.

    Returns:
        For each budget ("step" in ε / |f|; "radius" and "on-manifold" in natural medians, along the gradient's null
        part or Σ times the gradient), attacker and judge: grid; figures AS, AS_abs (degrees) and success, means over
        images, each over its targets; their 95 % intervals over source classes and images; area, [mean height over the
        grid, low, high]; outside, the share of rows that no step brings within the budget.
    """
    judges = judges or attackers
    exact = texts.double()
    columns: list[dict[str, np.ndarray]] = []
    for batch in batches:
        images = plan.select(batch)
        targets = plan.wanted.to(exact.device)[images.source].sum(1)
        sums: dict[str, Tensor] = {}
        for rows in images.rows(plan, len(texts)):
            for attacker, translator in attackers.items():
                for budget, direction, steps in budgets.steps_along(rows, translator, null_space):
                    add_by_image(sums, f"{attacker}|{budget}", steps.isnan().to(exact), rows.image, len(targets))
                    for judge, reader in judges.items():
                        read = read_along(rows, direction, torch.nan_to_num(steps), reader, exact)
                        for name, values in zip(FIGURES, read, strict=True):
                            add_by_image(sums, f"{attacker}|{judge}|{budget}|{name}", values, rows.image, len(targets))
        if sums:
            means = {key: (value / targets[:, None]).float().cpu().numpy() for key, value in sums.items()}
            columns.append({"index": images.indices.numpy(), "class": images.source.cpu().numpy(), **means})
    by_image = gather_rows(columns, sort_by="index")
    return [
        _curve(by_image, attacker, judge, budget, budgets.grid(budget))
        for budget in (BUDGETS if budgets.gaussian is not None else BUDGETS[:1])
        for attacker in attackers
        for judge in judges
    ]


def add_by_image(sums: dict[str, Tensor], name: str, values: Tensor, image: Tensor, images: int) -> None:
    """Add to a sum over the rows of each image. Shape: values (R, ...), image (R,), the sum (b, ...)."""
    sums.setdefault(name, values.new_zeros(images, *values.shape[1:])).index_add_(0, image, values)


def read_along(
    rows: SteeringRows, direction: Tensor, steps: Tensor, judge: AnyTranslator, texts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Read AS, |AS| (degrees) and success of every row at every step.

    Shape: direction (R, m), steps (R, G), texts (C, n); returns three (R, G).
    """
    cosines, same = _cosines_along(judge, rows, direction, texts), own_prompt(rows.text, texts)

    def to_target(found: Tensor) -> Tensor:
        return torch.rad2deg(torch.arccos(found[:, 0].clamp(-1, 1)))

    before = to_target(cosines(torch.zeros_like(steps[:, 0])))
    moved, won = torch.empty_like(steps), torch.empty_like(steps)
    for place in range(steps.shape[1]):
        found = cosines(steps[:, place])
        moved[:, place] = before - to_target(found)
        won[:, place] = outranks(found[:, 0], found[:, 1:], same).to(steps)
    return moved, moved.abs(), won


def _cosines_along(
    judge: AnyTranslator, rows: SteeringRows, direction: Tensor, texts: Tensor
) -> Callable[[Tensor], Tensor]:
    """ε (R,) to the cosines (R, 1 + C) of T(f + ε d) to the target prompt and to all class prompts.

    For a linear translator each is a ratio of polynomials in ε: two products serve every ε.
    """

    def products(z: Tensor) -> Tensor:
        return torch.cat([(z * rows.text).sum(-1, keepdim=True), z @ texts.T], dim=1)

    if not isinstance(judge, LinearTranslator):
        translate = in_its_own_dtype(judge)
        unit = torch.nn.functional.normalize
        return lambda step: products(unit(translate(rows.features + step[:, None] * direction), dim=-1))
    z, u = judge(rows.features), direction @ judge.matrix.to(direction).T
    start, travel = products(z), products(u)
    alpha, beta, gamma = (z * z).sum(-1), (z * u).sum(-1), (u * u).sum(-1)

    def cosines(step: Tensor) -> Tensor:
        length = (alpha + step * (2 * beta + step * gamma)).clamp_min(torch.finfo(step.dtype).tiny).sqrt()
        found: Tensor = (start + step[:, None] * travel) / length[:, None]
        return found

    return cosines


def _curve(
    by_image: Mapping[str, np.ndarray], attacker: str, judge: str, budget: str, grid: Sequence[float]
) -> dict[str, Any]:
    """Means, intervals and area over images of one curve; the columns hold (N, G)."""
    values = np.stack([by_image[f"{attacker}|{judge}|{budget}|{name}"] for name in FIGURES], axis=1).astype(np.float64)
    drawn = resampled_means(values.reshape(len(values), -1), groups=by_image["class"])
    outside = by_image[f"{attacker}|{budget}"].mean(0)
    names = {"attacker": attacker, "judge": judge, "budget": budget, "grid": grid}
    found = curve_figures(FIGURES, values.mean(0), drawn.reshape(-1, *values.shape[1:]), grid)
    curve: dict[str, Any] = plain({**names, **found, "outside": outside})
    return curve


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
    """Return a curve's figure at one point of its grid.

    Raises:
        ValueError: the value is not on the grid.
    """
    if value not in curve["grid"]:
        known = ", ".join(f"{each:g}" for each in curve["grid"])
        raise ValueError(f"{value} is not on the grid of {curve['budget']}: {known}")
    return curve["figures"][figure][curve["grid"].index(value)]


def the_curve(curves: Iterable[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    """Return the only curve with these values, such as attacker="fitted", budget="step".

    Raises:
        ValueError: none or several have them.
    """
    found = [curve for curve in curves if all(curve[name] == value for name, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"expected one curve with {wanted}, got {len(found)}")
    return found[0]
