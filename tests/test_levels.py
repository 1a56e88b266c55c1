"""Class and concept level: against slow loops, over processes, on planted scenes, on bad input."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from singreg.analysis import levels
from singreg.analysis.features import FeatureBatch
from singreg.analysis.levels import analyze_classes, analyze_concepts, joint_distribution, select_concepts
from singreg.data.scenes import ATTRIBUTES, sample_scenes
from singreg.functional import kappa
from singreg.nullspace import NullSpace
from singreg.translator import fit_translator
from tests.demo import demo_vlm, embedded
from tests.processes import run_same
from tests.recipe_run import same
from tests.reference import formulas
from tests.toy import World

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
Found = dict[str, Any]


def close(found: Any, expected: Tensor, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.array(found), expected.numpy(), atol=tolerance, rtol=0)


def test_every_class_is_the_plain_mean_of_its_images_the_leakiest_first() -> None:
    """Of classes 0, 1, 2, 4 and 5 (class 3 has no image), class 5 with a single one."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 4])[rng.integers(0, 4, 90)]
    labels[11] = 5
    rows = pd.DataFrame({"label": labels, "correct": rng.integers(0, 2, 90).astype(float)})
    rows["AS/auditor"], rows["IS/auditor"] = rng.normal(-1, 3, 90) - labels, rng.uniform(10, 30, 90)
    rows["kappa/auditor"] = rng.normal(0, 0.1, 90)
    found = analyze_classes(rows, NAMES)
    assert found["empty"] == ["dog"]
    leaks = [each["means"]["AS_neg"] for each in found["classes"]]
    assert leaks == sorted(leaks, reverse=True)
    for each in found["classes"]:
        mine = rows[rows["label"] == each["label"]]
        attribute = mine["AS/auditor"].to_numpy()
        assert (each["images"], each["name"]) == (len(mine), NAMES[each["label"]])
        expected = {"AS": attribute, "AS_neg": np.maximum(-attribute, 0), "AS_abs": np.abs(attribute)}
        expected |= {"IS": mine["IS/auditor"], "accuracy": mine["correct"], "kappa": mine["kappa/auditor"]}
        assert each["means"] == pytest.approx({key: values.mean() for key, values in expected.items()})
        if len(mine) == 1:
            assert set(each["intervals"].values()) == {None}  # one image says nothing about spread
        else:
            low, high = each["intervals"]["AS"]
            assert low < attribute.mean() < high
            assert high - low == pytest.approx(2 * 1.96 * attribute.std() / len(mine) ** 0.5, rel=0.15)


def test_a_tilted_normal_cloud_is_found_with_its_axes() -> None:
    rng, tilt = np.random.default_rng(0), np.radians(30)
    along, across = rng.normal(0, [[6], [2]], (2, 20_000))
    image, attribute = 40 + along * np.cos(tilt) - across * np.sin(tilt), along * np.sin(tilt) + across * np.cos(tilt)
    found = joint_distribution(pd.DataFrame({"IS/auditor": image, "AS/auditor": attribute - 2}))
    assert found["mean"] == pytest.approx([40, -2], abs=0.15)
    assert found["ratio"] == pytest.approx(image.mean() / np.abs(attribute - 2).mean())
    for sigma, ellipse in zip((1, 2), found["ellipses"], strict=True):
        assert (ellipse["width"], ellipse["height"]) == pytest.approx((12 * sigma, 4 * sigma), rel=0.03)
        assert ellipse["tilt"] % 180 == pytest.approx(30, abs=1)


@pytest.mark.parametrize(("image", "attribute"), [([3.0], [1.0]), ([3.0] * 9, [0.0] * 9)])
def test_clouds_without_spread_or_leakage_have_no_nan(image: list[float], attribute: list[float]) -> None:
    found = joint_distribution(pd.DataFrame({"IS/auditor": image, "AS/auditor": attribute}))
    assert found["ratio"] == (3.0 if attribute[0] else None)
    assert all(each["width"] == each["height"] == 0 for each in found["ellipses"])


