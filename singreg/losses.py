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
from singreg.ridge import RidgeStatistics
from singreg.terms import PRESETS, TERMS, LossInputs, resolve_terms
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_sum

__all__ = ["PRESETS", "TERMS", "SingLoss", "resolve_terms"]

MOMENTUM, CLASS_MOMENTUM = 0.99, 0.9  # of the running feature mean, and of a class's, by its own images alone
SMALLEST_REFERENCE = 0.1  # degrees
READOUT_RIDGE = 1e-3  # of the mean variance in the row space


class SingLoss(nn.Module):
    """L = λ(step) · Σ_k w_k term_k, to be added to the task loss (METHOD section 6).

    The projector follows the head's current weight. `forward` reads no value back from a GPU, so it never waits for it.
    Detached terms by name are in `last_terms`, with "sing" (their weighted sum) and "sing_weight" (λ).

    Args:
        head: a `Classifier`, its last linear layer, or any module with a `.weight` (C, m). It is referred to and never
            registered, so it is neither saved nor trained a second time.
        translator: T(f) = f Aᵀ + a, which gets no gradient; `set_translator` replaces it.
        texts: embedding of each class's prompt, (C, n).
        statistics: sums over features and embeddings of the images behind the translator, best many that are not
            trained on: `readout` and `capacity` need them.
        weight: λ after the ramp.
        terms: name -> weight of `TERMS`; the preset "sing" unless given (see `resolve_terms`).
        warmup_steps: steps with λ = 0; ramp_steps: those of the cosine ramp to λ that follow.
        accumulation: forwards in one step, all with the same λ, for loops that accumulate gradients.
        invariance: null space of the "logits" or of the "softmax".
        floor: ε of `capacity`'s metric; towards infinity it becomes the Euclidean one.

    Shape: features (B, m), labels (B,) of integers, embeddings (B, n) of the same images by the vision-language model,
        which `readout` needs -> (), in float32 or wider, outside autocast.

    Raises:
        ValueError: unknown terms, shapes that do not fit, what a term reads and was not given, an empty batch, a head
            without a null space; on a CPU also labels outside 0..C-1 (a GPU stops at them with its own assertion).

    Example:
        >>> from singreg import fit_translator
        >>> head, (f, z) = nn.Linear(8, 3), (torch.randn(100, 8), torch.randn(100, 5))
        >>> translator, statistics = fit_translator([(f, z)]), RidgeStatistics(8, 5).update(f, z)
        >>> sing = SingLoss(head, translator, torch.randn(3, 5), statistics)
        >>> features, labels = f[:6].requires_grad_(), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> loss = nn.functional.cross_entropy(head(features), labels) + sing(features, labels, z[:6])
        >>> loss.backward(); sorted(sing.last_terms)
        ['capacity', 'readout', 'sing', 'sing_weight']
    """

    texts: Tensor
    contrast: Tensor
    span: Tensor
    matrix: Tensor
    offset: Tensor
    covariance: Tensor
    readout: Tensor
    feature_mean: Tensor
    embedding_mean: Tensor
    mean: Tensor
    class_means: Tensor
    image_score_ref: Tensor
    seen: Tensor

    def __init__(
        self,
        head: nn.Module,
        translator: LinearTranslator,
        texts: Tensor,
        statistics: RidgeStatistics | None = None,
        *,
        weight: float = 1.0,
        terms: Mapping[str, float] | None = None,
        warmup_steps: int = 0,
        ramp_steps: int = 0,
        accumulation: int = 1,
        invariance: Invariance = "logits",
        floor: float = 1.0,
    ) -> None:
        super().__init__()
        self.terms = dict(PRESETS["sing"] if terms is None else terms)
        if unknown := sorted(set(self.terms) - set(TERMS)):
            raise ValueError(f"unknown loss terms {unknown}; known are {sorted(TERMS)}")
        self._head: tuple[Any] = (head,)  # a tuple hides it from nn.Module: not saved, not trained twice
        self.reads = frozenset[str]().union(*(TERMS[name].reads for name in self.terms))
        if hasattr(head, "base_layer"):  # as all of PEFT's layers have it: .weight is the base's, without the adapter
            raise ValueError(
                f"the head {type(head).__name__} computes more than its .weight says (an adapter); merge the "
                "adapter into the head, or leave the head out of target_modules"
            )
        (classes, width), size = self.head_weight.shape, translator.matrix.shape[0]
        if texts.shape != (classes, size):
            raise ValueError(f"expected texts ({classes}, {size}), a row for each class, got {tuple(texts.shape)}")
        NullSpace.from_weight(self.head_weight, invariance=invariance)  # says so where there is no null space
        self.weight, self.warmup_steps, self.ramp_steps = weight, warmup_steps, ramp_steps
        self.accumulation, self.invariance, self.floor = accumulation, invariance, floor
        # No buffer: it stays on the CPU, so that λ is known without asking a device. The extra state saves it.
        self.step = torch.zeros((), dtype=torch.long)
        self.last_terms: dict[str, Tensor] = {}
        texts = texts.detach()
        self.register_buffer("texts", texts.float(), persistent=False)
        self.register_buffer("contrast", loss_terms.contrast_directions(texts).float(), persistent=False)
        self.register_buffer("span", loss_terms.contrast_basis(texts).float(), persistent=False)
        for name, shape in (("matrix", (0,)), ("offset", (0,)), ("covariance", (0, 0)), ("readout", (0, width))):
            self.register_buffer(name, torch.empty(shape))
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("embedding_mean", torch.zeros(size))
        self.set_translator(translator, statistics)
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

    @torch.no_grad()
    def set_translator(self, translator: LinearTranslator, statistics: RidgeStatistics | None = None) -> None:
        """Use another translator from now on, with capacity's metric and a new readout from the same images' sums."""
        wanted = (self.texts.shape[1], self.head_weight.shape[1])
        if translator.matrix.shape != wanted:
            raise ValueError(f"expected a translator matrix {wanted}, got {tuple(translator.matrix.shape)}")
        self.matrix = translator.matrix.detach().to(self.texts, copy=True)
        self.offset = translator.offset.detach().to(self.texts, copy=True)
        if "statistics" in self.reads:
            if statistics is None or statistics.fz.shape != wanted[::-1]:
                got = "none" if statistics is None else tuple(statistics.fz.shape)
                terms = sorted(name for name in self.terms if "statistics" in TERMS[name].reads)
                raise ValueError(
                    f"the terms {terms} read sums over images: expected statistics of m, n = {wanted[::-1]}, "
                    f"got {got}; pass RidgeStatistics(m, n).update(features, embeddings)"
                )
            self._take(statistics)

    def _take(self, statistics: RidgeStatistics) -> None:
        """Take Σ, the means and the readout: a ridge regression of s = Uᵀ(z - z̄) on Qᵀ(f - μ), Q of today's head."""
        scatter, cross, _ = statistics.centred()
        basis = NullSpace.from_weight(self.head_weight, invariance=self.invariance).basis.to(scatter)
        inner = basis.T @ scatter @ basis
        inner.diagonal().add_(READOUT_RIDGE * inner.diagonal().mean())
        coefficients = torch.linalg.solve(inner, basis.T @ cross @ self.span.to(cross))
        self.covariance = (scatter / statistics.count).to(self.texts)
        self.readout = (basis @ coefficients).T.to(self.texts).contiguous()
        self.feature_mean = (statistics.f / statistics.count).to(self.texts)
        self.embedding_mean = (statistics.z / statistics.count).to(self.texts)

    def get_extra_state(self) -> Tensor:
        """Return the step for `state_dict`, as a tensor, which safetensors can hold."""
        return self.step.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the step from a `state_dict`, after its buffers."""
        self.step.copy_(state)
        self._all_referenced = bool(torch.isfinite(self.image_score_ref).all())

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

    def forward(self, features: Tensor, labels: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Return λ(step) · Σ w_k term_k of features (B, m), labels (B,) and embeddings (B, n), a tensor ()."""
        self._check(features, labels, embeddings)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            if self.training:
                self._track(features.detach(), labels)
            inputs = self._inputs(features, labels, embeddings)
            values = {name: TERMS[name].function(inputs) for name in self.terms}
            total = torch.stack([self.terms[name] * value for name, value in values.items()]).sum()
        weight = self.current_weight
        logged = {**values, "sing": total, "sing_weight": torch.full((), weight, device=features.device)}
        self.last_terms = {name: value.detach() for name, value in logged.items()}
        if self.training:
            self.step += 1
        return weight * total

    def _check(self, features: Tensor, labels: Tensor, embeddings: Tensor | None) -> None:
        classes, width = self.class_means.shape
        if features.shape != (len(labels), width) or not len(labels):
            shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"expected features (B, {width}) and labels (B,) of at least one image, got {shapes}")
        wrong = labels.is_floating_point() or labels.ndim != 1
        if not wrong and labels.device.type == "cpu":  # elsewhere looking at values would make the host wait
            wrong = not 0 <= int(labels.min()) <= int(labels.max()) < classes
        if wrong:
            raise ValueError(f"labels (B,) must be integers in 0..{classes - 1}, not mixed ones")
        expected = (len(labels), self.texts.shape[1])
        if "embeddings" in self.reads and (embeddings is None or embeddings.shape != expected):
            got = "none" if embeddings is None else tuple(embeddings.shape)
            terms = sorted(name for name in self.terms if "embeddings" in TERMS[name].reads)
            raise ValueError(
                f"the terms {terms} read what the vision-language model sees: expected embeddings {expected}, "
                f"got {got}; pass sing(features, labels, embeddings), row by row of the same images"
            )

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

    def _inputs(self, features: Tensor, labels: Tensor, embeddings: Tensor | None) -> LossInputs:
        names = ("mean", "texts", "contrast", "span", "matrix", "offset", "covariance", "readout", "feature_mean")
        buffers = {name: getattr(self, name).to(features.dtype) for name in names}
        mean, matrix = buffers["mean"], buffers["matrix"]
        centred, pulled = features - mean, buffers["texts"] @ matrix
        anchors = self.class_means.to(mean)[labels] - mean
        moved = (mean - buffers["feature_mean"])[None]  # the readout's mean is that of the images it was fitted on
        # One projection for the batch, its class means and the prompts: the factorisation of W Wᵀ is shared.
        every = torch.cat([centred, anchors, moved, pulled])
        inside = row_space_projection(self.head_weight, every, invariance=self.invariance)
        null, class_null, _, pulled_null = torch.split(every - inside, [len(labels), len(labels), 1, len(pulled)])
        z, shift, seen = features @ matrix.T + buffers["offset"], null @ matrix.T, features[:, :0]
        if "embeddings" in self.reads and embeddings is not None:
            seen = (embeddings.detach().to(mean) - self.embedding_mean.to(mean)) @ buffers["span"]
        return LossInputs(
            null=null,
            centred=centred,
            z=z,
            z_eq=z - shift,
            text=buffers["texts"][labels],
            shift=shift,
            total=centred @ matrix.T,
            contrast=buffers["contrast"][labels],
            class_null=class_null.detach(),
            image_score_ref=self._reference(z, z - shift, labels),
            pulled=pulled,
            pulled_null=pulled_null,
            covariance=buffers["covariance"],
            floor=self.floor,
            seen=seen,
            read=(inside[: len(labels)] + inside[2 * len(labels)]) @ buffers["readout"].T,
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
