"""Several classifiers on the same images: paired differences, and whether their order holds in every view."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torchmetrics.functional.regression import kendall_rank_corrcoef

from singreg.analysis.statistics import resampled_means

FIGURES = ("AS_neg", "AS_abs", "IS", "ratio")
"""Mean relu(-AS), mean |AS|, mean IS (degrees), and the ratio of means IS / |AS|: what models are compared by."""
LARGE_IS_GOOD = ("IS", "ratio")
PRIMARY = "auditor"


@dataclass(frozen=True)
class PairedFigures:
    """Every figure of M models in V views, with R bootstrap resamples of the same images for all of them.

    Attributes:
        views: (space, translator).
        figures: by name (1 + R, V, M), the figures themselves first; "top1" (1 + R, M) as shares.
    """

    models: tuple[str, ...]
    views: tuple[tuple[str, str], ...]
    images: int
    figures: dict[str, np.ndarray]

    @property
    def primary(self) -> int:
        """The view that sentences speak of: the first space, by the auditor where there is one."""
        wanted = (self.views[0][0], PRIMARY)
        return self.views.index(wanted) if wanted in self.views else 0


def paired_figures(
    rows: Mapping[str, Mapping[str, pd.DataFrame]], *, resamples: int = 1000, seed: int = 0
) -> PairedFigures:
    """Take every figure of several models, all resampled together, so that every difference is paired by image.

    Args:
        rows: by space and model, one row an image with "image", "label", "correct", "AS/TRANSLATOR" and
            "IS/TRANSLATOR". A view is a space read by a translator that all its models have.

    Raises:
        ValueError: nothing measured, other models in another space, no common translator, or other images.
    """
    first = next(iter(rows.values()), {})
    models = tuple(first)
    if not models:
        raise ValueError("expected at least one measured model to compare, got none")
    reference = first[models[0]]
    views = [(space, name) for space, found in rows.items() for name in _common_translators(space, found, models)]
    columns = [first[model]["correct"].to_numpy(np.float64) for model in models]
    for space, translator in views:
        for model in models:
            table = rows[space][model]
            _refuse_other_images(table["image"].to_numpy(), reference["image"].to_numpy(), f"{model} in {space}")
            attribute = table[f"AS/{translator}"].to_numpy(np.float64)
            columns += [np.maximum(-attribute, 0), np.abs(attribute), table[f"IS/{translator}"].to_numpy(np.float64)]
    values = np.stack(columns, axis=1)
    drawn = resampled_means(values, groups=reference["label"].to_numpy(), resamples=resamples, seed=seed)
    means = np.concatenate([values.mean(0, keepdims=True), drawn])
    scores = means[:, len(models) :].reshape(1 + resamples, len(views), len(models), 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        every = dict(zip(FIGURES, (*np.moveaxis(scores, 3, 0), scores[..., 2] / scores[..., 1]), strict=True))
    return PairedFigures(models, tuple(views), len(reference), {"top1": means[:, : len(models)], **every})


def translators_of(table: pd.DataFrame) -> list[str]:
    """Return the names of the translators that read a model's rows."""
    return [str(name).removeprefix("AS/") for name in table.columns if str(name).startswith("AS/")]


def _common_translators(space: str, found: Mapping[str, pd.DataFrame], models: Sequence[str]) -> list[str]:
    if set(found) != set(models):
        raise ValueError(f"every space must have the same models; {space!r} has {sorted(found)}, not {sorted(models)}")
    every = [translators_of(found[model]) for model in models]
    common = [name for name in every[0] if all(name in names for names in every)]
    if not common:
        raise ValueError(f"no translator was fitted for all models in {space!r}, so nothing compares them")
    return common