def concepts(w: World, size: int = 4) -> Found:
    return analyze_concepts(w.batches(size), w.concepts, w.concept_texts, **w.reader)


def test_every_concepts_figure_is_that_of_the_slow_loops() -> None:
    w = World.make()
    found, T = concepts(w), w.translator
    pairs = formulas.translations(w.features, w.weight, T.matrix, T.offset)
    before, after = formulas.concept_angles(pairs, w.concept_texts)
    score, overall = before - after, found["overall"]
    for name, values in (("before", before), ("after", after), ("AS", score)):
        close(overall[name], values.mean(0))
    half = 1.959964 * score.std(0, correction=0) / 31**0.5
    close(overall["AS_high"], score.mean(0) + half)
    close(overall["AS_low"], score.mean(0) - half)
    slow = [[float(kappa(z, z_eq, text.double())) for text in w.concept_texts] for z, z_eq in pairs]
    close(overall["kappa"], torch.tensor(slow).mean(0), 1e-5)
    assert (found["images"], np.abs(overall["AS"]).max() > 1) == (31, True)


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = concepts(World.make())
    monkeypatch.setattr(levels, "CHUNK_ELEMENTS", 2 * 9)
    same(concepts(World.make(), size=31), first, rel=1e-9, abs=3e-5)


@pytest.mark.parametrize(("world", "count"), [(2, 31), (3, 7), (3, 1)])
def test_processes_count_every_image_once(world: int, count: int) -> None:
    expected = concepts(World.make(count))
    assert expected["images"] == count
    for together in run_same(world, concepts, World.make(count)):
        same(together, expected, rel=1e-7, abs=1e-5)


def test_the_selectors_put_the_right_concepts_first() -> None:
    found = concepts(World.make())
    score = np.array(found["overall"]["AS"])
    strongest = select_concepts(found["overall"], "strongest", 9)
    assert strongest["concept"].tolist() == [f"concept {place}" for place in np.argsort(-np.abs(score))]
    rises, falls = (select_concepts(found["overall"], way, 9) for way in ("rises", "falls"))
    assert (len(rises), len(falls)) == ((score > 0).sum(), (score < 0).sum())
    assert (rises["AS"][0], falls["AS"][0]) == (score.max(), score.min())


@cache
def scenes() -> tuple[dict[str, np.ndarray], Tensor, Tensor, list[str]]:
    """Attribute codes of scenes, the demo VLM's embeddings of the images, its texts for all attribute values."""
    table = sample_scenes(300, seed=11)
    names = [value for kind in ("shape", "color", "texture", "background") for value in ATTRIBUTES[kind]]
    texts = demo_vlm().embed_texts([f"an image of {name}" for name in names])
    return table.codes, embedded(table).float(), texts, names


@pytest.mark.parametrize("hidden", ["color", "background", "shape"])
def test_the_concept_that_the_head_does_not_see_is_the_one_that_moves(hidden: str) -> None:
    """Features hold every attribute, the head reads all but one: that attribute's own value falls most of all."""
    codes, z, texts, names = scenes()
    kinds = ("shape", "color", "texture", "background")
    blocks = {kind: nn.functional.one_hot(torch.from_numpy(codes[kind])).float() for kind in kinds}
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(0))).Q
    f, labels = torch.cat(list(blocks.values()), dim=1), torch.from_numpy(codes[hidden])
    f = (f - f.mean(0)) @ rotation
    seen = torch.cat([torch.full((block.shape[1],), kind != hidden) for kind, block in blocks.items()])
    reader: Any = {"null_space": NullSpace.from_weight(rotation[seen]), "translator": fit_translator([(f, z)])}
    for label, value in enumerate(ATTRIBUTES[hidden]):
        own = (labels == label).nonzero()[:, 0]
        found = analyze_concepts([FeatureBatch(f[own], f[own], z[own], own, own)], names, texts, **reader)
        scores = pd.Series(found["overall"]["AS"], index=names)
        assert scores.idxmin() == value
        assert scores[value] < -5
        assert abs(scores[value]) > 2 * scores.drop(list(ATTRIBUTES[hidden])).abs().max()
