"""The passport of a head, in seconds and without data, and whether two heads may be compared (METHOD section 8.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
        summary (`describe_head`), softmax_nullity (dimensions in which probabilities stay), largest_row, and
        logit_bound, the largest |Δlogit| that removing the null component of a unit feature can leave in float32.
    """
    weight = classifier.weight.detach()
    space = NullSpace.from_weight(weight, allow_empty=True)
    largest = float(torch.linalg.vector_norm(weight.double(), dim=1).max())
    return {
        "summary": describe_head(classifier, space),
        "softmax_nullity": NullSpace.from_weight(weight, invariance="softmax", allow_empty=True).nullity,
        "logit_bound": _logit_bound(space, largest),
        "largest_row": largest,
    }


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
    warnings = [sentence for passport in passports for sentence in _alone(passport)]
    usable = sorted((p for p in passports if p["summary"]["nullity"]), key=lambda p: -chance_angle(p))
    if len(usable) > 1 and chance_angle(usable[0]) - chance_angle(usable[-1]) > VISIBLE:
        large, small = usable[0], usable[-1]
        warnings.append(
            f"{_size(large, 'in its null space ')}, {_size(small)}: removing that many random dimensions already "
            f"turns a feature by {chance_angle(large):.0f}° and {chance_angle(small):.0f}°, so compare their scores "
            "only beside their chance levels."
        )
    summaries = [passport["summary"] for passport in passports]
    if len({summary["classes"] for summary in summaries}) > 1:
        counts = ", ".join(f"{summary['tag']} {summary['classes']}" for summary in summaries)
        warnings.append(
            f"The heads have different numbers of classes ({counts}), so class prompts and ranks are not the same."
        )
    return warnings


def _logit_bound(space: NullSpace, largest_row: float) -> float:
    """|W f~ - W f| <= bound · |f| for f~ = f - Π_n f in float32, unit roundoff u = 2^-24.

    Three errors add up: singular values below the rank's tolerance, rounding f~ (u·|w|), and two dot products of m
    terms, each off by at most γ·|w|·|f| with γ = m u / (1 - m u).
    """
    discarded = float(space.singular_values[space.rank]) if space.rank < len(space.singular_values) else 0.0
    unit, terms = torch.finfo(torch.float32).eps / 2, space.basis.shape[0]
    gamma = terms * unit / (1 - terms * unit)
    return discarded + (unit + 2 * gamma * (1 + unit)) * largest_row


def _size(passport: Passport, where: str = "") -> str:
    s = passport["summary"]
    return f"{s['tag']} has {s['nullity']} of {s['features']} dimensions {where}({100 * s['null_dimensions']:.0f} %)"


def _alone(passport: Passport) -> list[str]:
    """What is wrong with one head, whatever it is compared with."""
    s, angle, warnings = passport["summary"], chance_angle(passport), []
    if not s["nullity"] or angle < VISIBLE:
        warnings.append(f"{s['tag']} ({s['classes']} classes, {s['features']} features): {judge_passport(passport)}.")
    loose = math.degrees(math.asin(math.sqrt(1 - s["rank_loose"] / s["features"])))
    if loose - angle > VISIBLE:
        warnings.append(
            f"{s['tag']} has {s['rank'] - s['rank_loose']} more directions with singular values below {LOOSE:g} of the "
            "largest: nearly null, they count as row space here, and its null space depends on the tolerance."
        )
    cond = 1 / s["conditioning"] if s["conditioning"] else math.inf
    if cond > ILL_CONDITIONED:
        said = "a projection in float32 is not exact enough, use float64."
        warnings.append(f"{s['tag']}: σ_max/σ_min is {cond:.1e}; {said}")
    return warnings
