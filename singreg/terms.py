"""The terms of SingLoss, one small function each (METHOD section 6)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from singreg.utils import all_reduce_mean


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
