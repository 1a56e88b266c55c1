"""A non-linear translator on a part, from the cached features and embeddings of its pictures (METHOD section 2)."""

from __future__ import annotations

import numpy as np

from singreg.analysis.features import PassSettings, cached_features
from singreg.data.datasets import ImageSplit
from singreg.mlp import MLPSettings, MLPTranslator, fit_mlp_translator
from singreg.models.classifier import Classifier
from singreg.translator import TranslatorInfo


def fit_mlp_on_part(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    *,
    mlp: MLPSettings | None = None,
    normalize_targets: bool = False,
    info: TranslatorInfo | None = None,
    settings: PassSettings,
) -> MLPTranslator:
    """Fit an MLP translator on all pictures of a part; every fifth picture decides when to stop, as it chooses λ in `fit_on_part`.

    Shapes: embeddings (N, n). The features are read many times, so `settings.cache` must name a folder.

    Raises:
        ValueError: no cache folder; or see `fit_mlp_translator`.
    """
    if settings.cache is None:
        raise ValueError("an MLP translator reads the features once an epoch: give PassSettings(cache=FOLDER) to keep them in")
    features = cached_features(
        classifier, part, settings.cache, batch_size=settings.batch_size, workers=settings.workers, progress=settings.progress
    )
    return fit_mlp_translator(
        features, embeddings, settings=mlp, normalize_targets=normalize_targets, info=info,
        device=classifier.weight.device, progress=settings.progress,
    )  # fmt: skip
