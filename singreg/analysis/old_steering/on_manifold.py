"""How far natural features lie from what their row-space component predicts, from streamed second moments (METHOD section 9a)."""

from __future__ import annotations

import numpy as np

from singreg.analysis.features import PassSettings, gathered, iterate_features
from singreg.analysis.old_steering.results import NaturalRadii
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.steering import ConditionalGaussian
from singreg.utils import gather_rows


def fit_conditional(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    null_space: NullSpace,
    *,
    floor: float = 1e-3,
    settings: PassSettings | None = None,
) -> ConditionalGaussian:
    """The Gaussian of Π_n f given Π_p f over a part's pictures: one pass, O(m²) memory, exact over processes.

    Shapes: embeddings (N, n), only for the pass. Variances below `floor` times their mean count as that.

    Raises:
        ValueError: fewer than two pictures, or features that do not vary in the null space.
    """
    # The ridge's own sums, without a target.
    moments = RidgeStatistics(classifier.feature_dim, 0, device=classifier.weight.device)
    for batch in gathered(iterate_features(classifier, part, embeddings, settings or PassSettings(), "second moments")):
        moments.update(batch.features, batch.features.new_zeros(len(batch.features), 0))
    scatter, _, _ = moments.reduce().centred()
    return ConditionalGaussian.from_moments(
        moments.f / moments.count, scatter / (moments.count - 1), null_space, floor=floor
    )


def natural_radii(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    gaussian: ConditionalGaussian,
    *,
    fit_images: int,
    settings: PassSettings | None = None,
) -> NaturalRadii:
    """Percentiles of the radius over the pictures of a part that did not make the Gaussian. Shapes: embeddings (N, n).

    Held out on purpose: a covariance of few pictures calls its own pictures nearer than any others.
    """
    columns = []
    for batch in iterate_features(classifier, part, embeddings, settings or PassSettings(), "natural radii"):
        columns.append({"index": batch.indices.numpy(), "radius": gaussian.radius(batch.features).cpu().numpy()})
    radii = gather_rows(columns, sort_by="index")["radius"]
    median, p95, p99 = (float(value) for value in np.quantile(radii, (0.5, 0.95, 0.99)))
    return NaturalRadii(
        median=median,
        p95=p95,
        p99=p99,
        images=len(radii),
        dimensions=len(gaussian.whitening),
        fit_images=fit_images,
        floor=gaussian.floor,
        floored=gaussian.floored,
    )
