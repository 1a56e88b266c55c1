"""Arms and models against each other, paired by image, and what may be said about them (METHOD section 8)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.crossfit import AUDITOR, audited_columns, resampled_figures
from singreg.analysis.features import IMAGES_PER_FEATURE, ZERO_SHOT
from singreg.analysis.statistics import ends, paired_proportions, resampled_means

Measured = tuple[pd.DataFrame, dict[str, Any]]
"""What `analyze_model` returns of one model: a row an image, and the figures."""
Rows = Mapping[int, pd.DataFrame]
"""An arm's rows of `analyze_model` by seed."""
Paired = Mapping[str, Mapping[str, Any]]
"""What `compare_rows` returns."""

MARGIN = 0.005  # top-1 counts as kept when the interval of its change stays above minus this
CONFIRMED = 2 / 3  # of the fall that the loop reads: where an auditor confirms less, the loss was gamed
LEAST_IMAGES, LEAST_CLASSES = 200, 5
"""Of a claim: with fewer images half is not known to 0.07, and a bootstrap over fewer classes means little."""
LEAST_EVENTS = 10  # images of the control on which it happens: the share of fewer is not known to a third
UNMOVED = 1e-3  # degrees: arms whose every image agrees to this are one arm
SMALLEST = 0.05  # a ratio nearer to 1 is no effect worth a claim
HARM = "class_variance"  # what arms are ordered by: steering, AS⁻ and |AS| all come of it (METHOD section 8.8)
FALLING = {
    HARM: "class-score variance in the null",
    "AS_neg": "AS⁻",
    "AS_abs": "|AS|",
    "contrast AS_abs": "contrast |AS|",
    "unique_r2": "unique R²",
    "cross 4 sd": "4 sd step judged by another",
    "cross 25% of |f|": "25 % step judged by another",
}
"""Figures that are to fall, in people's words."""
STAYING = {"IS": "IS", "orthogonal IS": "IS beside all prompts", "harmless_r2": "harmless R²"}
CENTRED = {"centred AS_neg": "AS⁻, centred", "centred IS": "IS, centred"}
FIGURES = {"top1": "top-1", **FALLING, **STAYING, **CENTRED, "confirmed": "confirmed share"}
"""What arms are compared by."""
CLAIMED = (HARM, "AS_neg", "AS_abs", "cross 4 sd")
"""What must fall together for a claim: each alone can be met without mending anything (METHOD section 8.8)."""
BLIND = 0.5  # share of the test images' classes that the vision-language model must name itself
SCORES = ("AS_neg", "AS_abs", "IS", "ratio")
"""Mean relu(-AS), mean |AS|, mean IS (degrees), and the ratio of means IS / |AS|: what models are compared by."""


def compare_rows(arm: Rows, reference: Rows) -> dict[str, dict[str, Any]]:
    """Compare an arm with its reference, paired by image, seeds averaged first; only common seeds are compared.

    Returns:
        By figure of `FIGURES`: value, low, high and unit. A ratio of means (×) with its 95 % bootstrap interval over
        classes and images; of top-1 the difference in points with a score interval over images, ends averaged over
        seeds; "confirmed", what the auditor confirms of the fall in AS⁻ that the loop reads (METHOD section 8.6), is
        (reference - arm by the auditor) / (reference - arm by the loop), and left out where the loop reads no fall.
    """
    seeds = sorted(arm.keys() & reference.keys())
    if any(list(arm[seed]["image"]) != list(reference[seed]["image"]) for seed in seeds):
        raise ValueError("the arms were measured on other images, so they cannot be paired")
    classes, means = reference[seeds[0]]["label"].to_numpy(), []
    for rows in (arm, reference):
        columns = [audited_columns(rows[seed]) for seed in seeds]
        means.append({name: np.mean([each[name] for each in columns], axis=0) for name in columns[0]})
    one, other = (resampled_figures(each, classes) for each in means)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {name: (*ends(one[name] / other[name]), "×") for name in FIGURES if name in one}
        if "loop AS_neg" in one and "loop AS_neg" in other:
            fall, read = other["AS_neg"] - one["AS_neg"], other["loop AS_neg"] - one["loop AS_neg"]
            found |= {"confirmed": (*ends(fall / read), "×")} if read[0] > UNMOVED else {}
    hits = [[rows[seed]["correct"].to_numpy(np.float64) for rows in (arm, reference)] for seed in seeds]
    # Of these classes, so over images alone; of one seed each, since an average of seeds has no score interval.
    points = 100 * np.mean([paired_proportions(*pair) for pair in hits], axis=0)
    found["top1"] = (*points.tolist(), "points")
    return {name: dict(zip(("value", "low", "high", "unit"), each, strict=True)) for name, each in found.items()}


