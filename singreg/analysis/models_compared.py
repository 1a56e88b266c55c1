"""Several classifiers on the same images: paired differences, and whether their order holds in every view."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.comparison import too_few
from singreg.analysis.statistics import ends, resampled_means

FIGURES = ("AS_neg", "AS_abs", "IS", "ratio")
"""Mean relu(-AS), mean |AS|, mean IS (degrees), and the ratio of means IS / |AS|: what models are compared by."""
PRIMARY = "auditor"


@dataclass(frozen=True)
class PairedFigures:
    """Figures of M models in V views (space, translator) by name, (1 + R, V, M), those of R resamples after the first.

    "top1" is (1 + R, M), as shares.
    """

    models: tuple[str, ...]
    views: tuple[tuple[str, str], ...]
    images: int
    classes: int
    figures: dict[str, np.ndarray]

    @property
    def primary(self) -> int:
        """The view that sentences speak of: the first space, by the auditor."""
        return self.views.index((self.views[0][0], PRIMARY))


def paired_figures(rows: Mapping[str, Mapping[str, pd.DataFrame]], *, seed: int = 0) -> PairedFigures:
    """Take every figure of several models, all resampled together, so that every difference is paired by image.

    Args:
        rows: by space and model, one row an image with "image", "label", "correct", "AS/TRANSLATOR" and
            "IS/TRANSLATOR"; the same models, translators and images everywhere.
    """
    first = next(iter(rows.values()))
    models, reference = tuple(first), next(iter(first.values()))
    common = set.intersection(*(set(map(str, table)) for tables in rows.values() for table in tables.values()))
    translators = [name[3:] for name in map(str, reference) if name.startswith("AS/") and name in common]
    views = tuple(itertools.product(rows, translators))
    columns = [first[model]["correct"].to_numpy(np.float64) for model in models]
    for (space, translator), model in itertools.product(views, models):
        table = rows[space][model]
        attribute = table[f"AS/{translator}"].to_numpy(np.float64)
        columns += [np.maximum(-attribute, 0), np.abs(attribute), table[f"IS/{translator}"].to_numpy(np.float64)]
    groups = reference["label"].to_numpy()
    means = resampled_means(np.stack(columns, axis=1), groups=groups, seed=seed)
    read = means[:, len(models) :].reshape(len(means), len(views), len(models), 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        figures = dict(zip(FIGURES, (*np.moveaxis(read, 3, 0), read[..., 2] / read[..., 1]), strict=True))
    figures["top1"] = means[:, : len(models)]
    return PairedFigures(models, views, len(reference), reference["label"].nunique(), figures)


def model_differences(figures: PairedFigures) -> list[dict[str, Any]]:
    """Take second minus first for every two models: top-1 once (points), then every figure in every view.

    The intervals are over classes and images, paired, and not corrected for the number of pairs.
    """
    changes = [(("top1", "-", "-"), 100 * figures.figures["top1"])]
    for (place, view), name in itertools.product(enumerate(figures.views), FIGURES):
        changes.append(((name, *view), figures.figures[name][:, place]))
    found = []
    for one, other in itertools.combinations(range(len(figures.models)), 2):
        for (name, space, translator), values in changes:
            value, low, high = ends(values[:, other] - values[:, one])
            pair = {"first": figures.models[one], "second": figures.models[other]}
            where = {"figure": name, "space": space, "translator": translator}
            found.append({**where, **pair, "value": value, "low": low, "high": high})
    return found


def order_check(figures: PairedFigures) -> dict[str, Any]:
    """Check whether AS⁻ orders the models alike in all V views, lowest first, in the values and in the resamples.

    Returns:
        views: their names; orders: the models in each; tau: Kendall's τ-b between views (V, V); lowest: the least of
        them; same: share of the resamples in which two views order all models alike (V, V); stable: share in which a
        view's own order comes again (V,).
    """
    values = figures.figures["AS_neg"]
    orders = np.argsort(values, axis=2, kind="stable")
    order, resampled = orders[0], orders[1:]
    tau = kendall_tau(values[0])
    return {
        "views": [f"{space}, {translator}" for space, translator in figures.views],
        "orders": [[figures.models[model] for model in row] for row in order],
        "tau": tau.tolist(),
        "lowest": float(tau.min()),
        "same": (resampled[:, :, None] == resampled[:, None]).all(3).mean(0).tolist(),
        "stable": (resampled == order).all(2).mean(0).tolist(),
    }


def kendall_tau(values: np.ndarray) -> np.ndarray:
    """Return Kendall's τ-b between rows of figures. Shape: (V, M) -> (V, V); NaN where a row ties everything."""
    signs = np.sign(values[:, :, None] - values[:, None]).reshape(len(values), -1)
    agreed = signs @ signs.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(agreed / np.sqrt(np.outer(np.diag(agreed), np.diag(agreed))))


def comparison_verdict(figures: PairedFigures | None, heads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in at most three sentences who leaks least and most, whether that order holds, and who was left out."""
    omitted = ", ".join(head["label"] for head in heads if head["omitted"] is not None)
    left_out = [f"Nothing could be measured, for want of a null space: {omitted}."] if omitted else []
    if figures is None:
        return ["None of the models has a null space, so no score exists for any of them.", *left_out]
    (space, translator), harm = figures.views[figures.primary], figures.figures["AS_neg"][:, figures.primary]
    order = order_check(figures)
    names = order["orders"][figures.primary]
    best, worst = (harm[:, figures.models.index(name)] for name in (names[0], names[-1]))
    told = [ends(values) for values in (best, worst, worst - best)]
    read = ["{:.2f}° [{:.2f}, {:.2f}]".format(*each) for each in told]
    if len(names) == 1:
        return [f"Only {names[0]} could be measured: AS⁻ {read[0]} in {space} by the {translator}.", *left_out]
    few = too_few(figures.images, figures.classes)
    if few is not None:
        return [few, *left_out]
    if told[2][1] <= 0:
        return [
            f"Of {len(names)} models on the same {figures.images} images none is shown to lose more than another: AS⁻ "
            f"of {names[0]} is {read[0]}, of {names[-1]} {read[1]}, paired {read[2]} apart, in {space} by the "
            f"{translator}.",
            *left_out,
        ]
    holds = "is the same" if all(row == order["orders"][0] for row in order["orders"]) else "is not the same"
    return [
        f"Of {len(names)} models on the same {figures.images} images, {names[0]} loses least of the true class when "
        f"its null space is removed (AS⁻ {read[0]}), {names[-1]} most ({read[1]}), in {space} by the {translator}: "
        f"paired, they are {read[2]} apart.",
        f"The order by AS⁻ {holds} in all {len(figures.views)} views (lowest Kendall τ {order['lowest']:.2f}); it "
        f"comes again in {order['stable'][figures.primary]:.0%} of bootstrap resamples.",
        *left_out,
    ]
