"""The concept level against slow loops, over processes, on planted scenes, and on bad input."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from singreg.analysis.features import FeatureBatch
from singreg.analysis.levels import concepts as module
from singreg.analysis.levels.concept_results import ConceptMeasurement
from singreg.analysis.levels.concepts import analyze_concepts
from singreg.data.scenes import ATTRIBUTES, sample_scenes
from singreg.functional import image_score, kappa
from singreg.mlp import MLPSettings
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator, fit_mlp_translator, fit_translator
from tests.analysis.levels.level_data import World, measure_in_process
from tests.processes import run_processes
from tests.reference import formulas


def assert_close(found: np.ndarray, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected.numpy(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("centred", [False, True])
def test_every_figure_is_that_of_the_slow_loops(centred: bool) -> None:
    world = World.make()
    found = world.measure(centred=centred)
    pairs = formulas.translations(
        world.features, world.weight, world.translator.matrix, world.translator.offset, world.mean if centred else None
    )
    before, after = formulas.concept_angles(pairs, world.concept_texts)
    score = before - after
    assert (found.images, found.unlabelled, found.centred) == (31, 1, centred)
    for name, values in (("before", before), ("after", after), ("AS", score)):
        assert_close(found.overall[name], values.mean(0))
        assert_close(found.overall[f"{name}_std"], values.std(0, correction=0))
    assert_close(found.overall["AS_abs"], score.abs().mean(0))
    half = 1.959964 * score.std(0, correction=0) / 31**0.5
    assert_close(found.overall["AS_high"], score.mean(0) + half)
    assert_close(found.overall["AS_low"], score.mean(0) - half)
    kappa = [[float(kappa(z, z_eq, text.double())) for text in world.concept_texts] for z, z_eq in pairs]
    assert_close(found.overall["kappa"], torch.tensor(kappa).mean(0), 1e-5)
    moved = torch.tensor([formulas.degrees(z, z_eq) for z, z_eq in pairs])
    assert found.image_score == pytest.approx(float(moved.mean()), abs=1e-4)
    assert found.image_score_std == pytest.approx(float(moved.std(correction=0)), abs=1e-4)
    for label in range(3):
        mine = world.labels == label
        assert found.class_images[label] == int(mine.sum())
        for name, values in (("before", before), ("after", after), ("AS", score)):
            assert_close(found.per_class[name][label], values[mine].mean(0))
        assert_close(found.per_class["AS_std"][label], score[mine].std(0, correction=0))
    assert np.abs(found.overall["AS"]).max() > 1


def test_a_class_without_pictures_is_named_and_nothing_else_is_undefined() -> None:
    found = World.make().measure()
    assert found.empty_classes == ("class 3",)
    assert np.isnan(found.per_class["AS"][3]).all()
    assert np.isfinite(found.per_class["AS"][:3]).all()
    with pytest.raises(ValueError, match="'class 3' has no pictures"):
        found.select("strongest", label=3)
    with pytest.raises(ValueError, match="4 classes, numbered from 0; got 4"):
        found.shift("concept 0", label=4)


def test_batches_chunks_and_a_way_through_json_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World.make()
    first = world.measure()
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2 * 9)
    second = world.measure(size=31)
    back = ConceptMeasurement.from_json(json.loads(json.dumps(first.to_json(), allow_nan=False)))
    for other, tolerance in ((second, 3e-5), (back, 0)):
        for table in ("overall", "per_class"):
            for name, values in getattr(first, table).items():
                np.testing.assert_allclose(getattr(other, table)[name], values, atol=tolerance, rtol=0)
    assert back.select("falls", 3, label=1) == first.select("falls", 3, label=1)
    assert back.class_images.tolist() == first.class_images.tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_count_every_picture_once(world: int) -> None:
    """At odd sizes, and with one picture for all processes."""
    for count in (31, 7, 1):
        concepts, images = World.make(count).measure().to_json(), World.make(count).worst(count=4).to_json()
        for together, worst in run_processes(world, measure_in_process, count):
            assert [together[name] for name in ("images", "unlabelled", "class_images")] == [
                concepts[name] for name in ("images", "unlabelled", "class_images")
            ]
            for name, values in concepts["overall"].items():
                np.testing.assert_allclose(together["overall"][name], values, atol=1e-5)
            assert [row["index"] for row in worst["worst"]] == [row["index"] for row in images["worst"]]
            assert worst["images"] == images["images"]


def test_the_selectors_put_the_right_concepts_first() -> None:
    found = World.make().measure()
    score = found.overall["AS"]
    order = np.argsort(-np.abs(score))
    names = [shift.concept for shift in found.select("strongest", 9)]
    assert names == [f"concept {place}" for place in order]
    assert [shift.concept for shift in found.select("weakest", 9)] == names[::-1]
    rises, falls = found.select("rises", 9), found.select("falls", 9)
    assert len(rises) == (score > 0).sum() > 0
    assert len(falls) == (score < 0).sum() > 0
    assert rises[0].score == score.max()
    assert falls[0].score == score.min()
    assert found.shift("concept 2").before == found.overall["before"][2]
    with pytest.raises(ValueError, match="order must be one of"):
        found.select("largest")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="'zebra' is not among the 9"):
        found.shift("zebra")


def test_extreme_angles_and_large_offsets_are_right_too() -> None:
    """Texts along and against T(f), tiny removals, features with a large mean; arccos of a float32 cosine is the control."""
    world = World.make(12, unlabelled=False)
    space = world.space
    tiny = space.remove(world.features) + 1e-5 * space.component(world.features) + 30
    pairs = formulas.translations(tiny, world.weight, world.translator.matrix, world.translator.offset)
    texts = torch.stack([pairs[0][0], -pairs[0][0], pairs[1][1], pairs[2][0] + 1e-4, world.concept_texts[0].double()])
    before, after = formulas.concept_angles(pairs, texts.float())
    assert before.min() < 1e-3
    assert before.max() > 179.9
    found = analyze_concepts(
        [FeatureBatch(tiny[:1], tiny[:1], tiny[:1], world.labels[:1], torch.tensor([0]))], list("abcde"), texts.float(),
        null_space=space, translator=world.translator, class_names=["x"],
    )  # fmt: skip
    assert_close(found.overall["before"], before[0])
    assert_close(found.overall["after"], after[0])
    assert_close(found.overall["AS"], before[0] - after[0])
    z = nn.functional.normalize(world.translator(tiny))
    naive = torch.rad2deg(torch.acos((z @ nn.functional.normalize(texts.float()).T).clamp(-1, 1))).double()
    assert (naive - before).abs().max() > 2e-4


def test_real_sizes_are_right_to_a_ten_thousandth_of_a_degree() -> None:
    g = torch.Generator().manual_seed(0)
    f = torch.randn(24, 2048, generator=g).abs()
    translator = LinearTranslator(torch.randn(768, 2048, generator=g) / 45, torch.randn(768, generator=g))
    weight = torch.randn(100, 2048, generator=g)
    texts = torch.randn(6, 768, generator=g)
    texts[:3] = translator(f[:3]) + texts[:3] * torch.tensor([[0.02], [0.3], [1.0]])
    batch = FeatureBatch(f, f, f, torch.arange(24), torch.arange(24))
    found = analyze_concepts(
        [batch], list("abcdef"), texts, null_space=NullSpace.from_weight(weight), translator=translator, class_names=["x"] * 24
    )
    before, after = formulas.concept_angles(formulas.translations(f, weight, translator.matrix, translator.offset), texts)
    assert_close(found.per_class["before"], before)
    assert_close(found.per_class["AS"], before - after)


def test_a_non_linear_translator_is_called_on_the_removed_features() -> None:
    world = World.make(20, unlabelled=False)
    translator = fit_mlp_translator(
        world.features, world.features[:, :7] ** 2, settings=MLPSettings(hidden=8, epochs=2), progress=False
    )
    world = dataclasses.replace(world, translator=translator)  # type: ignore[arg-type]
    found = world.measure(centred=True)
    null = world.space.component(world.features - world.mean)
    pairs = list(zip(translator(world.features).double(), translator(world.features - null).double(), strict=True))
    before, after = formulas.concept_angles(pairs, world.concept_texts)
    assert_close(found.overall["AS"], (before - after).mean(0))
    assert float(image_score(pairs[0][0], pairs[0][1])) > 0.1


@pytest.fixture(scope="module")
def scenes() -> tuple[dict[str, np.ndarray], torch.Tensor, torch.Tensor, list[str]]:
    """Attribute codes of scenes, the demo VLM's embeddings of the drawn pictures, its texts for all attribute values."""
    from singreg.data.datasets import SceneSplit
    from singreg.models.vlm import VisionLanguageModel
    from singreg.workbench.build import ASSETS

    vlm = VisionLanguageModel.from_open_clip(f"local-dir:{ASSETS / 'demo_vlm'}")
    table = sample_scenes(300, seed=11)
    part = SceneSplit("test", table)
    z = torch.cat([vlm.embed_images(torch.stack([vlm.transform(part.image(i)) for i in range(at, at + 50)])) for at in range(0, 300, 50)])
    names = [value for kind in ("shape", "color", "texture", "background") for value in ATTRIBUTES[kind]]
    return table.codes, z, vlm.embed_texts([f"an image of {name}" for name in names]), names


