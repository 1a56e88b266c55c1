"""The arms against each other, paired by image, and what may be said about it in plain words (METHOD section 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from singreg.analysis.results import CENTRED, Comparison, ModelMeasurement
from singreg.analysis.statistics import paired_difference, paired_ratio

MARGIN = 0.005  # accuracy counts as kept when the interval of its change stays above minus this (equivalence, not p > 0.05)
GAMED = 1.5


def _harm(measurement: ModelMeasurement, translator: str, kind: str = "") -> np.ndarray:
    return np.maximum(-measurement.rows[f"{kind}AS/{translator}"], 0)


def compare_arms(measurements: Mapping[str, ModelMeasurement]) -> list[Comparison]:
    """SingLoss against the control (against before without one): differences and ratios of means, paired; degrees, points."""
    reference = measurements.get("control", measurements["before"])
    after = measurements["sing"]
    found = [Comparison("top-1", "-", *_points(after, reference), unit="points")]
    for translator in ("frozen", "auditor"):
        pairs = {
            "AS⁻ ratio": (_harm(after, translator), _harm(reference, translator)),
            "AS⁻ centred ratio": (_harm(after, translator, CENTRED), _harm(reference, translator, CENTRED)),
            "|AS| ratio": (np.abs(after.rows[f"AS/{translator}"]), np.abs(reference.rows[f"AS/{translator}"])),
            "IS ratio": (after.rows[f"IS/{translator}"], reference.rows[f"IS/{translator}"]),
            "IS centred ratio": (after.rows[f"{CENTRED}IS/{translator}"], reference.rows[f"{CENTRED}IS/{translator}"]),
        }
        classes = reference.rows["label"]
        found += [Comparison(name, translator, *paired_ratio(*pair, groups=classes), unit="×") for name, pair in pairs.items()]
        difference = paired_difference(*pairs["AS⁻ ratio"], groups=classes)
        found.append(Comparison("AS⁻ difference", translator, *difference, unit="°"))
    return found


def _points(after: ModelMeasurement, reference: ModelMeasurement) -> tuple[float, float, float]:
    hits = (100 * after.rows["correct"], 100 * reference.rows["correct"])
    value, low, high = paired_difference(*hits, groups=reference.rows["label"])
    return value, low, high


def no_claim(pictures: int, features: int, images_per_feature: float) -> str | None:
    """Why an auditor fitted on that many pictures supports no claim; None where it does (no shapes).

    Example:
        >>> no_claim(500, 100, 6.0)
        'No claim: the auditor has 500 pictures, 600 are needed (data.audit_per_class, data.unlabeled; of scenes data.scenes_audit).'
    """
    needed = math.ceil(images_per_feature * features)
    if pictures >= needed:
        return None
    where = "data.audit_per_class, data.unlabeled; of scenes data.scenes_audit"
    return f"No claim: the auditor has {pictures} pictures, {needed} are needed ({where})."


def verdict(
    measurements: Mapping[str, ModelMeasurement], *, images_per_feature: float = 0.0, trained: bool = True
) -> list[str]:
    """Three or four sentences: what leaks, what the loss changed by the auditor's reading, at what price (degrees, points).

    Without training (`trained=False`) there is nothing to compare, and it says so in place of the other sentences. An auditor of
    fewer than `images_per_feature` pictures a feature supports no claim, which then stands in place of the effect.
    """
    before, after = measurements["before"], measurements["sing"]
    auditor = before.translators["auditor"].overall
    sentences = [
        f"Before: the null space holds {before.null_share:.0%} of the feature norm; removing it costs the true class "
        f"{auditor['AS_neg']:.2f}° (AS⁻) and moves the picture's meaning by {auditor['IS']:.1f}° (IS), by the auditor's reading "
        f"of {before.images} test pictures."
    ]
    if not trained:
        return [*sentences, "Nothing was trained (training.epochs: 0): every arm is the starting classifier, so no effect is claimed."]
    against = "plain fine-tuning" if "control" in measurements else "the model before (no control was trained)"
    found = {(c.name, c.translator): c for c in compare_arms(measurements)}
    image, top1 = found["IS ratio", "auditor"], found["top-1", "-"]
    harm, neutral = found["AS⁻ ratio", "auditor"], 1
    if math.isnan(harm.value):  # nothing to divide by: the other arm leaks nowhere
        harm, neutral = found["AS⁻ difference", "auditor"], 0
    direction = "lower" if harm.high < neutral else "higher" if harm.low > neutral else "not distinguishable"
    refused = [no_claim(m.translators["auditor"].fit_images, m.head.features, images_per_feature) for m in (before, after)]
    sentences.append(
        next(filter(None, refused), None)
        or f"Against {against}, SingLoss leaves an AS⁻ that is {direction}: {harm.value:.2f}{harm.unit} [{harm.low:.2f}, {harm.high:.2f}] "
        f"by the auditor ({after.translators['auditor'].overall['AS_neg']:.2f}°), with IS {image.value:.2f}× "
        f"[{image.low:.2f}, {image.high:.2f}]."
    )
    kept = "kept" if top1.low > -100 * MARGIN else "lost" if top1.high < 0 else "not shown to be kept"
    sentences.append(
        f"Top-1 is {kept}: {top1.value:+.2f} points [{top1.low:+.2f}, {top1.high:+.2f}] (margin {100 * MARGIN:.1f} points)."
    )
    loop = after.translators["loop"].overall["AS_neg"]
    if loop > 0:
        gap = after.translators["auditor"].overall["AS_neg"] / loop
        gamed = "the loop's translator was gamed: do not believe its figure" if gap > GAMED else "loop and auditor agree"
        sentences.append(f"Audit gap {gap:.2f} (auditor AS⁻ over the loop's own): {gamed}.")
    return sentences


def report_warnings(measurements: Mapping[str, ModelMeasurement], images_per_feature: float) -> list[str]:
    """Reasons not to believe a figure: too few auditor pictures for its width, a poor translator, no control (sentences)."""
    warnings = []
    before = measurements["before"]
    auditor, width = before.translators["auditor"], before.head.features
    if auditor.fit_images < images_per_feature * width:
        warnings.append(
            f"Warning: the auditor was fitted on {auditor.fit_images} pictures for {width} features; below "
            f"{images_per_feature:g} a feature it is not identified well, AS⁻ reads too high, and no claim should be made."
        )
    if auditor.zero_shot < 0.5 * before.vlm_zero_shot:
        warnings.append(
            f"Warning: translated features name {auditor.zero_shot:.0%} of the classes where the vision-language model's own "
            f"embeddings name {before.vlm_zero_shot:.0%}; the translator loses too much for AS to mean the class."
        )
    if before.vlm_zero_shot < 0.5:
        warnings.append(
            f"Warning: the vision-language model itself names only {before.vlm_zero_shot:.0%} of the test pictures' classes."
        )
    if "control" not in measurements:
        warnings.append("Warning: no control arm was trained, so nothing here shows an effect of the loss.")
    return warnings
