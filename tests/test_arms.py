"""An arm's figures against plain loops: steering image by image, harmless variety, known attributes; processes."""

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
from torch import Tensor

from singreg.analysis import arms
from singreg.analysis.arms import (
    Judge,
    Measured,
    attribute_r2,
    harmless_rows,
    measure_arm,
    steer_images,
)
from singreg.analysis.features import iterate_features
from singreg.analysis.fitting import translator_agreement
from singreg.analysis.probes import BlockFits, fit_blocks, measure_information
from singreg.analysis.scores import Rows, analyze_model
from singreg.analysis.statistics import paired_ratio
from singreg.analysis.steering import measure_steering, steering_targets
from singreg.analysis.steering_curves import FIGURES, Budgets
from singreg.data.corruption import CorruptedSplit
from singreg.nullspace import NullSpace
from singreg.steering import ConditionalGaussian, bisect_step
from singreg.translator import LinearTranslator, Translator
from tests import planted, toy
from tests.processes import run_processes
from tests.reference.formulas import angle_degrees

FIT, COUNT = 90, 31
AUDIT, TEST = toy.ToySplit(FIT, unlabelled=(4,)), toy.ToySplit(COUNT, seed=1)
STRANGE = toy.ToySplit(17, seed=2, unlabelled=tuple(range(17)))
READERS: dict[str, Translator] = {"auditor A": toy.translator(), "auditor B": toy.translator(1)}


def other(name: str = "auditor VLM2") -> Judge:
    g = torch.Generator().manual_seed(5)
    texts = torch.nn.functional.normalize(torch.randn(toy.CLASSES, 9, generator=g), dim=1)
    translator = LinearTranslator(torch.randn(9, toy.WIDTH, generator=g), torch.randn(9, generator=g))
    return Judge(texts, torch.randn(COUNT, 9, generator=g).numpy(), {name: translator})


def mean() -> Tensor:
    return toy.features(toy.classifier(), AUDIT).mean(0).float()


def measure(rank: int = 0, world: int = 1, cache_folder: str | None = None, **changes: Any) -> Measured:
    rng = np.random.default_rng(4)
    known = [pd.DataFrame(rng.normal(size=(count, 2)), columns=["colour", "size"]) for count in (FIT, COUNT)]
    judge = Judge(toy.texts(), toy.embeddings(COUNT, seed=1), READERS)
    options: dict[str, Any] = {
        "judges": [judge, other()],
        "mean": mean(),
        "ood": STRANGE,
        "attributes": tuple(known),
        "transfers": [("auditor A", "auditor B"), ("auditor A", "auditor VLM2")],
        "settings": replace(toy.QUIET, cache=cache_folder),
    }
    return measure_arm(toy.classifier(), TEST, AUDIT, toy.embeddings(FIT), **{**options, **changes})


@cache
def measured() -> Measured:
    return measure()


def test_scores_are_those_of_analyze_model_for_each_vlm() -> None:
    judges = Judge(toy.texts(), toy.embeddings(COUNT, seed=1), READERS), other()
    figures, found = measured().figures, []
    for each in judges:
        read = (each.embeddings, each.texts, each.translators)
        found.append(analyze_model(toy.classifier(), TEST, *read, mean=mean(), settings=toy.QUIET))
    (first, top), (second, _) = found
    assert (figures["top1"], figures["null_share"], figures["nullity"]) == (
        top["top1"],
        top["null_share"],
        top["head"]["nullity"],
    )
    for _, read in found:
        for name, scores in read["translators"].items():
            assert figures[f"AS_neg/{name}"] == scores["overall"]["AS_neg"]
            assert figures[f"centred_IS/{name}"] == scores["centred"]["IS"]
            assert measured().intervals[f"kappa/{name}"] == scores["intervals"]["kappa"]
    for name in {*first.columns, *second.columns}:
        np.testing.assert_array_equal(measured().rows[name], (first if name in first else second)[name])
    agreement = translator_agreement(toy.translator(), toy.translator(1), toy.texts())
    assert figures["agreement/auditor A|auditor B"] == agreement


