"""Side effects of emptying a null space: telling strange images from known ones, calibration (METHOD section 8.8)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from singreg.analysis.features import FeatureBatch, PassSettings, iterate_features
from singreg.analysis.scores import Rows
from singreg.data.splits import ImageSplit
from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null
from singreg.nullspace import NullSpace
from singreg.utils import all_reduce_max, all_reduce_sum, gather_rows

BINS = 15  # of the calibration error
ROUNDING = 1e-6  # a null residual below this share of |f| is what float32 left of none


def network_outputs(batches: Iterable[FeatureBatch], space: NullSpace, mean: Tensor) -> Rows:
    """Gather logits (N, C), labels, whether right, and the columns of `ood_columns` (N,) of all processes' images."""
    rows: list[Rows] = []
    for batch in batches:
        right = (batch.logits.argmax(1) == batch.labels).double()
        columns = {"logits": batch.logits, "label": batch.labels, "correct": right}
        columns |= ood_columns(batch.features, batch.logits, space, mean)
        rows.append({"index": batch.indices.numpy(), **{name: value.cpu().numpy() for name, value in columns.items()}})
    return gather_rows(rows, sort_by="index")


def ood_columns(features: Tensor, logits: Tensor, space: NullSpace, mean: Tensor) -> dict[str, Tensor]:
    """Return residual |Π_n(f - μ)|, logsumexp and largest logit of each image, (B,) float64.

    Shape: features (B, m), logits (B, C), mean (m,).
    """
    logits, centred = logits.double(), features.double() - mean.double()
    residual = torch.linalg.vector_norm(space.component(centred), dim=1)
    # What float32 leaves of a null component that is not there would otherwise be ranked as if it said something.
    nothing = residual <= ROUNDING * torch.linalg.vector_norm(features.double(), dim=1)
    residual = torch.where(nothing, torch.zeros_like(residual), residual)
    return {"residual": residual, "logsumexp": logits.logsumexp(1), "max_logit": logits.amax(1)}


def ood_figures(known: Rows, strange: Rows, fit: Rows) -> dict[str, float]:
    """Return how well null energy, the energy score and ViM's combination tell strange images from known ones (AUROC).

    ViM with the null space of W in the place of the small principal components: α|Π_n(f - μ)| - logsumexp, with α the
    mean largest logit over the mean residual of the fit. Without any null energy the energy score stands alone.

    Args:
        known: columns of `ood_columns` (N,); strange and fit likewise.
    """
    scale = fit["max_logit"].mean() / fit["residual"].mean() if fit["residual"].any() else 0.0

    def score(weight: float, energy: float) -> float:
        one, other = (
            torch.from_numpy(weight * each["residual"] - energy * each["logsumexp"]) for each in (known, strange)
        )
        return auroc(one, other)

    return {"ood_null_energy": score(1, 0), "ood_energy": score(0, 1), "ood_vim": score(scale, 1)}


def auroc(known: Tensor, strange: Tensor) -> float:
    """Return the share of (known, strange) pairs in which the strange one scores higher, ties as half.

    Shape: (N,), (M,).

    Raises:
        ValueError: one of them is empty, or a score is not finite.

    Example:
        >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    scores = torch.cat([known, strange]).double()
    if not len(known) or not len(strange) or not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f"an AUROC needs finite scores of both kinds, got {len(known)} known, {len(strange)} strange ones"
        )
    # Ranks: torchmetrics squashes scores outside [0, 1] by a float32 sigmoid, in which large ones tie.
    values, rank = torch.unique(scores, return_inverse=True)
    target = torch.cat([torch.zeros_like(known), torch.ones_like(strange)]).long()
    return float(binary_auroc(rank.double() / len(values), target))


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return ece (of the largest probability in 15 equal bins) and nll (nats) of logits (N, C), labels (N,).

    Raises:
        ValueError: no images, or unlabelled ones.

    Example:
        >>> found = calibration(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
        >>> round(found["ece"], 3), round(found["nll"], 3)
        (0.5, 4.5)
    """
    if not len(labels) or bool((labels < 0).any()):
        raise ValueError(f"calibration needs labelled images, got {len(labels)}, {int((labels < 0).sum())} unlabelled")
    log_probabilities = logits.detach().double().log_softmax(1)
    error = multiclass_calibration_error(log_probabilities.exp(), labels, logits.shape[1], n_bins=BINS)
    nll = -log_probabilities.gather(1, labels[:, None]).mean()
    return {"ece": float(error), "nll": float(nll)}


def measure_dropped(
    classifier: Classifier, split: ImageSplit, embeddings: np.ndarray, settings: PassSettings
) -> dict[str, float]:
    """Return top1 after the null space was dropped, and logit_change, the largest |Δlogit| to the classifier itself.

    Side by side, batch by batch: the logits of all images by two models may be gigabytes.
    """
    once = replace(settings, cache=None)
    device = classifier.weight.device
    counts, change = torch.zeros(2, dtype=torch.float64, device=device), torch.zeros((), device=device)
    both = (
        iterate_features(model, split, embeddings, passes, "dropping the null space")
        for model, passes in ((classifier, once), (drop_null(classifier), replace(once, progress=False)))
    )
    for before, after in zip(*both, strict=True):
        hits = (after.logits.argmax(1) == after.labels).sum()
        counts += torch.stack([hits, hits.new_tensor(len(after.labels))])
        change = torch.maximum(change, (after.logits - before.logits).abs().max())
    right, images = all_reduce_sum(counts).tolist()
    return {"top1": right / images, "logit_change": float(all_reduce_max(change))}
