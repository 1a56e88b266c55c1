"""Loaders: every picture once, and an order and augmentation that hang on seed, epoch and index alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

from singreg.data import load_splits, make_loader, pictures
from tests.data.pictures_for_tests import config
from tests.processes import run_processes


def noisy(image: Image.Image) -> Tensor:
    """A transform that draws from all three random generators."""
    tensor = Compose([RandomCrop(4), RandomHorizontalFlip(), ToTensor()])(image)
    return tensor + random.random() + np.random.rand()


def batches(loader: Any) -> list[tuple[Tensor, ...]]:
    return [tuple(batch) for batch in loader]


def test_loader_gives_every_picture_once_with_its_index(tree: Path) -> None:
    test = load_splits(config(tree)).test
    seen = batches(make_loader(test, ToTensor(), 4))
    assert [len(batch[0]) for batch in seen] == [4, 4, 1]
    assert seen[0][0].dtype == torch.float32
    assert torch.cat([batch[2] for batch in seen]).tolist() == list(range(9))
    assert torch.cat([batch[1] for batch in seen]).tolist() == test.labels.tolist()
    assert torch.equal(seen[2][0][0], ToTensor()(test.image(8)))
    assert [len(batch[0]) for batch in batches(make_loader(test, ToTensor(), 4, drop_last=True))] == [4, 4]
    assert batches(make_loader(test.subset([]), ToTensor(), 4)) == []
    shuffled = torch.cat([batch[2] for batch in batches(make_loader(test, ToTensor(), 4, shuffle=True))]).tolist()
    assert sorted(shuffled) == list(range(9)) != shuffled


def _load_in_a_group(rank: int, world: int, source: str, options: dict[str, Any]) -> tuple[int, list[str], str]:
    read: list[str] = []
    real = pictures._examine
    pictures._examine = lambda item, reader: (read.append(item), real(item, reader))[1]  # type: ignore[assignment]
    try:
        parts = load_splits(config(Path(source), **options))
        return len(read), [part.fingerprint for part in parts], ""
    except (ValueError, RuntimeError) as error:
        return len(read), [], f"{type(error).__name__}: {error}"
    finally:
        pictures._examine = real


def test_one_process_looks_at_the_pictures_for_all(tree: Path, tmp_path: Path) -> None:
    expected = [part.fingerprint for part in load_splits(config(tree))]
    for options in ({}, {"cache_dir": str(tmp_path)}):  # with and without a folder that all see
        first, second, third = run_processes(3, _load_in_a_group, str(tree), options)
        assert first == (7 + 5 + 9 + 9, expected, "")
        assert second == third == (0, expected, "")
    assert run_processes(2, _load_in_a_group, str(tree), {"cache_dir": str(tmp_path)}) == [(0, expected, "")] * 2


def test_what_fails_in_the_first_process_reaches_the_others(tree: Path) -> None:
    first, second = run_processes(2, _load_in_a_group, str(tree), {"train_per_class": 100})
    assert first[2].startswith("ValueError: ")
    assert "too few pictures" in first[2]
    assert second[2].startswith("ValueError: reading the data failed elsewhere: process 0: ValueError: ")


def test_order_and_augmentation_depend_on_seed_and_epoch_only(tree: Path) -> None:
    train = load_splits(config(tree)).train

    def run(epoch: int, *, workers: int = 0, seed: int = 5, batch_size: int = 5) -> tuple[Tensor, Tensor]:
        torch.rand(1), np.random.rand()  # what others draw must not matter
        loader = make_loader(train, noisy, batch_size, shuffle=True, seed=seed, workers=workers)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        seen = batches(loader)
        return torch.cat([batch[0] for batch in seen]), torch.cat([batch[2] for batch in seen])

    first, order = run(0)
    for other, other_order in (run(0), run(0, workers=2), run(0, batch_size=3)):
        assert torch.equal(first, other)
        assert torch.equal(order, other_order)
    assert not torch.equal(order, run(1)[1])
    assert not torch.equal(order, run(0, seed=6)[1])
    by_picture = dict(zip(run(1)[1].tolist(), run(1)[0], strict=True))
    assert not torch.equal(by_picture[int(order[0])], first[0])


def test_augmentation_leaves_the_global_generators_alone(tree: Path) -> None:
    train = load_splits(config(tree)).train
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    batches(make_loader(train, noisy, 4))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_the_clean_view_is_of_the_same_picture(tree: Path) -> None:
    train = load_splits(config(tree)).train
    for view, clean, labels, indices in make_loader(train, noisy, 4, clean_transform=ToTensor(), shuffle=True):
        assert view.shape[1:] == (3, 4, 4)
        assert clean.shape[1:] == (3, 7, 9)
        for picture, label, index in zip(clean, labels, indices, strict=True):
            assert torch.equal(picture, ToTensor()(train.image(int(index))))
            assert label == train.labels[index]
    assert len(train.tensors(ToTensor())[0]) == 3
    assert len(train.tensors(noisy, ToTensor())[0]) == 4


def test_prepared_by_accelerate_it_moves_on_by_itself(tree: Path) -> None:
    from accelerate import Accelerator

    train = load_splits(config(tree)).train
    loader = Accelerator(cpu=True).prepare(make_loader(train, noisy, 5, shuffle=True))
    first, second = batches(loader), batches(loader)
    plain = make_loader(train, noisy, 5, shuffle=True)
    assert torch.equal(first[0][0], batches(plain)[0][0])
    plain.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert torch.equal(second[0][0], batches(plain)[0][0])
    assert not torch.equal(first[0][0], second[0][0])
