"""Translators fitted on a split: scikit-learn's ridge, plain means, the same over processes; reference image scores."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from singreg.analysis.fitting import FittedTranslator, fit_all, fit_on_split, translator_agreement
from singreg.data.datasets import Splits
from singreg.ridge import DEFAULT_RIDGES
from singreg.translator import TranslatorInfo
from tests import toy
from tests.processes import run_same
from tests.reference import formulas

COUNT, UNLABELLED = 83, (3, 4)


def fitted(count: int = COUNT, *, batch_size: int = 4, **options: Any) -> FittedTranslator:
    split, settings = toy.ToySplit(count, unlabelled=UNLABELLED), replace(toy.QUIET, batch_size=batch_size)
    z = toy.embeddings(count)
    return fit_on_split(toy.classifier(), split, z, settings=settings, **options)


def as_arrays() -> tuple[np.ndarray, np.ndarray]:
    return toy.features(toy.classifier(), toy.ToySplit(COUNT)).numpy(), toy.embeddings(COUNT).astype(np.float64)


def scikit(f: np.ndarray, z: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression on features scaled by block, as (A, a) for the features as they are."""
    scale = formulas.block_scale(f, toy.classifier().weight)
    found = Ridge(alpha=ridge * (((f - f.mean(0)) @ scale) ** 2).sum() / f.shape[1]).fit(f @ scale, z)
    return found.coef_ @ scale, found.intercept_


def first_half(count: int) -> np.ndarray:
    """Fibonacci hashing of the places: of images in any regular order about every second."""
    return np.array([(place + 1) * 2654435761 % 2**32 < 2**31 for place in range(count)])


@pytest.mark.parametrize("turns", [2, 3, 10, 100])
def test_labels_that_take_turns_are_alike_in_both_halves(turns: int) -> None:
    first, labels = first_half(100 * turns), np.arange(100 * turns) % turns
    assert np.abs(np.bincount(labels, first) - 50).max() < 15


def test_the_fit_is_scikit_learns_with_the_ridge_on_which_two_halves_agree() -> None:
    f, z = as_arrays()
    whole = fitted(info=TranslatorInfo(vlm="toys"))
    got, scale = whole.translator, formulas.block_scale(f, toy.classifier().weight)
    first = first_half(COUNT)
    pair = [(f[half], z[half]) for half in (first, ~first)]
    scores = {ridge: formulas.agreement(pair, scale, ridge) for ridge in DEFAULT_RIDGES}
    best = max(scores, key=lambda ridge: math.prod(scores[ridge]))
    assert (got.info.ridge, got.info.images, got.info.vlm) == (best, COUNT, "toys")
    assert (got.info.validation_r2, got.info.agreement) == pytest.approx(scores[best], abs=1e-6)
    assert scores[best][0] > 0.5  # there was something to fit
    assert [int(half.count) for half in whole.halves] == [first.sum(), (~first).sum()]
    again = FittedTranslator.from_state(whole.state_dict(), got.info)
    sums = [each.statistics.state_dict() for each in (whole, again)]
    assert all(torch.equal(value, sums[1][name]) for name, value in sums[0].items())
    torch.testing.assert_close(again.statistics.ff.numpy(), f.T @ f, rtol=1e-5, atol=1e-5, check_dtype=False)
    for found, expected in zip((got.matrix, got.offset), scikit(f, z, best), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


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
    found, mean = fit_all(toy.classifier(), splits, z, ridge=0.1, settings=toy.QUIET)
    for name, split, key in (("fitted", bank, "bank"), ("auditor", audit, "audit")):
        alone = fit_on_split(toy.classifier(), split, z[key], ridges=(0.1,), settings=toy.QUIET)
        assert torch.equal(found[name].matrix, alone.translator.matrix)
    assert torch.equal(mean, alone.mean)
    agreement = translator_agreement(found["fitted"], found["auditor"], toy.texts())
    contrasts = (toy.texts() - toy.texts().mean(0)).double()
    one, other = (contrasts @ found[name].matrix.double() for name in ("fitted", "auditor"))
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(one, other, strict=True)]
    assert agreement == pytest.approx(np.mean(cosines))
