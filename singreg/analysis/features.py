"""One pass over a split: features, logits and the stored embeddings of the same images, shared out over processes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from singreg.data.embeddings import PassSettings, encode_split, take_rows
from singreg.data.splits import ImageSplit, make_loader
from singreg.models.classifier import Classifier
from singreg.models.vlm import hash_of_state
from singreg.utils import progress, rank_and_world

STORED_BATCH = 2048
GATHERED_ROWS = 512


@dataclass(frozen=True)
class FeatureBatch:
    """One batch: features (B, m), logits (B, C), embeddings (B, n), labels (B,) with -1 for none, indices (B,) on CPU.

    `indices` are the images' places in the split.
    """

    features: Tensor
    logits: Tensor
    embeddings: Tensor
    labels: Tensor
    indices: Tensor


def process_share(count: int) -> np.ndarray:
    """Return the indices of the images this process reads, (n,) int64: every world-size-th, no padding, none twice."""
    rank, world = rank_and_world()
    return np.arange(rank, count, world)


def evenly(count: int, most: int) -> np.ndarray:
    """Return at most `most` of `count` indices, (n,) int64, evenly spaced: splits are sorted by class."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


@torch.no_grad()
def iterate_features(
    classifier: Classifier, split: ImageSplit, embeddings: np.ndarray, settings: PassSettings, description: str
) -> Iterator[FeatureBatch]:
    """Yield this process's batches of a split in order, with the model in eval mode; its mode is restored."""
    if len(embeddings) != len(split):
        raise ValueError(f"split {split.name!r} has {len(split)} images but {len(embeddings)} embeddings were given")
    if settings.cache is not None:
        yield from _stored_batches(classifier, split, embeddings, settings, description)
        return
    share, device = process_share(len(split)), classifier.weight.device
    loader = make_loader(split.subset(share), classifier.transform, settings.batch_size, workers=settings.workers)
    was_training = classifier.training
    classifier.eval()
    try:
        for images, labels, positions in progress(loader, f"{description} [{split.name}]", enabled=settings.progress):
            indices = torch.from_numpy(share)[positions]
            features, logits = classifier.features_and_logits(images.to(device, non_blocking=True))
            if not bool(torch.isfinite(features).all()):
                bad = indices[~torch.isfinite(features).all(1).cpu()]
                names = ", ".join(split.identifier(int(i)) for i in bad[:5])
                raise ValueError(f"{classifier.tag} gives features that are not finite for {len(bad)} images: {names}")
            z = take_rows(embeddings, indices.numpy()).to(device)
            yield FeatureBatch(features.float(), logits.float(), z, labels.to(device), indices)
    finally:
        classifier.train(was_training)


def gathered(batches: Iterable[FeatureBatch], rows: int = GATHERED_ROWS) -> Iterator[FeatureBatch]:
    """Yield the same images in the same order, in batches of at least `rows` (the last: what is left).

    Adding to sums of size (m, m) costs a walk through the whole matrix, however few the images.
    """
    waiting: list[FeatureBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(held.indices) for held in waiting) >= rows:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(batches: Sequence[FeatureBatch]) -> FeatureBatch:
    return FeatureBatch(*(torch.cat([getattr(each, part.name) for each in batches]) for part in fields(FeatureBatch)))


def cached_features(classifier: Classifier, split: ImageSplit, settings: PassSettings) -> np.ndarray:
    """Return features (N, m) of a split, float32 and memory-mapped, computed once for this backbone and these images.

    The head's weights are not part of the key: a model whose head alone was trained or edited finds the same file.
    """
    was_training, device, head = classifier.training, classifier.weight.device, f"{classifier.head_name}."
    backbone = {name: each for name, each in classifier.model.state_dict().items() if not name.startswith(head)}
    facts = {"backbone": hash_of_state(backbone, head), "preprocessing": classifier.preprocessing}
    where = classifier.transform, split, classifier.feature_dim
    classifier.eval()
    try:
        return encode_split(lambda x: classifier.features(x.to(device)), *where, facts, "features", settings)
    finally:
        classifier.train(was_training)


def _stored_batches(
    classifier: Classifier, split: ImageSplit, embeddings: np.ndarray, settings: PassSettings, description: str
) -> Iterator[FeatureBatch]:
    """The same batches from the feature cache; only the head runs, so they may be larger."""
    stored, device = cached_features(classifier, split, settings), classifier.weight.device
    share = torch.from_numpy(process_share(len(split)))
    chunks = torch.split(share, STORED_BATCH) if len(share) else ()
    for rows in progress(chunks, f"{description} [{split.name}]", enabled=settings.progress):
        features, z = (take_rows(table, rows.numpy()).to(device) for table in (stored, embeddings))
        labels = torch.from_numpy(split.labels[rows.numpy()]).to(device)
        yield FeatureBatch(features, classifier.logits(features).float(), z, labels, rows)
