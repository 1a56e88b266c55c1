"""Pictures as tensors, in an order and with random draws that depend on seed, epoch and index alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from singreg.data.splits import ImageSplit

Transform = Callable[[Image.Image], Tensor]


class TensorView(Dataset[tuple[Any, ...]]):
    """A part's pictures through a transform: items (tensor, label, index), or (tensor, clean tensor, label, index).

    The random draws of item i in epoch e hang on (seed, e, i): not on the number of workers or processes, and not on
    whether the run was interrupted. The clean view is of the same picture, through the second transform.
    """

    def __init__(
        self, part: ImageSplit, transform: Transform, clean_transform: Transform | None = None, *, seed: int = 0
    ) -> None:
        self.part, self.transform, self.clean_transform = part, transform, clean_transform
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = self.part.image(index)
        label = int(self.part.labels[index])
        with _seeded(self.seed, self.epoch, index):
            view = self.transform(image)
        if self.clean_transform is None:
            return view, label, index
        return view, self.clean_transform(image), label, index

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of this epoch from now on (no shapes)."""
        self.epoch = epoch


class EpochSampler(Sampler[int]):
    """The order of one epoch: 0..N-1, or a permutation that depends on (seed, epoch) alone.

    accelerate calls `set_epoch` on a loader's sampler only, once several processes share it, so it is passed on to the view.
    """

    def __init__(self, view: TensorView, *, shuffle: bool, seed: int = 0) -> None:
        self.view, self.shuffle, self.seed, self.epoch = view, shuffle, seed, 0

    def __len__(self) -> int:
        return len(self.view)

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(len(self.view)))
        order = np.random.default_rng([self.seed, self.epoch, 1]).permutation(len(self.view))
        return iter(order.tolist())

    def set_epoch(self, epoch: int) -> None:
        """Move the order and the view's augmentations to this epoch (no shapes)."""
        self.epoch = epoch
        self.view.set_epoch(epoch)


@contextmanager
def _seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Run with torch's, numpy's and Python's generators at a state of (seed, epoch, index); put the old ones back after."""
    state = np.random.SeedSequence([seed, epoch, index, 2]).generate_state(3)
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(int(state[0]))
        np.random.seed(int(state[1]))
        random.seed(int(state[2]))
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
