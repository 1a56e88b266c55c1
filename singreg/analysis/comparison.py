"""Arms and models against each other, paired by image, and what may be said about them (METHOD section 8)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.crossfit import AUDITED, figures
from singreg.analysis.features import IMAGES_PER_FEATURE, ZERO_SHOT
from singreg.analysis.statistics import ends, paired_difference, paired_proportions, paired_ratio, resampled_means

Measured = tuple[pd.DataFrame, dict[str, Any]]
"""What `analyze_model` returns of one model: a row an image, and the figures."""

MARGIN = 0.005  # top-1 counts as kept when the interval of its change stays above minus this
CONFIRMED = 2 / 3  # of the fall that the loop reads: where an auditor confirms less, the loss was gamed
LEAST_IMAGES, LEAST_CLASSES = 200, 5
"""Of a claim: with fewer images half is not known to 0.07, and a bootstrap over fewer classes means little."""
LEAST_EVENTS = 10  # images of the control on which it happens: the share of fewer is not known to a third
UNMOVED = 1e-3  # degrees: arms whose every image agrees to this are one arm
SMALLEST = 0.05  # a ratio nearer to 1 is no effect worth a claim
CLAIMED = {
    "class_variance": "class-score variance in the null space",
    "AS⁻": "AS⁻",
    "|AS|": "|AS|",
    "cross 4 sd": "success of a 4 sd step judged by another",
}
"""What must fall together for a claim: each alone can be met without mending anything (METHOD section 8.8)."""
BLIND = 0.5  # share of the test images' classes that the vision-language model must name itself
FIGURES = ("AS_neg", "AS_abs", "IS", "ratio")
"""Mean relu(-AS), mean |AS|, mean IS (degrees), and the ratio of means IS / |AS|: what models are compared by."""
PRIMARY = "auditor"


def _harm(scores: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(-scores, 0))


COMPARED: tuple[tuple[str, str, Any], ...] = (
    ("AS⁻", "AS", _harm),
    ("AS⁻ centred", "centred AS", _harm),
    ("|AS|", "AS", np.abs),
    ("IS", "IS", np.asarray),
    ("IS centred", "centred IS", np.asarray),
)


def compare_arms(measurements: Mapping[str, Measured]) -> pd.DataFrame:
    """Compare "sing" with "control": differences and ratios of means, paired by image, with 95 % intervals.

    Returns:
        Columns name, translator, value, low, high, unit (× of means, degrees, points).
    """
    both = [measurements[name][0] for name in ("sing", "control")]
    classes = both[1]["label"].to_numpy()
    top1 = paired_proportions(*(rows["correct"].to_numpy(np.float64) for rows in both))
    found: list[tuple[Any, ...]] = [("top-1", "-", *(100 * end for end in top1), "points")]
    judges = [str(name)[3:] for name in both[0] if str(name).startswith("AS/") and name in both[1]]
    for translator in judges:
        for name, column, change in COMPARED:
            pair = (change(rows[f"{column}/{translator}"].to_numpy()) for rows in both)
            found.append((f"{name} ratio", translator, *paired_ratio(*pair, groups=classes), "×"))
        pair = (_harm(rows[f"AS/{translator}"].to_numpy()) for rows in both)
        found.append(("AS⁻ difference", translator, *paired_difference(*pair, groups=classes), "°"))
    first, second = (figures(columns) for columns in resampled(both, sorted(AUDITED), classes))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {name: first[name] / second[name] for name in first}
    found += [(f"{name} ratio", "auditor", *ends(ratio), "×") for name, ratio in ratios.items()]
    if {"loop", "auditor"} <= set(judges):
        found.append(("confirmed share", "auditor", *confirmed_share(both, classes), "×"))
    return pd.DataFrame(found, columns=["name", "translator", "value", "low", "high", "unit"])


def confirmed_share(both: Sequence[pd.DataFrame], classes: np.ndarray) -> tuple[float, float, float]:
    """Return what the auditor confirms of the fall in AS⁻ that the loop reads, each by its own reading of both arms.

    (control - loss by the auditor) / (control - loss by the loop), with its 95 % interval (METHOD section 8.6). A ratio
    of the two readings after training would grow without bound as the loop's own goes to 0.
    """
    names = ("AS/auditor", "AS/loop")
    harm = [rows[list(names)].apply(lambda scores: _harm(scores.to_numpy())) for rows in both]
    after, control = resampled(harm, names, classes)
    with np.errstate(divide="ignore", invalid="ignore"):
        return ends((control[names[0]] - after[names[0]]) / (control[names[1]] - after[names[1]]))


def resampled(both: Sequence[pd.DataFrame], names: Sequence[str], classes: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Return means of two arms' columns and their paired resamples, (1 + resamples,) by name: the means come first."""
    table = np.concatenate([rows[list(names)].to_numpy(np.float64) for rows in both], axis=1)
    means = resampled_means(table, groups=classes).T
    return [dict(zip(names, part, strict=True)) for part in (means[: len(names)], means[len(names) :])]


def no_claim(images: int, features: int) -> str | None:
    """Say why an auditor fitted on that many images supports no claim; None where it does."""
    needed, where = math.ceil(IMAGES_PER_FEATURE * features), "data.per_class.audit or data.scenes.audit"
    said = f"No claim: the auditor has {images} images, {needed} are needed ({where})."
    return said if images < needed else None


def too_few(images: int, classes: int) -> str | None:
    """Say why an interval over these test images means little; None where it does not."""
    if images >= LEAST_IMAGES and classes >= LEAST_CLASSES:
        return None
    return (
        f"No claim: an interval from {images} test images of {classes} classes means little; at least "
        f"{LEAST_IMAGES} images of {LEAST_CLASSES} classes are needed (data.per_class.test or data.scenes.test)."
    )


