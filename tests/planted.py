"""Synthetic features whose null space holds one thing: class meaning, nuisance, a copy, an offset, or nothing."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, process_share
from singreg.nullspace import NullSpace

CLASSES, WIDTH, DIM, ATTRIBUTES, GAP = 8, 40, 24, 4, 1.5
COUNT = 3000  # 75 images a feature: the translator is identified
STRENGTHS = {"leakage": 0.4, "nuisance": 0.6, "copy": 2.0, "offset": 0.5, "nothing": 0.0}
"""What is planted how strongly; chosen so that the paper's |AS| of all but "nothing" is alike."""
CASES = tuple(STRENGTHS)


@dataclass(frozen=True)
class Planted:
    """features (N, m), embeddings (N, n), labels (N,); weight (C, m) and texts (C, n) are those of all cases."""

    features: Tensor
    embeddings: Tensor
    labels: Tensor
    weight: Tensor
    texts: Tensor

    @property
    def space(self) -> NullSpace:
        return NullSpace.from_weight(self.weight)

    def batches(self, size: int = 500) -> Iterator[FeatureBatch]:
        """This process's images in batches; the logits are not read by anything here."""
        for rows in torch.from_numpy(process_share(len(self.labels))).split(size):
            f = self.features[rows]
            yield FeatureBatch(f, f @ self.weight.T, self.embeddings[rows], self.labels[rows], rows)


def world() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W (C, m) with a null space off the axes; unit texts (C, n); attribute directions (k, n); a gap (1, n).

    All prompts share a direction ("an image of a"), and all images lie off the prompts by the same gap, as in CLIP.
    """
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, WIDTH, generator=g, dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(DIM, 2 + CLASSES + ATTRIBUTES, generator=g, dtype=torch.float64)).Q.T
    texts = torch.nn.functional.normalize(0.6 * directions[:1] + 0.8 * directions[2 : 2 + CLASSES])
    return weight, texts, directions[2 + CLASSES :], GAP * directions[1:2]


def plant(case: str, *, seed: int = 0, count: int = COUNT, strength: float | None = None) -> Planted:
    """Draw a split of one case; other seeds give other images of the same world."""
    strength = STRENGTHS[case] if strength is None else strength
    weight, texts, across, gap = world()
    g = torch.Generator().manual_seed(1000 + seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.arange(count) % CLASSES
    code = torch.nn.functional.one_hot(labels, CLASSES).double() - 1 / CLASSES
    attributes, common = noise(count, ATTRIBUTES), 1 + 0.1 * noise(count, 1)
    row_noise = strength if case == "leakage" else 0.2
    row = code + row_noise * noise(count, CLASSES)
    null = noise(count, WIDTH - CLASSES)
    shared = texts.mean(0, keepdim=True)
    embeddings = texts[labels] + gap + 0.1 * noise(count, DIM)
    if case == "leakage":  # the class, seen through a noise of its own: the row space does not know it as well
        null[:, :CLASSES] = code + 0.4 * noise(count, CLASSES)
    elif case == "nuisance":  # what varies across the classes
        null[:, :ATTRIBUTES] = attributes
        embeddings += strength * attributes @ across
    elif case == "copy":  # what the row space says, once more
        null[:, :CLASSES] = strength * row
    elif case == "offset":  # a mean that all images share, and that hardly varies
        null[:, :1] = 10 * common
        embeddings += strength * common * shared
    space = NullSpace.from_weight(weight)
    features = row @ space.basis.T + null @ space.null_basis().T
    return Planted(features, embeddings, labels, weight, texts)
