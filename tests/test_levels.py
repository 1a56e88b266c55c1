"""Class, concept and image level: against slow loops and scipy, over processes, on planted scenes, on bad input."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from singreg.analysis import concepts as concept_level
from singreg.analysis import images as image_level
from singreg.analysis.classes import analyze_classes, joint_distribution, spearman
from singreg.analysis.concepts import EquivalentPairs, analyze_concepts, select_concepts
from singreg.analysis.features import FeatureBatch, process_share
from singreg.analysis.images import analyze_images, nearest_images
from singreg.data.scenes import ATTRIBUTES, sample_scenes
from singreg.functional import kappa
from singreg.mlp import MLPSettings
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator, fit_mlp_translator, fit_translator
from tests.demo import demo_vlm, embedded
from tests.processes import run_processes
from tests.reference import formulas
from tests.toy import NamedSplit, World

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
Found = dict[str, Any]


def close(found: Any, expected: Tensor, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.array(found), expected.numpy(), atol=tolerance, rtol=0)


def class_rows(count: int = 90) -> pd.DataFrame:
    """Images of classes 0, 1, 2, 4 and 5 (class 3 has none), two of them unlabelled, class 5 with a single one."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 4])[rng.integers(0, 4, count)]
    labels[[3, 7]], labels[11] = -1, 5
    rows: dict[str, Any] = {"label": labels, "correct": rng.integers(0, 2, count).astype(float)}
    rows["AS/auditor"] = rng.normal(-1, 3, count) - labels
    rows["IS/auditor"] = rng.uniform(10, 30, count)
    rows["kappa/auditor"] = rng.normal(0, 0.1, count)
    return pd.DataFrame(rows)


def test_every_class_is_the_plain_mean_of_its_images() -> None:
    rows = class_rows()
    found = analyze_classes(rows, NAMES)
    assert (found["empty"], found["unlabelled"], found["images"]) == (["dog"], 2, 88)
    for score in found["classes"]:
        mine = rows[rows["label"] == score["label"]]
        attribute = mine["AS/auditor"].to_numpy()
        assert (score["images"], score["name"]) == (len(mine), NAMES[score["label"]])
        expected = {"AS": attribute, "AS_neg": np.maximum(-attribute, 0), "AS_pos": np.maximum(attribute, 0)}
        expected |= {"AS_abs": np.abs(attribute), "IS": mine["IS/auditor"], "accuracy": mine["correct"]}
        expected |= {"kappa": mine["kappa/auditor"]}
        assert score["means"] == pytest.approx({key: values.mean() for key, values in expected.items()})
        quantiles = score["distribution"]["AS"]
        ends = attribute.min(), np.median(attribute), attribute.max()
        assert (len(quantiles), quantiles[0], quantiles[25], quantiles[50]) == pytest.approx((51, *ends))


def test_the_leakiest_class_comes_first_with_an_interval_around_its_mean() -> None:
    found = analyze_classes(class_rows(), NAMES)["classes"]
    leaks = [score["means"]["AS_neg"] for score in found]
    assert leaks == sorted(leaks, reverse=True)
    for score in found:
        if score["images"] == 1:
            assert set(score["intervals"].values()) == {None}  # one image says nothing about spread
        else:
            low, high = score["intervals"]["AS_neg"]
            assert low < score["means"]["AS_neg"] < high
    values = class_rows().query("label == 0")["AS/auditor"].to_numpy()
    low, high = next(score["intervals"]["AS"] for score in found if score["label"] == 0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / len(values) ** 0.5, rel=0.15)


def test_rank_correlation_is_scipys_and_undefined_without_variation() -> None:
    rng = np.random.default_rng(3)
    for count in (3, 8, 200):
        x, y = rng.integers(0, 4, count).astype(float), rng.normal(size=count).round(1)
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
    tie = analyze_classes(class_rows().assign(correct=1.0), NAMES)["correlations"]["AS_neg"]
    assert (tie["value"], tie["low"], tie["undefined"]) == (None, None, 1000)
    two = class_rows().query("label == 0 or label == 1")
    assert analyze_classes(two, NAMES)["correlations"]["IS"]["value"] is None


