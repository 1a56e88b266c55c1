"""SingLoss: null-space regularisation as a differentiable loss (METHOD section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from singreg.distributed import all_reduce_mean, all_reduce_sum
from singreg.geometry.angles import attribute_score, image_score
from singreg.geometry.nullspace import Invariance, row_space_projection
from singreg.translation.translator import LinearTranslator

# Chosen on scenes of other seeds than any report's: leak and hinge act on the backbone, capacity on the head alone.
DEFAULT_TERMS: dict[str, float] = {"leak": 0.3, "hinge": 1.0, "band": 0.3, "class_share": 0.1, "capacity": 100.0}


@dataclass(frozen=True)
class LossInputs:
    """What every term may use; B images, m features, n translator dimensions, angles in degrees.

    null (B, m): f_n = Π_n (f - μ). centred (B, m): f - μ. z, z_eq (B, n): T f and T(f - f_n). text (B, n): the true class's.
    shift, total (B, n): A f_n and A (f - μ). contrast (B, n, K): orthonormal contrast directions of the true class.
    class_null (B, m): Π_n of the true class's mean - μ, no gradient. image_score_ref (B,): IS of the model before.
    prompts, prompts_null (C, m): Aᵀ t_k of every class and its null part (empty unless "capacity" is among the terms).
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


def _contrast_energy(vector: Tensor, z: Tensor, contrast: Tensor) -> Tensor:
    """|U_yᵀ v|² with v taken tangent at z: what moves the angles, not the length. (B, n), (B, n), (B, n, K) to (B,)."""
    unit = nn.functional.normalize(z, dim=-1)
    tangent = vector - unit * (vector * unit).sum(-1, keepdim=True)
    return torch.einsum("bn,bnk->bk", tangent, contrast).square().sum(-1)


def _ratio_of_means(numerator: Tensor, denominator: Tensor) -> Tensor:
    """mean(a) / mean(b) over ALL processes' images, value and gradient, though each sees only its own (B,) share.

    Quotient rule with the global means held fixed: averaged over processes (as DDP does) the gradient is exact.
    """
    top, bottom = all_reduce_mean(numerator), all_reduce_mean(denominator)
    bottom = bottom.clamp_min(torch.finfo(bottom.dtype).tiny)
    return numerator.mean() / bottom - (denominator.mean() - bottom) * (top / bottom**2)


def leak(inputs: LossInputs) -> Tensor:
    """Class-semantic energy in the null space: |U_yᵀ A f_n|² over the (fixed) mean of |U_yᵀ A (f - μ)|². Returns ()."""
    energy = _contrast_energy(inputs.shift, inputs.z, inputs.contrast).mean()
    scale = all_reduce_mean(_contrast_energy(inputs.total, inputs.z, inputs.contrast))
    return energy / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def hinge(inputs: LossInputs) -> Tensor:
    """Harmful side of the attribute score, mean relu(-AS) / IS_ref: both in degrees, so scale-free. Returns ()."""
    harmful = torch.relu(-attribute_score(inputs.z, inputs.z_eq, inputs.text))
    return (harmful / inputs.image_score_ref).mean()


def band(inputs: LossInputs) -> Tensor:
    """Keeps permitted variety: IS below 0.9 (collapse) or above 1.5 (dilution) of IS_ref, squared, over IS_ref². Returns ()."""
    relative = image_score(inputs.z, inputs.z_eq) / inputs.image_score_ref
    return (torch.relu(0.9 - relative).square() + torch.relu(relative - 1.5).square()).mean()


def class_share(inputs: LossInputs) -> Tensor:
    """Between-class share of the scatter of f_n, <f_n, class mean> over |f_n|²; needs no VLM. Returns (), 1 = all class."""
    between = (inputs.null * inputs.class_null).sum(-1)
    return _ratio_of_means(between, inputs.null.square().sum(-1))


def capacity(inputs: LossInputs) -> Tensor:
    """What the head leaves to the null space of the prompts' directions: Σ_k |Π_n Aᵀ t_k|² over Σ_k |Aᵀ t_k|². Returns (), in [0, 1].

    It moves W alone. 0: no null direction can raise any class's prompt for this translator (METHOD section 7).
    """
    return inputs.prompts_null.square().sum() / inputs.prompts.square().sum()


TERMS = {"leak": leak, "hinge": hinge, "band": band, "class_share": class_share, "capacity": capacity}


