"""The passport of a head, in seconds and without data, and whether two heads may be compared (METHOD section 8.3)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from singreg.analysis.scores import LOOSE, describe_head
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace

VISIBLE = 10.0
"""Degrees of IS below which a change is hardly seen in an image (METHOD section 3)."""
ILL_CONDITIONED = 1e3
"""cond(W) above which projections in float32 are not trusted (METHOD section 6)."""
Passport = Mapping[str, Any]


def head_passport(classifier: Classifier) -> dict[str, Any]:
    """Describe the null space of a classifier's head (`describe_head`), that of the logits, without data."""
    return describe_head(classifier, NullSpace.from_weight(classifier.weight.detach(), allow_empty=True))


def chance_angle(passport: Passport) -> float:
    """Return asin √share, the degrees by which losing a random subspace of this size turns an isotropic feature."""
    return math.degrees(math.asin(math.sqrt(passport["null_dimensions"])))


def judge_passport(passport: Passport) -> str:
    """Say in one sentence whether there is a null space to speak of."""
    if not passport["nullity"]:
        return "no null space: every feature direction moves a logit, nothing to measure"
    if (angle := chance_angle(passport)) < VISIBLE:
        return f"null space too small to see: removing as many random dimensions turns a feature by {angle:.1f}°"
    return "has a null space"


def compare_passports(passports: Sequence[Passport]) -> list[str]:
    """Warn where a null space is missing, too small, ill-conditioned, or too unlike the others' to compare scores.

    Heads are too different when their chance angles differ by more than can be seen in an image.
    """
    warnings = []
    for p in passports:
        if (verdict := judge_passport(p)) != "has a null space":
            warnings.append(f"{p['tag']} ({p['classes']} classes, {p['features']} features): {verdict}.")
        loose = math.degrees(math.asin(math.sqrt(1 - p["rank_loose"] / p["features"])))
        if loose - chance_angle(p) > VISIBLE:
            warnings.append(
                f"{p['tag']} has {p['rank'] - p['rank_loose']} more directions with singular values below {LOOSE:g} of "
                "the largest: nearly null, they count as row space here; its null space depends on the tolerance."
            )
        if p["conditioning"] < 1 / ILL_CONDITIONED:
            cond = 1 / p["conditioning"] if p["conditioning"] else math.inf
            said = "a projection in float32 is not exact enough, use float64."
            warnings.append(f"{p['tag']}: σ_max/σ_min is {cond:.1e}; {said}")
    usable = sorted((p for p in passports if p["nullity"]), key=chance_angle, reverse=True)
    if usable and chance_angle(usable[0]) - chance_angle(usable[-1]) > VISIBLE:
        large, small = (
            f"{p['tag']} has {p['nullity']} of {p['features']} dimensions in its null space "
            f"({100 * p['null_dimensions']:.0f} %)"
            for p in (usable[0], usable[-1])
        )
        warnings.append(
            f"{large}, {small}: removing that many random dimensions already turns a feature by "
            f"{chance_angle(usable[0]):.0f}° and {chance_angle(usable[-1]):.0f}°, so compare their scores only beside "
            "their chance levels."
        )
    if len({p["classes"] for p in passports}) > 1:
        counts = ", ".join(f"{p['tag']} {p['classes']}" for p in passports)
        warnings.append(
            f"The heads have different numbers of classes ({counts}), so class prompts and ranks are not the same."
        )
    return warnings
