"""One pass over a split, shared out over processes, and translators fitted in it (METHOD sections 2 and 8.6)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from singreg.data.embeddings import PassSettings, encode_split, take_rows
from singreg.data.splits import ImageSplit, make_loader
from singreg.models.classifier import Classifier
from singreg.models.vlm import hash_of_state
from singreg.nullspace import Invariance, NullSpace
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from singreg.translator import LinearTranslator, TranslatorInfo, fit_on_halves, update_halves
from singreg.utils import progress, rank_and_world, write_tensors

STORED_BATCH = 2048
GATHERED_ROWS = 512
IMAGES_PER_FEATURE = 6.0
"""With fewer images a feature an auditor is not identified well, AS⁻ reads too high, and a report makes no claim."""
AGREEMENT = 0.75
"""Below this two translators place the classes too differently (METHOD section 8.6)."""
ZERO_SHOT = 0.5
"""Share of the VLM's own zero-shot accuracy that must survive translation for AS to mean the class."""


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
    share, device = process_share(len(split)), classifier.weight.device
    told, was_training = f"{description} [{split.name}]", classifier.training
    if settings.cache is not None:  # only the head runs, so batches may be larger
        stored = cached_features(classifier, split, settings)
        starts = range(0, len(share), STORED_BATCH)
        for rows in progress([share[k : k + STORED_BATCH] for k in starts], told, enabled=settings.progress):
            features, z = (take_rows(table, rows).to(device) for table in (stored, embeddings))
            labels, indices = torch.from_numpy(split.labels[rows]).to(device), torch.from_numpy(rows)
            yield FeatureBatch(features, classifier.logits(features).float(), z, labels, indices)
        return
    loader = make_loader(split.subset(share), classifier.transform, settings.batch_size, workers=settings.workers)
    classifier.eval()
    try:
        for images, labels, positions in progress(loader, told, enabled=settings.progress):
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


@dataclass(frozen=True)
class FittedTranslator:
    """A translator, with the mean feature (m,) and the sums of the images behind it.

    `halves` are those over two disjoint halves of them, whose agreement chose the ridge.
    """

    translator: LinearTranslator
    mean: Tensor
    halves: tuple[RidgeStatistics, RidgeStatistics]

    @property
    def statistics(self) -> RidgeStatistics:
        """The sums over all images."""
        return self.halves[0] + self.halves[1]

    def save(self, path: str | Path) -> None:
        """Write all of it to a safetensors file, for a run that goes on later."""
        tensors = {"matrix": self.translator.matrix, "offset": self.translator.offset, "mean": self.mean}
        tensors |= {f"{half}.{key}": each for half in (0, 1) for key, each in self.halves[half].state_dict().items()}
        info = {"info": json.dumps(asdict(self.translator.info))}
        write_tensors(path, tensors, info)

    @classmethod
    def load(cls, path: str | Path, device: torch.device) -> "FittedTranslator":
        """Read back what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118  (not a mapping)
            info = TranslatorInfo(**json.loads(file.metadata()["info"]))
        halves = [RidgeStatistics(*state["0.fz"].shape, device=device) for _ in range(2)]
        for half, sums in enumerate(halves):
            sums.load_state_dict({key: state[f"{half}.{key}"] for key in sums.state_dict()})
        translator = LinearTranslator(state["matrix"], state["offset"], info)
        return cls(translator, state["mean"].clone(), (halves[0], halves[1]))  # in memory of torch's own


def fit_on_split(
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    *,
    ridges: Sequence[float] = DEFAULT_RIDGES,
    invariance: Invariance = "logits",
    info: TranslatorInfo | None = None,
    settings: PassSettings | None = None,
) -> "FittedTranslator":
    """Fit T on all images of a split in one pass, λ by the agreement of two halves. Exact over processes.

    The row-space and the null block of the head are brought to unit scale first, so that neither turning nor shrinking
    the null block moves the fit (METHOD section 8.6).

    Shape: embeddings (N, n).
    """
    basis = NullSpace.from_weight(classifier.weight, invariance=invariance, allow_empty=True).basis
    device = classifier.weight.device
    sizes = classifier.feature_dim, embeddings.shape[1]
    first, second = halves = RidgeStatistics(*sizes, device=device), RidgeStatistics(*sizes, device=device)
    for batch in gathered(iterate_features(classifier, split, embeddings, settings or PassSettings(), "fitting")):
        update_halves(halves, batch.features, batch.embeddings, batch.indices)  # the same on any number of processes
    translator = fit_on_halves(halves, ridges, basis, info)
    mean = (first.f + second.f) / (first.count + second.count)
    return FittedTranslator(translator.to(device), mean.float(), halves)


def translator_agreement(first: LinearTranslator, second: LinearTranslator, texts: Tensor) -> float:
    """Return the mean cosine over classes of the directions Aᵀ(t_k - t̄) of two translators; 1 is full agreement.

    The test of whether there were images enough (METHOD 8.6). Shape: texts (C, n); both A (n, m).
    """
    contrasts = (texts - texts.mean(0)).double()
    one, other = (contrasts @ translator.matrix.to(contrasts) for translator in (first, second))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=1).mean())
