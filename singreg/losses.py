"""SingLoss and its terms: null-space regularisation as a differentiable loss (METHOD section 6)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from singreg.functional import check_labels
from singreg.models.heads import check_is_affine
from singreg.nullspace import Invariance, NullSpace, row_space_projection
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_mean

READOUT_RIDGE = 1e-3  # of the mean variance in the row space


@dataclass(frozen=True)
class LossInputs:
    """What a term may use, for B images, C classes, m features, K contrasts of prompts."""

    inside: Tensor  # (B, m): Π_p (f - μ), μ the mean of the images behind the translator
    null: Tensor  # (B, m): f_n = Π_n (f - μ)
    labels: Tensor  # (B,)
    pulled: Tensor  # (C, m): Aᵀ t of every prompt
    pulled_null: Tensor  # (C, m): Π_n Aᵀ t
    covariance: Tensor  # (m, m): Σ of the features behind the translator
    floor: float  # ε of the metric Σ + ε (tr Σ / m) I
    seen: Tensor  # (B, K): s = Uᵀ (z_i - z̄) of the image's own embedding z_i; (B, 0) unless a term reads embeddings
    read: Tensor  # (B, K): the linear readout of s from the row-space part of the feature


TermFunction = Callable[[LossInputs], Tensor]


class Term(NamedTuple):
    """A registered term; see `term`."""

    function: TermFunction
    default: float
    embeddings: bool


TERMS: dict[str, Term] = {}


def term(name: str, *, default: float = 0.0, embeddings: bool = False) -> Callable[[TermFunction], TermFunction]:
    """Register a function of `LossInputs` as a loss term; this is all that a new term takes.

    Args:
        name: what configurations and logs call it.
        default: its weight in SingLoss; 0 leaves it out unless it is asked for.
        embeddings: whether it reads the images' own embeddings, which SingLoss must then be given.
    """

    def register(function: TermFunction) -> TermFunction:
        TERMS[name] = Term(function, default, embeddings)
        return function

    return register


@term("readout", default=1.0, embeddings=True)
def readout(inputs: LossInputs) -> Tensor:
    """Return what the row space does not tell of the image's own embedding, Σ|s - B Qᵀ(f - μ)|² over Σ|s|²."""
    spread = all_reduce_mean(inputs.seen.square().sum(-1))
    missed = (inputs.seen - inputs.read).square().sum(-1).mean()
    return missed / spread.clamp_min(torch.finfo(spread.dtype).tiny)


@term("capacity", default=10.0)
def capacity(inputs: LossInputs) -> Tensor:
    """Return the share of the prompts' score variance that the null space carries, tr(P M Pᵀ) / tr(A_t M A_tᵀ).

    M = Σ + ε (tr Σ / m) I is the features' metric, the rows of A_t are Aᵀ t_k, P = A_t Π_n. In [0, 1]; W alone moves.
    """
    metric = inputs.covariance, inputs.floor
    return score_variance(inputs.pulled_null, *metric) / score_variance(inputs.pulled, *metric)


def resolve_terms(overrides: Mapping[str, float]) -> dict[str, float]:
    """Return the terms with their default weights, some changed or added; a weight of 0 removes its term."""
    defaults = {name: each.default for name, each in TERMS.items()}
    return {name: weight for name, weight in {**defaults, **overrides}.items() if weight}


def score_variance(rows: Tensor, covariance: Tensor, floor: float) -> Tensor:
    """Return tr(R M Rᵀ) with M = Σ + ε (tr Σ / m) I, never formed. Shape: R (k, m), Σ (m, m) -> ()."""
    return ((rows @ covariance) * rows).sum() + floor * torch.diagonal(covariance).mean() * rows.square().sum()


