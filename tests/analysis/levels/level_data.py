"""Small random worlds for the class, concept and image level, and what each of several processes does with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, process_share
from singreg.analysis.levels.concepts import analyze_concepts
from singreg.analysis.levels.images import analyze_images
from singreg.data.datasets import ImageSplit
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator


class NumberedPart(ImageSplit):
    """Pictures that exist by name only."""

    def __init__(self, labels: np.ndarray, classes: int, prefix: str = "picture") -> None:
        digests = [hashlib.sha256(f"{prefix}{index}".encode()).digest() for index in range(len(labels))]
        rows = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
        super().__init__("test", [f"class {label}" for label in range(classes)], labels, rows)
        self.prefix = prefix

    def identifier(self, index: int) -> str:
        return f"{self.prefix}-{index}"


@dataclass
class World:
    """N pictures of C classes (the last one empty), a head, a linear translator, C class texts and K concepts."""

    features: Tensor
    labels: Tensor
    weight: Tensor
    translator: LinearTranslator
    texts: Tensor
    concept_texts: Tensor
    mean: Tensor

    @classmethod
    def make(cls, count: int = 31, seed: int = 0, *, unlabelled: bool = True) -> World:
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        labels = torch.arange(count) % 3
        if unlabelled and count > 5:
            labels[5] = -1
        features = draw(count, 12) + 1 + draw(4, 12)[labels]
        translator = LinearTranslator(draw(7, 12), draw(7))
        return cls(features, labels, draw(4, 12), translator, draw(4, 7), draw(9, 7), features.mean(0))

    @property
    def concepts(self) -> list[str]:
        return [f"concept {place}" for place in range(len(self.concept_texts))]

    @property
    def class_names(self) -> list[str]:
        return [f"class {label}" for label in range(len(self.texts))]

    @property
    def part(self) -> NumberedPart:
        return NumberedPart(self.labels.numpy(), len(self.texts))

    @property
    def space(self) -> NullSpace:
        return NullSpace.from_weight(self.weight)

    def batches(self, size: int = 4, share: np.ndarray | None = None) -> Iterator[FeatureBatch]:
        """The pictures (of a process's share) in batches."""
        for rows in torch.split(torch.arange(len(self.features)) if share is None else torch.from_numpy(share), size):
            if len(rows):
                f = self.features[rows]
                yield FeatureBatch(f, f @ self.weight.T, torch.zeros(len(rows), 7), self.labels[rows], rows)

    def measure(self, *, centred: bool = False, share: np.ndarray | None = None, size: int = 4) -> Any:
        return analyze_concepts(
            self.batches(size, share), self.concepts, self.concept_texts, null_space=self.space, translator=self.translator,
            class_names=self.class_names, mean=self.mean if centred else None,
        )  # fmt: skip

    def worst(self, *, centred: bool = False, share: np.ndarray | None = None, size: int = 4, **options: Any) -> Any:
        return analyze_images(
            self.batches(size, share), self.part, self.texts, self.concepts, self.concept_texts, null_space=self.space,
            translator=self.translator, class_names=self.class_names, mean=self.mean if centred else None, **options,
        )  # fmt: skip


def measure_in_process(rank: int, world: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """This process's share of the pictures, both levels, as JSON."""
    made = World.make(count)
    share = process_share(count)
    return made.measure(share=share).to_json(), made.worst(share=share, count=4).to_json()
