"""Corrupted images: the same every time, stronger with severity, a split of their own; what is unknown is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from singreg.data.corruption import BLUR, CONTRAST, KINDS, NOISE, CorruptedSplit, corrupt
from singreg.data.scenes import sample_scenes
from singreg.data.splits import SceneSplit


def photo(side: int = 80) -> Image.Image:
    """Smooth colours with an edge, nowhere near black or white."""
    y, x = np.mgrid[:side, :side] / side
    values = np.stack([90 + 60 * x, 90 + 60 * y, 100 + 50 * (x > 0.5)], axis=-1)
    return Image.fromarray(values.round().astype(np.uint8))


@pytest.fixture(scope="module")
def split() -> SceneSplit:
    return SceneSplit("test", sample_scenes(9, seed=1))


def test_each_kind_is_its_formula() -> None:
    image, values = photo(), np.asarray(photo(), float)
    assert np.array_equal(corrupt(image, "blur", 4), image.filter(ImageFilter.GaussianBlur(80 * BLUR[3])))
    noisy = np.asarray(corrupt(image, "noise", 2, seed=1), float) - values
    assert noisy.std() == pytest.approx(255 * NOISE[1], rel=0.03)
    assert abs(noisy.mean()) < 1
    flat = np.asarray(corrupt(image, "contrast", 5), float)
    assert flat.std() == pytest.approx(CONTRAST[4] * values.std(), abs=0.15)
    assert flat.mean() == pytest.approx(values.mean(), abs=0.5)


def test_noise_follows_the_seed_and_the_image_not_its_place(split: SceneSplit) -> None:
    image = photo()
    assert np.array_equal(corrupt(image, "noise", 3, seed=3), corrupt(image, "noise", 3, seed=3))
    assert not np.array_equal(corrupt(image, "noise", 3, seed=3), corrupt(image, "noise", 3, seed=4))
    whole, some = CorruptedSplit(split, "noise", 3), CorruptedSplit(split.subset([5, 2]), "noise", 3)
    assert np.array_equal(whole.image(5), some.image(0))
    assert np.array_equal(whole.image(2), some.image(1))
    first, second = (np.asarray(whole.image(i), int) - split.image(i) for i in (5, 2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(whole.image(5), CorruptedSplit(split, "noise", 3, seed=1).image(5))


def test_a_corrupted_split_keeps_labels_and_has_its_own_fingerprint(split: SceneSplit) -> None:
    made = [CorruptedSplit(split, kind, grade, seed=seed) for kind in KINDS for grade in (2, 3) for seed in (0, 1)]
    assert len({split.fingerprint, *(other.fingerprint for other in made)}) == 1 + len(made)
    assert made[0].fingerprint == CorruptedSplit(split, KINDS[0], 2).fingerprint
    assert all(other.labels.tolist() == split.labels.tolist() for other in made)
    assert made[0].identifier(4) == "scene-1-4 (blur 2)"
    assert len(CorruptedSplit(split.subset([]), "blur", 3)) == 0
