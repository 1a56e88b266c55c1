"""The terms of SingLoss, one small function each, and the sums of them that have a name (METHOD section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from singreg.functional import attribute_score, image_score
from singreg.nullspace import helmert_contrasts
from singreg.utils import all_reduce_mean

# Chosen on scenes of other seeds than any report's: leak and hinge act on the backbone, capacity on the head alone.
DEFAULT_TERMS: dict[str, float] = {"leak": 0.3, "hinge": 1.0, "band": 0.3, "class_share": 0.1, "capacity": 100.0}

HEAD_FLOOR = 0.3  # σ_min/σ_max below which `head` pushes
SMALLEST_SCATTER = 1e-20  # below it a share is of rounding noise; its square root is far below any feature's last bit
TARGET_SEED, PLACEBO_SEED = 20260, 20261  # fixed, so that every process and every resumed run draws the same

Placebo = Literal["none", "shuffled", "random"]


@dataclass(frozen=True)
class LossInputs:
    """What every term may use; B images, C classes, m features, n translator dimensions, k translators, angles in degrees.

    null (B, m): f_n = Π_n (f - μ). centred (B, m): f - μ. z, z_eq (B, n): T f and T(f - f_n). text (B, n): the true class's.
    shift, total (B, n): A f_n and A (f - μ). contrast (B, n, K): orthonormal contrast directions of the true class.
    class_null (B, m): Π_n of the true class's mean - μ, no gradient. image_score_ref (B,): IS of the model before.
    prompts, prompts_null (k, C, m): Aᵀ t of every class's prompt and its null part (empty unless a term needs them).
    targets (J, n): the prompts, then random directions; targets_null (k, J, m), targets_moved (k, J, n): Π_n Aᵀ t and A Π_n Aᵀ t
    of each (all three empty without "steer"). head (C, m): W.
    """

    null: Tensor
    centred: Tensor
    z: Tensor
    z_eq: Tensor
    text: Tensor
    shift: Tensor
    total: Tensor
    contrast: Tensor
    class_null: Tensor
    image_score_ref: Tensor
    prompts: Tensor
    prompts_null: Tensor
    targets: Tensor
    targets_null: Tensor
    targets_moved: Tensor
    head: Tensor


def _contrast_energy(vector: Tensor, z: Tensor, contrast: Tensor) -> Tensor:
    """|U_yᵀ v|² with v taken tangent at z: what moves the angles, not the length. (B, n), (B, n), (B, n, K) to (B,)."""
    unit = nn.functional.normalize(z, dim=-1)
    tangent = vector - unit * (vector * unit).sum(-1, keepdim=True)
    return torch.einsum("bn,bnk->bk", tangent, contrast).square().sum(-1)


def _ratio_of_means(numerator: Tensor, denominator: Tensor) -> Tensor:
    """mean(a) / mean(b) over ALL processes' images, value and gradient, though each sees only its own (B,) share.

    Quotient rule with the global means held fixed: averaged over processes (as DDP does) the gradient is exact.
    """
    top, bottom = all_reduce_mean(numerator), all_reduce_mean(denominator).clamp_min(SMALLEST_SCATTER)
    # Divided twice: the square of a small scatter would round to 0, and a share of nothing is 0, not NaN.
    return numerator.mean() / bottom - (denominator.mean() - bottom) * (top / bottom / bottom)


def leak(inputs: LossInputs) -> Tensor:
    """Class-semantic energy in the null space: |U_yᵀ A f_n|² over the (fixed) mean of |U_yᵀ A (f - μ)|². Returns ()."""
    energy = _contrast_energy(inputs.shift, inputs.z, inputs.contrast).mean()
    scale = all_reduce_mean(_contrast_energy(inputs.total, inputs.z, inputs.contrast))
    return energy / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def hinge(inputs: LossInputs) -> Tensor:
    """Harmful side of the attribute score, mean relu(-AS) / IS_ref: both in degrees, so scale-free. Returns ()."""
    harmful = torch.relu(-attribute_score(inputs.z, inputs.z_eq, inputs.text))
    return (harmful / inputs.image_score_ref).mean()


def attribute(inputs: LossInputs) -> Tensor:
    """Both sides of the attribute score, mean |AS| / IS_ref: the paper's figure itself, benign cleaning pushed down too. Returns ()."""
    score = attribute_score(inputs.z, inputs.z_eq, inputs.text)
    return (score.abs() / inputs.image_score_ref).mean()


def band(inputs: LossInputs) -> Tensor:
    """Keeps permitted variety: IS below 0.9 (collapse) or above 1.5 (dilution) of IS_ref, squared, over IS_ref². Returns ()."""
    relative = image_score(inputs.z, inputs.z_eq) / inputs.image_score_ref
    return (torch.relu(0.9 - relative).square() + torch.relu(relative - 1.5).square()).mean()


