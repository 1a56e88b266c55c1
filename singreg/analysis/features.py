"""One pass over a part: features, logits and the cached embeddings of the same pictures, split over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from singreg.data.datasets import ImageSplit, make_loader
from singreg.data.embeddings import encode_split, take_rows
from singreg.models.classifier import Classifier
from singreg.models.vlm import hash_of_state
from singreg.utils import progress

STORED_BATCH = 2048
GATHERED_ROWS = 512


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
    cache: str | None = None
    """Folder in which features are kept and found again, by weights and pictures; None: computed anew every time."""


def process_share(count: int) -> np.ndarray:
    """Indices of the pictures this process reads: every world-size-th, no padding, none twice. Returns (n,) int64.

    Counts stay exact at odd sizes, and a process may be idle.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    return np.arange(rank, count, world)


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly from first to last: parts are sorted by class, so the first ones are of few. (n,) int64."""
    spread: np.ndarray = np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)
    return spread


@torch.no_grad()
def iterate_features(
    classifier: Classifier, part: ImageSplit, embeddings: np.ndarray, settings: PassSettings, description: str
) -> Iterator[FeatureBatch]:
    """Yield this process's batches of a part in order, with the model in eval mode (its mode is restored afterwards).

    Shapes: embeddings (N, n), row i belongs to picture i of the part.

    Raises:
        ValueError: embeddings and part differ in length, or a feature is not finite (the picture is named).
    """
    if len(embeddings) != len(part):
        raise ValueError(f"part {part.name!r} has {len(part)} pictures but {len(embeddings)} embeddings were given")
    if settings.cache is not None:
        yield from _stored_batches(classifier, part, embeddings, settings, description)
        return
    share = process_share(len(part))
    device = classifier.weight.device
    loader = make_loader(part.subset(share), classifier.transform, settings.batch_size, workers=settings.workers)
    was_training = classifier.training
    classifier.eval()
    try:
        for images, labels, positions in progress(loader, f"{description} [{part.name}]", enabled=settings.progress):
            indices = torch.from_numpy(share)[positions]
            features, logits = classifier.features_and_logits(images.to(device, non_blocking=True))
            _refuse_non_finite(classifier, part, features, indices)
            z = take_rows(embeddings, indices.numpy()).to(device)
            yield FeatureBatch(features.float(), logits.float(), z, labels.to(device), indices)
    finally:
        classifier.train(was_training)


def gathered(batches: Iterable[FeatureBatch], rows: int = GATHERED_ROWS) -> Iterator[FeatureBatch]:
    """The same pictures in the same order, in batches of at least `rows` (the last: what is left).

    For sums of size (m, m): adding to them costs a walk through the whole matrix, however few the pictures.
    """
    waiting: list[FeatureBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(held.indices) for held in waiting) >= rows:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[FeatureBatch]) -> FeatureBatch:
    if len(batches) == 1:
        return batches[0]
    return FeatureBatch(*(torch.cat([getattr(batch, field.name) for batch in batches]) for field in fields(FeatureBatch)))


def cached_features(
    classifier: Classifier, part: ImageSplit, cache: str, *, batch_size: int = 64, workers: int = 0, progress: bool = True
) -> np.ndarray:
    """Features f (N, m) of a part, float32, row i for picture i, memory-mapped; computed once for this backbone and these pictures.

    The head's own weights have no part in its input, so a model whose head alone was trained or edited finds the same file.

    Raises:
        ValueError: a feature that is not finite (the picture is named), or an empty part.
    """
    was_training = classifier.training
    classifier.eval()
    device = classifier.weight.device
    try:
        return encode_split(
            lambda images: classifier.features(images.to(device)), classifier.transform, part, classifier.feature_dim, cache,
            key={"backbone": _hash_of_backbone(classifier), "preprocessing": classifier.preprocessing},
            batch_size=batch_size, workers=workers, progress=progress, description="features",
        )  # fmt: skip
    finally:
        classifier.train(was_training)


def _hash_of_backbone(classifier: Classifier) -> str:
    """SHA-256 of the model's state without the head, and of where the head is."""
    head = f"{classifier.head_name}."
    return hash_of_state({name: tensor for name, tensor in classifier.model.state_dict().items() if not name.startswith(head)}, head)


def _stored_batches(
    classifier: Classifier, part: ImageSplit, embeddings: np.ndarray, settings: PassSettings, description: str
) -> Iterator[FeatureBatch]:
    """The same batches from the feature cache; only the head runs, so they may be larger."""
    assert settings.cache is not None
    stored = cached_features(
        classifier, part, settings.cache,
        batch_size=settings.batch_size, workers=settings.workers, progress=settings.progress,
    )  # fmt: skip
    device, share = classifier.weight.device, process_share(len(part))
    chunks = np.split(share, range(STORED_BATCH, len(share), STORED_BATCH)) if len(share) else []
    for rows in progress(chunks, f"{description} [{part.name}]", enabled=settings.progress):
        features, z = (take_rows(table, rows).to(device) for table in (stored, embeddings))
        labels = torch.from_numpy(part.labels[rows]).to(device)
        yield FeatureBatch(features, classifier.logits(features).float(), z, labels, torch.from_numpy(rows))


def _refuse_non_finite(classifier: Classifier, part: ImageSplit, features: Tensor, indices: Tensor) -> None:
    if not bool(torch.isfinite(features).all()):
        bad = indices[~torch.isfinite(features).all(1).cpu()]
        names = ", ".join(part.identifier(int(i)) for i in bad[:5])
        raise ValueError(f"{classifier.tag} gives features that are not finite for {len(bad)} pictures: {names}")