def test_what_ties_leakage_to_accuracy_is_found_where_it_was_planted() -> None:
    """Accuracy falls with leakage by construction; the control draws it independently."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(30), 40)
    leak, names = labels / 3, [str(label) for label in range(30)]
    noise, image, correct = rng.normal(0, 0.5, 1200), rng.uniform(10, 30, 1200), rng.random(1200) > leak / 12
    rows = pd.DataFrame({"label": labels, "AS/auditor": noise - leak, "IS/auditor": image, "kappa/auditor": 0.0})
    planted = analyze_classes(rows.assign(correct=correct.astype(float)), names)["correlations"]["AS_neg"]
    assert planted["low"] <= planted["value"] <= planted["high"] < -0.8
    assert (planted["classes"], planted["undefined"]) == (30, 0)
    chance = (rng.random(1200) > 0.4).astype(float)
    control = analyze_classes(rows.assign(correct=chance), names)["correlations"]["AS_neg"]
    assert control["low"] < 0 < control["high"]


def cloud(image: np.ndarray, attribute: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"IS/auditor": image, "AS/auditor": attribute})


def test_a_tilted_normal_cloud_is_found_with_its_axes_and_shares() -> None:
    rng, tilt = np.random.default_rng(0), np.radians(30)
    along, across = rng.normal(0, 4, 20000), rng.normal(0, 1, 20000)
    image = 30 + along * np.cos(tilt) - across * np.sin(tilt)
    attribute = -2 + along * np.sin(tilt) + across * np.cos(tilt)
    found = joint_distribution(cloud(image, attribute))
    assert found["mean"] == pytest.approx([image.mean(), attribute.mean()])
    assert found["ratio"] == pytest.approx(image.mean() / np.abs(attribute).mean())
    assert found["correlation"] == pytest.approx(np.corrcoef(image, attribute)[0, 1])
    one, two = found["ellipses"]
    sizes = [ellipse[side] for ellipse in (one, two) for side in ("width", "height")]
    assert sizes == pytest.approx([8, 2, 16, 4], rel=0.03)
    assert one["tilt"] % 180 == pytest.approx(30, abs=1)
    assert (one["share"], two["share"]) == pytest.approx((1 - np.exp(-0.5), 1 - np.exp(-2)), abs=0.01)
    assert len(found["points"]) == 2000
    flat = joint_distribution(cloud(np.arange(5.0), np.zeros(5)))
    assert (flat["ratio"], flat["correlation"], flat["ellipses"][0]["height"]) == (None, None, 0)
    assert flat["ellipses"][1]["share"] == 1
    assert joint_distribution(cloud(np.ones(2), np.ones(2)))["ellipses"] == []


def pairs_of(w: World, mean: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    return formulas.translations(w.features, w.weight, w.translator.matrix, w.translator.offset, mean)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_folded_removal_is_the_removal(centred: bool, dtype: torch.dtype) -> None:
    w = World.make()
    mean = w.mean if centred else None
    z, z_eq = EquivalentPairs(w.translator, w.space, mean=mean)(w.features.to(dtype))
    for found, expected in zip((z, z_eq), zip(*pairs_of(w, mean), strict=True), strict=True):
        close(found.double(), torch.stack(expected), 1e-5 if dtype == torch.float32 else 1e-11)
    assert z.dtype == z_eq.dtype == dtype


def test_nothing_is_lost_where_the_null_component_is_almost_everything() -> None:
    """Null components 1e5 times the others: subtracting T(Π_n f) in float32 is the control that loses digits."""
    w = World.make()
    f = 1e-3 * w.space.remove(w.features) + 1e2 * w.space.component(w.features)
    truth = torch.stack([z for _, z in pairs_of(replace(w, features=f))])
    _, folded = EquivalentPairs(w.translator, w.space)(f)
    control = w.translator(f) - w.space.component(f) @ w.translator.matrix.T
    errors = [float((found.double() - truth).abs().max()) for found in (folded, control)]
    assert errors[0] < 1e-4
    assert errors[1] > 2 * errors[0]


def concepts(w: World, *, centred: bool = False, share: np.ndarray | None = None, size: int = 4) -> Found:
    mean = w.mean if centred else None
    return analyze_concepts(w.batches(size, share), w.concepts, w.concept_texts, mean=mean, **w.reader)


def worst(w: World, *, share: np.ndarray | None = None, size: int = 4, count: int) -> Found:
    named = (w.split, w.texts, w.concepts, w.concept_texts)
    return analyze_images(w.batches(size, share), *named, count=count, **w.reader)[0]


@pytest.mark.parametrize("centred", [False, True])
def test_every_concepts_figure_is_that_of_the_slow_loops(centred: bool) -> None:
    w = World.make()
    found, pairs = concepts(w, centred=centred), pairs_of(w, w.mean if centred else None)
    before, after = formulas.concept_angles(pairs, w.concept_texts)
    score, overall = before - after, found["overall"]
    assert (found["images"], found["unlabelled"], found["centred"]) == (31, 1, centred)
    for name, values in (("before", before), ("after", after), ("AS", score)):
        close(overall[name], values.mean(0))
        close(overall[f"{name}_std"], values.std(0, correction=0))
    close(overall["AS_abs"], score.abs().mean(0))
    half = 1.959964 * score.std(0, correction=0) / 31**0.5
    close(overall["AS_high"], score.mean(0) + half)
    close(overall["AS_low"], score.mean(0) - half)
    slow = [[float(kappa(z, z_eq, text.double())) for text in w.concept_texts] for z, z_eq in pairs]
    close(overall["kappa"], torch.tensor(slow).mean(0), 1e-5)
    moved = torch.tensor([formulas.degrees(z, z_eq) for z, z_eq in pairs])
    close([found["image_score"], found["image_score_std"]], torch.stack([moved.mean(), moved.std(correction=0)]))
    for label in range(3):
        mine = w.labels == label
        assert found["class_images"][label] == int(mine.sum())
        for name, values in (("before", before), ("after", after), ("AS", score)):
            close(found["per_class"][name][label], values[mine].mean(0))
        close(found["per_class"]["AS_std"][label], score[mine].std(0, correction=0))
    assert set(found["per_class"]["AS"][3]) == {None}  # a class without images
    assert np.abs(overall["AS"]).max() > 1


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = concepts(World.make())
    monkeypatch.setattr(concept_level, "CHUNK_ELEMENTS", 2 * 9)
    second = concepts(World.make(), size=31)
    for name, values in first["overall"].items():
        np.testing.assert_allclose(second["overall"][name], values, atol=3e-5, rtol=0)


def in_process(rank: int, world: int, count: int) -> tuple[Found, Found]:
    share = process_share(count)
    return concepts(World.make(count), share=share), worst(World.make(count), share=share, count=4)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [31, 7, 1])
def test_processes_count_every_image_once(world: int, count: int) -> None:
    expected, images = concepts(World.make(count)), worst(World.make(count), count=4)
    for together, found in run_processes(world, in_process, count):
        assert all(together[name] == expected[name] for name in ("images", "unlabelled", "class_images"))
        for name, values in expected["overall"].items():
            np.testing.assert_allclose(together["overall"][name], values, atol=1e-5)
        assert [row["index"] for row in found["worst"]] == [row["index"] for row in images["worst"]]
        assert found["images"] == images["images"]


def test_the_selectors_put_the_right_concepts_first() -> None:
    found = concepts(World.make())
    score = np.array(found["overall"]["AS"])
    strongest = select_concepts(found, "strongest", 9)
    assert strongest["concept"].tolist() == [f"concept {place}" for place in np.argsort(-np.abs(score))]
    assert select_concepts(found, "weakest", 9)["concept"].tolist() == strongest["concept"].tolist()[::-1]
    rises, falls = select_concepts(found, "rises", 9), select_concepts(found, "falls", 9)
    assert (len(rises), len(falls)) == ((score > 0).sum(), (score < 0).sum())
    assert (rises["AS"][0], falls["AS"][0]) == (score.max(), score.min())
    assert select_concepts(found, "falls", 1, label=1)["AS"][0] == min(found["per_class"]["AS"][1])


def test_extreme_angles_and_large_offsets_are_right_too() -> None:
    """Texts along and against T(f), tiny removals, features with a large mean; arccos in float32 is the control."""
    w = World.make(12, unlabelled=False)
    tiny = replace(w, features=w.space.remove(w.features) + 1e-5 * w.space.component(w.features) + 30)
    pairs = pairs_of(tiny)
    texts = [pairs[0][0], -pairs[0][0], pairs[1][1], pairs[2][0] + 1e-4, w.concept_texts[0].double()]
    tiny = replace(tiny, concept_texts=torch.stack(texts).float())
    before, after = formulas.concept_angles(pairs, tiny.concept_texts)
    assert before.min() < 1e-3
    assert before.max() > 179.9
    overall = concepts(replace(tiny, features=tiny.features[:1], labels=tiny.labels[:1]))["overall"]
    close(overall["before"], before[0])
    close(overall["AS"], before[0] - after[0])
    cosine = nn.functional.normalize(w.translator(tiny.features)) @ nn.functional.normalize(tiny.concept_texts).T
    assert (torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).double() - before).abs().max() > 2e-4


def test_real_sizes_are_right_to_a_ten_thousandth_of_a_degree() -> None:
    g = torch.Generator().manual_seed(0)
    f, labels = torch.randn(24, 2048, generator=g).abs(), torch.arange(24)
    T = LinearTranslator(torch.randn(768, 2048, generator=g) / 45, torch.randn(768, generator=g))
    weight, texts = torch.randn(100, 2048, generator=g), torch.randn(6, 768, generator=g)
    texts[:3] = T(f[:3]) + texts[:3] * torch.tensor([[0.02], [0.3], [1.0]])
    options: Any = {"null_space": NullSpace.from_weight(weight), "translator": T, "class_names": ["x"] * 24}
    found = analyze_concepts([FeatureBatch(f, f, f, labels, labels)], list("abcdef"), texts, **options)["per_class"]
    before, after = formulas.concept_angles(formulas.translations(f, weight, T.matrix, T.offset), texts)
    close(found["before"], before)
    close(found["AS"], before - after)


def test_a_non_linear_translator_is_called_on_the_removed_features() -> None:
    w = World.make(20, unlabelled=False)
    settings = MLPSettings(hidden=8, epochs=2)
    T: Any = fit_mlp_translator(w.features, w.features[:, :7] ** 2, settings=settings, progress=False)
    removed = w.features - w.space.component(w.features - w.mean)
    pairs = list(zip(T(w.features).double(), T(removed).double(), strict=True))
    before, after = formulas.concept_angles(pairs, w.concept_texts)
    close(concepts(replace(w, translator=T), centred=True)["overall"]["AS"], (before - after).mean(0))


@cache
def scenes() -> tuple[dict[str, np.ndarray], Tensor, Tensor, list[str]]:
    """Attribute codes of scenes, the demo VLM's embeddings of the images, its texts for all attribute values."""
    table = sample_scenes(300, seed=11)
    names = [value for kind in ("shape", "color", "texture", "background") for value in ATTRIBUTES[kind]]
    return (
        table.codes,
        embedded(table).float(),
        demo_vlm().embed_texts([f"an image of {name}" for name in names]),
        names,
    )


