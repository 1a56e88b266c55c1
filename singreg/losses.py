"""SingLoss: null-space regularisation as a differentiable loss (METHOD section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from singreg.functional import image_score
from singreg.loss_terms import (
    DEFAULT_TERMS,
    PRESETS,
    TARGET_SEED,
    TERMS,
    LossInputs,
    Placebo,
    contrast_directions,
    placebo_texts,
    random_directions,
    resolve_terms,
)
from singreg.nullspace import Invariance, NullSpace, row_space_projection
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_sum

SMALLEST_REFERENCE = 0.1  # degrees

__all__ = ["DEFAULT_TERMS", "PRESETS", "TERMS", "LossInputs", "Placebo", "SingLoss", "contrast_directions", "resolve_terms"]


class SingLoss(nn.Module):
    """L = λ(step) · Σ_k w_k term_k, to be added to the task loss (METHOD section 6).

    Args:
        head: the classifier's last linear layer, or any module with a `.weight` (C, m); it is referred to, never registered,
            so it is neither saved nor trained a second time. The projector follows its current weight.
        translator: T(f) = f Aᵀ + a; no gradient reaches it. Replace it with `set_translator`, or with several of disjoint folds
            by `set_translators`.
        texts: (C, n) text embedding of each class's prompt.
        weight: λ after the ramp, times the buffer `scale` (1 unless set). terms: name -> weight; names are the functions in
            `TERMS`, sums with a name are in `PRESETS`.
        warmup_steps: steps with λ = 0. ramp_steps: steps of the cosine ramp from 0 to λ that follow.
        accumulation: forwards in one step, all with the same λ, for loops that accumulate gradients.
        confusable: K, how many nearest classes make a class's contrast directions.
        momentum: of the running feature mean. class_momentum: of the class means, each of which moves only with its own pictures.
        placebo: "shuffled" or "random" replaces the prompts, contrasts included (see `loss_terms.placebo_texts`).

    Shapes: forward(features (B, m), labels (B,)) -> () in float32 or wider, outside autocast. Detached terms by name in
    `.last_terms`, with "sing" (their sum) and "sing_weight" (λ).

    Raises:
        ValueError: unknown terms or placebo, shapes that do not fit, labels outside 0..C-1, a head without a null space.

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
    more_matrices: Tensor | None
    more_offsets: Tensor | None
    scale: Tensor
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
        class_momentum: float = 0.9,
        invariance: Invariance = "logits",
        placebo: Placebo = "none",
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
        self.momentum, self.class_momentum, self.invariance = momentum, class_momentum, invariance
        NullSpace.from_weight(self.head_weight, invariance=invariance)  # says so where there is no null space
        texts = placebo_texts(texts.detach(), placebo)
        self.register_buffer("texts", texts.float(), persistent=False)
        random = random_directions(classes if "steer" in self.terms else 0, texts.shape[1], TARGET_SEED)
        self.register_buffer("targets", random.to(texts.device), persistent=False)
        self.register_buffer("contrast", contrast_directions(texts, confusable).float(), persistent=False)
        self.register_buffer("matrix", torch.empty(0))
        self.register_buffer("offset", torch.empty(0))
        self.register_buffer("more_matrices", None)  # no entry in the state while there is one translator
        self.register_buffer("more_offsets", None)
        self.set_translator(translator)
        self.register_buffer("scale", torch.ones(()))
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
        self.set_translators([translator])

    def set_translators(self, translators: Sequence[LinearTranslator]) -> None:
        """Use k translators, best of disjoint folds of the images, so that no single one's estimation error can be learned.

        Step s reads the features through number s mod k (the same on every process, and in all forwards of an accumulated step);
        `capacity` and `steer` take the prompts of all. `matrix` (n, m) and `offset` (n,) are the first one's.

        Raises:
            ValueError: no translator, or matrices that are not (n, m).
        """
        if not translators:
            raise ValueError("set_translators needs at least one translator, got an empty sequence")
        wanted = (self.texts.shape[1], self.head_weight.shape[1])
        if wrong := [tuple(t.matrix.shape) for t in translators if t.matrix.shape != wanted]:
            raise ValueError(f"expected a translator matrix {wanted}, got {', '.join(map(str, wrong))}")
        device = self.texts.device
        matrices = [t.matrix.detach().to(device, torch.float32).clone() for t in translators]
        offsets = [t.offset.detach().to(device, torch.float32).clone() for t in translators]
        self.matrix, self.offset = matrices[0], offsets[0]
        self.more_matrices = torch.stack(matrices[1:]) if matrices[1:] else None
        self.more_offsets = torch.stack(offsets[1:]) if offsets[1:] else None

    @property
    def translators(self) -> list[tuple[Tensor, Tensor]]:
        """(A (n, m), a (n,)) of every translator in use, the first one first."""
        if self.more_matrices is None or self.more_offsets is None:
            return [(self.matrix, self.offset)]
        return [(self.matrix, self.offset), *zip(self.more_matrices, self.more_offsets, strict=True)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """The stored number of translators is taken over; a state from before `scale` existed had 1."""
        if prefix + "matrix" in state_dict:
            for name in ("more_matrices", "more_offsets"):
                stored = state_dict.get(prefix + name)
                setattr(self, name, None if stored is None else torch.empty_like(stored, device=self.matrix.device))
            state_dict.setdefault(prefix + "scale", torch.ones_like(self.scale))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    @property
    def current_weight(self) -> float:
        """λ(step) · scale: 0 in the warm-up, then a cosine ramp, then `weight` times the buffer `scale`."""
        full = self.weight * float(self.scale)
        after = int(self.step) // self.accumulation - self.warmup_steps
        if after < 0:
            return 0.0
        if after >= self.ramp_steps:
            return full
        return full * 0.5 * (1 - math.cos(math.pi * (after + 1) / (self.ramp_steps + 1)))

    @torch.no_grad()
    def calibrate(self, mean: Tensor, class_means: Tensor, image_score_ref: Tensor) -> SingLoss:
        """Fix the references from the model before: μ (m,), class means (C, m), mean IS of each class (C,) in degrees.

        Without this they are taken from the first batches seen. A class without a reference (NaN) takes the mean IS of the others;
        one without a mean (NaN, as `fit_on_part` leaves it) begins with its first batch.

        Raises:
            ValueError: other shapes, a mean that is not finite, or no finite reference image score.
        """
        for name, value in (("mean", mean), ("class_means", class_means), ("image_score_ref", image_score_ref)):
            buffer = getattr(self, name)
            if value.shape != buffer.shape:
                raise ValueError(f"calibrate: expected {name} {tuple(buffer.shape)}, got {tuple(value.shape)}")
            buffer.copy_(value)
        if not bool(torch.isfinite(self.mean).all()):
            raise ValueError("calibrate: the mean feature holds NaN or infinity")
        met = torch.isfinite(self.class_means).all(1)
        self.class_means.copy_(torch.where(met[:, None], self.class_means, self.mean))
        known = torch.isfinite(self.image_score_ref)
        if not known.any():
            raise ValueError("calibrate: no class has a finite reference image score")
        self.image_score_ref[~known] = self.image_score_ref[known].mean()
        self.seen.copy_(met)
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
        moved = torch.where(first[:, None], class_mean, torch.lerp(class_mean, self.class_means, self.class_momentum))
        self.class_means.copy_(torch.where(present[:, None], moved, self.class_means))
        self.seen.copy_(torch.maximum(self.seen, present.to(self.seen)))

    def _inputs(self, features: Tensor, labels: Tensor) -> LossInputs:
        dtype = features.dtype
        mean, head, texts = self.mean.to(dtype), self.head_weight, self.texts.to(dtype)
        translators = [(matrix.to(dtype), offset.to(dtype)) for matrix, offset in self.translators]
        matrix, offset = translators[int(self.step) // self.accumulation % len(translators)]
        centred = features - mean
        anchors = self.class_means.to(dtype)[labels] - mean
        steered = "steer" in self.terms
        targets = torch.cat([texts, self.targets.to(dtype)]) if steered or "capacity" in self.terms else texts[:0]
        pulled = torch.stack([targets @ each for each, _ in translators])  # (k, J, m): Aᵀ t
        # One projection for the batch, its class means and the prompts: the factorisation of W Wᵀ is shared.
        every = torch.cat([centred, anchors, pulled.flatten(0, 1)])
        outside = every - row_space_projection(head, every, invariance=self.invariance)
        null, class_null, pulled_null = torch.tensor_split(outside, (len(centred), 2 * len(centred)))
        pulled_null = pulled_null.reshape(pulled.shape)
        targets_null = pulled_null if steered else pulled_null[:, :0]
        z = features @ matrix.T + offset
        shift = null @ matrix.T
        inputs = LossInputs(
            null=null,
            centred=centred,
            z=z,
            z_eq=z - shift,
            text=texts[labels],
            shift=shift,
            total=centred @ matrix.T,
            contrast=self.contrast.to(dtype)[labels],
            class_null=class_null.detach(),
            image_score_ref=self._reference(z, z - shift, labels),
            prompts=pulled[:, : len(texts)],
            prompts_null=pulled_null[:, : len(texts)],
            targets=targets if steered else targets[:0],
            targets_null=targets_null,
            targets_moved=torch.stack([rows @ each.T for rows, (each, _) in zip(targets_null, translators, strict=True)]),
            head=head.to(dtype),
        )
        return inputs

    @torch.no_grad()
    def _reference(self, z: Tensor, z_eq: Tensor, labels: Tensor) -> Tensor:
        """IS_ref of each image's class; a class without one takes its first training batch's (over all processes)."""
        reference = self.image_score_ref
        if bool(torch.isnan(reference).any()):
            scores = image_score(z, z_eq).to(reference.dtype)
            sums = all_reduce_sum(torch.zeros_like(reference).index_add_(0, labels, scores))
            counts = all_reduce_sum(torch.bincount(labels, minlength=len(sums)).to(sums))
            found = (sums / counts.clamp_min(1)).clamp_min(SMALLEST_REFERENCE)
            # A first batch of one is its own mean, so nothing moves: such a score serves this batch and is not kept.
            if self.training:
                kept = torch.isnan(reference) & (found > SMALLEST_REFERENCE)
                reference[kept] = found[kept]
            reference = torch.where(torch.isnan(reference), found, reference)
        # A class whose null moves nothing would divide by 0; a hundredth of a degree is far below what can be seen.
        return reference[labels].to(z.dtype).clamp_min(0.01)