def test_information_and_harmless_r2_are_held_out() -> None:
    space = NullSpace.from_weight(toy.classifier().weight)
    batches = partial(iterate_features, toy.classifier(), settings=toy.QUIET, description="test")
    sizes: dict[str, Any] = {"classes": toy.CLASSES, "target_dim": toy.DIM}
    fits = fit_blocks(batches(AUDIT, toy.embeddings(FIT)), null_space=space, **sizes)
    information = measure_information(batches(TEST, toy.embeddings(COUNT, seed=1)), fits)
    figures, rows = measured().figures, measured().rows
    assert figures["null_probe"] == information["accuracy"]["null_space"]
    assert figures["unique_r2"] == information["unique"]
    value, low, high = paired_ratio(rows["harmless_residual"], rows["harmless_spread"], groups=rows["label"].to_numpy())
    assert figures["harmless_r2"] == pytest.approx(1 - value)
    assert measured().intervals["harmless_r2"] == pytest.approx([1 - high, 1 - low])
    assert 0.5 < 1 - high < 1 - value < 1
    assert all(figures[f"{block}_r2/size"] < 0.5 for block in ("features", "row_space", "null_space"))  # it is noise


def test_corrupted_accuracy_and_attacks_are_there() -> None:
    model, figures, rows = toy.classifier(), measured().figures, measured().rows
    for kind in ("blur", "noise", "contrast"):
        logits = toy.features(model, CorruptedSplit(TEST, kind, 3)) @ model.weight.double().T + model.bias.double()
        right = (logits.argmax(1) == torch.from_numpy(TEST.labels)).double()
        assert rows[f"correct_{kind}"].tolist() == right.tolist()
        assert figures[f"corrupted/{kind}"] == pytest.approx(float(right.mean()))
    own, across = (lambda key, name=name: figures[f"{key}/{name}"] for name in ("auditor A", "auditor A→auditor B"))
    assert across("steering_step") == own("steering_step")  # the same attack
    assert abs(across("AS25")) < own("AS25")  # read by a translator that has nothing in common with it
    assert {"ood_vim", "ece", "nll", "manifold_success95/auditor VLM2", "area_AS/auditor A→auditor VLM2"} <= {*figures}
    assert rows["nll"].mean() == pytest.approx(figures["nll"])
    assert all(isinstance(value, float) for value in figures.values())


def test_cached_features_and_processes_give_the_same_figures(tmp_path: Path) -> None:
    expected = measured().figures
    assert measure(cache_folder=str(tmp_path)).figures == pytest.approx(expected, abs=1e-4, rel=1e-4)
    assert len(list(tmp_path.glob("*.npy"))) == 3  # audit, test and strange images, each through the network once
    for got in run_processes(2, measure):
        assert got.figures == pytest.approx(expected, abs=2e-3, rel=1e-4)
        assert got.rows["image"].tolist() == measured().rows["image"].tolist()
        np.testing.assert_allclose(got.rows["AS25/auditor A"], measured().rows["AS25/auditor A"], atol=1e-4)


def test_some_of_many_images_are_steered_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "STEERING_IMAGES", 7)
    bare = {"ood": None, "attributes": None}
    got, whole = measure(**bare).rows["AS25/auditor A"].to_numpy(), measured().rows["AS25/auditor A"].to_numpy()
    steered = np.flatnonzero(~np.isnan(got))
    assert steered.tolist() == [0, 5, 10, 15, 20, 25, 30]
    np.testing.assert_allclose(got[steered], whole[steered], atol=1e-6)


def test_judges_of_one_name_are_refused() -> None:
    judge = Judge(toy.texts(), toy.embeddings(COUNT, seed=1), READERS)
    with pytest.raises(ValueError, match="share a name"):
        measure(judges=[judge, other("auditor A")])


# Steering image by image.
C, M, N, IMAGES = 4, 10, 6, 20


@cache
def world() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=g)
    f, space = draw(IMAGES, M) + 1, NullSpace.from_weight(draw(C, M))
    gaussian = ConditionalGaussian.from_moments(torch.ones(M), torch.eye(M) + 0.1, space)
    radii = np.quantile(gaussian.radius(f).numpy(), (0.5, 0.95, 0.99))
    natural = dict(zip(("median", "p95", "p99"), radii.tolist(), strict=True))

    def reader(width: int) -> tuple[Tensor, LinearTranslator]:
        return torch.nn.functional.normalize(draw(C, width)), LinearTranslator(draw(width, M), draw(width))

    one = reader(N)
    readers = {"one": one, "two": (one[0], reader(N)[1]), "another VLM": reader(N + 2)}
    budgets = Budgets.over(arms.STEPS, (), gaussian, natural)
    return {"f": f, "y": torch.arange(IMAGES) % C, "space": space, "budgets": budgets, "readers": readers}