@pytest.mark.parametrize("hidden", ["color", "background", "shape"])
def test_the_concept_that_the_head_does_not_see_is_the_one_that_moves(hidden: str) -> None:
    """Features hold every attribute, the head reads all but one: that attribute's own value falls most of all."""
    codes, z, texts, names = scenes()
    kinds = ("shape", "color", "texture", "background")
    blocks = {kind: nn.functional.one_hot(torch.from_numpy(codes[kind])).float() for kind in kinds}
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(0))).Q
    f, labels = torch.cat(list(blocks.values()), dim=1) @ rotation, torch.from_numpy(codes[hidden])
    seen = torch.cat([torch.full((block.shape[1],), kind != hidden) for kind, block in blocks.items()])
    reader: Any = {"null_space": NullSpace.from_weight(rotation[seen]), "translator": fit_translator([(f, z)])}
    reader |= {"class_names": list(ATTRIBUTES[hidden]), "mean": f.mean(0)}
    found = analyze_concepts([FeatureBatch(f, f, z, labels, torch.arange(300))], names, texts, **reader)
    for label, value in enumerate(ATTRIBUTES[hidden]):
        scores = select_concepts(found, "falls", len(names), label).set_index("concept")["AS"]
        others = select_concepts(found, "strongest", len(names), label).set_index("concept")["AS"].abs()
        assert scores.index[0] == value
        assert scores[value] < -5
        assert abs(scores[value]) > 2 * others.drop(list(ATTRIBUTES[hidden])).max()


