"""The passport of a head, in seconds and without data, and whether two heads may be compared (METHOD section 8.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singreg.analysis.model import summarize_head
from singreg.analysis.results import HeadSummary
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace

VISIBLE = 10.0
"""Degrees of IS below which a change is hardly seen in a picture (METHOD section 3): the unit in which null spaces are judged."""
ILL_CONDITIONED = 1e3
"""cond(W) above which projections in float32 are not trusted (METHOD section 6)."""
LOOSE = 1e-3
"""The second tolerance of `HeadSummary.rank_loose`, relative to the largest singular value."""


@dataclass(frozen=True)
class HeadPassport:
    """What a head's weight says about its null space. summary: sizes, ranks, σ_min/σ_max and hash for invariance of logits.

    softmax_nullity: dimensions in which probabilities stay equal (logits may all move together). logit_bound: largest |Δlogit|
    that removing the null component of a feature of norm 1 can leave in float32 arithmetic, the bias aside. largest_row: the
    largest |w_c|. The null's share of the features' energy and the |Δlogit| measured need data: see `analyze_model`.
    """

    summary: HeadSummary
    softmax_nullity: int
    logit_bound: float
    largest_row: float

    @property
    def shares(self) -> dict[str, float]:
        """Null share of the dimensions by invariance, in [0, 1]."""
        return {"logits": self.summary.null_dimensions, "softmax": self.softmax_nullity / self.summary.features}

    @property
    def cond(self) -> float:
        """σ_max / σ_min over the rank; infinite for a head that is 0."""
        return 1 / self.summary.conditioning if self.summary.conditioning else math.inf

    @property
    def chance_angle(self) -> float:
        """Degrees by which losing a random subspace of the null space's dimension turns an isotropic feature: asin √share."""
        return math.degrees(math.asin(math.sqrt(self.summary.null_dimensions)))

    @property
    def verdict(self) -> str:
        """One sentence for a table: whether there is a null space to speak of (no shapes)."""
        if not self.summary.nullity:
            return "no null space: every feature direction moves a logit, nothing to measure"
        if self.chance_angle < VISIBLE:
            return f"null space too small to see: removing as many random dimensions turns a feature by {self.chance_angle:.1f}°"
        return "has a null space"

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict (no shapes)."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> HeadPassport:
        """Back from `to_json` (no shapes)."""
        return cls(**{**value, "summary": HeadSummary(**value["summary"])})


def head_passport(head: Classifier | Tensor, *, tag: str | None = None) -> HeadPassport:
    """The passport of a classifier's head, or of a bare weight (C, m) or (C, m, 1, 1). No data; works without a null space.

    Raises:
        ValueError: a weight of another shape, or one that is not finite.

    Example:
        >>> passport = head_passport(torch.eye(4)[:3], tag="three of four")
        >>> passport.summary.nullity, passport.shares, passport.cond
        (1, {'logits': 0.25, 'softmax': 0.5}, 1.0)
        >>> head_passport(torch.eye(4)).verdict
        'no null space: every feature direction moves a logit, nothing to measure'
    """
    classifier = _as_classifier(head, tag or "weight") if isinstance(head, Tensor) else head
    weight = classifier.weight.detach()
    space = NullSpace.from_weight(weight, allow_empty=True)
    summary = summarize_head(classifier, space)
    softmax = NullSpace.from_weight(weight, invariance="softmax", allow_empty=True)
    largest = float(torch.linalg.vector_norm(weight.double(), dim=1).max())
    return HeadPassport(summary, softmax.nullity, _logit_bound(space, largest), largest)


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

    Three errors add up, with u = 2^-24: the singular values below the rank's tolerance, σ_{r+1}; rounding f~ to float32,
    u·|w|; and two float32 dot products of m terms, each off by at most γ·|w|·|f| with γ = m u / (1 - m u).
    """
    discarded = float(space.singular_values[space.rank]) if space.rank < len(space.singular_values) else 0.0
    unit, terms = torch.finfo(torch.float32).eps / 2, space.basis.shape[0]
    gamma = terms * unit / (1 - terms * unit)
    return discarded + (unit + 2 * gamma * (1 + unit)) * largest_row


def compare_passports(passports: Sequence[HeadPassport]) -> list[str]:
    """Warnings where a null space is missing, too small, ill-conditioned, or too unlike the others' to compare scores (sentences).

    The measure is the chance angle: what removing a random subspace of the same dimension does to a feature. Two heads are too
    different when their chance angles differ by more than can be seen in a picture, since a difference of scores that large
    would come from the sizes of the heads alone.

    Example:
        >>> compare_passports([head_passport(torch.eye(4)[:2], tag="a"), head_passport(torch.eye(64)[:2], tag="b")])[0][:86]
        'b has 62 of 64 dimensions in its null space (97 %), a has 2 of 4 dimensions (50 %): re'
    """
    warnings = [sentence for passport in passports for sentence in _alone(passport)]
    usable = sorted((p for p in passports if p.summary.nullity), key=lambda p: -p.chance_angle)
    if len(usable) > 1 and usable[0].chance_angle - usable[-1].chance_angle > VISIBLE:
        large, small = usable[0], usable[-1]
        warnings.append(
            f"{_size(large, 'in its null space ')}, {_size(small)}: removing that many random dimensions already turns a feature by "
            f"{large.chance_angle:.0f}° and {small.chance_angle:.0f}°, so compare their scores only beside their chance levels."
        )
    if len({p.summary.classes for p in passports}) > 1:
        counts = ", ".join(f"{p.summary.tag} {p.summary.classes}" for p in passports)
        warnings.append(f"The heads have different numbers of classes ({counts}), so class prompts and ranks are not the same.")
    return warnings


def _size(passport: HeadPassport, where: str = "") -> str:
    s = passport.summary
    return f"{s.tag} has {s.nullity} of {s.features} dimensions {where}({100 * s.null_dimensions:.0f} %)"


def _alone(passport: HeadPassport) -> list[str]:
    """What is wrong with one head, whatever it is compared with."""
    s, warnings = passport.summary, []
    if not s.nullity or passport.chance_angle < VISIBLE:
        warnings.append(f"{s.tag} ({s.classes} classes, {s.features} features): {passport.verdict}.")
    loose = math.degrees(math.asin(math.sqrt(1 - s.rank_loose / s.features)))
    if loose - passport.chance_angle > VISIBLE:
        warnings.append(
            f"{s.tag} has {s.rank - s.rank_loose} more directions with singular values below {LOOSE:g} of the largest: nearly null, "
            f"they count as row space here, and its null space depends on the tolerance."
        )
    if passport.cond > ILL_CONDITIONED:
        warnings.append(f"{s.tag}: σ_max/σ_min is {passport.cond:.1e}; a projection in float32 is not exact enough, use float64.")
    return warnings
