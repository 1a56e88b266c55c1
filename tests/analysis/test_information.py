"""Unique information and the class probe against scikit-learn on whole arrays; what they must not be fooled by; processes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from singreg.analysis.fitting import VALIDATION_EVERY
from singreg.analysis.information import fit_blocks, measure_information
from singreg.analysis.information_results import BLOCKS, UniqueInformation
from singreg.analysis.probe import fit_probe, one_hot
from singreg.nullspace import NullSpace
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from tests.analysis.planted import CLASSES, DIM, Planted, plant
from tests.processes import run_processes

FIT, TEST = 403, 101


def parts(case: str = "leakage", *, unlabelled: bool = True) -> tuple[Planted, Planted]:
    fit, test = plant(case, seed=1, count=FIT), plant(case, seed=2, count=TEST)
    if unlabelled:
        fit, test = (replace(part, labels=torch.where(torch.arange(len(part.labels)) % 7 == 3, -1, part.labels)) for part in (fit, test))
    return fit, test


def measured(fit: Planted, test: Planted, *, size: int = 50, rank: int = 0, world: int = 1, **options: object) -> UniqueInformation:
    fits = fit_blocks(fit.batches(size, rank, world), null_space=fit.space, classes=CLASSES, target_dim=DIM, **options)  # type: ignore[arg-type]
    return measure_information(test.batches(size, rank, world), fits, resamples=100)


def coordinates(part: Planted, like: Planted) -> dict[str, np.ndarray]:
    """f, Π_p f and Π_n f in coordinates; of f both blocks, each over its root mean variance in `like`."""
    row, null = part.space.basis, part.space.null_basis()
    level = [float((like.features @ basis).var(dim=0, correction=0).mean().sqrt()) for basis in (row, null)]
    both = torch.cat([part.features @ row / level[0], part.features @ null / level[1]], dim=1)
    return dict(zip(BLOCKS, (value.numpy() for value in (both, part.features @ row, part.features @ null)), strict=True))


def scikit(x: np.ndarray, y: np.ndarray, ridge: float) -> Ridge:
    return Ridge(alpha=ridge * ((x - x.mean(0)) ** 2).sum() / x.shape[1]).fit(x, y)


def r2(x: np.ndarray, y: np.ndarray, model: Ridge) -> float:
    return float(1 - ((model.predict(x) - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


@pytest.mark.parametrize("normalize", [False, True])
def test_r2_of_every_block_is_scikit_learns(normalize: bool) -> None:
    fit, test = parts()
    found = measured(fit, test, normalize_targets=normalize)
    z, held = (torch.nn.functional.normalize(p.embeddings) if normalize else p.embeddings for p in (fit, test))
    validation = np.arange(FIT) % VALIDATION_EVERY == 0
    expected = {}
    for name, x in coordinates(fit, fit).items():
        tried = {ridge: scikit(x[~validation], z[~validation].numpy(), ridge) for ridge in DEFAULT_RIDGES}
        scores = {ridge: r2(x[validation], z[validation].numpy(), model) for ridge, model in tried.items()}
        best = max(scores, key=scores.__getitem__)
        assert found.ridges[f"r2 {name}"] == best
        expected[name] = r2(coordinates(test, fit)[name], held.numpy(), scikit(x, z.numpy(), best))
    assert found.r2 == pytest.approx(expected, abs=1e-8)
    assert found.unique == pytest.approx(expected["features"] - expected["row_space"], abs=1e-8)
    assert (found.images, found.fit_images) == (TEST, FIT)


def test_the_probe_is_scikit_learns_discriminant() -> None:
    """Without a penalty: the same scores up to what all classes share, so the same classes."""
    fit, test = parts(unlabelled=False)
    statistics = RidgeStatistics(40, CLASSES).update(fit.features, one_hot(fit.labels, CLASSES))
    probe = fit_probe(statistics, ridge=0.0)
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(fit.features.numpy(), fit.labels.numpy())
    mine = (test.features @ probe.matrix.T + probe.offset).numpy()
    theirs = oracle.decision_function(test.features.numpy())
    np.testing.assert_allclose(mine - mine.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=1e-8)
    # With a penalty: shrinking the within-class covariance towards a multiple of the identity, which scikit-learn takes as given.
    ridge = 0.5
    means = np.stack([fit.features[fit.labels == c].numpy().mean(0) for c in range(CLASSES)])
    centred = fit.features.numpy() - means[fit.labels.numpy()]
    total = ((fit.features - fit.features.mean(0)) ** 2).sum() / 40
    covariance = (centred.T @ centred + ridge * float(total) * np.eye(40)) / FIT
    slow = test.features.numpy() @ np.linalg.solve(covariance, means.T) - (means @ np.linalg.solve(covariance, means.T)).diagonal() / 2
    slow = slow + np.log(np.bincount(fit.labels.numpy()) / FIT)
    shrunk = fit_probe(statistics, ridge)
    np.testing.assert_allclose((test.features @ shrunk.matrix.T + shrunk.offset).numpy(), slow, atol=1e-8)


def test_accuracies_and_chance_are_plain_shares_of_the_labelled() -> None:
    fit, test = parts()
    found = measured(fit, test)
    known, held = fit.labels >= 0, test.labels >= 0
    for name in BLOCKS:
        x, fresh = (torch.from_numpy(coordinates(part, fit)[name]) for part in (fit, test))
        statistics = RidgeStatistics(x.shape[1], CLASSES).update(x[known], one_hot(fit.labels[known], CLASSES))
        probe = fit_probe(statistics, found.ridges[f"accuracy {name}"])
        share = float((probe.predict(fresh[held]) == test.labels[held]).double().mean())
        assert found.accuracy[name] == pytest.approx(share, abs=1e-12)
        low, high = found.intervals[f"accuracy {name}"]
        assert low <= share <= high
    majority = int(torch.bincount(fit.labels[known]).argmax())
    assert found.chance == pytest.approx(float((test.labels[held] == majority).double().mean()))
    assert found.unique_accuracy == pytest.approx(found.accuracy["features"] - found.accuracy["row_space"])
    assert (found.labelled, found.fit_labelled, found.unseen) == (int(held.sum()), int(known.sum()), 0)
    assert found.chance < 0.3 < found.accuracy["null_space"]


def test_a_class_between_others_is_named_by_the_probe_and_masked_in_a_regression() -> None:
    """Why the probe is a discriminant: with fewer dimensions than classes, least squares never names the one in the middle."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    f = labels[:, None].double() + 0.1 * torch.randn(300, 1, generator=g, dtype=torch.float64)
    statistics = RidgeStatistics(1, 3).update(f, one_hot(labels, 3))
    regression = statistics.solve(1e-6)
    masked = (f @ regression.matrix.T + regression.offset).argmax(1)
    assert float((masked == labels).double().mean()) < 0.7
    assert float((fit_probe(statistics, 1e-6).predict(f) == labels).double().mean()) > 0.99


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_shrinking_or_turning_the_null_space_changes_nothing(factor: float) -> None:
    fit, test = parts()
    null = fit.space.null_basis()
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    warp = torch.eye(40).double() - null @ null.T + factor * null @ turn @ null.T
    first, second = measured(fit, test), measured(*(replace(p, features=p.features @ warp.T) for p in (fit, test)))
    assert second.r2 == pytest.approx(first.r2, abs=1e-6)
    assert second.accuracy == pytest.approx(first.accuracy, abs=1e-12)


