"""Scenes: the same bits everywhere, uniform and independent attributes, the background dial, what attributes paint."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, label
from scipy.stats import chi2_contingency, chisquare

from singreg.data.scenes import ATTRIBUTES, BACKGROUNDS, PLACES, SHAPES, SceneTable, render_scene, sample_scenes

# Obtained by running the generator once; another processor, numpy or Python must give the same.
GOLDEN_TABLE = "725d8d1f2a3353301356e377ee50f54cc90a65f988d89f730bf85823a0d493c3"
GOLDEN_BIASED_TABLE = "60764b6b7a252aebf43139db18f3d79237138061e11840df92e2de4af39724db"
GOLDEN_SCENES = {
    0: "cf34f9066f4bed389f1c4ac1013742c4a970ca0c54ec445cafe06954eef8c376",
    1: "3353e781177878fee9c8ff5631e76edd8aede7c607f7933acce0cef775b65995",
    7: "1a8b46495c10c5045ff3b26473486b98a92d0e2bcd6c7bfde7aee810dd0ac5df",
}
GOLDEN_PIXELS = "3e56a5765bdae82284fe5067c8c3cefd9178e611dff07583079f9c7dd37aca53"
GOLDEN_COUNT = 48


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def with_value(table: SceneTable, index: int, **values: int) -> SceneTable:
    """One scene of a table with some of its codes replaced; the jitter stays."""
    codes = {name: column[index : index + 1].copy() for name, column in table.codes.items()}
    for name, value in values.items():
        codes[name][:] = value
    return SceneTable(table.seed, codes, table.noise[index : index + 1])


def effect(table: SceneTable, index: int, attribute: str) -> np.ndarray:
    """Pixels that any value of an attribute changes: (64, 64) bool."""
    values = range(len(ATTRIBUTES[attribute]))
    images = np.stack([render_scene(with_value(table, index, **{attribute: value}), 0) for value in values])
    changed: np.ndarray = (images != images[0]).any(axis=(0, 3))
    return changed


def plain(shape: str) -> SceneTable:
    """One large upright shape in the middle, without jitter."""
    codes = {name: np.zeros(1, np.int64) for name in ATTRIBUTES}
    codes["shape"][:], codes["size"][:], codes["place"][:] = SHAPES.index(shape), 2, PLACES.index("centre")
    still = next(w for w in range(4 << 24, 5 << 24) if (w % 17, (w >> 8) % 17, (w >> 16) % 5) == (8, 8, 2))
    return SceneTable(0, codes, np.full((1, 4), still, dtype=np.uint64))


def test_tables_and_pixels_are_the_golden_ones() -> None:
    table = sample_scenes(1000, seed=11)
    assert table.fingerprint == GOLDEN_TABLE
    assert sample_scenes(1000, seed=11, background_bias=0.6).fingerprint == GOLDEN_BIASED_TABLE
    assert {index: sha256(render_scene(table, index)) for index in GOLDEN_SCENES} == GOLDEN_SCENES
    for name, values in ATTRIBUTES.items():  # the hash below has seen every value there is
        assert set(table.codes[name][:GOLDEN_COUNT]) == set(range(len(values)))
    assert sha256(np.stack([render_scene(table, index) for index in range(GOLDEN_COUNT)])) == GOLDEN_PIXELS
    assert table.names(1) == {name: values[table.codes[name][1]] for name, values in ATTRIBUTES.items()}


def test_values_are_equally_frequent_and_attributes_independent() -> None:
    """Deterministic draws, so these are facts and not chances; a value left out or a shared word would give p = 0."""
    codes = sample_scenes(20_000, seed=5).codes
    for name, values in ATTRIBUTES.items():
        assert chisquare(np.bincount(codes[name], minlength=len(values))).pvalue > 1e-3, name
    for one, other in itertools.combinations(ATTRIBUTES, 2):
        table = np.zeros((len(ATTRIBUTES[one]), len(ATTRIBUTES[other])))
        np.add.at(table, (codes[one], codes[other]), 1)
        assert chi2_contingency(table).pvalue > 1e-3, (one, other)
    skewed = np.bincount(codes["shape"] % 9)  # the control: one value in nine drawn twice as often is seen
    assert chisquare(skewed).pvalue < 1e-100


@pytest.mark.parametrize("bias", [0.0, 0.6, 1.0])
def test_the_dial_ties_the_background_to_the_class_alone(bias: float) -> None:
    count = 20_000
    free, table = (sample_scenes(count, seed=6, background_bias=share) for share in (0.0, bias))
    tied = table.codes["background"] == table.codes["shape"] % len(BACKGROUNDS)
    expected = bias + (1 - bias) / len(BACKGROUNDS)
    assert tied.mean() == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / count))
    np.testing.assert_array_equal(table.codes["background"][~tied], free.codes["background"][~tied])
    counts = np.bincount(table.codes["background"][~tied], minlength=len(BACKGROUNDS))
    assert bias == 1 or (counts > 0).all()
    for name in set(ATTRIBUTES) - {"background"}:
        np.testing.assert_array_equal(table.codes[name], free.codes[name])
    np.testing.assert_array_equal(table.noise, free.noise)


def test_a_seed_gives_one_stream_and_other_seeds_give_others() -> None:
    table, longer = sample_scenes(300, seed=8), sample_scenes(700, seed=8)
    np.testing.assert_array_equal(longer.noise[:300], table.noise)
    np.testing.assert_array_equal(longer.codes["color"][:300], table.codes["color"])
    seeds = [8, 9, 0, -1, 2**40, 2**64 - 2]
    noises = np.concatenate([sample_scenes(300, seed=seed).noise for seed in seeds])
    assert len(np.unique(noises[:, 0])) == len(seeds) * 300  # no scene of one seed comes back in another


def test_colour_and_texture_paint_the_shape_only() -> None:
    table = sample_scenes(15, seed=1)
    centres = {"left": (-13, 0), "right": (13, 0), "top": (0, -13), "bottom": (0, 13), "centre": (0, 0)}
    for index in range(len(table)):
        shape, around, texture = (effect(table, index, name) for name in ("color", "background", "texture"))
        x, y = centres[table.names(index)["place"]]
        rows, columns = np.nonzero(shape)
        distance = np.hypot(columns - 31.5 - x, rows - 31.5 - y)
        assert distance.max() < (12, 16, 21)[table.codes["size"][index]] * 1.15 + 4  # jitter 2, pixel edges 1
        assert 150 < shape.sum() < 1300
        assert not (texture & ~shape).any()
        assert texture.sum() > shape.sum() / 3
        assert not (around & binary_erosion(shape, np.ones((3, 3)))).any()
        assert (around | shape).mean() > 0.9  # the rest is the white rim


def test_the_outline_is_what_shape_size_and_place_move() -> None:
    table = sample_scenes(5, seed=3)
    for index in range(len(table)):
        areas = [effect(with_value(table, index, size=size), 0, "color").sum() for size in range(3)]
        assert areas[0] < areas[1] < areas[2]
        moved = [effect(with_value(table, index, place=p), 0, "color") for p in range(len(PLACES))]
        left, right, top, bottom, centre = (np.argwhere(mask).mean(0) for mask in moved)
        assert left[1] + 15 < right[1]
        assert top[0] + 15 < bottom[0]
        assert np.abs(centre - 31.5).max() < 9
        assert effect(table, index, "shape").sum() < 2200  # the shapes' own square, not the whole image


def test_each_shape_is_the_one_its_name_says() -> None:
    masks = {shape: effect(plain(shape), 0, "color") for shape in SHAPES}
    for one, other in itertools.combinations(SHAPES, 2):
        assert (masks[one] & masks[other]).sum() / (masks[one] | masks[other]).sum() < 0.85, (one, other)
    assert [s for s in SHAPES if not masks[s][30:34, 30:34].all()] == ["ring", "crescent"]
    assert [shape for shape in SHAPES if label(~masks[shape])[1] == 2] == ["ring"]  # outside and hole
    for shape in ("circle", "square", "diamond", "ring", "cross"):  # equal to their mirror images up to edge pixels
        for mirrored in (masks[shape][:, ::-1], masks[shape][::-1]):
            assert (masks[shape] ^ mirrored).sum() <= 0.1 * masks[shape].sum(), shape
    widths = {shape: mask.sum(1)[mask.any(1)] for shape, mask in masks.items()}
    assert widths["triangle"][0] < widths["triangle"][-1] / 4  # stands on its side
    assert widths["heart"][-1] < widths["heart"].max() / 4  # and the heart on its point
    heights = masks["arrow"].sum(0)[masks["arrow"].any(0)]
    assert heights[-1] < heights[len(heights) // 2 :].max() / 4  # the arrow points to the right
    assert masks["crescent"][:, :32].sum() > 2 * masks["crescent"][:, 32:].sum()


def test_pixels_are_noisy_by_the_grain_only() -> None:
    table = sample_scenes(1, seed=4)
    noise = table.noise.copy()
    noise[:, 2] += np.uint64(1)
    one, other = (render_scene(SceneTable(4, table.codes, words), 0).astype(int) for words in (table.noise, noise))
    assert 0 < np.abs(one - other).max() <= 24
    assert (one != other).any(axis=2).mean() > 0.8