def test_texts_that_are_zero_are_named() -> None:
    w = World.make()
    with pytest.raises(ValueError, match="zero or not finite: 'a', 'b', 'c'"):
        analyze_concepts(w.batches(), ["a", "b", "c"], torch.zeros(3, 7), **w.reader)


def test_the_worst_images_and_their_concepts_are_those_of_the_slow_loops() -> None:
    w = World.make()
    found, pairs = worst(w, count=6), pairs_of(w)
    before, after = formulas.concept_angles(pairs, w.concept_texts)
    own = [w.texts[label] for label in w.labels]
    degrees = formulas.degrees
    attribute = np.array([degrees(z, t) - degrees(z_eq, t) for (z, z_eq), t in zip(pairs, own, strict=True)])
    image = np.array([degrees(z, z_eq) for z, z_eq in pairs])
    badness = np.where(w.labels.numpy() < 0, np.inf, attribute)
    assert [each["index"] for each in found["worst"]] == np.argsort(badness)[:6].tolist()
    assert [found[key] for key in ("images", "unlabelled")] == [30, 1]
    for each in found["worst"]:
        index = each["index"]
        scores = attribute[index], image[index]
        assert (each["attribute_score"], each["image_score"]) == pytest.approx(scores, abs=1e-4)
        predicted = int((w.weight @ w.features[index]).argmax())
        names = [f"image-{index}", f"class {w.labels[index]}", f"class {predicted}"]
        assert [each[key] for key in ("image", "class_name", "predicted")] == names
        score = (before - after)[index]
        order = torch.argsort(score).tolist()
        falls = [f"concept {k}" for k in order if score[k] < 0][:5]
        rises = [f"concept {k}" for k in order[::-1] if score[k] > 0][:5]
        assert [shift["concept"] for shift in (*each["falls"], *each["rises"])] == falls + rises
        for shift in (*each["falls"], *each["rises"]):
            k = int(shift["concept"].split()[1])
            angles = float(before[index, k]), float(after[index, k]), float(score[k])
            assert (shift["before"], shift["after"], shift["score"]) == pytest.approx(angles, abs=1e-4)