@pytest.mark.parametrize("hidden", ["color", "background", "shape"])
def test_on_scenes_the_concept_that_the_head_does_not_see_is_the_one_that_moves(hidden: str, scenes: tuple) -> None:  # type: ignore[type-arg]
    """Features hold every attribute, the head reads all but one: of all concepts exactly that attribute's own value falls most."""
    codes, z, texts, names = scenes
    blocks = {kind: nn.functional.one_hot(torch.from_numpy(codes[kind])).float() for kind in ("shape", "color", "texture", "background")}
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(0))).Q
    f = torch.cat(list(blocks.values()), dim=1) @ rotation
    starts = dict(zip(blocks, np.cumsum([0, *(block.shape[1] for block in blocks.values())]).tolist(), strict=False))
    own = range(starts[hidden], starts[hidden] + blocks[hidden].shape[1])
    weight = rotation[[row for row in range(30) if row not in own]]
    labels = torch.from_numpy(codes[hidden])
    found = analyze_concepts(
        [FeatureBatch(f, f, z, labels, torch.arange(300))], names, texts, null_space=NullSpace.from_weight(weight),
        translator=fit_translator([(f, z)]), class_names=list(ATTRIBUTES[hidden]), mean=f.mean(0),
    )  # fmt: skip
    for label, value in enumerate(ATTRIBUTES[hidden]):
        assert found.select("falls", 1, label=label)[0].concept == value
        fall, others = found.shift(value, label).score, [found.shift(name, label).score for name in names if name not in ATTRIBUTES[hidden]]
        assert fall < -5
        assert abs(fall) > 2 * max(map(abs, others))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"concepts": ["a", " ", "c"]}, r"concept names without text at positions \[1\] of 3"),
        ({"concepts": ["a", "b"]}, r"expected texts \(2, 7\).*got \(3, 7\)"),
        ({"texts": torch.zeros(3, 7)}, "zero or not finite: 'a', 'b', 'c'"),
        ({"texts": torch.ones(3, 6)}, r"expected texts \(3, 7\)"),
        ({"concepts": ["a", "b", "a"]}, "concepts named twice: 'a'"),
        ({"class_names": ["x", ""]}, r"class names without text at positions \[1\]"),
        ({"class_names": ["x"]}, "label 2, but there are 1 class names"),
        ({"mean": torch.zeros(11)}, r"mean is \(11,\)"),
        ({"batches": []}, "no picture"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], words: str) -> None:
    world = World.make()
    arguments = {
        "batches": list(world.batches()), "concepts": ["a", "b", "c"], "texts": torch.ones(3, 7), "null_space": world.space,
        "translator": world.translator, "class_names": ["x", "y", "z"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        analyze_concepts(**{**arguments, **change})  # type: ignore[arg-type]