def test_classes_never_seen_are_counted_and_never_named() -> None:
    fit, test = parts(unlabelled=False)
    fit = replace(fit, labels=torch.where(fit.labels == 2, -1, fit.labels))
    found = measured(fit, test)
    assert found.unseen == int((test.labels == 2).sum()) > 0
    assert found.accuracy["row_space"] <= 1 - found.unseen / found.labelled
    statistics = RidgeStatistics(40, CLASSES).update(fit.features[fit.labels >= 0], one_hot(fit.labels[fit.labels >= 0], CLASSES))
    assert 2 not in fit_probe(statistics, 0.1).predict(test.features)


def test_mapped_statistics_are_those_of_mapped_features() -> None:
    fit, _ = parts()
    basis = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = RidgeStatistics(40, DIM).update(fit.features, fit.embeddings).mapped(basis)
    theirs = RidgeStatistics(6, DIM).update(fit.features @ basis, fit.embeddings)
    for left, right in zip(mine._sums(), theirs._sums(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-8)


def test_json_round_trip() -> None:
    found = measured(*parts())
    assert UniqueInformation.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def _in_process(rank: int, world: int) -> UniqueInformation:
    torch.set_num_threads(1)
    return measured(*parts(), rank=rank, world=world)


@pytest.mark.parametrize("world", [2, 3])
def test_over_processes_it_is_the_same(world: int) -> None:
    expected = measured(*parts()).to_json()
    for found in run_processes(world, _in_process):
        mine = found.to_json()
        for name, value in expected.items():
            if name == "intervals":
                for key, bounds in value.items():
                    assert mine[name][key] == pytest.approx(bounds, abs=1e-6), key
            else:
                assert mine[name] == pytest.approx(value, abs=1e-8), name


def test_bad_input_is_named() -> None:
    fit, test = parts()
    nowhere = replace(fit, labels=torch.full_like(fit.labels, -1))
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        measured(nowhere, test)
    one = replace(fit, labels=torch.zeros_like(fit.labels))
    with pytest.raises(ValueError, match="at least 2 classes, got 1 of 8"):
        measured(one, test)
    with pytest.raises(ValueError, match="none of the 101 pictures has a label"):
        measured(fit, replace(test, labels=torch.full_like(test.labels, -1)))
    full = NullSpace.from_weight(torch.eye(4), allow_empty=True)
    with pytest.raises(ValueError, match="no null space"):
        fit_blocks([], null_space=full, classes=2, target_dim=2)
