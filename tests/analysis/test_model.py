"""analyze_model against picture-by-picture loops, over processes, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singreg.analysis import model as room
from singreg.analysis.model import analyze_model, summarize_head
from singreg.analysis.results import CENTRED, ModelMeasurement
from singreg.analysis.statistics import mean_interval, paired_ratio
from singreg.analysis.steering import measure_steering
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator
from tests.analysis import in_processes, toy
from tests.processes import run_processes
from tests.reference import formulas

COUNT = 43


@cache
def measured() -> ModelMeasurement:
    return in_processes.measure(0, 1, COUNT)


def tangent_cosine(z: Tensor, z_eq: Tensor, text: Tensor) -> Tensor:
    """κ by its definition from the three angles (METHOD section 8.2)."""
    before, after, image = (
        torch.deg2rad(formulas.angle_degrees(x, y)) for x, y in ((z, text), (z_eq, text), (z, z_eq))
    )
    return (after.cos() - before.cos() * image.cos()) / (before.sin() * image.sin())


def slow_rows(translator: LinearTranslator, centred: bool) -> dict[str, np.ndarray]:
    """AS, IS and κ of every picture from the full null projector, in float64."""
    part = toy.ToyPart(COUNT, seed=1)
    f, project = toy.features(toy.classifier(), part), formulas.null_projector(toy.classifier().weight)
    mean = toy.features(toy.classifier(), toy.ToyPart(30)).mean(0) if centred else torch.zeros(toy.WIDTH).double()
    removed = f - (f - mean) @ project
    z, z_eq = (g @ translator.matrix.double().T + translator.offset.double() for g in (f, removed))
    text = toy.texts().double()[part.labels]
    return {
        "AS": (formulas.angle_degrees(z, text) - formulas.angle_degrees(z_eq, text)).numpy(),
        "IS": formulas.angle_degrees(z, z_eq).numpy(),
        "kappa": tangent_cosine(z, z_eq, text).numpy(),
    }


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", ["frozen", "auditor"])
def test_every_score_is_that_of_the_slow_loops(name: str, centred: bool) -> None:
    slow = slow_rows(toy.translator() if name == "frozen" else toy.translator(1), centred)
    kind = CENTRED if centred else ""
    for figure, values in slow.items():
        np.testing.assert_allclose(measured().rows[f"{kind}{figure}/{name}"], values, atol=1e-4, rtol=0)
    attribute, image = slow["AS"], slow["IS"]
    expected = {
        "AS": attribute.mean(), "AS_neg": np.maximum(-attribute, 0).mean(), "AS_pos": np.maximum(attribute, 0).mean(),
        "AS_abs": np.abs(attribute).mean(), "IS": image.mean(), "kappa": slow["kappa"].mean(), "AS_std": attribute.std(),
        "IS_std": image.std(), "kappa_std": slow["kappa"].std(), "ratio": image.mean() / np.abs(attribute).mean(), "count": COUNT,
    }  # fmt: skip
    scores, classes = measured().translators[name], measured().rows["label"]
    assert (scores.centred if centred else scores.overall) == pytest.approx(expected, abs=1e-4)
    for figure, values in (("AS", attribute), ("AS_neg", np.maximum(-attribute, 0)), ("IS", image)):
        assert scores.intervals[f"{kind}{figure}"] == pytest.approx(mean_interval(values, groups=classes)[1:], abs=1e-3)
    assert scores.intervals[f"{kind}ratio"] == pytest.approx(paired_ratio(image, np.abs(attribute), groups=classes)[1:], abs=1e-3)
    if not centred:
        labels = toy.ToyPart(COUNT, seed=1).labels
        for label in range(toy.CLASSES):
            assert scores.per_class["AS_neg"][label] == pytest.approx(np.maximum(-attribute, 0)[labels == label].mean(), abs=1e-4)
            assert scores.per_class["count"][label] == (labels == label).sum()
        for share in (5, 50, 95):
            exact = np.quantile(image, share / 100, method="inverted_cdf")
            assert scores.quantiles[f"IS_{share}"] == pytest.approx(exact, abs=0.13)  # half of the histogram's 0.25 degrees


@pytest.mark.parametrize("name", ["frozen", "auditor"])
def test_the_quality_of_a_translator_is_measured_against_its_own_kind_of_target(name: str) -> None:
    translator = toy.translator() if name == "frozen" else toy.translator(1, normalized=True)
    part, target = toy.ToyPart(COUNT, seed=1), torch.from_numpy(toy.embeddings(COUNT, seed=1)).double()
    if name == "auditor":
        target = target / target.norm(dim=1, keepdim=True)
    z = toy.features(toy.classifier(), part) @ translator.matrix.double().T + translator.offset.double()
    scores = measured().translators[name]
    assert scores.cosine == pytest.approx(float(torch.cosine_similarity(z, target).mean()), abs=1e-6)
    r2 = 1 - ((z - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
    assert scores.r2 == pytest.approx(float(r2), rel=1e-5)
    nearest = torch.stack([torch.cosine_similarity(row, toy.texts().double()).argmax() for row in z])
    assert scores.zero_shot == pytest.approx(float((nearest.numpy() == part.labels).mean()))
    assert (scores.ridge, scores.fit_images, scores.standardized, scores.validation_r2) == (0.1, 50, False, None)


def test_figures_of_the_model_itself() -> None:
    part = toy.ToyPart(COUNT, seed=1)
    model = toy.classifier()
    f = toy.features(model, part)
    null = f @ formulas.null_projector(model.weight)
    right = (f @ model.weight.double().T + model.bias).argmax(1).numpy() == part.labels
    got = measured()
    assert got.images == COUNT
    assert (got.top1, *got.top1_interval) == pytest.approx(mean_interval(right.astype(float), groups=part.labels))
    assert got.null_share == pytest.approx(float((null.norm(dim=1) / f.norm(dim=1)).mean()), abs=1e-6)
    assert got.null_energy == pytest.approx(float((null**2).sum() / (f**2).sum()), abs=1e-6)
    z = torch.from_numpy(toy.embeddings(COUNT, seed=1))
    seen = (nn.functional.normalize(z) @ toy.texts().T).argmax(1).numpy() == part.labels
    assert got.vlm_zero_shot == pytest.approx(seen.mean())
    assert got.rows["index"].tolist() == list(range(COUNT))
    assert got.rows["label"].tolist() == part.labels.tolist()
    assert got.rows["image"].tolist() == [f"toy-{index}" for index in range(COUNT)]
    assert {len(column) for column in got.rows.values()} == {COUNT}
    assert got.logit_change_float64 <= 1e-9
    assert 0 < got.logit_change_float32 <= 1e-4


def test_steering_is_that_of_pictures_from_all_over_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.classifier()
    f = toy.features(model, toy.ToyPart(COUNT, seed=1)).float()
    space = NullSpace.from_weight(model.weight)
    labels = torch.from_numpy(toy.ToyPart(COUNT, seed=1).labels)
    for limit in (1024, 6):  # 6 lies inside a batch of 4
        monkeypatch.setattr(room, "STEERING_IMAGES", limit)
        got = in_processes.measure(0, 1, COUNT).steering["frozen"]
        used = np.linspace(0, COUNT - 1, min(limit, COUNT)).round().astype(int)
        assert used[-1] == COUNT - 1
        expected = measure_steering(
            f[used], labels[used], torch.from_numpy(used), texts=toy.texts(), null_space=space, attacker=toy.translator()
        )
        assert asdict(got) == pytest.approx(expected, abs=1e-4)
        assert got.images == min(limit, COUNT)


def test_the_softmax_null_keeps_probabilities_and_measures_one_dimension_more() -> None:
    got = in_processes.measure(0, 1, COUNT, invariance="softmax")
    assert got.head.nullity == measured().head.nullity + 1
    assert not np.allclose(got.rows["AS/frozen"], measured().rows["AS/frozen"], atol=0.1)
    assert got.logit_change_float64 <= 1e-9  # of what is kept: logits up to a constant that all of a picture's share
    assert 0 < got.logit_change_float32 <= 1e-4


def plain(measurement: ModelMeasurement) -> dict[str, Any]:
    """Nested numbers as one level, for comparisons with a tolerance."""
    flat: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}")
        elif isinstance(value, (list, tuple)):
            for place, inner in enumerate(value):
                walk(inner, f"{name}.{place}")
        elif not isinstance(value, str):
            flat[name] = math.nan if value is None else value

    walk(asdict(replace(measurement, rows={})), "")
    return {name: value for name, value in flat.items() if "logit_change" not in name}


@pytest.mark.parametrize(("world", "count"), [(2, COUNT), (3, COUNT), (3, 2)], ids=["odd over 2", "odd over 3", "one idle of 3"])
def test_processes_measure_what_one_measures(world: int, count: int) -> None:
    expected = in_processes.measure(0, 1, count)
    for got in run_processes(world, in_processes.measure, count):
        assert got.images == count == got.translators["frozen"].overall["count"] == got.translators["auditor"].centred["count"]
        assert got.rows["image"].tolist() == [f"toy-{index}" for index in range(count)]
        assert plain(got) == pytest.approx(plain(expected), abs=1e-3, rel=1e-5, nan_ok=True)
        for name, column in expected.rows.items():
            if column.dtype.kind == "f":
                np.testing.assert_allclose(got.rows[name], column, atol=1e-4, rtol=1e-5)
        assert 0 < got.logit_change_float32 <= 1e-4
        assert got.logit_change_float64 <= 1e-9


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    got = in_processes.measure(0, 1, COUNT, batch_size)
    assert plain(got) == pytest.approx(plain(measured()), abs=1e-3, rel=1e-5, nan_ok=True)


def test_the_passport_of_a_head() -> None:
    weight = torch.zeros(3, 8)
    weight[0, 0], weight[1, 1], weight[2, 2] = 4.0, 2.0, 1e-4
    head = nn.Linear(8, 3)
    head.weight = nn.Parameter(weight)
    model = Classifier.from_module(nn.Sequential(nn.Flatten(), head), head="1", tag="small")
    got = summarize_head(model, NullSpace.from_weight(model.weight))
    assert (got.tag, got.classes, got.features, got.rank, got.rank_loose, got.nullity) == ("small", 3, 8, 3, 2, 5)
    assert got.null_dimensions == 5 / 8
    assert got.conditioning == pytest.approx(1e-4 / 4)
    assert got.head_hash == model.head_hash()


def test_what_cannot_be_measured_is_refused() -> None:
    def run(part: toy.ToyPart, model: Classifier, z: np.ndarray) -> ModelMeasurement:
        mean = torch.zeros(model.feature_dim)
        return analyze_model(model, part, z, toy.texts(), {"frozen": toy.translator()}, mean=mean, settings=toy.QUIET)

    with pytest.raises(ValueError, match=r"part 'toys' must hold labelled pictures.*it has 0, 0 of"):
        run(toy.ToyPart(0), toy.classifier(), toy.embeddings(1)[:0])
    with pytest.raises(ValueError, match=r"it has 9, 1 of them unlabelled"):
        run(toy.ToyPart(9, unlabelled=(5,)), toy.classifier(), toy.embeddings(9))
    with pytest.raises(ValueError, match="9 pictures but 8 embeddings"):
        run(toy.ToyPart(9), toy.classifier(), toy.embeddings(8))
    with pytest.raises(ValueError, match=r"30 classes, 24 features.*no null space"):
        run(toy.ToyPart(9), toy.classifier(classes=30), toy.embeddings(9))
    wide = Classifier.from_module(nn.Sequential(nn.Flatten(), nn.Linear(108, toy.CLASSES)), "1", transform=toy.to_tensor)
    with pytest.raises(ValueError, match=r"takes features \(\.\.\., 24\), got \(9, 108\)"):
        run(toy.ToyPart(9), wide, toy.embeddings(9))
