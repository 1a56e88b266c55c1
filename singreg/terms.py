"""The terms of SingLoss, one small function each, and the sums of them that have a name (METHOD section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from singreg.functional import attribute_score, image_score
from singreg.nullspace import helmert_contrasts
from singreg.utils import all_reduce_mean

CONFUSABLE = 16  # how many nearest classes make a class's contrast directions
HEAD_FLOOR = 0.3  # σ_min/σ_max below which `head` pushes
SMALLEST_SCATTER = 1e-20  # below it a share is of rounding noise; its square root is far below any feature's last bit
TARGET_SEED, PLACEBO_SEED = 20260, 20261  # fixed, so that every process and every resumed run draws the same

Placebo = Literal["none", "shuffled", "random"]


@dataclass(frozen=True)
class LossInputs:
    """What a term may use, for B images, C classes, m features and n translator dimensions."""

    null: Tensor  # (B, m): f_n = Π_n (f - μ)
    centred: Tensor  # (B, m): f - μ
    z: Tensor  # (B, n): T f
    z_eq: Tensor  # (B, n): T (f - f_n)
    text: Tensor  # (B, n): embedding of the true class's prompt
    shift: Tensor  # (B, n): A f_n
    total: Tensor  # (B, n): A (f - μ)
    contrast: Tensor  # (B, n, K): orthonormal contrast directions of the true class
    class_null: Tensor  # (B, m): Π_n (mean of the true class - μ), without gradient
    image_score_ref: Tensor  # (B,): IS of the true class before training, degrees
    head: Tensor  # (C, m): W
    matrix: Tensor  # (n, m): A
    targets: Tensor  # (J, n): the prompts (C), then random directions; empty unless a term needs them
    pulled: Tensor  # (J, m): Aᵀ t of every target
    pulled_null: Tensor  # (J, m): Π_n Aᵀ t


TermFunction = Callable[[LossInputs], Tensor]
Targets = Literal["", "prompts", "random"]


class Term(NamedTuple):
    """A registered term; see `term`."""

    function: TermFunction
    default: float
    head_only: bool
    targets: Targets


TERMS: dict[str, Term] = {}


def term(
    name: str, *, default: float = 0.0, head_only: bool = False, targets: Targets = ""
) -> Callable[[TermFunction], TermFunction]:
    """Register a function of `LossInputs` as a loss term; this is all that a new term takes.

    Args:
        name: what configurations and logs call it.
        default: its weight in the preset "sing"; 0 leaves it out.
        head_only: no gradient of it reaches the features.
        targets: what it reads as `targets`: the "prompts", or them and as many "random" directions.
    """

    def register(function: TermFunction) -> TermFunction:
        TERMS[name] = Term(function, default, head_only, targets)
        return function

    return register


@term("leak", default=0.3)
def leak(inputs: LossInputs) -> Tensor:
    """Return the class-semantic energy in the null space: |U_yᵀ A f_n|² over the fixed mean of |U_yᵀ A (f - μ)|²."""
    energy = _contrast_energy(inputs.shift, inputs.z, inputs.contrast).mean()
    scale = all_reduce_mean(_contrast_energy(inputs.total, inputs.z, inputs.contrast))
    return energy / scale.clamp_min(torch.finfo(scale.dtype).tiny)


@term("hinge", default=1.0)
def hinge(inputs: LossInputs) -> Tensor:
    """Return the harmful side of the attribute score, mean relu(-AS) / IS_ref: degrees over degrees, so scale-free."""
    harmful = torch.relu(-attribute_score(inputs.z, inputs.z_eq, inputs.text))
    return (harmful / inputs.image_score_ref).mean()


@term("attribute")
def attribute(inputs: LossInputs) -> Tensor:
    """Return both sides of the attribute score, mean |AS| / IS_ref: the paper's figure, so benign changes count too."""
    score = attribute_score(inputs.z, inputs.z_eq, inputs.text)
    return (score.abs() / inputs.image_score_ref).mean()


@term("band", default=0.3)
def band(inputs: LossInputs) -> Tensor:
    """Return how far IS leaves [0.9, 1.5] of IS_ref, squared: below, permitted variety collapses; above, it dilutes."""
    relative = image_score(inputs.z, inputs.z_eq) / inputs.image_score_ref
    return (torch.relu(0.9 - relative).square() + torch.relu(relative - 1.5).square()).mean()


@term("class_share", default=0.1)
def class_share(inputs: LossInputs) -> Tensor:
    """Return the between-class share of the scatter of f_n, mean |class mean|² over mean |f_n|²; needs no VLM."""
    # With the running mean m_y held fixed, this has the value of |m_y|² and its whole gradient; <f_n, m_y> has half of
    # it, with which descent would raise a share above one half.
    between = 2 * (inputs.null * inputs.class_null).sum(-1) - inputs.class_null.square().sum(-1)
    return _ratio_of_means(between, inputs.null.square().sum(-1))


@term("capacity", default=100.0, head_only=True, targets="prompts")
def capacity(inputs: LossInputs) -> Tensor:
    """Return what the head leaves to the null space of the prompts, Σ_k |Π_n Aᵀ t_k|² over Σ_k |Aᵀ t_k|², in [0, 1]."""
    prompts = len(inputs.head)
    return inputs.pulled_null[:prompts].square().sum() / inputs.pulled[:prompts].square().sum()


