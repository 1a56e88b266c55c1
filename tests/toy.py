"""A split of small random images, a small classifier, and random worlds of features; processes import this too."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from singreg.analysis.features import FeatureBatch, process_share
from singreg.data.embeddings import PassSettings
from singreg.data.splits import ImageSplit
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator, TranslatorInfo
from tests.images import to_tensor

SIDE, WIDTH, CLASSES, DIM = 6, 24, 5, 7
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon")
QUIET = PassSettings(batch_size=4, progress=False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64, always the same."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class ToySplit(ImageSplit):
    """N random images; label = index modulo the classes, or -1 for the unlabelled."""

    side = SIDE

    def __init__(self, count: int, *, seed: int = 0, unlabelled: tuple[int, ...] = (), classes: int = CLASSES) -> None:
        shape = (count, self.side, self.side, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        labels = np.arange(count) % classes
        labels[list(unlabelled)] = -1
        digests = np.random.default_rng(seed + 1000).integers(0, 256, (count, 32), dtype=np.uint8)
        super().__init__("toys", NAMES[:classes], labels, digests)
        self.pixels = pixels

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def identifier(self, index: int) -> str:
        return f"toy-{index}"


def classifier(seed: int = 0, classes: int = CLASSES) -> Classifier:
    torch.manual_seed(seed)
    first = nn.Linear(SIDE * SIDE * 3, WIDTH)
    net = nn.Sequential(nn.Flatten(), first, nn.Dropout(0.5), nn.Tanh(), nn.Linear(WIDTH, classes))
    return Classifier.from_module(net, head="4", transform=to_tensor, tag="toy")


def headed(weight: Tensor, *, tag: str = "weight") -> Classifier:
    """A classifier that is nothing but its head."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return Classifier.from_module(nn.Sequential(linear), "0", tag=tag)


@torch.no_grad()
def features(model: Classifier, split: ImageSplit) -> Tensor:
    """f (N, m) float64 of a whole split in one batch."""
    model.eval()
    return model.features(torch.stack([to_tensor(split.image(index)) for index in range(len(split))])).double()


@cache
def embeddings(count: int, seed: int = 0) -> np.ndarray:
    """Embeddings (N, n) that follow from the toy features but for some noise."""
    f = features(classifier(), ToySplit(count, seed=seed))
    rng = np.random.default_rng(7)
    matrix, noise = rng.normal(size=(DIM, WIDTH)), np.random.default_rng(seed + 70).normal(size=(count, DIM))
    return (f.numpy() @ matrix.T + 1 + 0.3 * noise).astype(np.float32)


def texts(classes: int = CLASSES) -> Tensor:
    return nn.functional.normalize(torch.randn(classes, DIM, generator=torch.Generator().manual_seed(3)))


def translator(seed: int = 0) -> LinearTranslator:
    generator = torch.Generator().manual_seed(seed)
    matrix, offset = torch.randn(DIM, WIDTH, generator=generator), torch.randn(DIM, generator=generator)
    return LinearTranslator(matrix, offset, TranslatorInfo(images=50, ridge=0.1))


@dataclass
class World:
    """Features of N images of C classes (the last one empty), a head, a translator, C class texts and K concepts."""

    features: Tensor
    labels: Tensor
    weight: Tensor
    translator: LinearTranslator
    texts: Tensor
    concept_texts: Tensor
    mean: Tensor

    @classmethod
    def make(cls, count: int = 31, seed: int = 0, *, unlabelled: bool = True) -> "World":
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        labels = torch.arange(count) % 3
        if unlabelled and count > 5:
            labels[5] = -1
        found = draw(count, 12) + 1 + draw(4, 12)[labels]
        linear = LinearTranslator(draw(7, 12), draw(7))
        return cls(found, labels, draw(4, 12), linear, draw(4, 7), draw(9, 7), found.mean(0))

    @property
    def concepts(self) -> list[str]:
        return [f"concept {place}" for place in range(len(self.concept_texts))]

    @property
    def space(self) -> NullSpace:
        return NullSpace.from_weight(self.weight)

    @property
    def reader(self) -> dict[str, Any]:
        """What the concept and image level are read with."""
        return {"null_space": self.space, "translator": self.translator}

    def batches(self, size: int = 4) -> Iterator[FeatureBatch]:
        """This process's images in batches."""
        for rows in torch.from_numpy(process_share(len(self.features))).split(size):
            if len(rows):
                f = self.features[rows]
                yield FeatureBatch(f, f @ self.weight.T, torch.zeros(len(rows), 7), self.labels[rows], rows)
