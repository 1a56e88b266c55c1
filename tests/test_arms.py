"""An arm's figures against plain loops: steering, harmless variety, known attributes, side effects; processes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from singreg.analysis import arms
from singreg.analysis.arms import AUDITOR, Measured, network_outputs, ood_figures
from singreg.analysis.features import FeatureBatch, iterate_features
from singreg.analysis.fitting import fit_on_split, translator_agreement
from singreg.analysis.probes import BlockFits, fit_blocks, measure_information
from singreg.analysis.scores import Rows, analyze_model
from singreg.analysis.statistics import paired_ratio
from singreg.analysis.steering import measure_steering, steering_targets
from singreg.data.corruption import CorruptedSplit
from singreg.data.splits import Splits
from singreg.models.edits import drop_null
from singreg.nullspace import NullSpace
from singreg.setup import Setup
from singreg.steering import ConditionalGaussian, bisect_step
from singreg.translator import LinearTranslator
from tests import planted, toy
from tests.processes import run_processes
from tests.reference.formulas import angle_degrees, null_projector

FIT, COUNT = 90, 31
BANK, AUDIT, TEST = (
    toy.ToySplit(40, seed=2, unlabelled=tuple(range(17))),
    toy.ToySplit(FIT),
    toy.ToySplit(COUNT, seed=1),
)
BANK.name, AUDIT.name, TEST.name = "bank", "audit", "test"


def measure(rank: int = 0, world: int = 1, cache_folder: str | None = None, **changes: Any) -> Measured:
    splits = Splits(BANK, BANK, AUDIT, TEST, TEST.class_names, None)
    tables = {"bank": toy.embeddings(40, seed=2), "audit": toy.embeddings(FIT), "test": toy.embeddings(COUNT, seed=1)}
    nothing: Any = None
    passes = replace(toy.QUIET, cache=cache_folder)
    setup = Setup(splits, nothing, nothing, toy.texts(), tables, nothing, passes)
    return arms.measure_arm(toy.classifier(), setup, {"loop": toy.translator(1)}, **{"ridge": 0.3, "ood": 9, **changes})


@cache
def measured() -> Measured:
    return measure(validation=(TEST, toy.embeddings(COUNT, seed=1)))


def test_scores_are_those_of_analyze_model_by_a_fresh_auditor() -> None:
    fitted = fit_on_split(toy.classifier(), AUDIT, toy.embeddings(FIT), ridges=(0.3,), settings=toy.QUIET)
    judges = {"loop": toy.translator(1), AUDITOR: fitted.translator}
    read = toy.classifier(), TEST, toy.embeddings(COUNT, seed=1), toy.texts(), judges
    table, found = analyze_model(*read, mean=fitted.mean, settings=toy.QUIET)
    figures, rows = measured().figures, measured().rows
    assert rows is not None
    assert (figures["top1"], figures["nullity"]) == (found["top1"], found["head"]["nullity"])
    for name, scores in found["translators"].items():
        assert figures[f"AS_neg/{name}"] == pytest.approx(scores["overall"]["AS_neg"], rel=1e-5)
        assert measured().intervals[f"IS/{name}"] == pytest.approx(scores["intervals"]["IS"], rel=1e-5)
    assert figures["audit_gap"] == pytest.approx(figures["AS_neg/auditor"] / figures["AS_neg/loop"])
    agreement = translator_agreement(toy.translator(1), fitted.translator, toy.texts())
    assert figures["agreement/loop|auditor"] == pytest.approx(agreement, abs=1e-6)
    np.testing.assert_allclose(rows["AS/auditor"], table["AS/auditor"], atol=1e-4)
    held = measured().validation  # here the test images once more
    assert (held["top1"], held["images"]) == (found["top1"], COUNT)
    assert held["AS_neg"] == figures["AS_neg/auditor"]
    assert held["step"] == pytest.approx(figures["steering_step/auditor"], abs=1e-5)


def test_information_corruption_and_side_effects_are_held_out() -> None:
    model, figures, rows = toy.classifier(), measured().figures, measured().rows
    assert rows is not None
    batches = partial(iterate_features, model, settings=toy.QUIET, description="test")
    sizes: dict[str, Any] = {"classes": toy.CLASSES, "target_dim": toy.DIM}
    fits = fit_blocks(batches(AUDIT, toy.embeddings(FIT)), null_space=NullSpace.from_weight(model.weight), **sizes)
    information = measure_information(batches(TEST, toy.embeddings(COUNT, seed=1)), fits)
    assert (figures["null_probe"], figures["unique_r2"]) == (
        information["accuracy"]["null_space"],
        information["unique"],
    )
    value, low, high = paired_ratio(rows["harmless_residual"], rows["harmless_spread"], groups=rows["label"].to_numpy())
    assert measured().intervals["harmless_r2"] == pytest.approx([1 - high, 1 - low])
    assert 0.5 < 1 - high < 1 - value == pytest.approx(figures["harmless_r2"])
    for kind in ("blur", "noise", "contrast"):
        logits = toy.features(model, CorruptedSplit(TEST, kind, 3)) @ model.weight.double().T + model.bias.double()
        right = (logits.argmax(1) == torch.from_numpy(TEST.labels)).double().mean()
        assert figures[f"corrupted/{kind}"] == pytest.approx(float(right))
    assert {"ood_vim", "ece", "nll", "manifold_success95/auditor"} <= {*figures}
    assert "ood_vim" not in measure(ood=0).figures
    assert all(isinstance(value, float) for value in figures.values())


def test_cached_features_and_processes_give_the_same_figures(tmp_path: Path) -> None:
    assert measure(cache_folder=str(tmp_path)).figures == pytest.approx(measured().figures, abs=1e-4, rel=1e-4)
    assert len(list(tmp_path.glob("*.npy"))) == 3  # audit, test and strange images, each through the network once
    rows = measured().rows
    assert rows is not None
    for got in run_processes(2, measure):
        assert got.figures == pytest.approx(measured().figures, abs=2e-3, rel=1e-4)
        assert got.rows["image"].tolist() == rows["image"].tolist()
        np.testing.assert_allclose(got.rows["AS25/auditor"], rows["AS25/auditor"], atol=1e-4)


# Steering image by image.
C, M, N, IMAGES = 4, 10, 6, 20


@cache
def world() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=g)
    f, space = draw(IMAGES, M) + 1, NullSpace.from_weight(draw(C, M))
    gaussian = ConditionalGaussian.from_moments(torch.ones(M), torch.eye(M) + 0.1, space)
    radius = float(np.quantile(gaussian.radius(f).numpy(), 0.95))
    texts, translator = torch.nn.functional.normalize(draw(C, N)), LinearTranslator(draw(N, M), draw(N))
    return {"f": f, "space": space, "gaussian": gaussian, "radius": radius, "texts": texts, "translator": translator}


def steer(size: int = IMAGES, translator: LinearTranslator | None = None, seed: int = 0) -> pd.DataFrame:
    w, nothing = world(), torch.zeros(0)
    parts = torch.arange(IMAGES).split(size)
    batches = [FeatureBatch(w["f"][rows], nothing, nothing, rows % C, rows) for rows in parts]
    read = w["texts"], translator or w["translator"], w["space"], w["gaussian"], w["radius"], seed
    return arms.steer_images(batches, IMAGES, *read).rename(columns=lambda name: name.removesuffix("/auditor"))


def test_every_image_is_steered_as_in_plain_loops() -> None:
    w, found = world(), steer()
    texts, T, gaussian = w["texts"].double(), w["translator"], w["gaussian"]

    def read(f: Tensor, moved: Tensor, text: Tensor) -> tuple[float, float]:
        won = (torch.nn.functional.normalize(T(moved), dim=0) @ texts.T).argmax() == (texts @ text).argmax()
        return float(angle_degrees(T(f), text) - angle_degrees(T(moved), text)), float(won)

    for i, target in enumerate(steering_targets(torch.arange(IMAGES) % C, torch.arange(IMAGES), C).tolist()):
        f, text = w["f"][i].double().requires_grad_(), texts[target]
        torch.nn.functional.cosine_similarity(T(f), text, dim=0).backward()
        assert f.grad is not None
        g, f = w["space"].component(f.grad), f.detach()
        d = g / g.norm()
        step = float(bisect_step(T, f[None], d[None], 40.0) / f.norm())
        row = found.iloc[i]
        assert row["steering_step"] == pytest.approx(step, rel=1e-6, nan_ok=True)
        assert row["steering_reachable"] == (not math.isnan(step))
        assert tuple(row[["AS25", "success25"]]) == pytest.approx(read(f, f + 0.25 * f.norm() * d, text), abs=1e-4)
        along = gaussian.on_manifold(g)
        along = along / along.norm()
        grid = torch.linspace(0, 20, 20001).double()
        inside = gaussian.radius(f + grid[:, None] * along) <= w["radius"]
        largest = float(grid[inside].max()) if bool(inside.any()) else 0.0
        assert row["manifold_success95"] == read(f, f + largest * along, text)[1]
    rows, options = torch.arange(IMAGES), {"texts": w["texts"], "null_space": w["space"], "attacker": T}
    expected = measure_steering(w["f"], rows % C, rows, **options)
    assert found["steering_step"].mean() == pytest.approx(expected["step"], abs=1e-4)


def test_a_blind_translator_is_not_steered() -> None:
    w = world()
    blind = LinearTranslator(w["space"].remove(w["translator"].matrix), w["translator"].offset)
    got, control = steer(translator=blind), steer()
    assert not got["steering_reachable"].any()
    assert got["steering_step"].isna().all()
    assert control["AS25"].mean() > 2 > abs(got["AS25"].mean())


def test_targets_are_fixed_by_seed_and_image_and_some_of_many_are_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steer()
    pd.testing.assert_frame_equal(steer(size=7), whole, atol=1e-9)
    assert not np.allclose(steer(seed=1)["AS25"], whole["AS25"])
    monkeypatch.setattr(arms, "STEERING_IMAGES", 3)
    few = steer(size=5)["AS25"]
    assert few.dropna().index.tolist() == [0, 10, 19]
    np.testing.assert_allclose(few.dropna(), whole["AS25"][[0, 10, 19]], atol=1e-9)


# Harmless variety and known attributes.
def fits_of(train: planted.Planted, rank: int = 0, world: int = 1) -> BlockFits:
    batches, dim = train.batches(100, rank, world), train.embeddings.shape[1]
    return fit_blocks(batches, null_space=train.space, classes=planted.CLASSES, target_dim=dim)


def test_harmless_rows_are_what_the_fit_misses_off_the_prompts() -> None:
    test, fits = planted.plant("nuisance", seed=1, count=900), fits_of(planted.plant("nuisance"))
    rows = arms.harmless_rows(test.batches(), fits, test.texts)
    off = torch.eye(planted.DIM).double() - torch.linalg.pinv(test.texts) @ test.texts
    matrix = fits.solutions["features"].matrix @ fits.basis["features"].T
    z, centre = test.embeddings, test.embeddings.mean(0)
    for i in range(0, 900, 97):
        error = off @ (z[i] - matrix @ test.features[i] - fits.solutions["features"].offset)
        assert rows["residual"][i] == pytest.approx(float(error @ error))
        assert rows["spread"][i] == pytest.approx(float((off @ (z[i] - centre)).square().sum()))
    twice = arms.harmless_rows(test.batches(), fits, torch.cat([test.texts, test.texts]))  # the same span
    np.testing.assert_allclose(twice["residual"], rows["residual"], rtol=1e-9)
    nothing = arms.harmless_rows(test.batches(), fits, torch.eye(planted.DIM))  # prompts that span everything
    assert not np.any([nothing["residual"], nothing["spread"]])


def test_nuisance_is_harmless_variety_and_class_is_none() -> None:
    found = {}
    for case, emptied in (("nuisance", False), ("leakage", False), ("nuisance", True)):
        train, test = planted.plant(case), planted.plant(case, seed=1, count=900)
        if emptied:
            train, test = (replace(each, features=each.space.remove(each.features)) for each in (train, test))
        rows = arms.harmless_rows(test.batches(), fits_of(train), test.texts)
        found[case, emptied] = float(1 - rows["residual"].sum() / rows["spread"].sum())
    assert found["nuisance", False] > 0.8
    assert abs(found["leakage", False]) < 0.1  # z's variety is class alone, and that lies within the prompts' span
    assert found["nuisance", True] < 0.1


def attributes(seed: int, count: int) -> planted.Planted:
    """Known attributes in the place of embeddings: one in the row space, one in the null space, noise, a constant."""
    w = planted.plant("nuisance", seed=seed, count=count)
    row, null = w.features @ w.space.basis, w.features @ w.space.null_basis()
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()
    return replace(w, embeddings=torch.stack([row[:, 0] + row[:, 3], null[:, 0], noise, torch.ones_like(noise)], dim=1))


def known(rank: int, world: int) -> dict[str, float]:
    train, test = attributes(0, 1200), attributes(1, 601)
    fits, names = fits_of(train, rank, world), ("seen", "hidden", "noise", "constant")
    return arms.attribute_r2(test.batches(100, rank, world), fits, names)


def test_attributes_are_found_where_they_were_planted() -> None:
    found = known(0, 1)
    for name, values in {"seen": (1, 1, 0), "hidden": (1, 0, 1), "noise": (0, 0, 0)}.items():
        got = [found[f"{block}_r2/{name}"] for block in ("features", "row_space", "null_space")]
        assert got == pytest.approx(values, abs=0.06), name
    assert all(np.isnan(value) for key, value in found.items() if key.endswith("constant"))
    for got in run_processes(2, known):
        assert got == pytest.approx(found, abs=1e-8, nan_ok=True)


# Side effects.
Values = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def slow_auroc(known: Any, strange: Any) -> float:
    pairs = list(itertools.product(known, strange))
    return sum(1.0 if b > a else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@given(Values, Values)
def test_auroc_is_that_of_all_pairs(known: list[int], strange: list[int]) -> None:
    a, b = (1000 + 1e-9 * np.array(values) for values in (known, strange))  # that a float32 sigmoid calls equal
    assert arms.auroc(a, b) == pytest.approx(slow_auroc(a, b), abs=1e-9)


def images(push: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weight, bias, and known, strange and fitted features: the strange ones lie further out in the null space."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(C, M, generator=g), torch.randn(C, generator=g)
    known, strange, fit = (torch.randn(count, M, generator=g) + 2 for count in (40, 30, 60))
    return weight, bias, [known, strange + push * torch.randn(30, M, generator=g) @ null_projector(weight).float(), fit]


def outputs(weight: Tensor, bias: Tensor, features: list[Tensor]) -> list[Rows]:
    space, mean, found = NullSpace.from_weight(weight), features[2].double().mean(0), []
    for f in features:
        places = torch.arange(len(f))
        batch = FeatureBatch(f, f.double() @ weight.double().T + bias.double(), f, places % C, places)
        found.append(network_outputs([batch], space, mean))
    return found


def test_ood_scores_are_those_of_plain_loops() -> None:
    weight, bias, features = images(push=0.7)
    project, mean = null_projector(weight), features[2].double().mean(0)

    def parts(f: Tensor) -> tuple[float, float, float]:
        logits = weight.double() @ f.double() + bias.double()
        energy = math.log(sum(math.exp(v) for v in logits))
        return float(((f.double() - mean) @ project).norm()), energy, float(logits.max())

    known, strange, fit = (np.array([parts(f) for f in each]) for each in features)
    ways = {"null_energy": (1, 0), "energy": (0, 1), "vim": (fit[:, 2].mean() / fit[:, 0].mean(), 1)}
    slow = {
        f"ood_{n}": slow_auroc(*(a * e[:, 0] - b * e[:, 1] for e in (known, strange))) for n, (a, b) in ways.items()
    }
    assert ood_figures(*outputs(weight, bias, features)) == pytest.approx(slow, abs=1e-6)
    assert len({round(value, 3) for value in slow.values()}) == 3


def test_dropping_moving_or_rescaling_the_null() -> None:
    weight, bias, features = images()
    space, before = NullSpace.from_weight(weight), ood_figures(*outputs(*images()))
    after = ood_figures(*outputs(weight, bias, [space.remove(f) for f in features]))  # float32: rounding is left
    assert before["ood_null_energy"] > 0.8  # planted
    assert after["ood_null_energy"] == 0.5
    assert after["ood_energy"] == pytest.approx(before["ood_energy"], abs=1e-6) == after["ood_vim"]
    moved = [f + 3 * space.component(f) + space.component(torch.ones(M)) for f in features]
    assert ood_figures(*outputs(weight, bias, moved)) == pytest.approx(before, abs=1e-6)


def test_true_probabilities_are_calibrated_bolder_ones_not() -> None:
    g = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20000, C, generator=g)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]

    def error(scale: float) -> float:
        confidence, named = (scale * logits).double().softmax(1).max(1)
        bins: list[list[float]] = [[] for _ in range(arms.BINS)]
        for p, right in zip(confidence.tolist(), (named == labels).tolist(), strict=True):
            bins[min(int(p * arms.BINS), arms.BINS - 1)].append(p - right)
        found = arms.calibration_error(confidence.numpy(), (named == labels).double().numpy())
        assert found == pytest.approx(sum(abs(sum(each)) for each in bins) / len(labels), abs=1e-9)
        return found

    assert error(1) < 0.015 < 0.1 < error(3)


def test_dropping_the_null_keeps_top1() -> None:
    pixels = torch.stack([toy.to_tensor(TEST.image(index)) for index in range(COUNT)])
    with torch.no_grad():
        logits = drop_null(toy.classifier()).eval().features_and_logits(pixels)[1]
    right = (logits.argmax(1) == torch.from_numpy(TEST.labels)).double().mean()
    found = arms.measure_dropped(toy.classifier(), (TEST, toy.embeddings(COUNT, seed=1)), toy.QUIET)
    assert (found.figures, found.rows) == ({"top1": pytest.approx(float(right))}, None)
