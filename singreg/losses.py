"""SingLoss: null-space regularisation as a differentiable loss (METHOD section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singreg import terms as loss_terms
from singreg.functional import image_score
from singreg.nullspace import Invariance, NullSpace, row_space_projection
from singreg.terms import PRESETS, TERMS, LossInputs, Placebo, resolve_terms
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_sum

__all__ = ["PRESETS", "TERMS", "SingLoss", "resolve_terms"]

MOMENTUM, CLASS_MOMENTUM = 0.99, 0.9  # of the running feature mean, and of a class's, by its own images alone
SMALLEST_REFERENCE = 0.1  # degrees


class SingLoss(nn.Module):
    """L = λ(step) · Σ_k w_k term_k, to be added to the task loss (METHOD section 6).

    The projector follows the head's current weight. `forward` reads no value back from a GPU, so it never waits for it.
    Detached terms by name are in `last_terms`, with "sing" (their weighted sum) and "sing_weight" (λ).

    Args:
        head: a `Classifier`, its last linear layer, or any module with a `.weight` (C, m). It is referred to and never
            registered, so it is neither saved nor trained a second time.
        translator: T(f) = f Aᵀ + a, which gets no gradient; `set_translator` replaces it.
        texts: embedding of each class's prompt, (C, n).
        weight: λ after the ramp, times the attribute `scale` (a tensor on the CPU, 1 unless set).
        terms: name -> weight of `TERMS`; the preset "sing" unless given (see `resolve_terms`).
        warmup_steps: steps with λ = 0; ramp_steps: those of the cosine ramp to λ that follow.
        accumulation: forwards in one step, all with the same λ, for loops that accumulate gradients.
        invariance: null space of the "logits" or of the "softmax".
        placebo: "shuffled" or "random" replaces the prompts, contrasts included (see `placebo_texts`).

    Shape: features (B, m), labels (B,) of integers -> (), in float32 or wider, outside autocast.

    Raises:
        ValueError: unknown terms or placebo, shapes that do not fit, an empty batch, a head without a null space; on a
            CPU also labels outside 0..C-1 (a GPU stops at them with its own assertion).

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
    targets: Tensor
    matrix: Tensor
    offset: Tensor
    mean: Tensor
    class_means: Tensor
    image_score_ref: Tensor
    seen: Tensor

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
        invariance: Invariance = "logits",
        placebo: Placebo = "none",
    ) -> None:
        super().__init__()
        self.terms = dict(PRESETS["sing"] if terms is None else terms)
        if unknown := sorted(set(self.terms) - set(TERMS)):
            raise ValueError(f"unknown loss terms {unknown}; known are {sorted(TERMS)}")
        self._head: tuple[Any] = (head,)  # a tuple hides it from nn.Module: not saved, not trained twice
        (classes, width), size = self.head_weight.shape, translator.matrix.shape[0]
        if texts.shape != (classes, size):
            raise ValueError(f"expected texts ({classes}, {size}), a row for each class, got {tuple(texts.shape)}")
        NullSpace.from_weight(self.head_weight, invariance=invariance)  # says so where there is no null space
        self.weight, self.warmup_steps, self.ramp_steps = weight, warmup_steps, ramp_steps
        self.accumulation, self.invariance = accumulation, invariance
        # No buffers: they stay on the CPU, so that λ is known without asking a device. The extra state saves them.
        self.step, self.scale = torch.zeros((), dtype=torch.long), torch.ones(())
        self.last_terms: dict[str, Tensor] = {}
        texts = loss_terms.placebo_texts(texts.detach(), placebo)
        self.register_buffer("contrast", loss_terms.contrast_directions(texts).float(), persistent=False)
        self.register_buffer("texts", texts.float(), persistent=False)
        self.register_buffer("targets", loss_terms.target_directions(self.terms, self.texts), persistent=False)
        self.register_buffer("matrix", torch.empty(0))
        self.register_buffer("offset", torch.empty(0))
        self.set_translator(translator)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("class_means", torch.zeros(classes, width))
        self.register_buffer("seen", torch.zeros(classes))
        self.register_buffer("image_score_ref", torch.full((classes,), math.nan))
        self._all_referenced = False  # whether every class is known to have its IS_ref

    @property
    def head_weight(self) -> Tensor:
        """The head's current weight as (C, m); a 1x1 convolution is flattened."""
        weight: Tensor = self._head[0].weight
        return weight.flatten(1)

    def set_translator(self, translator: LinearTranslator) -> None:
        """Use another translator from now on, from the same m features into the same space."""
        wanted = (self.texts.shape[1], self.head_weight.shape[1])
        if translator.matrix.shape != wanted:
            raise ValueError(f"expected a translator matrix {wanted}, got {tuple(translator.matrix.shape)}")
        self.matrix = translator.matrix.detach().to(self.texts, copy=True)
        self.offset = translator.offset.detach().to(self.texts, copy=True)

    def get_extra_state(self) -> Tensor:
        """Return step and scale for `state_dict`, as a tensor, which safetensors can hold."""
        return torch.stack([self.step.double(), self.scale.double()])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over step and scale from a `state_dict`, after its buffers."""
        self.step.fill_(int(state[0]))
        self.scale.fill_(float(state[1]))
        self._all_referenced = bool(torch.isfinite(self.image_score_ref).all())

    @property
    def current_weight(self) -> float:
        """λ(step): 0 in the warm-up, then a cosine ramp, then `weight`; all times `scale`."""
        full = self.weight * float(self.scale)
        after = int(self.step) // self.accumulation - self.warmup_steps
        if after < 0:
            return 0.0
        if after >= self.ramp_steps:
            return full
        return full * 0.5 * (1 - math.cos(math.pi * (after + 1) / (self.ramp_steps + 1)))

    @torch.no_grad()
    def calibrate(self, mean: Tensor, class_means: Tensor, image_score_ref: Tensor) -> SingLoss:
        """Fix the references from the model before training; without this they are taken from the first batches seen.

        Args:
            mean: μ, (m,).
            class_means: of each class, (C, m); a class without one (NaN) begins with its first batch.
            image_score_ref: mean IS of each class in degrees, (C,); where it is NaN, the mean of the others is taken.
        """
        for name, value in (("mean", mean), ("class_means", class_means), ("image_score_ref", image_score_ref)):
            buffer = getattr(self, name)
            if value.shape != buffer.shape:
                raise ValueError(f"calibrate: expected {name} {tuple(buffer.shape)}, got {tuple(value.shape)}")
            buffer.copy_(value)
        met, known = torch.isfinite(self.class_means).all(1), torch.isfinite(self.image_score_ref)
        if not (torch.isfinite(self.mean).all() and known.any()):
            raise ValueError("calibrate: the mean feature holds NaN or infinity, or no class has a finite reference IS")
        self.class_means.copy_(torch.where(met[:, None], self.class_means, self.mean))
        self.image_score_ref[~known] = self.image_score_ref[known].mean()
        self.seen.copy_(met)
        self._all_referenced = True
        return self

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return λ(step) · Σ w_k term_k of features (B, m) and labels (B,), a tensor ()."""
        self._check(features, labels)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            if self.training:
                self._track(features.detach(), labels)
            inputs = self._inputs(features, labels)
            values = {name: TERMS[name].function(inputs) for name in self.terms}
            total = torch.stack([self.terms[name] * value for name, value in values.items()]).sum()
        weight = self.current_weight
        logged = {**values, "sing": total, "sing_weight": torch.full((), weight, device=features.device)}
        self.last_terms = {name: value.detach() for name, value in logged.items()}
        if self.training:
            self.step += 1
        return weight * total

    def _check(self, features: Tensor, labels: Tensor) -> None:
        classes, width = self.class_means.shape
        if features.shape != (len(labels), width) or not len(labels):
            shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"expected features (B, {width}) and labels (B,) of at least one image, got {shapes}")
        wrong = labels.is_floating_point() or labels.ndim != 1
        if not wrong and labels.device.type == "cpu":  # elsewhere looking at values would make the host wait
            wrong = not 0 <= int(labels.min()) <= int(labels.max()) < classes
        if wrong:
            raise ValueError(f"labels (B,) must be integers in 0..{classes - 1}, not mixed ones")

    @torch.no_grad()
    def _track(self, features: Tensor, labels: Tensor) -> None:
        """Move the running mean and class means by a batch, summed over processes so that all hold the same."""
        features = features.to(self.mean.dtype)
        sums = all_reduce_sum(torch.zeros_like(self.class_means).index_add_(0, labels, features))
        counts = self._count(labels)
        present, first = counts > 0, self.seen == 0
        batch_mean = sums.sum(0) / counts.sum()
        self.mean.copy_(torch.where(first.all(), batch_mean, torch.lerp(batch_mean, self.mean, MOMENTUM)))
        class_mean = sums / counts.clamp_min(1)[:, None]
        moved = torch.lerp(class_mean, self.class_means, CLASS_MOMENTUM)
        moved = torch.where(first[:, None], class_mean, moved)
        self.class_means.copy_(torch.where(present[:, None], moved, self.class_means))
        self.seen.copy_(torch.maximum(self.seen, present.to(self.seen)))

    def _count(self, labels: Tensor) -> Tensor:
        """Images of each class over all processes, (C,); `bincount` would wait for the device."""
        return all_reduce_sum(torch.zeros_like(self.seen).index_add_(0, labels, torch.ones_like(labels).to(self.seen)))

    def _inputs(self, features: Tensor, labels: Tensor) -> LossInputs:
        buffers = (self.mean, self.texts, self.contrast, self.targets, self.matrix, self.offset)
        mean, texts, contrast, targets, matrix, offset = (buffer.to(features.dtype) for buffer in buffers)
        head, centred, pulled = self.head_weight, features - mean, targets @ matrix
        anchors = self.class_means.to(mean)[labels] - mean
        # One projection for the batch, its class means and the targets: the factorisation of W Wᵀ is shared.
        every = torch.cat([centred, anchors, pulled])
        outside = every - row_space_projection(head, every, invariance=self.invariance)
        null, class_null, pulled_null = torch.tensor_split(outside, (len(centred), 2 * len(centred)))
        z, shift = features @ matrix.T + offset, null @ matrix.T
        return LossInputs(
            null=null,
            centred=centred,
            z=z,
            z_eq=z - shift,
            text=texts[labels],
            shift=shift,
            total=centred @ matrix.T,
            contrast=contrast[labels],
            class_null=class_null.detach(),
            image_score_ref=self._reference(z, z - shift, labels),
            head=head.to(mean),
            matrix=matrix,
            targets=targets,
            pulled=pulled,
            pulled_null=pulled_null,
        )

    @torch.no_grad()
    def _reference(self, z: Tensor, z_eq: Tensor, labels: Tensor) -> Tensor:
        """IS_ref of each image's class; a class without one takes its first training batch's."""
        reference = self.image_score_ref
        if not self._all_referenced:
            scores = image_score(z, z_eq).to(reference.dtype)
            sums = all_reduce_sum(torch.zeros_like(reference).index_add_(0, labels, scores))
            found = (sums / self._count(labels).clamp_min(1)).clamp_min(SMALLEST_REFERENCE)
            if self.training:
                # A batch of one is its own mean, so nothing moves: such a score serves this batch and is not kept.
                kept = torch.isnan(reference) & (found > SMALLEST_REFERENCE)
                reference.copy_(torch.where(kept, found, reference))
            reference = torch.where(torch.isnan(reference), found, reference)
        # A class whose null moves nothing would divide by 0; a hundredth of a degree is far below what can be seen.
        return reference[labels].to(z.dtype).clamp_min(0.01)
