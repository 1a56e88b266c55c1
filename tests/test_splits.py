"""Batches whose order and augmentation depend on seed, epoch and index alone; images corrupted the same every time."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

from singreg.data import splits
from singreg.data.scenes import sample_scenes
from singreg.data.splits import KINDS, CorruptedSplit, SceneSplit, TableSplit, corrupt, make_loader
from tests.images import file_split


def noisy(image: Image.Image) -> Tensor:
    """A transform that draws from all three random generators."""
    tensor = Compose([RandomCrop(4), RandomHorizontalFlip(), ToTensor()])(image)
    return tensor + random.random() + np.random.rand()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TableSplit:
    return file_split(tmp_path_factory.mktemp("images"), 9)


def test_every_image_comes_once_with_its_index(split: TableSplit) -> None:
    seen = list(make_loader(split, ToTensor(), 4))
    assert [len(batch[0]) for batch in seen] == [4, 4, 1]
    assert torch.cat([batch[2] for batch in seen]).tolist() == list(range(9))
    assert torch.cat([batch[1] for batch in seen]).tolist() == split.labels.tolist()
    assert torch.equal(seen[2][0][0], ToTensor()(split.image(8)))
    assert [len(batch[0]) for batch in make_loader(split, ToTensor(), 4, drop_last=True)] == [4, 4]
    assert list(make_loader(split.subset([]), ToTensor(), 4)) == []


def test_order_and_augmentation_depend_on_seed_and_epoch_only(split: TableSplit) -> None:
    def run(epoch: int, *, workers: int = 0, seed: int = 5, batch_size: int = 5) -> tuple[Tensor, Tensor]:
        torch.rand(1), np.random.rand()  # what others draw must not matter
        loader = make_loader(split, noisy, batch_size, shuffle=True, seed=seed, workers=workers)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        seen = list(loader)
        return torch.cat([batch[0] for batch in seen]), torch.cat([batch[2] for batch in seen])

    first, order = run(0)
    for other, other_order in (run(0), run(0, workers=2), run(0, batch_size=3)):
        assert torch.equal(first, other)
        assert torch.equal(order, other_order)
    assert sorted(order.tolist()) == list(range(9))
    assert not torch.equal(order, run(1)[1])
    assert not torch.equal(order, run(0, seed=6)[1])
    by_image = dict(zip(run(1)[1].tolist(), run(1)[0], strict=True))
    assert not torch.equal(by_image[int(order[0])], first[0])


def test_the_draws_are_those_of_earlier_versions(split: TableSplit) -> None:
    drawn = [int(index) for _, _, index in make_loader(split, ToTensor(), 1, shuffle=True, seed=5)]
    assert drawn == [5, 6, 8, 4, 0, 3, 2, 7, 1]
    first = next(iter(make_loader(split, noisy, 9, seed=5)))[0]
    assert first.sum().item() == pytest.approx(650.4228515625, rel=1e-6)


def photo(side: int = 80) -> Image.Image:
    """Smooth colours with an edge, nowhere near black or white."""
    y, x = np.mgrid[:side, :side] / side
    values = np.stack([90 + 60 * x, 90 + 60 * y, 100 + 50 * (x > 0.5)], axis=-1)
    return Image.fromarray(values.round().astype(np.uint8))


def test_each_corruption_is_its_formula() -> None:
    image, values = photo(), np.asarray(photo(), float)
    assert np.array_equal(corrupt(image, "blur", 1), image.filter(ImageFilter.GaussianBlur(80 * splits.BLUR)))
    noise = np.asarray(corrupt(image, "noise", 1), float) - values
    assert noise.std() == pytest.approx(255 * splits.NOISE, rel=0.03)
    assert abs(noise.mean()) < 1
    flat = np.asarray(corrupt(image, "contrast", 1), float)
    assert flat.std() == pytest.approx(splits.CONTRAST * values.std(), abs=0.15)
    assert flat.mean() == pytest.approx(values.mean(), abs=0.5)


def test_a_corrupted_split_follows_seed_and_image() -> None:
    scenes = SceneSplit("test", sample_scenes(9, seed=1))
    whole, some = CorruptedSplit(scenes, "noise"), CorruptedSplit(scenes.subset([5, 2]), "noise")
    assert np.array_equal(whole.image(5), some.image(0))
    assert np.array_equal(whole.image(2), some.image(1))
    first, second = (np.asarray(whole.image(i), int) - scenes.image(i) for i in (5, 2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(whole.image(5), CorruptedSplit(scenes, "noise", seed=1).image(5))
    made = [CorruptedSplit(scenes, kind, seed=seed) for kind in KINDS for seed in (0, 1)]
    assert len({scenes.fingerprint, *(other.fingerprint for other in made)}) == 1 + len(made)
    assert made[0].fingerprint == CorruptedSplit(scenes, KINDS[0]).fingerprint
    assert all(other.labels.tolist() == scenes.labels.tolist() for other in made)
    assert made[0].identifier(4) == "scene-1-4 (blur)"