def contrast_basis(texts: Tensor) -> Tensor:
    """Return an orthonormal basis U of the contrasts t_k - t̄ of all prompts. Shape: (C, n) -> (n, K), K < C."""
    exact = nn.functional.normalize(texts.detach().cpu().double(), dim=-1)
    _, sizes, right = torch.linalg.svd(exact - exact.mean(0), full_matrices=False)
    basis: Tensor = right[sizes > 1e-6 * sizes[:1].clamp_min(1e-6)].T
    return basis.to(texts)


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
            trained on.
        weight: λ after the ramp.
        terms: name -> weight of `TERMS`; readout 1 and capacity 10 unless given.
        warmup_steps: steps with λ = 0; ramp_steps: those of the cosine ramp to λ that follow.
        accumulation: forwards in one step, all with the same λ, for loops that accumulate gradients.
        invariance: null space of the "logits" or of the "softmax".
        floor: ε of `capacity`'s metric; towards infinity it becomes the Euclidean one.
        everywhere: read the readout from all of f, a control: distillation that need not go through the head.

    Shape: features (B, m), labels (B,) of integers, embeddings (B, n) of the same images by the vision-language model,
        which `readout` needs -> (), in float32 or wider, outside autocast.

    Raises:
        ValueError: unknown terms, shapes that do not fit, embeddings that a term reads and were not given, an empty
            batch, a head without a null space; on a CPU also labels outside 0..C-1 (a GPU has its own assertion).

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
    span: Tensor
    matrix: Tensor
    offset: Tensor
    covariance: Tensor
    readout: Tensor
    feature_mean: Tensor
    embedding_mean: Tensor

    def __init__(
        self,
        head: nn.Module,
        translator: LinearTranslator,
        texts: Tensor,
        statistics: RidgeStatistics,
        *,
        weight: float = 1.0,
        terms: Mapping[str, float] | None = None,
        warmup_steps: int = 0,
        ramp_steps: int = 0,
        accumulation: int = 1,
        invariance: Invariance = "logits",
        floor: float = 1.0,
        everywhere: bool = False,
    ) -> None:
        super().__init__()
        self.terms = resolve_terms({}) if terms is None else dict(terms)
        if unknown := sorted(set(self.terms) - set(TERMS)):
            raise ValueError(f"unknown loss terms {unknown}; known are {sorted(TERMS)}")
        self._head: tuple[Any] = (head,)  # a tuple hides it from nn.Module: not saved, not trained twice
        self.reads_embeddings = any(TERMS[name].embeddings for name in self.terms)
        own = getattr(head, "weight", None)
        if not isinstance(own, Tensor) or own.ndim < 2:
            got = f"got {type(head).__name__}; pass its last linear layer"
            raise ValueError(f"expected a head with a weight (C, m), {got}")
        check_is_affine(getattr(head, "head", head), "head")  # of a `Classifier`, its own
        wanted = (len(self.head_weight), len(translator.matrix))
        if texts.shape != wanted:
            raise ValueError(f"expected texts {wanted}, a row for each class, got {tuple(texts.shape)}")
        NullSpace.from_weight(self.head_weight, invariance=invariance)  # says so where there is no null space
        self.weight, self.warmup_steps, self.ramp_steps = weight, warmup_steps, ramp_steps
        self.accumulation, self.invariance = accumulation, invariance
        self.floor, self.everywhere = floor, everywhere
        # No buffer: it stays on the CPU, so that λ is known without asking a device. The extra state saves it.
        self.step = torch.zeros((), dtype=torch.long)
        self.last_terms: dict[str, Tensor] = {}
        self.register_buffer("texts", texts.detach().float(), persistent=False)
        self.register_buffer("span", contrast_basis(texts).float(), persistent=False)
        for name in ("matrix", "offset", "covariance", "readout", "feature_mean", "embedding_mean"):
            self.register_buffer(name, torch.empty(0))
        self.set_translator(translator, statistics)

    @property
    def head_weight(self) -> Tensor:
        """The head's current weight as (C, m); a 1x1 convolution is flattened."""
        weight: Tensor = self._head[0].weight
        return weight.flatten(1)

    @torch.no_grad()
    def set_translator(self, translator: LinearTranslator, statistics: RidgeStatistics) -> None:
        """Use another translator from now on, with capacity's metric and a new readout from the same images' sums.

        The readout is a ridge regression of s = Uᵀ(z - z̄) on Qᵀ(f - μ), Q the row space of the head as it is now; with
        `everywhere` Q is all of feature space.
        """
        wanted, got = (self.texts.shape[1], self.head_weight.shape[1]), translator.matrix.shape
        if got != wanted or statistics.fz.shape != wanted[::-1]:
            sizes = f"a matrix {wanted} and RidgeStatistics{wanted[::-1]}"
            raise ValueError(f"expected {sizes}, got {tuple(got)} and {tuple(statistics.fz.shape)}")
        scatter, cross, _ = statistics.centred()
        basis = NullSpace.from_weight(self.head_weight, invariance=self.invariance).basis.to(scatter)
        basis = torch.eye(len(basis)).to(basis) if self.everywhere else basis
        inner = basis.T @ scatter @ basis
        inner.diagonal().add_(READOUT_RIDGE * inner.diagonal().mean())
        coefficients = torch.linalg.solve(inner, basis.T @ cross @ self.span.to(cross))
        self.matrix = translator.matrix.detach().to(self.texts, copy=True)
        self.offset = translator.offset.detach().to(self.texts, copy=True)
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

    @property
    def current_weight(self) -> float:
        """λ(step): 0 in the warm-up, then a cosine ramp, then `weight`."""
        after = int(self.step) // self.accumulation - self.warmup_steps
        if after < 0:
            return 0.0
        if after >= self.ramp_steps:
            return self.weight
        return self.weight * 0.5 * (1 - math.cos(math.pi * (after + 1) / (self.ramp_steps + 1)))

    def forward(self, features: Tensor, labels: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Return λ(step) · Σ w_k term_k of features (B, m), labels (B,) and embeddings (B, n), a tensor ()."""
        self._check(features, labels, embeddings)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
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
        classes, width = self.head_weight.shape
        if features.shape != (len(labels), width) or not len(labels):
            shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"expected features (B, {width}) and labels (B,) of at least one image, got {shapes}")
        check_labels(labels, classes)
        expected = (len(labels), self.texts.shape[1])
        if self.reads_embeddings and (embeddings is None or embeddings.shape != expected):
            got = "none" if embeddings is None else tuple(embeddings.shape)
            terms = sorted(name for name in self.terms if TERMS[name].embeddings)
            wanted = f"the terms {terms} need the images' own embeddings {expected}, got {got}"
            raise ValueError(f"{wanted}; pass sing(features, labels, embeddings), row by row of the same images")

    def _inputs(self, features: Tensor, labels: Tensor, embeddings: Tensor | None) -> LossInputs:
        buffers = {name: buffer.to(features.dtype) for name, buffer in self.named_buffers()}
        centred, pulled = features - buffers["feature_mean"], buffers["texts"] @ buffers["matrix"]
        # One projection for the batch and the prompts: the factorisation of W Wᵀ is shared.
        every = torch.cat([centred, pulled])
        projected = row_space_projection(self.head_weight, every, invariance=self.invariance)
        inside, null = projected[: len(labels)], every - projected
        seen = features[:, :0]
        if self.reads_embeddings and embeddings is not None:
            seen = (embeddings.detach().to(features.dtype) - buffers["embedding_mean"]) @ buffers["span"]
        return LossInputs(
            inside=inside,
            null=null[: len(labels)],
            labels=labels,
            pulled=pulled,
            pulled_null=null[len(labels) :],
            covariance=buffers["covariance"],
            floor=self.floor,
            seen=seen,
            read=(centred if self.everywhere else inside) @ buffers["readout"].T,
        )
