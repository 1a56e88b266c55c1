"""The terms of SingLoss, one small function each, and the sums of them that have a name (METHOD section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from singreg.functional import attribute_score, image_score
from singreg.utils import all_reduce_mean

CONFUSABLE = 16  # how many nearest classes make a class's contrast directions
SMALLEST_SCATTER = 1e-20  # below it a share is of rounding noise; its square root is far below any feature's last bit


@dataclass(frozen=True)
class LossInputs:
    """What a term may use, for B images, C classes, m features, n translator dimensions, K contrasts of prompts."""

    null: Tensor  # (B, m): f_n = Π_n (f - μ)
    centred: Tensor  # (B, m): f - μ
    z: Tensor  # (B, n): T f
    z_eq: Tensor  # (B, n): T (f - f_n)
    text: Tensor  # (B, n): embedding of the true class's prompt
    shift: Tensor  # (B, n): A f_n
    total: Tensor  # (B, n): A (f - μ)
    contrast: Tensor  # (B, n, .): orthonormal contrast directions of the true class
    class_null: Tensor  # (B, m): Π_n (mean of the true class - μ), without gradient
    image_score_ref: Tensor  # (B,): IS of the true class before training, degrees
    pulled: Tensor  # (C, m): Aᵀ t of every prompt
    pulled_null: Tensor  # (C, m): Π_n Aᵀ t
    covariance: Tensor  # (m, m): Σ of the features behind the translator; empty unless a term reads statistics
    floor: float  # ε of the metric Σ + ε (tr Σ / m) I
    seen: Tensor  # (B, K): s = Uᵀ (z_i - z̄) of the image's own embedding z_i; empty unless a term reads embeddings
    read: Tensor  # (B, K): the linear readout of s from the row-space part of the feature


TermFunction = Callable[[LossInputs], Tensor]


class Term(NamedTuple):
    """A registered term; see `term`."""

    function: TermFunction
    default: float
    reads: frozenset[str]


TERMS: dict[str, Term] = {}


def term(name: str, *, default: float = 0.0, reads: str = "") -> Callable[[TermFunction], TermFunction]:
    """Register a function of `LossInputs` as a loss term; this is all that a new term takes.

    Args:
        name: what configurations and logs call it.
        default: its weight in the preset "sing"; 0 leaves it out.
        reads: what SingLoss must be given for it, in words: "statistics", "embeddings".
    """

    def register(function: TermFunction) -> TermFunction:
        TERMS[name] = Term(function, default, frozenset(reads.split()))
        return function

    return register


@term("readout", default=1.0, reads="statistics embeddings")
def readout(inputs: LossInputs) -> Tensor:
    """Return what the row space does not tell of the image's own embedding, Σ|s - B Qᵀ(f - μ)|² over Σ|s|²."""
    spread = all_reduce_mean(inputs.seen.square().sum(-1))
    missed = (inputs.seen - inputs.read).square().sum(-1).mean()
    return missed / spread.clamp_min(torch.finfo(spread.dtype).tiny)


@term("capacity", default=10.0, reads="statistics")
def capacity(inputs: LossInputs) -> Tensor:
    """Return the share of the prompts' score variance that the null space carries, tr(P M Pᵀ) / tr(A_t M A_tᵀ).

    M = Σ + ε (tr Σ / m) I is the features' metric, the rows of A_t are Aᵀ t_k, P = A_t Π_n. In [0, 1]; W alone moves.
    """
    metric = inputs.covariance, inputs.floor
    return score_variance(inputs.pulled_null, *metric) / score_variance(inputs.pulled, *metric)


@term("leak")
def leak(inputs: LossInputs) -> Tensor:
    """Return the class-semantic energy in the null space: |U_yᵀ A f_n|² over the fixed mean of |U_yᵀ A (f - μ)|²."""
    energy = _contrast_energy(inputs.shift, inputs.z, inputs.contrast).mean()
    scale = all_reduce_mean(_contrast_energy(inputs.total, inputs.z, inputs.contrast))
    return energy / scale.clamp_min(torch.finfo(scale.dtype).tiny)


@term("hinge")
def hinge(inputs: LossInputs) -> Tensor:
    """Return the harmful side of the attribute score, mean relu(-AS) / IS_ref: degrees over degrees, so scale-free."""
    harmful = torch.relu(-attribute_score(inputs.z, inputs.z_eq, inputs.text))
    return (harmful / inputs.image_score_ref).mean()


@term("band")
def band(inputs: LossInputs) -> Tensor:
    """Return how far IS leaves [0.9, 1.5] of IS_ref, squared: below, permitted variety collapses; above, it dilutes."""
    relative = image_score(inputs.z, inputs.z_eq) / inputs.image_score_ref
    return (torch.relu(0.9 - relative).square() + torch.relu(relative - 1.5).square()).mean()


