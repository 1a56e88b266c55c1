"""Unique information against the normal equations, the class probe against scikit-learn; planted truths, processes."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn.functional import one_hot

from singreg.analysis.probes import BLOCKS, VALIDATION_EVERY, BlockFits, fit_blocks, fit_probe, measure_information
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from tests.planted import CLASSES, DIM, WIDTH, Planted, plant
from tests.processes import run_same
from tests.recipe_run import same
from tests.reference import formulas

FIT, TEST = 403, 101


@cache
def parts(unlabelled: bool = True) -> tuple[Planted, Planted]:
    both = plant("leakage", seed=1, count=FIT), plant("leakage", seed=2, count=TEST)
    if not unlabelled:
        return both
    fit, test = (replace(p, labels=torch.where(torch.arange(len(p.labels)) % 7 == 3, -1, p.labels)) for p in both)
    return fit, test


def fitted(fit: Planted) -> BlockFits:
    return fit_blocks(fit.batches(50), null_space=fit.space, classes=CLASSES, target_dim=DIM)


def measured(fit: Planted, test: Planted) -> dict[str, Any]:
    return measure_information(test.batches(50), fitted(fit))


def coordinates(part: Planted, like: Planted) -> dict[str, np.ndarray]:
    """f, Π_p f and Π_n f in coordinates; of f both blocks, each over its root mean variance in `like`."""
    row, null = part.space.basis, part.space.null_basis()
    level = [float((like.features @ basis).var(dim=0, correction=0).mean().sqrt()) for basis in (row, null)]
    both = torch.cat([part.features @ row / level[0], part.features @ null / level[1]], dim=1)
    blocks = (both, part.features @ row, part.features @ null)
    return dict(zip(BLOCKS, (value.numpy() for value in blocks), strict=True))


def test_r2_of_every_block_is_that_of_the_normal_equations() -> None:
    fit, test = parts()
    found = measured(fit, test)
    z, held_out, expected = fit.embeddings.numpy(), np.arange(FIT) % VALIDATION_EVERY == 0, dict[str, float]()
    for name, x in coordinates(fit, fit).items():
        pair = [(x[rows], z[rows]) for rows in (~held_out, held_out)]
        best = max(DEFAULT_RIDGES, key=partial(formulas.held_out_r2, *pair))
        expected[name] = formulas.held_out_r2((x, z), (coordinates(test, fit)[name], test.embeddings.numpy()), best)
    assert found["r2"] == pytest.approx(expected, abs=1e-8)
    assert found["unique"] == pytest.approx(expected["features"] - expected["row_space"], abs=1e-8)


def test_the_probe_is_scikit_learns_discriminant() -> None:
    """Without a penalty the same scores up to what all classes share; with one, a shrunk within-class covariance."""
    fit, test = parts(unlabelled=False)
    statistics = RidgeStatistics(WIDTH, CLASSES).update(fit.features, one_hot(fit.labels, CLASSES))
    x, y, fresh = fit.features.numpy(), fit.labels.numpy(), test.features.numpy()
    probes = [fit_probe(statistics, ridge) for ridge in (0.0, 0.5)]
    mine, shrunk = ((test.features @ probe.matrix.T + probe.offset).numpy() for probe in probes)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y).decision_function(fresh)
    np.testing.assert_allclose(mine - mine.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=1e-8)
    means = np.stack([x[y == c].mean(0) for c in range(CLASSES)])
    centred, total = x - means[y], ((x - x.mean(0)) ** 2).sum() / WIDTH
    solved = np.linalg.solve((centred.T @ centred + 0.5 * total * np.eye(WIDTH)) / FIT, means.T)
    slow = fresh @ solved - (means @ solved).diagonal() / 2 + np.log(np.bincount(y) / FIT)
    np.testing.assert_allclose(shrunk, slow, atol=1e-8)


def test_accuracies_and_chance_are_plain_shares_of_the_labelled() -> None:
    fit, test = parts()
    found, fits = measured(fit, test), fitted(fit)
    known, held = fit.labels >= 0, test.labels >= 0
    for name in BLOCKS:
        x, fresh = (torch.from_numpy(coordinates(part, fit)[name]) for part in (fit, test))
        statistics = RidgeStatistics(x.shape[1], CLASSES).update(x[known], one_hot(fit.labels[known], CLASSES))
        probe = fit_probe(statistics, fits.probes[name].ridge)
        share = float((probe.predict(fresh[held]) == test.labels[held]).double().mean())
        assert found["accuracy"][name] == pytest.approx(share, abs=1e-12)
        low, high = found["intervals"][f"accuracy {name}"]
        assert low <= share <= high
    majority = int(torch.bincount(fit.labels[known]).argmax())
    assert found["chance"] == pytest.approx(float((test.labels[held] == majority).double().mean()))
    assert found["unique_accuracy"] == found["accuracy"]["features"] - found["accuracy"]["row_space"]
    assert found["chance"] < 0.3 < found["accuracy"]["null_space"]


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_shrinking_or_turning_the_null_space_changes_nothing(factor: float) -> None:
    fit, test = parts()
    null, g = fit.space.null_basis(), torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=g, dtype=torch.float64)).Q
    warp = torch.eye(WIDTH).double() - null @ null.T + factor * null @ turn @ null.T
    first, second = measured(fit, test), measured(*(replace(p, features=p.features @ warp.T) for p in (fit, test)))
    assert second["r2"] == pytest.approx(first["r2"], abs=1e-6)
    assert second["accuracy"] == pytest.approx(first["accuracy"], abs=1e-12)


def test_classes_never_seen_are_never_named() -> None:
    fit, test = parts(unlabelled=False)
    fit = replace(fit, labels=torch.where(fit.labels == 2, -1, fit.labels))
    found = measured(fit, test)
    unseen = float((test.labels == 2).double().mean())
    assert 0 < found["accuracy"]["row_space"] <= 1 - unseen < 1
    known = fit.labels >= 0
    statistics = RidgeStatistics(WIDTH, CLASSES).update(fit.features[known], one_hot(fit.labels[known], CLASSES))
    assert 2 not in fit_probe(statistics, 0.1).predict(test.features)


@pytest.mark.parametrize("world", [2, 3])
def test_over_processes_it_is_the_same(world: int) -> None:
    expected = measured(*parts())
    for found in run_same(world, measured, *parts()):
        same(found, expected, rel=1e-8, abs=1e-6)


@pytest.mark.parametrize(("label", "words"), [(-1, "at least 2 images, got 0"), (0, "at least 2 classes, got 1 of 8")])
def test_labels_that_fit_no_probe_are_refused(label: int, words: str) -> None:
    fit, test = parts()
    with pytest.raises(ValueError, match=words):
        measured(replace(fit, labels=torch.full_like(fit.labels, label)), test)
