"""A whole arm: every figure is that of the measurement it comes from; JSON; two VLMs; processes; what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from singreg.analysis.features import iterate_features
from singreg.analysis.information import fit_blocks, measure_information
from singreg.analysis.model import analyze_model
from singreg.analysis.statistics import paired_ratio
from singreg.analysis.study.agreement import translator_agreement
from singreg.analysis.study.arm_figures import ArmFigures, KnownAttributes, OtherVLM, measure_arm
from singreg.analysis.study.side_effects import calibration, ood_auroc
from singreg.data.corruption import CorruptedSplit
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator, Translator
from tests.analysis import toy
from tests.processes import run_processes

FIT, COUNT = 90, 31
NAMES = ("colour", "size")


def parts() -> tuple[toy.ToyPart, toy.ToyPart, toy.ToyPart]:
    return toy.ToyPart(FIT, unlabelled=(4,)), toy.ToyPart(COUNT, seed=1), toy.ToyPart(17, seed=2, unlabelled=tuple(range(17)))


def readers() -> dict[str, Translator]:
    return {"auditor A": toy.translator(), "auditor B": toy.translator(1)}


def other() -> OtherVLM:
    g = torch.Generator().manual_seed(5)
    texts = torch.nn.functional.normalize(torch.randn(toy.CLASSES, 9, generator=g), dim=1)
    translator = LinearTranslator(torch.randn(9, toy.WIDTH, generator=g), torch.randn(9, generator=g))
    return OtherVLM(texts, torch.randn(COUNT, 9, generator=g).numpy(), {"auditor VLM2": translator})


def known() -> KnownAttributes:
    rng = np.random.default_rng(4)
    return KnownAttributes(NAMES, rng.normal(size=(FIT, 2)), rng.normal(size=(COUNT, 2)))


def mean() -> torch.Tensor:
    return toy.features(toy.classifier(), parts()[0]).mean(0).float()


def measure(rank: int = 0, world: int = 1, cache_folder: str | None = None, **changes: Any) -> ArmFigures:
    fit, test, ood = parts()
    options = {
        "fit": fit, "fit_embeddings": toy.embeddings(FIT), "mean": mean(), "other": other(), "ood": ood, "attributes": known(),
        "transfers": [("auditor A", "auditor B"), ("auditor A", "auditor VLM2")], "settings": replace(toy.QUIET, cache=cache_folder),
    }  # fmt: skip
    return measure_arm(toy.classifier(), test, toy.embeddings(COUNT, seed=1), toy.texts(), readers(), **{**options, **changes})


@cache
def measured() -> ArmFigures:
    return measure()


def test_scores_are_those_of_analyze_model_for_each_vlm() -> None:
    _, test, _ = parts()
    options = {"mean": mean(), "settings": toy.QUIET}
    first = analyze_model(toy.classifier(), test, toy.embeddings(COUNT, seed=1), toy.texts(), readers(), **options)
    second = analyze_model(toy.classifier(), test, other().embeddings, other().texts, other().translators, **options)
    got = measured().measurement
    assert list(got.translators) == ["auditor A", "auditor B", "auditor VLM2"]
    assert got.translators == {**first.translators, **second.translators}
    assert got.steering == {**first.steering, **second.steering}
    assert (got.top1, got.null_share, got.vlm_zero_shot) == (first.top1, first.null_share, first.vlm_zero_shot)
    for name, column in {**second.rows, **first.rows}.items():
        np.testing.assert_array_equal(measured().rows[name], column)


def test_information_and_harmless_r2_are_held_out() -> None:
    fit, test, _ = parts()
    space = NullSpace.from_weight(toy.classifier().weight)
    batches = iterate_features(toy.classifier(), fit, toy.embeddings(FIT), toy.QUIET, "fit")
    fits = fit_blocks(batches, null_space=space, classes=toy.CLASSES, target_dim=toy.DIM)
    tested = iterate_features(toy.classifier(), test, toy.embeddings(COUNT, seed=1), toy.QUIET, "test")
    assert measured().information == measure_information(tested, fits)
    rows = measured().rows
    value, low, high = paired_ratio(rows["harmless_residual"], rows["harmless_spread"], groups=rows["label"])
    assert measured().harmless_r2 == pytest.approx([1 - value, 1 - high, 1 - low])
    assert 0.5 < measured().harmless_r2[1] < measured().harmless_r2[0] < measured().harmless_r2[2] < 1
    assert list(measured().attributes) == list(NAMES)
    assert all(value < 0.5 for blocks in measured().attributes.values() for value in blocks.values())  # they are noise


def test_side_effects_are_those_of_the_arrays() -> None:
    fit, test, ood = parts()
    model, got = toy.classifier(), measured().side_effects
    f, strange, others = (toy.features(model, part) for part in (test, ood, fit))
    labels = torch.from_numpy(test.labels)
    logits = f @ model.weight.double().T + model.bias.double()
    assert (got.ece, got.nll) == pytest.approx(calibration(logits, labels), abs=1e-5)
    assert measured().rows["nll"].mean() == pytest.approx(got.nll, abs=1e-9)
    expected = ood_auroc(NullSpace.from_weight(model.weight), f, strange, model.weight, model.bias, others)
    assert vars(got.ood) == pytest.approx(vars(expected), abs=2e-3)  # float32 logits may swap a near tie
    assert set(got.corrupted) == {"blur", "noise", "contrast"}
    for kind, accuracy in got.corrupted.items():
        corrupted = toy.features(model, CorruptedSplit(test, kind, 3))
        right = (corrupted @ model.weight.double().T + model.bias.double()).argmax(1) == labels
        assert measured().rows[f"correct_{kind}"].tolist() == right.double().tolist()
        assert accuracy == pytest.approx(float(right.double().mean()))


def test_every_attack_has_its_figures_and_transfers_are_read_by_the_judge() -> None:
    got = measured()
    assert list(got.steering) == ["auditor A", "auditor B", "auditor VLM2", "auditor A→auditor B", "auditor A→auditor VLM2"]
    for name in ("auditor A", "auditor B", "auditor VLM2"):
        table = got.measurement.steering[name]
        effort = got.steering[name]
        assert (effort.AS, effort.step) == pytest.approx((table.attribute_score, table.step), abs=1e-3)
    own, across = got.steering["auditor A"], got.steering["auditor A→auditor B"]
    assert across.step == own.step  # the same attack
    assert abs(across.at_steps["25 %"]["AS"]) < own.at_steps["25 %"]["AS"]  # read by a translator that has nothing in common with it
    assert got.agreement == {"auditor A|auditor B": translator_agreement(toy.translator(), toy.translator(1), toy.texts())}
    assert {len(column) for column in got.rows.values()} == {COUNT}


def test_flat_names_every_figure_once() -> None:
    flat = measured().flat()
    assert flat["top1"] == measured().measurement.top1
    assert flat["null_probe"] == measured().information.accuracy["null_space"]
    assert flat["AS_neg/auditor A"] == measured().measurement.translators["auditor A"].overall["AS_neg"]
    assert flat["AS25/auditor A"] == measured().steering["auditor A"].at_steps["25 %"]["AS"]
    assert flat["manifold_success95/auditor VLM2"] == measured().steering["auditor VLM2"].on_manifold["95 %"]["success"]
    assert flat["ood_vim"] == measured().side_effects.ood.vim
    assert flat["null_space_r2/size"] == measured().attributes["size"]["null_space"]
    assert all(isinstance(value, float) for value in flat.values())


def test_it_goes_to_strict_json_and_back() -> None:
    blind = LinearTranslator(NullSpace.from_weight(toy.classifier().weight).remove(toy.translator().matrix), torch.ones(toy.DIM))
    _, test, _ = parts()
    bare = measure_arm(
        toy.classifier(), test, toy.embeddings(COUNT, seed=1), toy.texts(), {"blind": blind}, fit=parts()[0],
        fit_embeddings=toy.embeddings(FIT), mean=mean(), settings=toy.QUIET, corruptions=(),
    )  # fmt: skip
    assert math.isnan(bare.steering["blind"].AS)  # NaN must survive
    assert bare.side_effects.ood is None
    assert bare.attributes == {}
    for figures in (measured(), bare):
        text = json.dumps(figures.to_json(), allow_nan=False)
        again = ArmFigures.from_json(json.loads(text), figures.rows)
        assert json.dumps(again.to_json(), allow_nan=False) == text
        assert again.flat() == pytest.approx(figures.flat(), nan_ok=True)
        assert again.rows is figures.rows
    assert ArmFigures.from_json(json.loads(json.dumps(measured().to_json()))) == measured()


def test_cached_features_and_processes_give_the_same_figures(tmp_path: Path) -> None:
    expected = measured().flat()
    assert measure(cache_folder=str(tmp_path)).flat() == pytest.approx(expected, abs=1e-4, rel=1e-4)
    assert len(list(tmp_path.glob("*.npy"))) == 3  # fit, test and strange pictures, each through the network once
    for got in run_processes(2, measure):
        assert got.flat() == pytest.approx(expected, abs=2e-3, rel=1e-4)
        assert got.rows["image"].tolist() == measured().rows["image"].tolist()
        np.testing.assert_allclose(got.rows["AS25/auditor A"], measured().rows["AS25/auditor A"], atol=1e-4)


def test_only_some_of_many_pictures_are_steered_evenly_over_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("singreg.analysis.study.arm_figures.STEERING_IMAGES", 7)
    got = measure(other=None, ood=None, attributes=None, corruptions=(), transfers=())
    steered = np.flatnonzero(~np.isnan(got.rows["AS25/auditor A"]))
    assert steered.tolist() == [0, 5, 10, 15, 20, 25, 30]
    assert got.steering["auditor A"].images == 7
    np.testing.assert_allclose(got.rows["AS25/auditor A"][steered], measured().rows["AS25/auditor A"][steered], atol=1e-6)


def test_what_cannot_be_measured_is_refused_before_anything_is() -> None:
    clash = replace(other(), translators={"auditor A": toy.translator()})
    with pytest.raises(ValueError, match=r"share a name: auditor A; rename one.*transfers name no translator: nobody; there are"):
        measure(other=clash, transfers=[("nobody", "auditor B")])
    with pytest.raises(ValueError, match=r"must be \(90, 2\) for the fit.*and \(31, 2\) for the test.*got \(90, 2\) and \(30, 2\)"):
        measure(attributes=replace(known(), test=known().test[:30]))
    with pytest.raises(ValueError, match="no such corruption: fog"):
        measure(corruptions=("fog",))
