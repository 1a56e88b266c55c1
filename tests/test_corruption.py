"""Corrupted pictures: the same every time, stronger with severity, a part of their own; what is unknown is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from singreg.data.corruption import BLUR, CONTRAST, KINDS, NOISE, CorruptedSplit, corrupt
from tests.analysis.toy import ToyPart


def photo(side: int = 80) -> Image.Image:
    """Smooth colours with an edge, nowhere near black or white."""
    y, x = np.mgrid[:side, :side] / side
    values = np.stack([90 + 60 * x, 90 + 60 * y, 100 + 50 * (x > 0.5)], axis=-1)
    return Image.fromarray(values.round().astype(np.uint8))


def distance(kind: str, severity: int) -> float:
    picture = photo()
    return float(np.abs(np.asarray(corrupt(picture, kind, severity), float) - np.asarray(picture, float)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_severity_is_what_it_says(kind: str) -> None:
    distances = [distance(kind, severity) for severity in range(1, 6)]
    assert distances == sorted(distances)
    assert 0 < distances[0] < 0.8 * distances[-1]


def test_each_kind_is_its_formula() -> None:
    picture, values = photo(), np.asarray(photo(), float)
    assert np.array_equal(corrupt(picture, "blur", 4), picture.filter(ImageFilter.GaussianBlur(80 * BLUR[3])))
    noisy = np.asarray(corrupt(picture, "noise", 2, seed=1), float) - values
    assert noisy.std() == pytest.approx(255 * NOISE[1], rel=0.03)
    assert abs(noisy.mean()) < 1
    flat = np.asarray(corrupt(picture, "contrast", 5), float)
    assert flat.std() == pytest.approx(CONTRAST[4] * values.std(), abs=0.15)
    assert flat.mean() == pytest.approx(values.mean(), abs=0.5)


def test_noise_follows_the_seed_and_the_picture_not_its_place() -> None:
    picture = photo()
    assert np.array_equal(corrupt(picture, "noise", seed=3), corrupt(picture, "noise", seed=3))
    assert not np.array_equal(corrupt(picture, "noise", seed=3), corrupt(picture, "noise", seed=4))
    part = ToyPart(9)
    whole, some = CorruptedSplit(part, "noise"), CorruptedSplit(part.subset([5, 2]), "noise")
    assert np.array_equal(whole.image(5), some.image(0))
    assert np.array_equal(whole.image(2), some.image(1))
    assert not np.array_equal(
        np.asarray(whole.image(5), int) - part.image(5), np.asarray(whole.image(2), int) - part.image(2)
    )
    assert not np.array_equal(whole.image(5), CorruptedSplit(part, "noise", seed=1).image(5))


def test_a_corrupted_part_keeps_labels_and_has_a_fingerprint_of_its_own() -> None:
    part = ToyPart(9, unlabelled=(3,))
    made = [CorruptedSplit(part, kind, severity, seed=seed) for kind in KINDS for severity in (2, 3) for seed in (0, 1)]
    assert len({part.fingerprint, *(other.fingerprint for other in made)}) == 1 + len(made)
    assert made[0].fingerprint == CorruptedSplit(part, KINDS[0], 2).fingerprint
    for other in made:
        assert other.labels.tolist() == part.labels.tolist()
        assert other.class_names == part.class_names
    assert made[0].identifier(4) == "toy-4 (blur 2)"
    image, label, index = made[-1][4]
    assert (image.size, label, index) == (part.image(4).size, part.labels[4], 4)
    assert len(CorruptedSplit(part.subset([]), "blur")) == 0


def test_everything_unknown_is_named_at_once() -> None:
    with pytest.raises(
        ValueError, match="no such corruption: fog; known are blur, noise, contrast; severity must be 1 to 5, got 6"
    ):
        corrupt(photo(), "fog", 6)
    with pytest.raises(ValueError, match="severity must be 1 to 5, got 0"):
        CorruptedSplit(ToyPart(2), "blur", 0)