def contrast_directions(texts: Tensor, confusable: int = 16) -> Tensor:
    """Orthonormal bases of the contrasts t_y - t_j for the most confusable classes j of every class y (METHOD section 6).

    Shapes: texts (C, n) unit rows; returns (C, n, K) with K = min(confusable, C - 1, n), float64-orthonormalised.

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
    directions: Tensor = torch.linalg.svd(contrasts.mT, full_matrices=False).U
    return directions.to(texts.dtype)


class SingLoss(nn.Module):
    """L = λ(step) · Σ_k w_k term_k, to be added to the task loss (METHOD section 6).

    Args:
        head: the classifier's last linear layer, or any module with a `.weight` (C, m); it is referred to, never registered,
            so it is neither saved nor trained a second time. The projector follows its current weight.
        translator: T(f) = f Aᵀ + a; no gradient reaches it. Replace it with `set_translator`.
        texts: (C, n) text embedding of each class's prompt.
        weight: λ after the ramp. terms: name -> weight; names are the functions in `TERMS`.
        warmup_steps: steps with λ = 0. ramp_steps: steps of the cosine ramp from 0 to λ that follow.
        accumulation: forwards in one step, all with the same λ, for loops that accumulate gradients.
        confusable: K, how many nearest classes make a class's contrast directions.
        momentum: of the running feature mean and class means.

    Shapes: forward(features (B, m), labels (B,)) -> () in float32 or wider, outside autocast. Detached terms by name in
    `.last_terms`, with "sing" (their sum) and "sing_weight" (λ).

    Raises:
        ValueError: unknown terms, shapes that do not fit, labels outside 0..C-1.

    Example:
        >>> head = nn.Linear(8, 3)
        >>> sing = SingLoss(head, LinearTranslator(torch.randn(5, 8), torch.zeros(5)), torch.randn(3, 5))
        >>> features, labels = torch.randn(6, 8, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> loss = nn.functional.cross_entropy(head(features), labels) + sing(features, labels)
        >>> loss.backward(); sorted(sing.last_terms)
        ['band', 'capacity', 'class_share', 'hinge', 'leak', 'sing', 'sing_weight']
    """

    texts: Tensor
    contrast: Tensor
    matrix: Tensor
    offset: Tensor
    mean: Tensor
    class_means: Tensor
    image_score_ref: Tensor
    seen: Tensor
    step: Tensor

    def __init__(
        self,
        head: nn.Module,
        translator: LinearTranslator,
        texts: Tensor,
        *,
        weight: float = 0.1,
        terms: Mapping[str, float] | None = None,
        warmup_steps: int = 0,
        ramp_steps: int = 0,
        accumulation: int = 1,
        confusable: int = 16,
        momentum: float = 0.99,
        invariance: Invariance = "logits",
    ) -> None:
        super().__init__()
        self.terms = dict(DEFAULT_TERMS if terms is None else terms)
        if unknown := sorted(set(self.terms) - set(TERMS)):
            raise ValueError(f"unknown loss terms {unknown}; known are {sorted(TERMS)}")
        object.__setattr__(self, "_head", (head,))  # a tuple hides it from nn.Module: not saved, not trained twice
        classes, width = self.head_weight.shape
        if texts.ndim != 2 or len(texts) != classes or texts.shape[1] != translator.matrix.shape[0]:
            raise ValueError(
                f"expected texts ({classes}, {translator.matrix.shape[0]}): one row for each of the head's {classes} classes in "
                f"the translator's space; got {tuple(texts.shape)}"
            )
        self.weight, self.warmup_steps, self.ramp_steps, self.accumulation = weight, warmup_steps, ramp_steps, accumulation
        self.momentum, self.invariance = momentum, invariance
        self.register_buffer("texts", texts.detach().float(), persistent=False)
        self.register_buffer("contrast", contrast_directions(texts, confusable).float(), persistent=False)
        self.register_buffer("matrix", torch.empty(0))
        self.register_buffer("offset", torch.empty(0))
        self.set_translator(translator)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("class_means", torch.zeros(classes, width))
        self.register_buffer("seen", torch.zeros(classes))
        self.register_buffer("image_score_ref", torch.full((classes,), math.nan))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.last_terms: dict[str, Tensor] = {}

    @property
    def head_weight(self) -> Tensor:
        """The head's current weight as (C, m); a 1x1 convolution is flattened."""
        weight: Tensor = cast(Any, self._head)[0].weight
        return weight.flatten(1)

    def set_translator(self, translator: LinearTranslator) -> None:
        """Use another translator from now on; same classifier width m, same space n."""
        if translator.matrix.shape != (self.texts.shape[1], self.head_weight.shape[1]):
            raise ValueError(
                f"expected a translator matrix ({self.texts.shape[1]}, {self.head_weight.shape[1]}), "
                f"got {tuple(translator.matrix.shape)}"
            )
        device = self.texts.device
        self.matrix = translator.matrix.detach().to(device, torch.float32).clone()
        self.offset = translator.offset.detach().to(device, torch.float32).clone()

    @property
    def current_weight(self) -> float:
        """λ(step): 0 in the warm-up, then a cosine ramp, then `weight`."""
        after = int(self.step) // self.accumulation - self.warmup_steps
        if after < 0:
            return 0.0
        if after >= self.ramp_steps:
            return self.weight
        return self.weight * 0.5 * (1 - math.cos(math.pi * (after + 1) / (self.ramp_steps + 1)))

    @torch.no_grad()
    def calibrate(self, mean: Tensor, class_means: Tensor, image_score_ref: Tensor) -> SingLoss:
        """Fix the references from the model before: μ (m,), class means (C, m), mean IS of each class (C,) in degrees.

        Without this they are taken from the first batches seen. A class without a reference (NaN) takes the mean IS of the others.
        """
        for name, value in (("mean", mean), ("class_means", class_means), ("image_score_ref", image_score_ref)):
            buffer = getattr(self, name)
            if value.shape != buffer.shape:
                raise ValueError(f"calibrate: expected {name} {tuple(buffer.shape)}, got {tuple(value.shape)}")
            buffer.copy_(value)
        known = torch.isfinite(self.image_score_ref)
        if not known.any():
            raise ValueError("calibrate: no class has a finite reference image score")
        self.image_score_ref[~known] = self.image_score_ref[known].mean()
        self.seen.fill_(1)
        return self

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """λ(step) · Σ w_k term_k for features (B, m) and labels (B,); returns ()."""
        self._check(features, labels)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            if self.training:
                self._track(features.detach(), labels)
            inputs = self._inputs(features, labels)
            values = {name: TERMS[name](inputs) for name in self.terms}
            total = torch.stack([self.terms[name] * value for name, value in values.items()]).sum()
        weight = self.current_weight
        logged = {**values, "sing": total, "sing_weight": torch.tensor(weight)}
        self.last_terms = {name: value.detach() for name, value in logged.items()}
        if self.training:
            self.step += 1
        return weight * total

    def _check(self, features: Tensor, labels: Tensor) -> None:
        classes, width = self.class_means.shape
        if features.ndim != 2 or features.shape[1] != width or labels.shape != features.shape[:1]:
            raise ValueError(
                f"expected features (B, {width}) and labels (B,), got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels must be integers in 0..{classes - 1}; mixed labels do not work with SingLoss")

    @torch.no_grad()
    def _track(self, features: Tensor, labels: Tensor) -> None:
        """Running mean and class means, summed over processes so that every rank holds the same."""
        features = features.to(self.mean.dtype)
        sums = torch.zeros_like(self.class_means).index_add_(0, labels, features)
        counts = torch.bincount(labels, minlength=len(sums)).to(sums)
        sums, counts = all_reduce_sum(sums), all_reduce_sum(counts)
        present, first = counts > 0, self.seen == 0
        batch_mean = sums.sum(0) / counts.sum()
        self.mean.copy_(batch_mean if bool(first.all()) else torch.lerp(batch_mean, self.mean, self.momentum))
        class_mean = sums / counts.clamp_min(1)[:, None]
        moved = torch.where(first[:, None], class_mean, torch.lerp(class_mean, self.class_means, self.momentum))
        self.class_means.copy_(torch.where(present[:, None], moved, self.class_means))
        self.seen.copy_(torch.maximum(self.seen, present.to(self.seen)))

    def _inputs(self, features: Tensor, labels: Tensor) -> LossInputs:
        dtype = features.dtype
        matrix, offset, mean = self.matrix.to(dtype), self.offset.to(dtype), self.mean.to(dtype)
        head = self.head_weight
        centred = features - mean
        anchors = self.class_means.to(dtype)[labels] - mean
        prompts = self.texts.to(dtype) @ matrix if "capacity" in self.terms else centred[:0]
        # One projection for the batch, its class means and the prompts: the factorisation of W Wᵀ is shared.
        every = torch.cat([centred, anchors, prompts])
        outside = every - row_space_projection(head, every, invariance=self.invariance)
        null, class_null, prompts_null = torch.tensor_split(outside, (len(centred), 2 * len(centred)))
        z = features @ matrix.T + offset
        shift = null @ matrix.T
        inputs = LossInputs(
            null=null,
            centred=centred,
            z=z,
            z_eq=z - shift,
            text=self.texts.to(dtype)[labels],
            shift=shift,
            total=centred @ matrix.T,
            contrast=self.contrast.to(dtype)[labels],
            class_null=class_null.detach(),
            image_score_ref=self._reference(z, z - shift, labels),
            prompts=prompts,
            prompts_null=prompts_null,
        )
        return inputs

    @torch.no_grad()
    def _reference(self, z: Tensor, z_eq: Tensor, labels: Tensor) -> Tensor:
        """IS_ref of each image's class; a class without one takes its first batch's (over all processes)."""
        if bool(torch.isnan(self.image_score_ref).any()):
            scores = image_score(z, z_eq).float()
            sums = all_reduce_sum(torch.zeros_like(self.image_score_ref).index_add_(0, labels, scores))
            counts = all_reduce_sum(torch.bincount(labels, minlength=len(sums)).to(sums))
            new = torch.isnan(self.image_score_ref) & (counts > 0)
            self.image_score_ref[new] = (sums / counts.clamp_min(1))[new]
        # A class whose null moves nothing would divide by 0; a hundredth of a degree is far below what can be seen.
        return self.image_score_ref[labels].to(z.dtype).clamp_min(0.01)
