"""Side effects of emptying a null space: telling strange pictures from known ones, and calibration (METHOD section 8.8)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from singreg.analysis.study.arm_results import OodScores
from singreg.nullspace import NullSpace

BINS = 15
ROUNDING = 1e-6
OOD_COLUMNS = ("residual", "logsumexp", "max_logit")


def auroc(known: Tensor, strange: Tensor) -> float:
    """Share of (known, strange) pairs in which the strange one scores higher, ties as half. Shapes: (N,), (M,).

    Raises:
        ValueError: one of them is empty, or a score is not finite.

    Example:
        >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    scores = torch.cat([known, strange]).double()
    if not len(known) or not len(strange) or not bool(torch.isfinite(scores).all()):
        raise ValueError(f"an AUROC needs finite scores of both kinds, got {len(known)} known and {len(strange)} strange ones")
    # Ranks instead of scores: torchmetrics squashes scores outside [0, 1] by a float32 sigmoid, in which large ones tie.
    values, rank = torch.unique(scores, return_inverse=True)
    target = torch.cat([torch.zeros_like(known), torch.ones_like(strange)]).long()
    return float(binary_auroc(rank.double() / len(values), target))


def ood_columns(features: Tensor, logits: Tensor, space: NullSpace, mean: Tensor) -> dict[str, Tensor]:
    """What the OOD scores of a picture are made of: residual |Π_n(f - μ)|, logsumexp and largest logit, each (B,) float64.

    A residual below 1e-6 of |f| counts as 0.

    Shapes: features (B, m), logits (B, C), mean (m,).
    """
    logits, centred = logits.double(), features.double() - mean.double()
    residual = torch.linalg.vector_norm(space.component(centred), dim=1)
    # What float32 leaves of a null component that is not there would otherwise be ranked as if it said something.
    residual = torch.where(residual > ROUNDING * torch.linalg.vector_norm(features.double(), dim=1), residual, torch.zeros_like(residual))
    return dict(zip(OOD_COLUMNS, (residual, logits.logsumexp(1), logits.amax(1)), strict=True))


def ood_from_columns(known: dict[str, Tensor], strange: dict[str, Tensor], fit: dict[str, Tensor]) -> OodScores:
    """AUROCs from the columns of `ood_columns` (N,), (M,), (F,); α = mean largest logit / mean residual of the fit, as in ViM."""
    # Without any null energy there is nothing to scale, and the energy score stands alone.
    scale = fit["max_logit"].mean() / fit["residual"].mean() if bool(fit["residual"].any()) else torch.zeros(())

    def vim(columns: dict[str, Tensor]) -> Tensor:
        return scale * columns["residual"] - columns["logsumexp"]

    return OodScores(
        null_energy=auroc(known["residual"], strange["residual"]),
        energy=auroc(-known["logsumexp"], -strange["logsumexp"]),
        vim=auroc(vim(known), vim(strange)),
    )


def ood_auroc(
    space: NullSpace, id_features: Tensor, ood_features: Tensor, weight: Tensor, bias: Tensor | None, fit_features: Tensor
) -> OodScores:
    """How well null energy, the energy score and ViM's combination of both tell strange pictures from known ones.

    ViM with the null space of W in the place of the small principal components: α|Π_n(f - μ)| - logsumexp(W f + b), μ and α from
    `fit_features`. Higher is stranger.

    Shapes: features (N, m), (M, m), (F, m), weight (C, m), bias (C,).

    Example:
        >>> head, g = torch.eye(3)[:2], torch.Generator().manual_seed(0)
        >>> known, more = torch.randn(2, 50, 3, generator=g)
        >>> ood_auroc(NullSpace.from_weight(head), known, known + torch.tensor([0.0, 0.0, 9.0]), head, None, more)
        OodScores(null_energy=1.0, energy=0.5, vim=...)
    """
    mean = fit_features.double().mean(0)

    def columns(features: Tensor) -> dict[str, Tensor]:
        logits = features.detach().double() @ weight.detach().double().T + (0 if bias is None else bias.detach().double())
        return ood_columns(features.detach(), logits, space, mean)

    return ood_from_columns(columns(id_features), columns(ood_features), columns(fit_features))


def calibration(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """(expected calibration error of the largest probability in 15 equal bins, mean negative log-likelihood in nats).

    Shapes: logits (N, C), labels (N,).

    Raises:
        ValueError: no pictures, or unlabelled ones.

    Example:
        >>> calibration(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
        (0.4998..., 4.5001...)
    """
    if not len(labels) or bool((labels < 0).any()):
        raise ValueError(f"calibration needs labelled pictures, got {len(labels)}, {int((labels < 0).sum())} of them unlabelled")
    log_probabilities = logits.detach().double().log_softmax(1)
    error = multiclass_calibration_error(log_probabilities.exp(), labels, logits.shape[1], n_bins=BINS)
    nll = -log_probabilities.gather(1, labels[:, None]).mean()
    return float(error), float(nll)