def _refuse_other_images(found: np.ndarray, reference: np.ndarray, name: str) -> None:
    if len(found) != len(reference):
        raise ValueError(f"{name} was measured on {len(found)} images, the first model on {len(reference)}")
    if len(differ := np.flatnonzero(found != reference)):
        place = differ[0]
        raise ValueError(
            f"{name} was not measured on the first model's images in the same order: image {place} is {found[place]}, "
            f"not {reference[place]}"
        )


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return (value, low, high): the first of (1 + R,) and the 95 % percentile interval of the other, defined ones."""
    defined = values[1:][~np.isnan(values[1:])]
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)


def model_differences(figures: PairedFigures) -> list[dict[str, Any]]:
    """Take second minus first for every two models: top-1 once (points), then every figure in every view.

    The intervals are over classes and images, paired, and not corrected for the number of pairs.
    """
    found = []
    for one, other in itertools.combinations(range(len(figures.models)), 2):
        top1, pair = figures.figures["top1"], (figures.models[one], figures.models[other])
        changes = [("top1", "-", "-", 100 * (top1[:, other] - top1[:, one]))]
        for place, view in enumerate(figures.views):
            for name in FIGURES:
                values = figures.figures[name][:, place]
                changes.append((name, *view, values[:, other] - values[:, one]))
        for name, space, translator, change in changes:
            value, low, high = interval(change)
            row = {"figure": name, "space": space, "translator": translator, "first": pair[0], "second": pair[1]}
            found.append({**row, "value": value, "low": low, "high": high})
    return found


def order_check(figures: PairedFigures, figure: str) -> dict[str, Any]:
    """Check whether a figure orders the models alike in all V views, in the values and in the resamples.

    AS⁻ and |AS|: lowest first; IS and the ratio: highest first.

    Returns:
        views: their names; orders: the models in each, best first; tau: Kendall's τ-b between views (V, V); same: share
        of the resamples in which two views order all models alike (V, V); stable: share in which a view's own order
        comes again (V,); everywhere: share in which all views agree.
    """
    values = figures.figures[figure] * (-1.0 if figure in LARGE_IS_GOOD else 1.0)
    orders = np.argsort(values, axis=2, kind="stable")
    order, drawn = orders[0], orders[1:]
    alike = (drawn[:, :, None, :] == drawn[:, None, :, :]).all(3)
    return {
        "figure": figure,
        "views": [f"{space}, {translator}" for space, translator in figures.views],
        "orders": [[figures.models[model] for model in row] for row in order],
        "tau": [[kendall_tau(a, b) for b in values[0]] for a in values[0]],
        "same": alike.mean(0).tolist(),
        "stable": (drawn == order).all(2).mean(0).tolist(),
        "everywhere": float(alike[:, 0].all(1).mean()),
    }


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float:
    """Return Kendall's τ-b of two rows of figures (M,), in [-1, 1]; NaN when one of them ties everything.

    Example:
        >>> round(kendall_tau(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0])), 3)
        0.333
    """
    one, other = (torch.from_numpy(np.ascontiguousarray(row, np.float64)) for row in (first, second))
    return float(torch.as_tensor(kendall_rank_corrcoef(one, other, variant="b")))


def lowest_tau(order: Mapping[str, Any]) -> float:
    """Return the least agreement between two views; 1 with a single view."""
    return min((tau for place, row in enumerate(order["tau"]) for tau in row[:place]), default=1.0)


def comparison_verdict(figures: PairedFigures | None, heads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in at most three sentences who leaks least and most, whether that order holds, and who was left out."""
    omitted = ", ".join(head["label"] for head in heads if head["omitted"] is not None)
    left_out = [f"Nothing could be measured, for want of a null space: {omitted}."] if omitted else []
    if figures is None:
        return ["None of the models has a null space, so no score exists for any of them.", *left_out]
    (space, translator), harm = figures.views[figures.primary], figures.figures["AS_neg"][:, figures.primary]
    order = order_check(figures, "AS_neg")
    names = order["orders"][figures.primary]
    best, worst = (harm[:, figures.models.index(name)] for name in (names[0], names[-1]))
    read = ["{:.2f}° [{:.2f}, {:.2f}]".format(*interval(values)) for values in (best, worst, worst - best)]
    if len(names) == 1:
        return [f"Only {names[0]} could be measured: AS⁻ {read[0]} in {space} by the {translator}.", *left_out]
    holds = "is the same" if all(row == order["orders"][0] for row in order["orders"]) else "is not the same"
    return [
        f"Of {len(names)} models on the same {figures.images} images, {names[0]} loses least of the true class when "
        f"its null space is removed (AS⁻ {read[0]}), {names[-1]} most ({read[1]}), in {space} by the {translator}: "
        f"paired, they are {read[2]} apart.",
        f"The order by AS⁻ {holds} in all {len(figures.views)} views (lowest Kendall τ {lowest_tau(order):.2f}); it "
        f"comes again in {order['stable'][figures.primary]:.0%} of bootstrap resamples.",
        *left_out,
    ]