@term("class_share")
def class_share(inputs: LossInputs) -> Tensor:
    """Return the between-class share of the scatter of f_n, mean |class mean|² over mean |f_n|²; needs no VLM."""
    # With the running mean m_y held fixed, this has the value of |m_y|² and its whole gradient; <f_n, m_y> has half of
    # it, with which descent would raise a share above one half.
    between = 2 * (inputs.null * inputs.class_null).sum(-1) - inputs.class_null.square().sum(-1)
    return _ratio_of_means(between, inputs.null.square().sum(-1))


@term("null_energy")
def null_energy(inputs: LossInputs) -> Tensor:
    """Return the baseline mean |f_n|² over the fixed mean of |f - μ|²."""
    scale = all_reduce_mean(inputs.centred.square().sum(-1))
    return inputs.null.square().sum(-1).mean() / scale.clamp_min(torch.finfo(scale.dtype).tiny)


PRESETS: dict[str, dict[str, float]] = {
    "sing": {name: each.default for name, each in TERMS.items() if each.default},
    "first": {"leak": 0.3, "hinge": 1.0, "band": 0.3, "class_share": 0.1, "capacity": 100.0},  # 0.2's, floor 1e6
    "label_only": {"class_share": 1.0},
    "null_energy": {"null_energy": 1.0},
}


def resolve_terms(preset: str, overrides: Mapping[str, float]) -> dict[str, float]:
    """Return a preset's terms with some weights changed or added; a weight of 0 removes its term."""
    return {name: weight for name, weight in {**PRESETS[preset], **overrides}.items() if weight}


def score_variance(rows: Tensor, covariance: Tensor, floor: float) -> Tensor:
    """Return tr(R M Rᵀ) with M = Σ + ε (tr Σ / m) I, never formed. Shape: R (k, m), Σ (m, m) -> ()."""
    return ((rows @ covariance) * rows).sum() + floor * torch.diagonal(covariance).mean() * rows.square().sum()


def _contrast_energy(vector: Tensor, z: Tensor, contrast: Tensor) -> Tensor:
    """|U_yᵀ v|² of v tangent at z, which moves the angles, not the length: (B, n), (B, n), (B, n, K) to (B,)."""
    unit = nn.functional.normalize(z, dim=-1)
    tangent = vector - unit * (vector * unit).sum(-1, keepdim=True)
    return torch.einsum("bn,bnk->bk", tangent, contrast).square().sum(-1)


def _ratio_of_means(numerator: Tensor, denominator: Tensor) -> Tensor:
    """mean(a) / mean(b) over all processes' images: by the quotient rule the gradient that DDP averages is exact."""
    top, bottom = all_reduce_mean(numerator), all_reduce_mean(denominator).clamp_min(SMALLEST_SCATTER)
    # Divided twice: the square of a small scatter would round to 0, and a share of nothing is 0, not NaN.
    return numerator.mean() / bottom - (denominator.mean() - bottom) * (top / bottom / bottom)


def contrast_directions(texts: Tensor, confusable: int = CONFUSABLE) -> Tensor:
    """Return orthonormal bases of the contrasts t_y - t_j for the most confusable classes j of every class y.

    Shape: texts (C, n) -> (C, n, K), K = min(confusable, C - 1, n); a column is 0 where contrasts are dependent.
    """
    classes, width = texts.shape
    if classes < 2:
        raise ValueError(f"contrast directions need at least 2 classes, got texts {tuple(texts.shape)}")
    exact = nn.functional.normalize(texts.detach().cpu().double(), dim=-1)  # not every device has float64
    similarity = (exact @ exact.T).fill_diagonal_(-math.inf)
    nearest = similarity.topk(min(confusable, classes - 1, width), dim=1).indices
    directions, sizes, _ = torch.linalg.svd((exact[:, None, :] - exact[nearest]).mT, full_matrices=False)
    # Two classes with one prompt have no contrast; what the decomposition fills its column with means nothing.
    real = sizes > 1e-6 * sizes[:, :1].clamp_min(1e-6)
    found: Tensor = directions * real[:, None, :]
    return found.to(texts)


def contrast_basis(texts: Tensor) -> Tensor:
    """Return an orthonormal basis U of the contrasts t_k - t̄ of all prompts. Shape: (C, n) -> (n, K), K < C."""
    exact = nn.functional.normalize(texts.detach().cpu().double(), dim=-1)
    _, sizes, right = torch.linalg.svd(exact - exact.mean(0), full_matrices=False)
    basis: Tensor = right[sizes > 1e-6 * sizes[:1].clamp_min(1e-6)].T
    return basis.to(texts)
