"""Fitting translators on a part, and the reference figures a SingLoss starts from (METHOD sections 2, 6 and 8.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import PassSettings, gathered, iterate_features
from singreg.data.datasets import ImageSplit
from singreg.functional import image_score
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics, Standardize
from singreg.translator import LinearTranslator, TranslatorInfo, translator_from_statistics
from singreg.utils import all_reduce_sum

VALIDATION_EVERY = 5


@dataclass(frozen=True)
class FittedTranslator:
    """A translator with the mean feature (m,) and class means (C, m; NaN where unseen) of the pictures behind it."""

    translator: LinearTranslator
    mean: Tensor
    class_means: Tensor


def fit_on_part(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    *,
    ridges: Sequence[float] = DEFAULT_RIDGES,
    standardize: bool | Literal["blocks", "features", "no"] = False,
    invariance: Invariance = "logits",
    normalize_targets: bool = False,
    info: TranslatorInfo | None = None,
    settings: PassSettings | None = None,
    description: str = "translator",
) -> FittedTranslator:
    """Fit T on all pictures of a part in one pass; every fifth picture chooses λ. Exact over processes.

    Shapes: embeddings (N, n). The auditor is the same call on other pictures with `standardize="blocks"` (METHOD section 8.6):
    the row-space and the null block of the head are brought to unit scale, so that neither turning nor shrinking the null block
    moves it; True or "features" scales feature by feature, which only a head aligned with the axes makes as safe, and only from shrinking.

    Raises:
        ValueError: another `standardize` than "blocks", "features" (True) or "no" (False).
    """
    scale = standardization(classifier, standardize, invariance)
    width, dim = classifier.feature_dim, embeddings.shape[1]
    device = classifier.weight.device
    fit, validation = (RidgeStatistics(width, dim, device=device) for _ in range(2))
    sums = torch.zeros(classifier.num_classes, width, dtype=torch.float64, device=device)
    counts = torch.zeros(classifier.num_classes, dtype=torch.float64, device=device)
    for batch in gathered(iterate_features(classifier, part, embeddings, settings or PassSettings(), description)):
        targets = torch.nn.functional.normalize(batch.embeddings, dim=-1) if normalize_targets else batch.embeddings
        # By position in the part, so that the split is the same on any number of processes.
        held_out = (batch.indices % VALIDATION_EVERY == 0).to(device)
        fit.update(batch.features[~held_out], targets[~held_out])
        validation.update(batch.features[held_out], targets[held_out])
        known = batch.labels >= 0
        sums.index_add_(0, batch.labels[known], batch.features[known].double())
        counts += torch.bincount(batch.labels[known], minlength=len(counts))
    fit.reduce()
    validation.reduce()
    sums, counts = all_reduce_sum(sums), all_reduce_sum(counts)
    translator = translator_from_statistics(fit, validation, ridges=ridges, standardize=scale, info=info)
    mean = (fit.f + validation.f) / (fit.count + validation.count)
    return FittedTranslator(translator.to(device), mean.float(), (sums / counts[:, None]).float())


def fold_statistics(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    folds: int,
    *,
    seed: int = 0,
    normalize_targets: bool = False,
    settings: PassSettings | None = None,
    description: str = "fitting the loop's translators",
) -> list[RidgeStatistics]:
    """Sums of `folds` disjoint random shares of a part, from one pass over it; merged they are the whole part's. Exact over processes.

    Shapes: embeddings (N, n); each holds (m, m) and (m, n) sums over N / folds pictures. The shares hang on the seed alone.
    """
    fold = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed)) % folds
    width, dim, device = classifier.feature_dim, embeddings.shape[1], classifier.weight.device
    found = [RidgeStatistics(width, dim, device=device) for _ in range(folds)]
    for batch in gathered(iterate_features(classifier, part, embeddings, settings or PassSettings(), description)):
        targets = torch.nn.functional.normalize(batch.embeddings, dim=-1) if normalize_targets else batch.embeddings
        for number, statistics in enumerate(found):
            mine = (fold[batch.indices] == number).to(device)
            statistics.update(batch.features[mine], targets[mine])
    return [statistics.reduce() for statistics in found]


def standardization(classifier: Classifier, standardize: bool | str, invariance: Invariance) -> Standardize:
    """What `RidgeStatistics.solve` takes for "blocks" (a basis (m, r) of the head's row space), "features" or "no".

    Raises:
        ValueError: another word.
    """
    if isinstance(standardize, bool):
        return standardize
    if standardize not in ("blocks", "features", "no"):
        raise ValueError(f'standardize must be "blocks", "features" or "no", got {standardize!r}')
    if standardize != "blocks":
        return standardize == "features"
    return NullSpace.from_weight(classifier.weight, invariance=invariance, allow_empty=True).basis


def refit(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    previous: LinearTranslator,
    *,
    settings: PassSettings,
    invariance: Invariance = "logits",
    description: str = "refreshing the translator",
) -> LinearTranslator:
    """The same fit on today's features, at the ridge already chosen: the loop's refresh. Shapes: embeddings (N, n)."""
    fitted = fit_on_part(
        classifier,
        part,
        embeddings,
        ridges=(previous.info.ridge,),
        standardize="blocks" if previous.info.by_block else previous.info.standardized,
        invariance=invariance,
        normalize_targets=previous.info.normalized_targets,
        info=previous.info,
        settings=settings,
        description=description,
    )
    return fitted.translator


def reference_image_scores(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    fitted: FittedTranslator,
    *,
    per_class: int = 32,
    invariance: Invariance = "logits",
    settings: PassSettings | None = None,
) -> Tensor:
    """IS_ref of every class, (C,) in degrees: mean image score of the centred removal over its first `per_class` pictures.

    NaN for a class without labelled pictures in the part.
    """
    labels = np.asarray(part.labels)
    rank_in_class = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rank_in_class[labels == label] = np.arange((labels == label).sum())
    chosen = np.flatnonzero((labels >= 0) & (rank_in_class < per_class))
    space = NullSpace.from_weight(classifier.weight, invariance=invariance).to(classifier.weight.device)
    sums = torch.zeros(2, classifier.num_classes, dtype=torch.float64, device=classifier.weight.device)
    sample = part.subset(chosen)
    for batch in iterate_features(classifier, sample, embeddings[chosen], settings or PassSettings(), "reference IS"):
        equivalent = space.remove(batch.features, mean=fitted.mean)
        scores = image_score(fitted.translator(batch.features), fitted.translator(equivalent)).double()
        sums[0].index_add_(0, batch.labels, scores)
        sums[1] += torch.bincount(batch.labels, minlength=sums.shape[1])
    sums = all_reduce_sum(sums)
    return (sums[0] / sums[1]).float()