def test_neither_batches_nor_order_decide_who_is_worst() -> None:
    w, backwards = World.make(), np.arange(31)[::-1].copy()
    first = [each["index"] for each in worst(w, count=5)["worst"]]
    for options in ({"size": 31}, {"share": backwards}):
        assert [each["index"] for each in worst(w, count=5, **options)["worst"]] == first  # type: ignore[arg-type]
    same = World.make(12, unlabelled=False)
    same.features[:], same.labels[:] = same.features[0].clone(), 0
    equal = worst(same, count=4, share=np.arange(12)[::-1].copy())["worst"]
    assert [each["index"] for each in equal] == [0, 1, 2, 3]  # equal images go by their number
    few = worst(World.make(4), count=10)
    assert len(few["worst"]) == few["images"] == 4


def gallery(count: int = 23, prefix: str = "gallery") -> tuple[NamedSplit, np.ndarray]:
    embeddings = np.random.default_rng(5).normal(size=(count, 7)).astype(np.float32)
    return NamedSplit(np.full(count, -1), 1, prefix), embeddings


@pytest.mark.parametrize("chunk", [4096, 5, 1])
@pytest.mark.parametrize("prefix", ["gallery", "image"])
def test_nearest_images_are_those_of_the_loop_and_never_the_image_itself(
    chunk: int, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prefix "image" the gallery holds the very images that are looked for."""
    monkeypatch.setattr(image_level, "CHUNK", chunk)
    w, (split, z), indices = World.make(), gallery(prefix=prefix), [4, 0, 17]
    z[4] = w.translator(w.features[4]).numpy()  # the nearest of all, were it not itself
    steered, truth = w.features[indices] + w.space.component(torch.ones(12)), pairs_of(w)
    options: Any = {"pairs": EquivalentPairs(w.translator, w.space), "k": 3, "steered": steered}
    found = nearest_images(w.features[indices], indices, w.split, split, z, **options)
    for shift, index, moved in zip(found, indices, w.translator(steered), strict=True):
        assert (shift["index"], shift["image"]) == (index, f"image-{index}")
        for side, query in (("before", truth[index][0]), ("after", truth[index][1]), ("steered", moved)):
            ranked = sorted((formulas.degrees(query, torch.from_numpy(row)), place) for place, row in enumerate(z))
            kept = [(a, p) for a, p in ranked if bytes(split.digests[p]) != bytes(w.split.digests[index])][:3]
            assert [n["image"] for n in shift[side]] == [f"{prefix}-{place}" for _, place in kept]
            assert [n["angle"] for n in shift[side]] == pytest.approx([degrees for degrees, _ in kept], abs=1e-4)
    assert (found[0]["before"][0]["index"] == 4) == (prefix == "gallery")


def test_a_gallery_that_is_too_small_or_does_not_fit_is_refused() -> None:
    w = World.make()
    pairs, (other, z), (same, _) = EquivalentPairs(w.translator, w.space), gallery(5), gallery(5, "image")

    def search(split: NamedSplit, k: int) -> list[Found]:
        f = w.features[2:3]
        return nearest_images(f, [2], w.split, split, z, pairs=pairs, k=k, steered=f)

    assert [len(search(split, k)[0]["before"]) for split, k in ((other, 5), (same, 4))] == [5, 4]
    for split, k in ((other, 6), (same, 5), (other, 0)):
        with pytest.raises(ValueError, match=r"which has 5(, 1 of them the image itself)?: ask for fewer"):
            search(split, k)