def class_share(inputs: LossInputs) -> Tensor:
    """Between-class share of the scatter of f_n, mean |class mean|² over mean |f_n|²; needs no VLM. Returns (), 1 = all class.

    2 <f_n, m_y> - |m_y|² with the running mean m_y held fixed has the value of |m_y|² and, unlike <f_n, m_y>, its whole gradient:
    with half of it, descent would raise a share above one half, since the scatter below has all of its own.
    """
    between = 2 * (inputs.null * inputs.class_null).sum(-1) - inputs.class_null.square().sum(-1)
    return _ratio_of_means(between, inputs.null.square().sum(-1))


def capacity(inputs: LossInputs) -> Tensor:
    """What the head leaves to the null space of the prompts' directions: Σ_k |Π_n Aᵀ t_k|² over Σ_k |Aᵀ t_k|². Returns (), in [0, 1].

    It moves W alone. 0: no null direction can raise any class's prompt for this translator (METHOD section 7).
    """
    return inputs.prompts_null.square().sum() / inputs.prompts.square().sum()


def steer(inputs: LossInputs) -> Tensor:
    """How well a null step moves z towards a text direction t: mean cos²(M t, t), M = A Π_n Aᵀ. Returns (), in [0, 1]; moves W alone.

    Π_n Aᵀ t is the null direction along which z gains most of t, M t where it takes z. Targets: the prompts and as many random
    directions. 0: t is out of reach, since Aᵀ t lies in the row space; 1: the step goes straight there.
    """
    # tᵀ M t = |Π_n Aᵀ t|² since Π_n is a projector: exact where both vanish, while a dot product of t with rounding noise is not.
    along = inputs.targets_null.square().sum(-1) / torch.linalg.vector_norm(inputs.targets, dim=-1)
    length: Tensor = torch.linalg.vector_norm(inputs.targets_moved, dim=-1)
    cosine: Tensor = along / length.clamp_min(torch.finfo(length.dtype).tiny)
    return cosine.square().mean()


def head(inputs: LossInputs) -> Tensor:
    """Floor on the condition of the centred head: relu(0.3 - σ_min/σ_max)² / 0.3². Returns (), in [0, 1]; moves W alone.

    Centred as the softmax sees it. On its own it is METHOD's "σ_min only" baseline, the preset "sigma_min".
    """
    sigma = torch.linalg.svdvals(helmert_contrasts(inputs.head))  # those of W minus its mean row, without that one's zero
    ratio: Tensor = sigma[-1] / sigma[0].clamp_min(torch.finfo(sigma.dtype).tiny)
    return (torch.relu(HEAD_FLOOR - ratio) / HEAD_FLOOR).square()


def orthogonal(inputs: LossInputs) -> Tensor:
    """Baseline "orthogonal head": mean squared cosine of two different rows of W. Returns (), 0 = orthogonal; moves W alone."""
    rows = nn.functional.normalize(inputs.head, dim=1)
    pairs = len(rows) * (len(rows) - 1) / 2
    return torch.triu(rows @ rows.T, diagonal=1).square().sum() / pairs


def null_energy(inputs: LossInputs) -> Tensor:
    """Baseline: |f_n|² over the (fixed) mean of |f - μ|²; needs no VLM. Returns (), 0 when f - μ lies in the row space."""
    scale = all_reduce_mean(inputs.centred.square().sum(-1))
    return inputs.null.square().sum(-1).mean() / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def null_share(inputs: LossInputs) -> Tensor:
    """Baseline: mean |f_n|² over mean |f - μ|², gradients through both, so growing the row-space part lowers it too. Returns ().

    Centred like every term (METHOD section 8.4), so in [0, 1] and blind to a move of the mean; no VLM.
    """
    return _ratio_of_means(inputs.null.square().sum(-1), inputs.centred.square().sum(-1))


TERMS: dict[str, Callable[[LossInputs], Tensor]] = {
    term.__name__: term
    for term in (leak, hinge, attribute, band, class_share, capacity, steer, head, orthogonal, null_energy, null_share)
}

_LEAKAGE = {name: weight for name, weight in DEFAULT_TERMS.items() if name != "capacity"}
PRESETS: dict[str, dict[str, float]] = {
    "sing": DEFAULT_TERMS,
    "leakage": _LEAKAGE,  # no term of W alone
    "two_sided": {**{k: v for k, v in DEFAULT_TERMS.items() if k != "hinge"}, "attribute": 1.0},  # |AS|, not AS⁻ alone
    "steering": {**DEFAULT_TERMS, "steer": 100.0},  # as much as capacity: at a tenth of it, capacity alone shapes the head
    "label_only": {"class_share": 1.0},
    "null_energy": {"null_energy": 1.0},
    "null_share": {"null_share": 1.0},
    "sigma_min": {"head": 1.0},
    "orthogonal": {"orthogonal": 1.0},
}


