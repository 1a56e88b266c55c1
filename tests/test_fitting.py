"""Translators fitted on a split solve the normal equations, also over processes; what two half-auditors agree on."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.features import FittedTranslator, fit_on_split, translator_agreement
from singreg.analysis.scores import AUDITED, BUDGETS, CrossFit, figures, resampled_figures
from singreg.analysis.statistics import ends
from singreg.analysis.steering import steering_targets
from singreg.data.splits import Splits
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from singreg.setup import Setup, fit_translators
from singreg.translator import LinearTranslator, TranslatorInfo
from tests import toy
from tests.planted import CLASSES, DIM, WIDTH, Planted, plant
from tests.processes import run_same
from tests.reference import formulas

COUNT, UNLABELLED = 83, (3, 4)


def fitted(count: int = COUNT, *, batch_size: int = 4, **options: Any) -> FittedTranslator:
    split, settings = toy.ToySplit(count, unlabelled=UNLABELLED), replace(toy.QUIET, batch_size=batch_size)
    z = toy.embeddings(count)
    return fit_on_split(toy.classifier(), split, z, settings=settings, **options)


def slow_fit(f: Tensor, z: Tensor, ridge: float, scale: np.ndarray) -> tuple[Tensor, Tensor]:
    """(A, a) by the normal equations on features scaled by a symmetric map, for the features as they are."""
    matrix, offset = formulas.ridge(f.numpy() @ scale, z.numpy(), ridge)
    return torch.from_numpy(matrix @ scale), torch.from_numpy(offset)


def first_half(count: int) -> np.ndarray:
    """Fibonacci hashing of the places: of images in any regular order about every second."""
    return np.array([(place + 1) * 2654435761 % 2**32 < 2**31 for place in range(count)])


@pytest.mark.parametrize("turns", [2, 3, 10, 100])
def test_labels_that_take_turns_are_alike_in_both_halves(turns: int) -> None:
    first, labels = first_half(100 * turns), np.arange(100 * turns) % turns
    assert np.abs(np.bincount(labels, first) - 50).max() < 15


def test_the_fit_is_the_normal_equations_with_the_ridge_on_which_two_halves_agree(tmp_path: Path) -> None:
    features, z = toy.features(toy.classifier(), toy.ToySplit(COUNT)), toy.embeddings(COUNT).astype(np.float64)
    whole = fitted(info=TranslatorInfo(vlm="toys"))
    got, f = whole.translator, features.numpy()
    scale = formulas.block_scale(f, toy.classifier().weight)
    first = first_half(COUNT)
    pair = [(f[half], z[half]) for half in (first, ~first)]
    scores = {ridge: formulas.agreement(pair, scale, ridge) for ridge in DEFAULT_RIDGES}
    best = max(scores, key=lambda ridge: math.prod(scores[ridge]))
    assert (got.info.ridge, got.info.images, got.info.vlm) == (best, COUNT, "toys")
    assert (got.info.validation_r2, got.info.agreement) == pytest.approx(scores[best], abs=1e-6)
    assert scores[best][0] > 0.5  # there was something to fit
    assert [int(half.count) for half in whole.halves] == [first.sum(), (~first).sum()]
    whole.save(tmp_path / "fitted.safetensors")
    again = FittedTranslator.load(tmp_path / "fitted.safetensors", torch.device("cpu"))
    assert again.translator.info == got.info
    assert torch.equal(again.mean, whole.mean)
    assert torch.equal(again.halves[0].ff, whole.halves[0].ff)
    sums = [each.statistics.state_dict() for each in (whole, again)]
    assert all(torch.equal(value, sums[1][name]) for name, value in sums[0].items())
    torch.testing.assert_close(again.statistics.ff.numpy(), f.T @ f, rtol=1e-5, atol=1e-5, check_dtype=False)
    slow = slow_fit(features, torch.from_numpy(z), best, scale)
    torch.testing.assert_close((got.matrix, got.offset), slow, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_batch_size_does_not_matter_and_bad_input_is_refused() -> None:
    one, all_ = (fitted(batch_size=size).translator.matrix for size in (1, 64))
    torch.testing.assert_close(one, all_, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fit_on_split(toy.classifier(), toy.ToySplit(3), toy.embeddings(3), settings=toy.QUIET)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_fit_what_one_fits(world: int) -> None:
    expected = fitted()
    for found in run_same(world, fitted):
        torch.testing.assert_close(found.translator.matrix, expected.translator.matrix, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.mean, expected.mean)
        assert (found.translator.info.images, found.translator.info.ridge) == (COUNT, expected.translator.info.ridge)


def test_the_two_translators_of_a_measurement_come_from_bank_and_audit() -> None:
    bank, audit = toy.ToySplit(60), toy.ToySplit(50, seed=1)
    splits = Splits(bank, bank, audit, audit, toy.NAMES, None)
    z = {"bank": toy.embeddings(60), "audit": toy.embeddings(50, 1)}
    vlm: Any = SimpleNamespace(tag="", weights_hash="", preprocessing={})
    setup = Setup(splits, toy.classifier(), vlm, toy.texts(), z, toy.QUIET)
    found, mean, sums = fit_translators(setup, 0.1)
    for name, split, key in (("fitted", bank, "bank"), ("auditor", audit, "audit")):
        alone = fit_on_split(toy.classifier(), split, z[key], ridges=(0.1,), settings=toy.QUIET)
        assert torch.equal(found[name].matrix, alone.translator.matrix)
    assert torch.equal(mean, alone.mean)
    covariance = torch.cov(toy.features(toy.classifier(), bank).T)
    torch.testing.assert_close(sums.centred()[0] / (sums.count - 1), covariance, atol=1e-6, rtol=1e-5)
    agreement = translator_agreement(found["fitted"], found["auditor"], toy.texts())
    contrasts = (toy.texts() - toy.texts().mean(0)).double()
    one, other = (contrasts @ found[name].matrix.double() for name in ("fitted", "auditor"))
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(one, other, strict=True)]
    assert agreement == pytest.approx(np.mean(cosines))


def split(bank: Planted) -> list[Planted]:
    """Two halves of a bank, with the same classes in both."""
    first = torch.arange(len(bank.labels)) // CLASSES % 2 == 0
    parts = [(bank.features[k], bank.embeddings[k], bank.labels[k]) for k in (first, ~first)]
    return [Planted(*part, bank.weight, bank.texts) for part in parts]


def auditor(bank: Planted, ridge: float) -> FittedTranslator:
    halves = [RidgeStatistics(WIDTH, DIM).update(p.features, p.embeddings) for p in split(bank)]
    whole = halves[0] + halves[1]
    translator = LinearTranslator.from_solution(whole.solve(ridge, standardize=bank.space.basis))
    return FittedTranslator(translator, bank.features.mean(0), (halves[0], halves[1]))


def read(crossfit: CrossFit, images: Planted) -> dict[str, Tensor]:
    parts = [crossfit.read(batch) for batch in images.batches(64)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_every_column_is_the_slow_one() -> None:
    bank, test, ridge = plant("leakage", seed=1, count=200), plant("leakage", seed=2, count=24), 0.1
    got = read(CrossFit(auditor(bank, ridge), bank.texts, bank.space), test)
    assert set(got) == AUDITED
    halves = split(bank)
    scales = [formulas.block_scale(part.features.numpy(), bank.weight) for part in (*halves, bank)]
    given = zip((*halves, bank), scales, strict=True)
    translators = [slow_fit(part.features, part.embeddings, ridge, scale) for part, scale in given]
    for maps in (scales, [bank.space.basis.numpy()] * 3):  # what predicts best: of f, of Π_p f
        pair = [(part.features.numpy() @ maps[place], part.embeddings.numpy()) for place, part in enumerate(halves)]
        best = max(DEFAULT_RIDGES, key=lambda r: formulas.held_out_r2(*pair, r))
        matrix, offset = formulas.ridge(bank.features.numpy() @ maps[2], bank.embeddings.numpy(), best)
        translators.append((torch.from_numpy(matrix @ maps[2].T), torch.from_numpy(offset)))
    targets = steering_targets(test.labels, torch.arange(24), CLASSES)
    for place in range(24):
        image = (test.features[place], test.embeddings[place], int(test.labels[place]), int(targets[place]))
        slow = formulas.audited(*image, translators, bank.texts, bank.weight, bank.features, bank.embeddings)
        assert {name: float(values[place]) for name, values in got.items()} == pytest.approx(slow, rel=1e-4, abs=1e-6)
    for name in ("cross 2 sd", "cross 10% of |f|", "self 25% of |f|"):  # the outcomes were of both kinds
        assert 0 < float(got[name].mean()) < 1


def success(case: str, count: int) -> tuple[dict[str, float], float, dict[str, list[float]]]:
    """Shares of steered images by kind and budget, that without a step, and the figures."""
    bank, test = plant(case, seed=1, count=count), plant(case, seed=2, count=400)
    crossfit = CrossFit(auditor(bank, 0.01), bank.texts, bank.space)
    rows = {name: values.numpy() for name, values in read(crossfit, test).items()}
    targets = steering_targets(test.labels, torch.arange(400), CLASSES)
    unmoved = [(normalize(half(test.features), dim=1) @ test.texts.T).argmax(1) == targets for half in crossfit.halves]
    drawn = resampled_figures(rows, test.labels.numpy())
    found, intervals = {}, {}
    for name, value in figures({name: rows[name].mean() for name in rows}).items():
        found[name], *intervals[name] = ends(drawn[name])
        assert found[name] == pytest.approx(float(value))
    return found, float(torch.stack(unmoved).double().mean()), intervals


def test_a_step_along_the_attacked_auditors_errors_convinces_no_other() -> None:
    """The null space holds nothing: the truth is that no null step changes what an image means."""
    few, rate, intervals = success("nothing", 120)
    assert few["self 4 sd"] > 0.45
    assert few["self 25% of |f|"] > 5 * rate
    for budget in BUDGETS:
        assert few[f"cross {budget}"] == pytest.approx(rate, abs=0.03)
    low, high = intervals["cross 4 sd"]
    assert low < rate < high < few["self 4 sd"] / 2
    # The control: what the null does hold convinces both, and more images leave less error to follow.
    leaking, rate, _ = success("leakage", 3000)
    assert leaking["cross 4 sd"] > max(0.5, 5 * rate)
    assert leaking["cross 4 sd"] == pytest.approx(leaking["self 4 sd"], abs=0.1)
    many, _, _ = success("nothing", 3000)
    assert many["self 4 sd"] < 0.1 * few["self 4 sd"]
    for name in ("class_variance", "unique_r2"):
        assert abs(many[name]) < 0.02 < 0.1 < leaking[name]
