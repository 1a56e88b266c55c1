"""Names that old callers still use; gone when they have moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from singreg.analysis.features import PassSettings, gathered, iterate_features
from singreg.analysis.fitting import VALIDATION_EVERY, FittedTranslator, fit_on_split, reference_image_scores
from singreg.analysis.fitting import standardization as new_standardization
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance
from singreg.ridge import RidgeStatistics, Standardize
from singreg.translator import LinearTranslator

__all__ = [
    "VALIDATION_EVERY",
    "FittedTranslator",
    "fit_on_part",
    "fold_statistics",
    "refit",
    "reference_image_scores",
    "standardization",
]
NAMES: dict[Any, str] = {False: "none", True: "features", "no": "none"}


def fit_on_part(*arguments: Any, standardize: Any = False, **options: Any) -> FittedTranslator:
    """Old spelling of fit_on_split."""
    return fit_on_split(*arguments, standardize=NAMES.get(standardize, standardize), **options)  # type: ignore[arg-type]


def standardization(classifier: Classifier, standardize: Any, invariance: Invariance) -> Standardize:
    """Old spelling of fitting.standardization."""
    return new_standardization(classifier, NAMES.get(standardize, standardize), invariance)


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
