"""Arms and models against each other, paired by image, and what may be said about them (METHOD section 8)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.features import IMAGES_PER_FEATURE, ZERO_SHOT
from singreg.analysis.scores import AUDITOR, audited_columns, resampled_figures
from singreg.analysis.statistics import ends, paired_proportions, ratio_interval, resampled_means

Measured = tuple[pd.DataFrame, dict[str, Any]]
"""What `analyze_model` returns of one model: a row an image, and the figures."""
BySeed = Mapping[int, pd.DataFrame]
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


def compare_rows(arm: BySeed, reference: BySeed) -> dict[str, dict[str, Any]]:
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
    found = {name: (*ratio_interval(one[name], other[name]), "×") for name in FIGURES if name in one}
    if "loop AS_neg" in one and "loop AS_neg" in other:
        fall, read = other["AS_neg"] - one["AS_neg"], other["loop AS_neg"] - one["loop AS_neg"]
        found |= {"confirmed": (*ratio_interval(fall, read), "×")} if read[0] > UNMOVED else {}
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


def model_figures(rows: Mapping[str, Mapping[str, pd.DataFrame]], *, seed: int = 0) -> pd.DataFrame:
    """Take every figure of several models, all resampled together, so that every difference is paired by image.

    Args:
        rows: by space and model, one row an image with "label", "correct", "AS/TRANSLATOR" and "IS/TRANSLATOR"; the
            same models, translators and images everywhere.

    Returns:
        A row of the images' own figures, then one a resample; columns (figure, space, translator, model), with "top1"
        in points once and the figures of `SCORES` in every view, that is space and translator.
    """
    tables = {(space, model): table for space, models in rows.items() for model, table in models.items()}
    models, reference = next(iter(rows.values())), next(iter(tables.values()))
    common = set.intersection(*(set(map(str, table)) for table in tables.values()))
    judges = [name[3:] for name in map(str, reference) if name.startswith("AS/") and name in common]
    columns = {("top1", "-", "-", model): 100 * table["correct"].to_numpy() for model, table in models.items()}
    for space, judge, model in itertools.product(rows, judges, models):
        score, image = (tables[space, model][f"{kind}/{judge}"].to_numpy() for kind in ("AS", "IS"))
        own = {"AS_neg": np.maximum(-score, 0), "AS_abs": np.abs(score), "IS": image}
        columns |= {(name, space, judge, model): values for name, values in own.items()}
    means = resampled_means(np.stack([*columns.values()], axis=1), groups=reference["label"].to_numpy(), seed=seed)
    names = ["figure", "space", "translator", "model"]
    drawn = pd.DataFrame(means, columns=pd.MultiIndex.from_tuples(columns, names=names))
    image, absolute = (drawn.xs(name, axis=1, level="figure") for name in ("IS", "AS_abs"))
    return pd.concat([drawn, pd.concat({"ratio": image / absolute}, axis=1, names=names)], axis=1)


def model_differences(figures: pd.DataFrame) -> list[dict[str, Any]]:
    """Take second minus first for every two models, of every figure of `model_figures`.

    The intervals are over classes and images, paired, and not corrected for the number of pairs.
    """
    found = []
    for first, second in itertools.combinations(figures.columns.unique("model"), 2):
        one, other = (figures.xs(model, axis=1, level="model") for model in (first, second))
        change = other - one
        for where, drawn in zip(change.columns.to_frame().to_dict("records"), change.to_numpy().T, strict=True):
            value, low, high = ends(drawn)
            found.append({**where, "first": first, "second": second, "value": value, "low": low, "high": high})
    return found


def order_check(figures: pd.DataFrame) -> dict[str, Any]:
    """Check whether AS⁻ orders the models alike in all V views, lowest first.

    Returns:
        views: their names; orders: the models in each; tau: Kendall's τ-b between views (V, V); lowest: its least.
    """
    each = figures.iloc[0].xs("AS_neg", level="figure").groupby(level=["space", "translator"], sort=False)
    views = {f"{space}, {judge}": harm.droplevel(["space", "translator"]) for (space, judge), harm in each}
    tau = kendall_tau(np.stack([*views.values()]))
    return {
        "views": [*views],
        "orders": [[*harm.sort_values(kind="stable").index] for harm in views.values()],
        "tau": tau.tolist(),
        "lowest": float(tau.min()),
    }


def kendall_tau(values: np.ndarray) -> np.ndarray:
    """Return Kendall's τ-b between rows of figures. Shape: (V, M) -> (V, V); NaN where a row ties everything."""
    signs = np.sign(values[:, :, None] - values[:, None]).reshape(len(values), -1)
    agreed = signs @ signs.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(agreed / np.sqrt(np.outer(np.diag(agreed), np.diag(agreed))))


def comparison_verdict(
    figures: pd.DataFrame | None, heads: Sequence[Mapping[str, Any]], labels: Sequence[int]
) -> list[str]:
    """Say in at most three sentences who leaks least and most, whether that order holds, and who was left out.

    `labels` (N,) are those of the images behind `model_figures`.
    """
    omitted = ", ".join(head["label"] for head in heads if head["omitted"] is not None)
    left_out = [f"Nothing could be measured, for want of a null space: {omitted}."] if omitted else []
    if figures is None:
        return ["None of the models has a null space, so no score exists for any of them.", *left_out]
    order, harm = order_check(figures), figures.xs("AS_neg", axis=1, level="figure")
    space = harm.columns[0][0]
    primary = f"{space}, {AUDITOR}"  # the view that sentences speak of: the first space, by the auditor
    names = order["orders"][order["views"].index(primary)]
    best, worst = (harm[space, AUDITOR, name].to_numpy() for name in (names[0], names[-1]))
    told = [ends(values) for values in (best, worst, worst - best)]
    read = ["{:.2f}° [{:.2f}, {:.2f}]".format(*each) for each in told]
    if len(names) == 1:
        return [f"Only {names[0]} could be measured: AS⁻ {read[0]} in {space} by the {AUDITOR}.", *left_out]
    if (few := too_few(len(labels), len(set(labels)))) is not None:
        return [few, *left_out]
    if told[2][1] <= 0:
        return [
            f"Of {len(names)} models on the same {len(labels)} images none is shown to lose more than another: AS⁻ of "
            f"{names[0]} is {read[0]}, of {names[-1]} {read[1]}, paired {read[2]} apart, in {space} by the {AUDITOR}.",
            *left_out,
        ]
    holds = "is the same" if all(row == order["orders"][0] for row in order["orders"]) else "is not the same"
    return [
        f"Of {len(names)} models on the same {len(labels)} images, {names[0]} loses least of the true class when its "
        f"null space is removed (AS⁻ {read[0]}), {names[-1]} most ({read[1]}), in {space} by the {AUDITOR}: paired, "
        f"they are {read[2]} apart.",
        f"The order by AS⁻ {holds} in all {len(order['views'])} views (lowest Kendall τ {order['lowest']:.2f}).",
        *left_out,
    ]