def steer(attacker: Any = None, judge: Any = None, rows: slice = slice(None), **options: Any) -> Rows:
    w = world()
    attacker = attacker or w["readers"]["one"]
    batch = w["f"][rows], w["y"][rows], torch.arange(IMAGES)[rows]
    kept = {"null_space": w["space"], "budgets": w["budgets"], **options}
    return steer_images(*batch, attacker=attacker, judge=judge or attacker, **kept)


@pytest.mark.parametrize("judge", ["one", "two", "another VLM"])
def test_every_image_is_steered_as_in_plain_loops(judge: str) -> None:
    w = world()
    (own, attacker), (texts, reader) = w["readers"]["one"], w["readers"][judge]
    own, texts, gaussian, natural = own.double(), texts.double(), w["budgets"].gaussian, w["budgets"].natural
    found = steer(judge=(texts, reader))

    def read(f: Tensor, moved: Tensor, text: Tensor) -> tuple[float, float, float]:
        z, after = reader(f), reader(moved)
        gained = float(angle_degrees(z, text) - angle_degrees(after, text))
        cosines = torch.nn.functional.normalize(after, dim=0) @ texts.T
        return gained, abs(gained), float(int(cosines.argmax()) == int((texts @ text).argmax()))

    for i, target in enumerate(steering_targets(w["y"], torch.arange(IMAGES), C).tolist()):
        f, text = w["f"][i].double().requires_grad_(), texts[target]
        torch.nn.functional.cosine_similarity(attacker(f), own[target], dim=0).backward()
        assert f.grad is not None
        slope, f = f.grad, f.detach()
        g = w["space"].component(slope)
        d = g / g.norm()
        step = float(bisect_step(attacker, f[None], d[None], 40.0))
        if math.isnan(step):
            assert (found["steering_reachable"][i], found["steering_success"][i]) == (0, 0)
            assert np.isnan([found["steering_AS"][i], found["steering_step"][i]]).all()
        else:
            gained, _, won = read(f, f + step * d, text)
            assert found["steering_AS"][i] == pytest.approx(gained, abs=1e-4)
            assert found["steering_step"][i] == pytest.approx(step / float(f.norm()), rel=1e-6)
            assert (found["steering_reachable"][i], found["steering_success"][i]) == (1, won)
        path = [read(f, f + share * f.norm() * d, text) for share in arms.STEPS]
        for place, name in enumerate(FIGURES):
            for label, share in (("10", 0.1), ("25", 0.25)):
                assert found[f"{name}{label}"][i] == pytest.approx(path[arms.STEPS.index(share)][place], abs=1e-4)
            heights = [(a[place] + b[place]) / 2 for a, b in itertools.pairwise(path)]
            assert found[f"area_{name}"][i] == pytest.approx(np.dot(heights, np.diff(arms.STEPS)), abs=1e-4)
        along = gaussian.on_manifold(g)
        along = along / along.norm()
        for label, limit in (("50", "median"), ("95", "p95"), ("99", "p99")):
            grid = torch.linspace(0, 20, 20001).double()
            inside = gaussian.radius(f + grid[:, None] * along) <= natural[limit]
            largest = float(grid[inside].max()) if bool(inside.any()) else 0.0
            for name, value in zip(FIGURES[:2], read(f, f + largest * along, text), strict=False):
                assert found[f"manifold_{name}{label}"][i] == pytest.approx(value, abs=5e-2)


def test_steering_figures_agree_with_table_1() -> None:
    w = world()
    columns = {f"{name}/one": np.append(values, np.nan) for name, values in steer().items()}  # one is not steered
    got, (texts, attacker) = arms.steering_figures(columns, "one"), w["readers"]["one"]
    batch = w["f"], w["y"], torch.arange(IMAGES)
    expected = measure_steering(*batch, texts=texts, null_space=w["space"], attacker=attacker)
    names = {"AS": "attribute_score", "step": "step", "reachable": "reachable", "success": "success"}
    for mine, theirs in names.items():
        assert got[f"steering_{mine}/one"] == pytest.approx(expected[theirs], abs=1e-4)
    assert got["AS25/one"] == pytest.approx(np.nanmean(columns["AS25/one"]))


