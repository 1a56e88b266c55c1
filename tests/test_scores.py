"""analyze_model against image-by-image loops and the public metric, over processes, and what it refuses."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from singreg.analysis.features import fit_on_split
from singreg.analysis.scores import CENTRED, analyze_model
from singreg.analysis.statistics import mean_interval
from singreg.models.classifier import Classifier
from tests import toy
from tests.processes import run_same
from tests.recipe_run import same
from tests.reference import formulas

COUNT = 43
TRANSLATORS = {"frozen": toy.translator(), "auditor": toy.translator(1)}


def measure(count: int = COUNT, **options: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    mean = toy.features(toy.classifier(), toy.ToySplit(30)).mean(0).float()
    fitted = fit_on_split(toy.classifier(), toy.ToySplit(60), toy.embeddings(60), ridges=(0.1,), settings=toy.QUIET)
    options |= {"mean": mean, "auditor": fitted, "settings": toy.QUIET}
    split, z = toy.ToySplit(count, seed=1), toy.embeddings(count, seed=1)
    return analyze_model(toy.classifier(), split, z, toy.texts(), TRANSLATORS, **options)


measured = cache(measure)


def slow(name: str, centred: bool) -> dict[str, np.ndarray]:
    """AS, IS and κ of every image from the full null projector, in float64."""
    split, translator = toy.ToySplit(COUNT, seed=1), TRANSLATORS[name]
    f, project = toy.features(toy.classifier(), split), formulas.null_projector(toy.classifier().weight)
    mean = toy.features(toy.classifier(), toy.ToySplit(30)).mean(0) if centred else 0
    removed = f - (f - mean) @ project
    z, z_eq = (g @ translator.matrix.double().T + translator.offset.double() for g in (f, removed))
    found = formulas.scores(z, z_eq, toy.texts().double()[split.labels])
    return {name: values.numpy() for name, values in found.items()}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", TRANSLATORS)
def test_every_score_is_that_of_the_slow_loops(name: str, centred: bool) -> None:
    rows, found = measured()
    expected, kind = slow(name, centred), CENTRED if centred else ""
    for figure, values in expected.items():
        np.testing.assert_allclose(rows[f"{kind}{figure}/{name}"], values, atol=1e-4, rtol=0)
    attribute, image = expected["AS"], expected["IS"]
    parts = {"AS_neg": np.maximum(-attribute, 0), "AS_pos": np.maximum(attribute, 0), "AS_abs": np.abs(attribute)}
    means = {key: values.mean() for key, values in {**expected, **parts}.items()}
    means |= {f"{key}_std": expected[key].std() for key in ("AS", "IS", "kappa")}
    by, labels = found["translators"][name], rows["label"].to_numpy()
    overall = {**means, "ratio": image.mean() / np.abs(attribute).mean(), "count": COUNT}
    assert by["centred" if centred else "overall"] == pytest.approx(overall, abs=1e-4)
    if centred:
        return
    for figure, values in (("AS_abs", parts["AS_abs"]), ("AS_neg", parts["AS_neg"]), ("IS", image)):
        assert by["intervals"][figure] == pytest.approx(mean_interval(values, groups=labels)[1:], abs=1e-3)


@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_translator_is_judged_by_the_embeddings(name: str) -> None:
    translator, split = TRANSLATORS[name], toy.ToySplit(COUNT, seed=1)
    target = torch.from_numpy(toy.embeddings(COUNT, seed=1)).double()
    z = toy.features(toy.classifier(), split) @ translator.matrix.double().T + translator.offset.double()
    by = measured()[1]["translators"][name]
    assert by["cosine"] == pytest.approx(float(torch.cosine_similarity(z, target).mean()), abs=1e-6)
    r2 = 1 - ((z - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
    assert by["r2"] == pytest.approx(float(r2), rel=1e-5)
    nearest = torch.stack([torch.cosine_similarity(row, toy.texts().double()).argmax() for row in z])
    assert by["zero_shot"] == pytest.approx(float((nearest.numpy() == split.labels).mean()))
    assert [by[key] for key in ("ridge", "fit_images")] == [0.1, 50]


def test_figures_of_the_model_itself() -> None:
    split, model = toy.ToySplit(COUNT, seed=1), toy.classifier()
    f = toy.features(model, split)
    null = f @ formulas.null_projector(model.weight)
    right = (f @ model.weight.double().T + model.bias).argmax(1).numpy() == split.labels
    rows, got = measured()
    top1 = mean_interval(right.astype(float), groups=split.labels)
    assert (got["images"], got["top1"], *got["audit"]["intervals"]["top1"]) == pytest.approx((COUNT, *top1))
    assert got["null_share"] == pytest.approx(float((null.norm(dim=1) / f.norm(dim=1)).mean()), abs=1e-6)
    assert got["null_energy"] == pytest.approx(float((null**2).sum() / (f**2).sum()), abs=1e-6)
    z = nn.functional.normalize(torch.from_numpy(toy.embeddings(COUNT, seed=1)))
    assert got["vlm_zero_shot"] == pytest.approx(((z @ toy.texts().T).argmax(1).numpy() == split.labels).mean())
    assert rows["index"].tolist() == list(range(COUNT))
    assert rows["label"].tolist() == split.labels.tolist()
    assert rows["image"].tolist() == [f"toy-{index}" for index in range(COUNT)]
    assert (got["head"]["classes"], got["head"]["features"], got["head"]["nullity"]) == (5, 24, 19)
    softmax, other = measure(invariance="softmax")
    assert other["head"]["nullity"] == 20
    assert not np.allclose(softmax["AS/frozen"], rows["AS/frozen"], atol=0.1)


@pytest.mark.parametrize(("world", "count"), [(2, COUNT), (3, COUNT), (3, 2)], ids=["odd over 2", "odd over 3", "idle"])
def test_processes_measure_what_one_measures(world: int, count: int) -> None:
    rows, expected = measure(count=count)
    for got_rows, got in run_same(world, measure, count):
        assert got_rows["image"].tolist() == rows["image"].tolist()
        same(got, expected, rel=1e-5)
        pd.testing.assert_frame_equal(got_rows, rows, atol=1e-4, rtol=1e-5)


def test_what_cannot_be_measured_is_refused() -> None:
    def run(split: toy.ToySplit, model: Classifier, z: np.ndarray) -> None:
        mean = torch.zeros(model.feature_dim)
        analyze_model(model, split, z, toy.texts(), {"frozen": toy.translator()}, mean=mean, settings=toy.QUIET)

    with pytest.raises(ValueError, match="must hold labelled images"):
        run(toy.ToySplit(0), toy.classifier(), toy.embeddings(1)[:0])
    with pytest.raises(ValueError, match="1 of them unlabelled"):
        run(toy.ToySplit(9, unlabelled=(5,)), toy.classifier(), toy.embeddings(9))
    with pytest.raises(ValueError, match="no null space"):
        run(toy.ToySplit(9), toy.classifier(classes=30), toy.embeddings(9))
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, toy.CLASSES))
    with pytest.raises(ValueError, match=r"\(\.\.\., 24\), got \(9, 108\)"):
        run(toy.ToySplit(9), Classifier.from_module(net, "1", transform=toy.to_tensor), toy.embeddings(9))
