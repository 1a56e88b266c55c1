"""The passport of a head, in seconds and without data, and whether two heads may be compared (METHOD section 8.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singreg.analysis.scores import LOOSE, describe_head
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace

VISIBLE = 10.0
"""Degrees of IS below which a change is hardly seen in an image (METHOD section 3)."""
ILL_CONDITIONED = 1e3
"""cond(W) above which projections in float32 are not trusted (METHOD section 6)."""
Passport = Mapping[str, Any]


def head_passport(head: Classifier | Tensor, *, tag: str | None = None) -> dict[str, Any]:
    """Describe the null space of a classifier's head, or of a bare weight (C, m) or (C, m, 1, 1), without data.

    Returns:
        summary (see `describe_head`, for invariance of logits); softmax_nullity, dimensions in which probabilities stay
        equal; logit_bound, largest |Δlogit| that removing the null component of a feature of norm 1 can leave in
        float32, the bias aside; largest_row, the largest |w_c|.

    Raises:
        ValueError: a weight of another shape, or one that is not finite.

    Example:
        >>> passport = head_passport(torch.eye(4)[:3], tag="three of four")
        >>> passport["summary"]["nullity"], passport["softmax_nullity"], round(chance_angle(passport))
        (1, 2, 30)
        >>> judge_passport(head_passport(torch.eye(4)))
        'no null space: every feature direction moves a logit, nothing to measure'
    """
    classifier = _as_classifier(head, tag or "weight") if isinstance(head, Tensor) else head
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

    Two heads are too different when their chance angles differ by more than can be seen in an image: a difference of
    scores that large would come from the sizes of the heads alone.

    Example:
        >>> small, large = head_passport(torch.eye(4)[:2], tag="a"), head_passport(torch.eye(64)[:2], tag="b")
        >>> compare_passports([small, large])[0].split(",")[0]
        'b has 62 of 64 dimensions in its null space (97 %)'
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


def _as_classifier(weight: Tensor, tag: str) -> Classifier:
    """A weight as a model that is nothing but its head."""
    flat = weight.detach().flatten(1) if weight.ndim == 4 and weight.shape[2:].numel() == 1 else weight.detach()
    if flat.ndim != 2 or not flat.numel():
        raise ValueError(f"expected a head weight (C, m) or (C, m, 1, 1), got {tuple(weight.shape)}")
    linear = nn.Linear(flat.shape[1], flat.shape[0], bias=False, device=flat.device, dtype=flat.dtype)
    linear.weight = nn.Parameter(flat.clone(), requires_grad=False)
    return Classifier.from_module(nn.Sequential(linear), "0", tag=tag)


def _logit_bound(space: NullSpace, largest_row: float) -> float:
    """|W f~ - W f| <= bound · |f| for f~ = f - Π_n f stored and multiplied in float32.

    Three errors add up, with u = 2^-24: the singular values below the rank's tolerance, σ_{r+1}; rounding f~ to
    float32, u·|w|; and two float32 dot products of m terms, each off by at most γ·|w|·|f| with γ = m u / (1 - m u).
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
        warnings.append(
            f"{s['tag']}: σ_max/σ_min is {cond:.1e}; a projection in float32 is not exact enough, use float64."
        )
    return warnings
