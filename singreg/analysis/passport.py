"""The passport of a head, in seconds and without data, and whether two heads may be compared (METHOD section 8.3)."""

from __future__ import annotations

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
    """Describe the null space of a classifier's head, without data.

    Returns:
        summary (`describe_head`), and softmax_nullity, the dimensions in which probabilities stay.
    """
    weight = classifier.weight.detach()
    softmax = NullSpace.from_weight(weight, invariance="softmax", allow_empty=True)
    summary = describe_head(classifier, NullSpace.from_weight(weight, allow_empty=True))
    return {"summary": summary, "softmax_nullity": softmax.nullity}


def chance_angle(passport: Passport) -> float:
    """Return asin √share, the degrees by which losing a random subspace of this size turns an isotropic feature."""
    return math.degrees(math.asin(math.sqrt(passport["summary"]["null_dimensions"])))


def judge_passport(passport: Passport) -> str:
    """Say in one sentence whether there is a null space to speak of."""
    if not passport["summary"]["nullity"]:
        return "no null space: every feature direction moves a logit, nothing to measure"
    if (angle := chance_angle(passport)) < VISIBLE:
        return f"null space too small to see: removing as many random dimensions turns a feature by {angle:.1f}°"
    return "has a null space"


def compare_passports(passports: Sequence[Passport]) -> list[str]:
    """Warn where a null space is missing, too small, ill-conditioned, or too unlike the others' to compare scores.

    Heads are too different when their chance angles differ by more than can be seen in an image.
    """
    warnings = []
    for passport in passports:
        s, angle, verdict = passport["summary"], chance_angle(passport), judge_passport(passport)
        if verdict != "has a null space":
            warnings.append(f"{s['tag']} ({s['classes']} classes, {s['features']} features): {verdict}.")
        loose = math.degrees(math.asin(math.sqrt(1 - s["rank_loose"] / s["features"])))
        if loose - angle > VISIBLE:
            warnings.append(
                f"{s['tag']} has {s['rank'] - s['rank_loose']} more directions with singular values below {LOOSE:g} of "
                "the largest: nearly null, they count as row space here; its null space depends on the tolerance."
            )
        if s["conditioning"] < 1 / ILL_CONDITIONED:
            cond = 1 / s["conditioning"] if s["conditioning"] else math.inf
            said = "a projection in float32 is not exact enough, use float64."
            warnings.append(f"{s['tag']}: σ_max/σ_min is {cond:.1e}; {said}")
    usable = [passport for passport in passports if passport["summary"]["nullity"]]
    large, small = max(usable, key=chance_angle, default={}), min(usable, key=chance_angle, default={})
    if usable and chance_angle(large) - chance_angle(small) > VISIBLE:
        sizes = [
            f"{s['tag']} has {s['nullity']} of {s['features']} dimensions in its null space "
            f"({100 * s['null_dimensions']:.0f} %)"
            for s in (large["summary"], small["summary"])
        ]
        warnings.append(
            f"{', '.join(sizes)}: removing that many random dimensions already turns a feature by "
            f"{chance_angle(large):.0f}° and {chance_angle(small):.0f}°, so compare their scores only beside "
            "their chance levels."
        )
    summaries = [passport["summary"] for passport in passports]
    if len({summary["classes"] for summary in summaries}) > 1:
        counts = ", ".join(f"{summary['tag']} {summary['classes']}" for summary in summaries)
        warnings.append(
            f"The heads have different numbers of classes ({counts}), so class prompts and ranks are not the same."
        )
    return warnings
