"""Loaders: every image once, and an order and augmentation that depend on seed, epoch and index alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

from singreg.data.loader import make_loader
from singreg.data.splits import TableSplit
from tests.images import file_split


def noisy(image: Image.Image) -> Tensor:
    """A transform that draws from all three random generators."""
    tensor = Compose([RandomCrop(4), RandomHorizontalFlip(), ToTensor()])(image)
    return tensor + random.random() + np.random.rand()


def batches(loader: Any) -> list[tuple[Tensor, ...]]:
    return [tuple(batch) for batch in loader]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TableSplit:
    return file_split(tmp_path_factory.mktemp("images"), 9)


def test_every_image_comes_once_with_its_index(split: TableSplit) -> None:
    seen = batches(make_loader(split, ToTensor(), 4))
    assert [len(batch[0]) for batch in seen] == [4, 4, 1]
    assert torch.cat([batch[2] for batch in seen]).tolist() == list(range(9))
    assert torch.cat([batch[1] for batch in seen]).tolist() == split.labels.tolist()
    assert torch.equal(seen[2][0][0], ToTensor()(split.image(8)))
    assert [len(batch[0]) for batch in batches(make_loader(split, ToTensor(), 4, drop_last=True))] == [4, 4]
    assert batches(make_loader(split.subset([]), ToTensor(), 4)) == []
    shuffled = torch.cat([batch[2] for batch in batches(make_loader(split, ToTensor(), 4, shuffle=True))]).tolist()
    assert sorted(shuffled) == list(range(9)) != shuffled


def test_order_and_augmentation_depend_on_seed_and_epoch_only(split: TableSplit) -> None:
    def run(epoch: int, *, workers: int = 0, seed: int = 5, batch_size: int = 5) -> tuple[Tensor, Tensor]:
        torch.rand(1), np.random.rand()  # what others draw must not matter
        loader = make_loader(split, noisy, batch_size, shuffle=True, seed=seed, workers=workers)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        seen = batches(loader)
        return torch.cat([batch[0] for batch in seen]), torch.cat([batch[2] for batch in seen])

    first, order = run(0)
    for other, other_order in (run(0), run(0, workers=2), run(0, batch_size=3)):
        assert torch.equal(first, other)
        assert torch.equal(order, other_order)
    assert not torch.equal(order, run(1)[1])
    assert not torch.equal(order, run(0, seed=6)[1])
    by_image = dict(zip(run(1)[1].tolist(), run(1)[0], strict=True))
    assert not torch.equal(by_image[int(order[0])], first[0])


def test_the_draws_are_those_of_earlier_versions(split: TableSplit) -> None:
    drawn = [int(index) for _, _, index in make_loader(split, ToTensor(), 1, shuffle=True, seed=5)]
    assert drawn == [5, 6, 8, 4, 0, 3, 2, 7, 1]
    first = next(iter(make_loader(split, noisy, 9, seed=5)))[0]
    assert first.sum().item() == pytest.approx(650.4228515625, rel=1e-6)


def test_augmentation_leaves_the_global_generators_alone(split: TableSplit) -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    batches(make_loader(split, noisy, 4))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_prepared_by_accelerate_it_moves_on_by_itself(split: TableSplit) -> None:
    from accelerate import Accelerator

    loader = Accelerator(cpu=True).prepare(make_loader(split, noisy, 5, shuffle=True))
    first, second = batches(loader), batches(loader)
    plain = make_loader(split, noisy, 5, shuffle=True)
    assert torch.equal(first[0][0], batches(plain)[0][0])
    plain.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert torch.equal(second[0][0], batches(plain)[0][0])
    assert not torch.equal(first[0][0], second[0][0])
