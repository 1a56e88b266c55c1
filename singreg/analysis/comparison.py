"""The arms against each other, paired by image, and what may be said about it (METHOD section 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.fitting import IMAGES_PER_FEATURE, ZERO_SHOT
from singreg.analysis.statistics import paired_difference, paired_ratio

Measured = tuple[pd.DataFrame, dict[str, Any]]
"""What `analyze_model` returns of one model: a row an image, and the figures."""

MARGIN = 0.005  # top-1 counts as kept when the interval of its change stays above minus this
GAMED = 1.5
BLIND = 0.5  # share of the test images' classes that the vision-language model must name itself


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
    """Compare SingLoss with the control: differences and ratios of means, paired by image, with 95 % intervals.

    Returns:
        Columns name, translator, value, low, high, unit (× of means, degrees, points).
    """
    both = [measurements[name][0] for name in ("sing", "control")]
    classes = both[1]["label"].to_numpy()
    hits = (100 * rows["correct"].to_numpy() for rows in both)
    found = [("top-1", "-", *paired_difference(*hits, groups=classes), "points")]
    for translator in ("frozen", "auditor"):
        for name, column, change in COMPARED:
            pair = (change(rows[f"{column}/{translator}"].to_numpy()) for rows in both)
            found.append((f"{name} ratio", translator, *paired_ratio(*pair, groups=classes), "×"))
        pair = (_harm(rows[f"AS/{translator}"].to_numpy()) for rows in both)
        found.append(("AS⁻ difference", translator, *paired_difference(*pair, groups=classes), "°"))
    table: pd.DataFrame = pd.DataFrame(found, columns=["name", "translator", "value", "low", "high", "unit"])
    return table


def audit_gap(figures: Mapping[str, Any]) -> float | None:
    """Return the auditor's AS⁻ over the loop translator's (METHOD section 8.6); above 1.5 the loss was gamed."""
    scores = figures["translators"]
    loop = scores["loop"]["overall"]["AS_neg"]
    return scores["auditor"]["overall"]["AS_neg"] / loop if loop > 0 else None


def no_claim(images: int, features: int) -> str | None:
    """Say why an auditor fitted on that many images supports no claim; None where it does."""
    needed, where = math.ceil(IMAGES_PER_FEATURE * features), "data.per_class.audit or data.scenes.audit"
    said = f"No claim: the auditor has {images} images, {needed} are needed ({where})."
    return said if images < needed else None


def verdict(measurements: Mapping[str, Measured], comparisons: pd.DataFrame, *, trained: bool = True) -> list[str]:
    """Say in at most four lines what leaks, whether the audit passed, what the loss changed and at what price."""
    (_, before), (_, after) = measurements["before"], measurements["sing"]
    auditor = before["translators"]["auditor"]["overall"]
    lines = [
        f"Before: the null space holds {before['null_share']:.0%} of the feature norm; removing it costs the true "
        f"class {auditor['AS_neg']:.2f}° (AS⁻) and moves the image's meaning by {auditor['IS']:.1f}° (IS), by the "
        f"auditor's reading of {before['images']} test images."
    ]
    if not trained:
        return [*lines, "Nothing was trained (training.epochs: 0), so no effect is claimed."]
    gap = audit_gap(after)
    if gap is not None:
        gamed = "was gamed: do not believe its figure" if gap > GAMED else "agrees with the auditor"
        lines.append(f"Audit: the auditor's AS⁻ is {gap:.2f} times the loop translator's, which {gamed}.")
    judged = comparisons[comparisons["translator"] != "frozen"]
    found: dict[str, Any] = {str(row.name): row for row in judged.itertuples(index=False)}
    harm, neutral = found["AS⁻ ratio"], 1
    if math.isnan(harm.value):  # nothing to divide by: the control leaks nowhere
        harm, neutral = found["AS⁻ difference"], 0
    direction = "lower" if harm.high < neutral else "higher" if harm.low > neutral else "not distinguishable"
    image, top1 = found["IS ratio"], found["top-1"]
    kept = "kept" if top1.low > -100 * MARGIN else "lost" if top1.high < 0 else "not shown to be kept"
    effect = (
        f"Against plain fine-tuning, SingLoss leaves an AS⁻ that is {direction}: {harm.value:.2f}{harm.unit} "
        f"[{harm.low:.2f}, {harm.high:.2f}] by the auditor "
        f"({after['translators']['auditor']['overall']['AS_neg']:.2f}°), with IS {image.value:.2f}× "
        f"[{image.low:.2f}, {image.high:.2f}]."
    )
    price = (
        f"Top-1 is {kept}: {top1.value:+.2f} points [{top1.low:+.2f}, {top1.high:+.2f}] "
        f"(margin {100 * MARGIN:.1f} points)."
    )
    refused = no_claim(after["translators"]["auditor"]["fit_images"], after["head"]["features"])
    return [*lines, refused or effect, price]


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
