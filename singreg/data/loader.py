"""Batches of a split, in an order and with random draws that depend on seed, epoch and index alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from singreg.data.splits import ImageSplit

Transform = Callable[[Image.Image], Tensor]


@dataclass(eq=False)
class _Views(Dataset[tuple[Any, ...]]):
    """A split's images as (tensor, label, index), or (tensor, clean tensor, label, index) with a second transform."""

    split: ImageSplit
    transform: Transform
    clean_transform: Transform | None
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, label = self.split.image(index), int(self.split.labels[index])
        with _seeded(self.seed, self.epoch, index):
            view = self.transform(image)
        clean = () if self.clean_transform is None else (self.clean_transform(image),)
        return view, *clean, label, index


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """The order of one epoch; accelerate calls `set_epoch` on samplers alone, so the views hear of it from here."""

    views: _Views
    shuffle: bool

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.views.seed, self.views.epoch, 1])
        return iter(generator.permutation(len(self)).tolist() if self.shuffle else range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        self.views.epoch = epoch


def make_loader(
    split: ImageSplit,
    transform: Transform,
    batch_size: int,
    *,
    clean_transform: Transform | None = None,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """Return batches (images (B, 3, H, W), labels (B,), indices (B,)); `clean_transform` puts a clean view second."""
    views = _Views(split, transform, clean_transform, seed)
    sampler = EpochSampler(views, shuffle)
    generator = torch.Generator().manual_seed(seed)  # or every pass would draw from the training's dropout
    return DataLoader(views, batch_size, sampler=sampler, num_workers=workers, drop_last=drop_last, generator=generator)


@contextmanager
def _seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Run with the CPU generators of torch, numpy and Python seeded; what they had before is put back."""
    state = [int(word) for word in np.random.SeedSequence([seed, epoch, index, 2]).generate_state(3)]
    kept = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(state[0])  # torch.manual_seed would reset a GPU's generator too
            np.random.seed(state[1])
            random.seed(state[2])
            yield
    finally:
        np.random.set_state(kept[0])
        random.setstate(kept[1])
