"""Translators fitted on a part: scikit-learn's ridge, plain means, the same over processes; the reference image scores."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from singreg.analysis.old_fitting import VALIDATION_EVERY, FittedTranslator, fit_on_part, reference_image_scores, refit
from singreg.ridge import DEFAULT_RIDGES
from singreg.translator import TranslatorInfo
from tests.analysis import in_processes, toy
from tests.analysis.in_processes import UNLABELLED
from tests.processes import run_processes
from tests.reference import formulas

COUNT = 83


def fitted(count: int = COUNT, *, batch_size: int = 4, **options: object) -> FittedTranslator:
    part = toy.ToyPart(count, unlabelled=UNLABELLED)
    settings = replace(toy.QUIET, batch_size=batch_size)
    return fit_on_part(toy.classifier(), part, toy.embeddings(count), settings=settings, **options)  # type: ignore[arg-type]


def as_arrays(count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    return toy.features(toy.classifier(), toy.ToyPart(count)).numpy(), toy.embeddings(count).astype(np.float64)


def scikit(f: np.ndarray, z: np.ndarray, ridge: float) -> Ridge:
    return Ridge(alpha=ridge * ((f - f.mean(0)) ** 2).sum() / f.shape[1]).fit(f, z)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_fit_is_scikit_learns_with_the_ridge_that_every_fifth_picture_chooses(normalize: bool) -> None:
    f, z = as_arrays()
    if normalize:
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
    info = TranslatorInfo(vlm="toys", normalized_targets=normalize)
    got = fitted(normalize_targets=normalize, info=info).translator
    held_out = np.arange(COUNT) % VALIDATION_EVERY == 0
    scores = {}
    for ridge in DEFAULT_RIDGES:
        error = scikit(f[~held_out], z[~held_out], ridge).predict(f[held_out]) - z[held_out]
        scores[ridge] = 1 - (error**2).sum() / ((z[held_out] - z[held_out].mean(0)) ** 2).sum()
    best = max(scores, key=scores.__getitem__)
    assert got.info.ridge == best
    assert got.info.validation_r2 == pytest.approx(scores[best], abs=1e-6)
    assert got.info.images == COUNT
    assert got.info.vlm == "toys"
    oracle = scikit(f, z, best)
    np.testing.assert_allclose(got.matrix.numpy(), oracle.coef_, atol=1e-5)
    np.testing.assert_allclose(got.offset.numpy(), oracle.intercept_, atol=1e-5)
    slow, offset = formulas.ridge(f, z, best)
    np.testing.assert_allclose(got.matrix.numpy(), slow, atol=1e-5)
    np.testing.assert_allclose(got.offset.numpy(), offset, atol=1e-5)
    assert scores[best] > 0.5  # there was something to fit


def test_a_standardised_fit_is_the_plain_one_on_standardised_features() -> None:
    f, z = as_arrays()
    got = fitted(standardize=True, ridges=(0.3,)).translator
    assert got.info.standardized
    scale = f.std(0)
    slow, offset = formulas.ridge(f / scale, z, 0.3)
    np.testing.assert_allclose(got.matrix.numpy(), slow / scale, atol=1e-5)
    np.testing.assert_allclose(got.offset.numpy(), offset, atol=1e-5)
    assert np.abs(fitted(ridges=(0.3,)).translator.matrix.numpy() - slow / scale).max() > 1e-3


def test_means_are_plain_means_and_a_class_without_pictures_has_none() -> None:
    f, _ = as_arrays()
    got = fitted()
    labels = toy.ToyPart(COUNT, unlabelled=UNLABELLED).labels
    np.testing.assert_allclose(got.mean.numpy(), f.mean(0), atol=1e-6)  # unlabelled pictures have features too
    for label in range(toy.CLASSES):
        np.testing.assert_allclose(got.class_means[label].numpy(), f[labels == label].mean(0), atol=1e-6)
    few = toy.ToyPart(12, classes=toy.CLASSES - 1)
    means = fit_on_part(toy.classifier(), few, toy.embeddings(12), settings=toy.QUIET, ridges=(1.0,)).class_means
    assert torch.isnan(means).all(1).tolist() == [False] * (toy.CLASSES - 1) + [True]


def test_batch_size_does_not_matter() -> None:
    torch.testing.assert_close(fitted(batch_size=1).translator.matrix, fitted(batch_size=64).translator.matrix, atol=1e-5, rtol=1e-5)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fit_on_part(toy.classifier(), toy.ToyPart(4), toy.embeddings(4), settings=toy.QUIET)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_fit_what_one_fits_with_the_exact_count(world: int) -> None:
    expected = fitted(COUNT, standardize=True)
    for matrix, mean, class_means, info in run_processes(world, in_processes.fit, COUNT):
        torch.testing.assert_close(matrix, expected.translator.matrix, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mean, expected.mean)
        torch.testing.assert_close(class_means, expected.class_means)
        assert info.images == COUNT
        assert info.ridge == expected.translator.info.ridge


def test_refit_keeps_the_ridge_and_the_kind_of_fit_and_follows_the_features() -> None:
    first = fitted(standardize=True, normalize_targets=True, info=TranslatorInfo(vlm="toys", normalized_targets=True)).translator
    part, z = toy.ToyPart(COUNT, unlabelled=UNLABELLED), toy.embeddings(COUNT)
    again = refit(toy.classifier(), part, z, first, settings=toy.QUIET)
    torch.testing.assert_close(again.matrix, first.matrix, atol=1e-6, rtol=1e-5)
    assert replace(again.info, validation_r2=None) == replace(first.info, validation_r2=None)
    other = toy.classifier(seed=5)
    moved = refit(other, part, z, first, settings=toy.QUIET)
    f = toy.features(other, part).numpy()
    target = z / np.linalg.norm(z, axis=1, keepdims=True)
    slow, _ = formulas.ridge(f / f.std(0), target.astype(np.float64), first.info.ridge)
    np.testing.assert_allclose(moved.matrix.numpy(), slow / f.std(0), atol=1e-5)


def slow_reference(per_class: int, fit: FittedTranslator, part: toy.ToyPart) -> list[float]:
    """Mean angle of the centred removal over each class's first pictures, picture by picture."""
    f = toy.features(toy.classifier(), part)
    project = formulas.null_projector(toy.classifier().weight)
    matrix, offset = fit.translator.matrix.double(), fit.translator.offset.double()
    found: list[list[float]] = [[] for _ in range(toy.CLASSES)]
    for feature, label in zip(f, part.labels.tolist(), strict=True):
        if label >= 0 and len(found[label]) < per_class:
            removed = feature - project @ (feature - fit.mean.double())
            found[label].append(float(formulas.angle_degrees(matrix @ feature + offset, matrix @ removed + offset)))
    return [float(np.mean(scores)) if scores else math.nan for scores in found]


@pytest.mark.parametrize("per_class", [1, 4, 100])
def test_reference_image_scores_are_the_slow_means_of_each_classes_first_pictures(per_class: int) -> None:
    fit, part = fitted(), toy.ToyPart(COUNT, unlabelled=UNLABELLED)
    got = reference_image_scores(toy.classifier(), part, toy.embeddings(COUNT), fit, per_class=per_class, settings=toy.QUIET)
    assert got.tolist() == pytest.approx(slow_reference(per_class, fit, part), abs=1e-3)
    assert (got > 5).all()


@pytest.mark.parametrize(("world", "count"), [(2, 11), (3, 2)], ids=["odd over 2", "one idle of 3"])
def test_reference_image_scores_over_processes_are_those_of_one(world: int, count: int) -> None:
    expected = in_processes.reference(0, 1, count)
    assert torch.isnan(expected).tolist() == [label >= count for label in range(toy.CLASSES)]
    for got in run_processes(world, in_processes.reference, count):
        torch.testing.assert_close(got, expected, equal_nan=True)