def test_a_blind_translator_is_not_steered_a_callable_is() -> None:
    w = world()
    texts, one = w["readers"]["one"]
    blind = LinearTranslator(w["space"].remove(one.matrix), one.offset)
    got = arms.steering_figures({f"{name}/x": values for name, values in steer((texts, blind)).items()}, "x")
    assert (got["steering_reachable/x"], got["steering_success/x"]) == (0, 0)
    assert np.isnan([got["steering_AS/x"], got["steering_step/x"]]).all()
    control, opaque = steer(), steer((texts, lambda f: one(f)))
    assert control["AS25"].mean() > 2 > abs(got["AS25/x"])
    for name, values in control.items():
        np.testing.assert_allclose(opaque[name], values, atol=1e-3, err_msg=name)


def test_targets_are_fixed_by_seed_and_image_not_by_batch() -> None:
    parts = [steer(rows=slice(first, first + 7)) for first in range(0, IMAGES, 7)]
    for name, values in steer().items():
        np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), values, atol=1e-9)
    assert not np.allclose(steer(seed=1)["AS25"], steer()["AS25"])


# Harmless variety and known attributes.
NAMES = ("seen", "hidden", "noise", "constant")


def fits_of(train: planted.Planted, rank: int = 0, world: int = 1) -> BlockFits:
    batches, dim = train.batches(100, rank, world), train.embeddings.shape[1]
    return fit_blocks(batches, null_space=train.space, classes=planted.CLASSES, target_dim=dim)


def r2(rows: Rows) -> float:
    return float(1 - rows["residual"].sum() / rows["spread"].sum())


def test_harmless_rows_are_what_the_fit_misses_off_the_prompts() -> None:
    test, fits = planted.plant("nuisance", seed=1, count=900), fits_of(planted.plant("nuisance"))
    rows = harmless_rows(test.batches(), fits, test.texts)
    off = torch.eye(planted.DIM).double() - torch.linalg.pinv(test.texts) @ test.texts
    matrix = fits.solutions["features"].matrix @ fits.basis["features"].T
    z, centre = test.embeddings, test.embeddings.mean(0)
    for i in range(0, 900, 97):
        error = off @ (z[i] - matrix @ test.features[i] - fits.solutions["features"].offset)
        assert rows["residual"][i] == pytest.approx(float(error @ error))
        assert rows["spread"][i] == pytest.approx(float((off @ (z[i] - centre)).square().sum()))
    twice = harmless_rows(test.batches(), fits, torch.cat([test.texts, test.texts]))  # the same span
    np.testing.assert_allclose(twice["residual"], rows["residual"], rtol=1e-9)
    nothing = harmless_rows(test.batches(), fits, torch.eye(planted.DIM))  # prompts that span everything
    assert not nothing["residual"].any()
    assert not nothing["spread"].any()


def test_nuisance_is_harmless_variety_and_class_is_none() -> None:
    found = {}
    for case, emptied in (("nuisance", False), ("leakage", False), ("nuisance", True)):
        train, test = planted.plant(case), planted.plant(case, seed=1, count=900)
        if emptied:
            train, test = (replace(each, features=each.space.remove(each.features)) for each in (train, test))
        found[case, emptied] = r2(harmless_rows(test.batches(), fits_of(train), test.texts))
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
    return attribute_r2(test.batches(100, rank, world), fits_of(train, rank, world), NAMES)


def test_attributes_are_found_where_they_were_planted() -> None:
    found, fits, test = known(0, 1), fits_of(attributes(0, 1200)), attributes(1, 601)
    expected = {"seen": (1, 1, 0), "hidden": (1, 0, 1), "noise": (0, 0, 0)}
    for name, values in expected.items():
        got = [found[f"{block}_r2/{name}"] for block in ("features", "row_space", "null_space")]
        assert got == pytest.approx(values, abs=0.06), name
    assert all(np.isnan(value) for key, value in found.items() if key.endswith("constant"))
    solution, target = fits.solutions["null_space"], test.embeddings[:, 1]
    read = torch.stack(
        [solution.matrix[1] @ (fits.basis["null_space"].T @ f) + solution.offset[1] for f in test.features]
    )
    slow = float(1 - (target - read).square().sum() / (target - target.mean()).square().sum())
    assert found["null_space_r2/hidden"] == pytest.approx(slow, abs=1e-8)
    for got in run_processes(2, known):
        assert got == pytest.approx(found, abs=1e-8, nan_ok=True)