def words(paired: Mapping[str, Any] | None) -> str:
    """Write a paired figure with its unit and interval, such as "0.50× [0.40, 0.60]"."""
    if paired is None:
        return "–"
    value, low, high = (round(paired[end], 2) + 0.0 for end in ("value", "low", "high"))  # nothing has no sign
    if paired["unit"] == "points":
        return f"{value:+.2f} points [{low:+.2f}, {high:+.2f}]"
    return f"{value:.2f}{paired['unit']} [{low:.2f}, {high:.2f}]"


def change(paired: Mapping[str, Any], events: int = LEAST_EVENTS) -> str:
    """Write a ratio, and where it supports no more than that say so; `events` are the reference's."""
    if events < LEAST_EVENTS:
        return f"undefined (the control has it on {events} images, {LEAST_EVENTS} are needed)"
    if paired["low"] <= 1 <= paired["high"]:
        return f"{words(paired)} (not distinguishable)"
    return words(paired) + (" (too little to matter)" if abs(paired["value"] - 1) < SMALLEST else "")


def claim(paired: Paired, events: Mapping[str, int] | None = None) -> str:
    """Say of each figure that must fall how far it does, and whether all fall together."""
    counts = dict.fromkeys(CLAIMED, LEAST_EVENTS) | dict(events or {})
    fallen = {name: paired[name]["high"] < 1 and paired[name]["value"] < 1 - SMALLEST for name in CLAIMED}
    failed = [FALLING[name] for name in CLAIMED if not fallen[name] or counts[name] < LEAST_EVENTS]
    told = "; ".join(f"{FALLING[name]} {change(paired[name], counts[name])}" for name in CLAIMED)
    return f"{told}: " + (f"not shown to fall: {', '.join(failed)}" if failed else "all fall together")


def price(paired: Paired) -> str:
    """Say whether top-1 is kept, by equivalence, and what becomes of all else that is to stay."""
    top1 = paired["top1"]
    kept = "kept" if top1["low"] > -100 * MARGIN else "lost" if top1["high"] < 0 else "not shown to be kept"
    told = ", ".join(f"{FIGURES[name]} {words(paired[name])}" for name in STAYING)
    return f"Top-1 is {kept}: {words(top1)} (margin {100 * MARGIN:.1f} points); {told}."


def audit(paired: Paired) -> str:
    """Say how much of what the loop reads an auditor confirms."""
    if (share := paired.get("confirmed")) is None:
        return "Audit: the loop's translator reads no fall in AS⁻, so there is nothing to confirm."
    gamed = "" if share["value"] >= CONFIRMED else "; the loss was gamed: do not believe the loop's figure"
    return (
        f"Audit: of the fall in AS⁻ that the loop's translator reads the auditor confirms {share['value']:.0%} "
        f"[{share['low']:.0%}, {share['high']:.0%}]{gamed}."
    )


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


def verdict(measurements: Mapping[str, Measured], paired: Paired, *, trained: bool = True) -> list[str]:
    """Say in at most four lines what leaks, whether the audit passed, what the loss changed and at what price."""
    before, (rows, after), control = measurements["before"][1], measurements["sing"], measurements["control"][0]
    lines = [
        f"Before: the null space holds {before['audit'][HARM]:.0%} of the class scores' variance; removing it costs "
        f"the true class {before['audit']['AS_neg']:.2f}° (AS⁻) and moves the image's meaning by "
        f"{before['audit']['IS']:.1f}° (IS), by the auditor's reading of {before['images']} test images."
    ]
    if not trained:
        return [*lines, "Nothing was trained (training.epochs: 0), so no effect is claimed."]
    refused = no_claim(after["translators"][AUDITOR]["fit_images"], after["head"]["features"])
    refused = refused or too_few(len(rows), rows["label"].nunique())
    if not refused and np.abs(rows[f"AS/{AUDITOR}"] - control[f"AS/{AUDITOR}"]).max() < UNMOVED:
        refused = f"No claim: the two arms are the same (AS of no test image differs by {UNMOVED}° or more)."
    if refused:
        return [*lines, refused, f"Top-1 against the control: {words(paired['top1'])}."]
    happens = {"AS_neg": control[f"AS/{AUDITOR}"] < 0, "cross 4 sd": control["cross 4 sd"] > 0}
    effect = claim(paired, {name: int(each.sum()) for name, each in happens.items()})
    return [*lines, f"Against plain fine-tuning, by the auditor: {effect}.", audit(paired), price(paired)]


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
        return self.views.index((self.views[0][0], AUDITOR))


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
        figures = dict(zip(SCORES, (*np.moveaxis(read, 3, 0), read[..., 2] / read[..., 1]), strict=True))
    figures["top1"] = means[:, : len(models)]
    return PairedFigures(models, views, len(reference), reference["label"].nunique(), figures)


def model_differences(figures: PairedFigures) -> list[dict[str, Any]]:
    """Take second minus first for every two models: top-1 once (points), then every figure in every view.

    The intervals are over classes and images, paired, and not corrected for the number of pairs.
    """
    changes = [(("top1", "-", "-"), 100 * figures.figures["top1"])]
    for (place, view), name in itertools.product(enumerate(figures.views), SCORES):
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
