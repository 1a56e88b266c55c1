"""Several classifiers on the same pictures: paired differences, and whether their order holds in every view (METHOD section 8.7)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from singreg.analysis.comparing.results import ModelDifference, OrderCheck
from singreg.analysis.results import ModelMeasurement
from singreg.analysis.statistics import resampled_means

FIGURES = ("AS_neg", "AS_abs", "IS", "ratio")
"""Mean relu(-AS), mean |AS|, mean IS (degrees), and the ratio of means IS / |AS|: what models are compared by."""
LARGE_IS_GOOD = ("IS", "ratio")
Measured = Mapping[str, Mapping[str, ModelMeasurement]]


@dataclass(frozen=True)
class PairedFigures:
    """Every figure of M models in V views, with R bootstrap resamples over the same pictures for all of them.

    values[figure] (V, M), samples[figure] (R, V, M); top1 (M,) and its samples (R, M), shares. views: (space, translator).
    """

    models: tuple[str, ...]
    views: tuple[tuple[str, str], ...]
    images: int
    values: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    top1: np.ndarray
    top1_samples: np.ndarray

    def interval(self, figure: str, view: int, model: int) -> tuple[float, float]:
        """95 % percentile interval of one figure, in its unit."""
        low, high = np.quantile(self.samples[figure][:, view, model], [0.025, 0.975])
        return float(low), float(high)


def paired_figures(measured: Measured, *, resamples: int = 1000, seed: int = 0) -> PairedFigures:
    """Figures of several models by space and name, all resampled together, so that every difference is paired by picture.

    Memory O(N V M). The views are every space read by every translator that all its models have.

    Raises:
        ValueError: nothing measured, other models in another space, no common translator, or other pictures.
    """
    first = next(iter(measured.values()), {})
    models = tuple(first)
    if not models:
        raise ValueError("there is no measured model to compare")
    views = [
        (space, translator)
        for space, found in measured.items()
        for translator in _common_translators(space, found, models)
    ]
    reference = first[models[0]].rows["image"]
    columns = [np.asarray(first[model].rows["correct"], np.float64) for model in models]
    for space, translator in views:
        for model in models:
            rows = measured[space][model].rows
            _refuse_other_pictures(rows["image"], reference, f"{model} in {space}", f"{models[0]} in {views[0][0]}")
            attribute = np.asarray(rows[f"AS/{translator}"], np.float64)
            columns += [np.maximum(-attribute, 0), np.abs(attribute), np.asarray(rows[f"IS/{translator}"], np.float64)]
    table = np.stack(columns, axis=1)
    drawn = resampled_means(table, groups=first[models[0]].rows.get("label"), resamples=resamples, seed=seed)
    means = np.concatenate([table.mean(0, keepdims=True), drawn])
    top1, scores = means[:, : len(models)], means[:, len(models) :].reshape(1 + resamples, len(views), len(models), 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        every = dict(zip(FIGURES, (*np.moveaxis(scores, 3, 0), scores[..., 2] / scores[..., 1]), strict=True))
    return PairedFigures(
        models, tuple(views), len(reference),
        values={name: value[0] for name, value in every.items()}, samples={name: value[1:] for name, value in every.items()},
        top1=top1[0], top1_samples=top1[1:],
    )  # fmt: skip


def _common_translators(space: str, found: Mapping[str, ModelMeasurement], models: Sequence[str]) -> list[str]:
    if set(found) != set(models):
        raise ValueError(f"every space must have the same models; {space!r} has {sorted(found)}, the first one has {sorted(models)}")
    common = [name for name in found[models[0]].translators if all(name in found[model].translators for model in models)]
    if not common:
        raise ValueError(f"no translator was fitted for all models in {space!r}, so there is nothing to compare them by")
    return common


def _refuse_other_pictures(found: np.ndarray, reference: np.ndarray, name: str, reference_name: str) -> None:
    if len(found) != len(reference):
        raise ValueError(f"{name} was measured on {len(found)} pictures, {reference_name} on {len(reference)}; take the same ones")
    differ = np.flatnonzero(found != reference)
    if len(differ):
        place = int(differ[0])
        raise ValueError(
            f"{name} and {reference_name} were not measured on the same pictures in the same order: picture {place} is "
            f"{found[place]} and {reference[place]}"
        )


def model_differences(figures: PairedFigures) -> list[ModelDifference]:
    """Second minus first for every two models: top-1 once (points), then every figure in every view (degrees; ratio: no unit).

    95 % percentile intervals over pictures, paired; not corrected for how many pairs there are.
    """
    found = []
    for one, other in itertools.combinations(range(len(figures.models)), 2):
        pair = figures.models[one], figures.models[other]
        points, spread = (100 * (values[..., other] - values[..., one]) for values in (figures.top1, figures.top1_samples))
        found.append(ModelDifference("top1", "-", "-", *pair, float(points), *_ends(spread)))
        for view, (space, translator) in enumerate(figures.views):
            for figure in FIGURES:
                value = figures.values[figure][view, other] - figures.values[figure][view, one]
                samples = figures.samples[figure][:, view, other] - figures.samples[figure][:, view, one]
                found.append(ModelDifference(figure, space, translator, *pair, float(value), *_ends(samples)))
    return found


def _ends(samples: np.ndarray) -> tuple[float, float]:
    defined = samples[~np.isnan(samples)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's τ-b of two rows of figures (M,), in [-1, 1]; NaN when one of them ties everything.

    Example:
        >>> kendall_tau(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0]))
        0.333...
    """
    above = np.triu_indices(len(first), k=1)
    one, other = (np.sign(row[above[0]] - row[above[1]]) for row in (np.asarray(first), np.asarray(second)))
    untied = np.sqrt(float((one != 0).sum()) * float((other != 0).sum()))
    return float((one * other).sum() / untied) if untied else float("nan")


def order_check(figures: PairedFigures, figure: str) -> OrderCheck:
    """Whether a figure orders the models alike in all views, in the point values and in the resamples; see `OrderCheck`.

    AS⁻ and |AS|: lowest first; IS and the ratio: highest first. Needs at least two models to mean anything.
    """
    sign = -1.0 if figure in LARGE_IS_GOOD else 1.0
    values, samples = sign * figures.values[figure], sign * figures.samples[figure]
    order = np.argsort(values, axis=1, kind="stable")
    drawn = np.argsort(samples, axis=2, kind="stable")
    alike = (drawn[:, :, None, :] == drawn[:, None, :, :]).all(3)
    return OrderCheck(
        figure=figure,
        views=[f"{space}, {translator}" for space, translator in figures.views],
        orders=[[figures.models[model] for model in row] for row in order],
        tau=[[kendall_tau(a, b) for b in values] for a in values],
        same=alike.mean(0).tolist(),
        stable=(drawn == order[None]).all(2).mean(0).tolist(),
        everywhere=float(alike[:, 0].all(1).mean()),
    )
