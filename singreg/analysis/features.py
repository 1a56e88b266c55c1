"""One pass over a part: features, logits and the cached embeddings of the same pictures, split over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.data.loading import make_loader
from singreg.data.parts import ImagePart
from singreg.models.classifier import Classifier
from singreg.progress import progress


@dataclass(frozen=True)
class FeatureBatch:
    """features (B, m), logits (B, C), embeddings (B, n) float32; labels (B,), -1 unlabelled; indices (B,) into the part."""

    features: Tensor
    logits: Tensor
    embeddings: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class PassSettings:
    """How pictures are read in a pass that trains nothing."""

    batch_size: int = 64
    workers: int = 0
    progress: bool = True


def process_share(count: int) -> np.ndarray:
    """Indices of the pictures this process reads: every world-size-th, no padding, none twice. Returns (n,) int64.

    Counts stay exact at odd sizes, and a process may be idle (trap 5).
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    return np.arange(rank, count, world)


@torch.no_grad()
def iterate_features(
    classifier: Classifier, part: ImagePart, embeddings: np.ndarray, settings: PassSettings, description: str
) -> Iterator[FeatureBatch]:
    """Yield this process's batches of a part in order, with the model in eval mode (its mode is restored afterwards).

    Shapes: embeddings (N, n), row i belongs to picture i of the part.

    Raises:
        ValueError: embeddings and part differ in length, or a feature is not finite (the picture is named).
    """
    if len(embeddings) != len(part):
        raise ValueError(f"part {part.name!r} has {len(part)} pictures but {len(embeddings)} embeddings were given")
    share = process_share(len(part))
    device = classifier.weight.device
    loader = make_loader(part.subset(share), classifier.transform, settings.batch_size, workers=settings.workers)
    was_training = classifier.training
    classifier.eval()
    try:
        for images, labels, positions in progress(loader, f"{description} [{part.name}]", enabled=settings.progress):
            indices = torch.from_numpy(share)[positions]
            features, logits = classifier.features_and_logits(images.to(device, non_blocking=True))
            if not bool(torch.isfinite(features).all()):
                bad = indices[~torch.isfinite(features).all(1).cpu()]
                names = ", ".join(part.identifier(int(i)) for i in bad[:5])
                raise ValueError(f"{classifier.tag} gives features that are not finite for {len(bad)} pictures: {names}")
            z = torch.from_numpy(np.ascontiguousarray(embeddings[indices.numpy()])).to(device)
            yield FeatureBatch(features.float(), logits.float(), z, labels.to(device), indices)
    finally:
        classifier.train(was_training)