def verdict(measurements: Mapping[str, Measured], comparisons: pd.DataFrame, *, trained: bool = True) -> list[str]:
    """Say in at most four lines what leaks, whether the audit passed, what the loss changed and at what price."""
    (_, before), (_, after) = measurements["before"], measurements["sing"]
    auditor = before["translators"]["auditor"]["overall"]
    lines = [
        f"Before: the null space holds {before['audit']['class_variance']:.0%} of the class scores' variance; removing "
        f"it costs the true class {auditor['AS_neg']:.2f}° (AS⁻) and moves the image's meaning by {auditor['IS']:.1f}° "
        f"(IS), by the auditor's reading of {before['images']} test images."
    ]
    if not trained:
        return [*lines, "Nothing was trained (training.epochs: 0), so no effect is claimed."]
    judged = comparisons[comparisons["translator"] != "loop"]
    found: dict[str, Any] = {str(row.name): row for row in judged.itertuples(index=False)}
    control = measurements["control"][0]
    events = {"AS⁻": int((control["AS/auditor"] < 0).sum()), "cross 4 sd": int((control["cross 4 sd"] > 0).sum())}
    effect = "; ".join(
        f"{words} {_change(found[f'{name} ratio'], events.get(name, LEAST_EVENTS))}" for name, words in CLAIMED.items()
    )
    image, top1, share = found["IS ratio"], found["top-1"], found["confirmed share"]
    effect = f"Against plain fine-tuning, by the auditor: {effect}; IS {_change(image)}."
    kept = "kept" if top1.low > -100 * MARGIN else "lost" if top1.high < 0 else "not shown to be kept"
    change = f"{top1.value:+.2f} points [{top1.low:+.2f}, {top1.high:+.2f}]"
    price = f"Top-1 is {kept}: {change} (margin {100 * MARGIN:.1f} points)."
    confirmed = "Audit: the loop's translator reads no fall in AS⁻, so there is nothing to confirm."
    loop = comparisons[(comparisons["translator"] == "loop") & (comparisons["name"] == "AS⁻ difference")]
    if loop["value"].item() < -UNMOVED:
        gamed = "" if share.value >= CONFIRMED else "; the loss was gamed: do not believe the loop's figure"
        confirmed = (
            f"Audit: of the fall in AS⁻ that the loop's translator reads the auditor confirms {share.value:.0%} "
            f"[{share.low:.0%}, {share.high:.0%}]{gamed}."
        )
    refused = no_claim(after["translators"]["auditor"]["fit_images"], after["head"]["features"])
    refused = refused or _no_comparison(measurements)
    return [*lines, *([refused, f"Top-1 against the control: {change}."] if refused else [effect, confirmed, price])]


def _no_comparison(measurements: Mapping[str, Measured]) -> str | None:
    """Say why the test images support no claim about the two arms; None where they do."""
    rows, control = (measurements[name][0] for name in ("sing", "control"))
    few = too_few(len(rows), rows["label"].nunique())
    moved = np.abs(rows["AS/auditor"] - control["AS/auditor"]).max()
    if few is None and moved < UNMOVED:
        return f"No claim: the two arms are the same (AS of no test image differs by {UNMOVED}° or more)."
    return few


def _change(row: Any, events: int = LEAST_EVENTS) -> str:
    """A ratio with its interval, and in words where it supports no more than that; `events` are the control's."""
    if events < LEAST_EVENTS:
        return f"undefined (the control has it on {events} images, {LEAST_EVENTS} are needed)"
    if row.low <= 1 <= row.high:
        return f"{row.value:.2f}× [{row.low:.2f}, {row.high:.2f}] (not distinguishable)"
    small = " (too little to matter)" if abs(row.value - 1) < SMALLEST else ""
    return f"{row.value:.2f}× [{row.low:.2f}, {row.high:.2f}]{small}"


def finetune_warnings(measured: Mapping[str, Any], translators: Sequence[str] = ("auditor",)) -> list[str]:
    """Give the reasons not to believe figures: too few images for the width, a poor translator or VLM."""
    width, own, warnings = measured["head"]["features"], measured["vlm_zero_shot"], []
    for name in translators:
        by = measured["translators"][name]
        if by["fit_images"] < IMAGES_PER_FEATURE * width:
            warnings.append(
                f"The {name} translator was fitted on {by['fit_images']} images for {width} features; below "
                f"{IMAGES_PER_FEATURE:g} a feature it is not identified well and AS⁻ reads too high."
            )
        if by["zero_shot"] < ZERO_SHOT * own:
            warnings.append(
                f"Features translated by the {name} translator name {by['zero_shot']:.0%} of the classes where the "
                f"vision-language model's own embeddings name {own:.0%}; too much is lost for AS to mean the class."
            )
    if own < BLIND:
        warnings.append(f"The vision-language model itself names only {own:.0%} of the test images' classes.")
    return warnings


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
    """Check whether AS⁻ orders the models alike in all V views, lowest first.

    Returns:
        views: their names; orders: the models in each; tau: Kendall's τ-b between views (V, V); lowest: its least.
    """
    values = figures.figures["AS_neg"][0]
    tau = kendall_tau(values)
    return {
        "views": [f"{space}, {translator}" for space, translator in figures.views],
        "orders": [[figures.models[model] for model in row] for row in np.argsort(values, axis=1, kind="stable")],
        "tau": tau.tolist(),
        "lowest": float(tau.min()),
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
        f"The order by AS⁻ {holds} in all {len(figures.views)} views (lowest Kendall τ {order['lowest']:.2f}).",
        *left_out,
    ]
