"""A part of small random pictures and a small classifier, quick enough for every test here; processes import this too."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from singreg.analysis.features import PassSettings
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.translator import LinearTranslator, TranslatorInfo
from tests.images import to_tensor

SIDE, WIDTH, CLASSES, DIM = 6, 24, 5, 7
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon")
QUIET = PassSettings(batch_size=4, progress=False)


class ToyPart(ImageSplit):
    """N random pictures; label = index modulo the classes, or -1 for the unlabelled."""

    def __init__(self, count: int, *, seed: int = 0, unlabelled: tuple[int, ...] = (), classes: int = CLASSES) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
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
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE * 3, WIDTH), nn.Dropout(0.5), nn.Tanh(), nn.Linear(WIDTH, classes))
    return Classifier.from_module(net, head="4", transform=to_tensor, tag="toy")


@torch.no_grad()
def features(model: Classifier, part: ImageSplit) -> Tensor:
    """f (N, m) float64 of a whole part in one batch."""
    model.eval()
    return model.features(torch.stack([to_tensor(part.image(index)) for index in range(len(part))])).double()


@cache
def embeddings(count: int, seed: int = 0) -> np.ndarray:
    """Embeddings (N, n) that follow from the toy features but for some noise."""
    f = features(classifier(), ToyPart(count, seed=seed))
    rng = np.random.default_rng(7)
    matrix, noise = rng.normal(size=(DIM, WIDTH)), np.random.default_rng(seed + 70).normal(size=(count, DIM))
    z: np.ndarray = (f.numpy() @ matrix.T + 1 + 0.3 * noise).astype(np.float32)
    return z


def texts(classes: int = CLASSES) -> Tensor:
    return nn.functional.normalize(torch.randn(classes, DIM, generator=torch.Generator().manual_seed(3)))


def translator(seed: int = 0, *, normalized: bool = False) -> LinearTranslator:
    generator = torch.Generator().manual_seed(seed)
    matrix, offset = torch.randn(DIM, WIDTH, generator=generator), torch.randn(DIM, generator=generator)
    return LinearTranslator(matrix, offset, TranslatorInfo(images=50, ridge=0.1, normalized_targets=normalized))