def resolve_terms(preset: str, overrides: Mapping[str, float] | None = None) -> dict[str, float]:
    """A preset's terms with some weights changed or added; a weight of 0 removes its term. No shapes.

    Raises:
        ValueError: unknown preset or terms, weights that are negative or not finite (all named at once), or no term left.

    Example:
        >>> resolve_terms("leakage", {"hinge": 0.0, "steer": 2.0})
        {'leak': 0.3, 'band': 0.3, 'class_share': 0.1, 'steer': 2.0}
    """
    changes = dict(overrides or {})
    problems = [] if preset in PRESETS else [f"unknown preset {preset!r}; known are {sorted(PRESETS)}"]
    if unknown := sorted(set(changes) - set(TERMS)):
        problems.append(f"unknown loss terms {unknown}; known are {sorted(TERMS)}")
    if bad := {name: weight for name, weight in changes.items() if not (math.isfinite(weight) and weight >= 0)}:
        problems.append(f"weights must be finite and at least 0 (0 removes the term), got {bad}")
    merged = {name: weight for name, weight in {**PRESETS.get(preset, {}), **changes}.items() if weight}
    if not problems and not merged:
        problems.append(f"no term is left of preset {preset!r} after the changes {changes}; keep one")
    if problems:
        raise ValueError("; ".join(problems))
    return merged


def contrast_directions(texts: Tensor, confusable: int = 16) -> Tensor:
    """Orthonormal bases of the contrasts t_y - t_j for the most confusable classes j of every class y (METHOD section 6).

    Shapes: texts (C, n) unit rows; returns (C, n, K) with K = min(confusable, C - 1, n), float64-orthonormalised; a column is 0
    where contrasts are dependent (two classes with the same prompt).

    Raises:
        ValueError: fewer than two classes.

    Example:
        >>> contrast_directions(torch.eye(3), 2).shape
        torch.Size([3, 3, 2])
    """
    classes, width = texts.shape
    if classes < 2:
        raise ValueError(f"contrast directions need at least 2 classes, got texts {tuple(texts.shape)}")
    exact = nn.functional.normalize(texts.detach().double(), dim=-1)
    similarity = (exact @ exact.T).fill_diagonal_(-math.inf)
    nearest = similarity.topk(min(confusable, classes - 1, width), dim=1).indices
    contrasts = exact[:, None, :] - exact[nearest]
    directions, sizes, _ = torch.linalg.svd(contrasts.mT, full_matrices=False)
    # Two classes with one prompt have no contrast; what the decomposition fills its column with means nothing.
    real = sizes > 1e-6 * sizes[:, :1].clamp_min(1e-6)
    found: Tensor = directions * real[:, None, :]
    return found.to(texts.dtype)


def random_directions(count: int, width: int, seed: int) -> Tensor:
    """Unit directions, uniform on the sphere and the same for the same seed on every machine's CPU. Returns (count, width) float32.

    Example:
        >>> random_directions(2, 3, 0).norm(dim=1).round(decimals=5).tolist()
        [1.0, 1.0]
    """
    return nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def placebo_texts(texts: Tensor, placebo: Placebo) -> Tensor:
    """The texts a loss is given in place of the true ones: "none" as they are, "shuffled" prompts no class keeps, or "random".

    Control of the control: a loss that works as well with these does not work by meaning. "shuffled" moves every class's prompt
    to another class (two classes swap); the set of prompts stays, so `capacity`, which sums over it, only notices "random", and
    `steer` too. "random" replaces the prompts by unit directions of the same space. Shapes: (C, n) to (C, n).

    Raises:
        ValueError: another word, or fewer than two classes to shuffle.

    Example:
        >>> placebo_texts(torch.eye(2), "shuffled").tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    if placebo == "none":
        return texts
    if placebo == "random":
        return random_directions(len(texts), texts.shape[1], PLACEBO_SEED).to(texts)
    if placebo != "shuffled":
        raise ValueError(f'placebo must be "none", "shuffled" or "random", got {placebo!r}')
    if len(texts) < 2:
        raise ValueError(f"shuffled prompts need at least 2 classes, got texts {tuple(texts.shape)}")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(PLACEBO_SEED)).to(texts.device)
    shuffled = torch.empty_like(texts)
    shuffled[order] = texts[order.roll(1)]  # one cycle through all classes: none stays where it was
    return shuffled