@term("steer", head_only=True, targets="random")
def steer(inputs: LossInputs) -> Tensor:
    """Return how well a null step moves z towards a text direction t: mean cos²(M t, t), M = A Π_n Aᵀ, in [0, 1]."""
    # tᵀ M t = |Π_n Aᵀ t|², as Π_n is a projector: exact where both vanish, unlike a dot product with rounding noise.
    along = inputs.pulled_null.square().sum(-1) / torch.linalg.vector_norm(inputs.targets, dim=-1)
    length: Tensor = torch.linalg.vector_norm(inputs.pulled_null @ inputs.matrix.T, dim=-1)
    cosine: Tensor = along / length.clamp_min(torch.finfo(length.dtype).tiny)
    return cosine.square().mean()


@term("head", head_only=True)
def head(inputs: LossInputs) -> Tensor:
    """Return the floor on the condition of the centred head, relu(0.3 - σ_min/σ_max)² / 0.3², in [0, 1]."""
    sigma = torch.linalg.svdvals(helmert_contrasts(inputs.head))  # those of W minus its mean row, without the zero
    ratio: Tensor = sigma[-1] / sigma[0].clamp_min(torch.finfo(sigma.dtype).tiny)
    return (torch.relu(HEAD_FLOOR - ratio) / HEAD_FLOOR).square()


@term("orthogonal", head_only=True)
def orthogonal(inputs: LossInputs) -> Tensor:
    """Return the baseline "orthogonal head", the mean squared cosine of two different rows of W; 0 is orthogonal."""
    rows = nn.functional.normalize(inputs.head, dim=1)
    pairs = len(rows) * (len(rows) - 1) / 2
    return torch.triu(rows @ rows.T, diagonal=1).square().sum() / pairs


@term("null_energy")
def null_energy(inputs: LossInputs) -> Tensor:
    """Return the baseline mean |f_n|² over the fixed mean of |f - μ|²."""
    scale = all_reduce_mean(inputs.centred.square().sum(-1))
    return inputs.null.square().sum(-1).mean() / scale.clamp_min(torch.finfo(scale.dtype).tiny)


@term("null_share")
def null_share(inputs: LossInputs) -> Tensor:
    """Return the baseline mean |f_n|² over mean |f - μ|², in [0, 1]: growing the row-space part lowers it too."""
    return _ratio_of_means(inputs.null.square().sum(-1), inputs.centred.square().sum(-1))


HEAD_TERMS = {name for name, each in TERMS.items() if each.head_only}
DEFAULT_TERMS = {name: each.default for name, each in TERMS.items() if each.default}
PRESETS: dict[str, dict[str, float]] = {
    "sing": DEFAULT_TERMS,
    "leakage": {name: weight for name, weight in DEFAULT_TERMS.items() if name not in HEAD_TERMS},
    "two_sided": {**{k: v for k, v in DEFAULT_TERMS.items() if k != "hinge"}, "attribute": 1.0},  # |AS|, not AS⁻ alone
    "steering": {**DEFAULT_TERMS, "steer": 100.0},  # as much as capacity: at a tenth of it, capacity shapes the head
    "label_only": {"class_share": 1.0},
    "null_energy": {"null_energy": 1.0},
    "null_share": {"null_share": 1.0},
    "sigma_min": {"head": 1.0},
    "orthogonal": {"orthogonal": 1.0},
}


def resolve_terms(preset: str, overrides: Mapping[str, float]) -> dict[str, float]:
    """Return a preset's terms with some weights changed or added; a weight of 0 removes its term."""
    return {name: weight for name, weight in {**PRESETS[preset], **overrides}.items() if weight}


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


def target_directions(terms: Iterable[str], texts: Tensor) -> Tensor:
    """Return the targets (J, n) that some terms read: texts (C, n), then as many random ones if one wants them."""
    wanted = {TERMS[name].targets for name in terms}
    random = _random_directions(len(texts) if "random" in wanted else 0, texts.shape[1], TARGET_SEED)
    return torch.cat([texts if wanted - {""} else texts[:0], random.to(texts)])


def placebo_texts(texts: Tensor, placebo: Placebo) -> Tensor:
    """Return the texts (C, n) a loss gets in place of the true ones; one that works as well with these has no meaning.

    "none" keeps them; "shuffled" gives every class another's, which a sum over all prompts cannot notice; "random"
    takes unit directions of the same space.
    """
    if placebo == "random":
        return _random_directions(len(texts), texts.shape[1], PLACEBO_SEED).to(texts)
    if placebo == "none":
        return texts
    if placebo != "shuffled":
        raise ValueError(f'placebo must be "none", "shuffled" or "random", got {placebo!r}')
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(PLACEBO_SEED)).to(texts.device)
    shuffled = torch.empty_like(texts)
    shuffled[order] = texts[order.roll(1)]  # one cycle through all classes: none stays where it was
    return shuffled


def _random_directions(count: int, width: int, seed: int) -> Tensor:
    """Unit directions (count, width), uniform on the sphere."""
    return nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)
