"""Streamed ridge against scikit-learn and the normal equations; merging, λ by validation, invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from singreg.ridge import RidgeStatistics
from tests.reference import formulas


def data(count: int = 300, width: int = 12, dim: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(count, width, generator=generator, dtype=torch.float64) @ torch.diag(torch.logspace(-2, 1, width).double())
    z = (f + 3) @ torch.randn(width, dim, generator=generator, dtype=torch.float64)
    return f + 3, z + torch.randn(count, dim, generator=generator, dtype=torch.float64)


def statistics(f: torch.Tensor, z: torch.Tensor) -> RidgeStatistics:
    return RidgeStatistics(f.shape[1], z.shape[1]).update(f, z)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0, 30.0])
def test_solution_is_scikit_learns(ridge: float) -> None:
    f, z = data()
    solution = statistics(f, z).solve(ridge)
    penalty = ridge * float(((f - f.mean(0)) ** 2).sum()) / f.shape[1]
    oracle = Ridge(alpha=max(penalty, 1e-12)).fit(f.numpy(), z.numpy())
    np.testing.assert_allclose(solution.matrix.numpy(), oracle.coef_, atol=1e-8)
    np.testing.assert_allclose(solution.offset.numpy(), oracle.intercept_, atol=1e-7)
    slow = formulas.ridge(f.numpy(), z.numpy(), ridge)
    np.testing.assert_allclose(solution.matrix.numpy(), slow[0], atol=1e-8)
    path = statistics(f, z).path().solve(ridge)
    torch.testing.assert_close(path.matrix, solution.matrix, atol=1e-8, rtol=1e-6)


def test_batches_order_and_merge_do_not_matter() -> None:
    f, z = data()
    whole = statistics(f, z)
    parts = statistics(f[200:], z[200:]).merge(statistics(f[:1], z[:1])).merge(statistics(f[1:200], z[1:200]))
    torch.testing.assert_close(parts.solve(0.1).matrix, whole.solve(0.1).matrix)
    assert int(parts.count) == 300


@pytest.mark.parametrize("width", [3, 256, 300, 515])
def test_half_of_the_gram_matrix_is_summed_and_mirrored_when_looked_at(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    f = torch.randn(1300, width, generator=generator, dtype=torch.float64)
    z = torch.randn(1300, 2, generator=generator, dtype=torch.float64)
    sums = RidgeStatistics(width, 2)
    other = RidgeStatistics(width, 2).update(f[1200:], z[1200:])
    for start, stop in ((0, 600), (600, 640), (640, 1200)):
        sums.update(f[start:stop], z[start:stop])
        if stop == 640:
            torch.testing.assert_close(sums.ff, f[:640].T @ f[:640], atol=1e-9, rtol=0)  # looked at in between
    sums.merge(other).decay(0.5).decay(0.5).merge(RidgeStatistics(width, 2))
    kept = RidgeStatistics(width, 2)
    kept.load_state_dict(sums.state_dict())
    assert torch.equal(kept.ff, sums.ff)
    f, z = f / 2, z / 2
    torch.testing.assert_close(sums.ff, f.T @ f, atol=1e-9, rtol=0)
    torch.testing.assert_close(sums.fz, f.T @ z, atol=1e-9, rtol=0)
    torch.testing.assert_close(sums.ff, sums.ff.T, atol=1e-11, rtol=0)


def test_float32_batches_are_summed_in_float64() -> None:
    """Trap 9: float32 Gram sums are 2e-4 off."""
    f, z = (x.float() for x in data(4000))
    exact = statistics(f.double(), z.double()).solve(1e-4).matrix
    assert (statistics(f, z).solve(1e-4).matrix - exact).abs().max() < 1e-10
    gram = (f.T @ f).double()  # the control
    assert (gram - f.double().T @ f.double()).abs().max() > 1e-6


@pytest.mark.parametrize("standardize", [False, True])
def test_residuals_of_the_whole_path_are_those_of_its_solutions(standardize: bool) -> None:
    (f, z), (held_f, held_z) = data(), data(seed=1)
    f, held_f = torch.cat([f, f[:, :1]], 1), torch.cat([held_f, held_f[:, :1]], 1)  # one direction has no variance of its own
    path, held_out = statistics(f, z).path(standardize=standardize), statistics(held_f, held_z)
    ridges = [0.0, 1e-6, 0.1, 10.0]
    expected = [held_out.residual(path.solve(ridge)) for ridge in ridges]
    assert path.residuals(held_out, ridges) == pytest.approx(expected, rel=1e-8)
    assert max(expected) > 1.01 * min(expected)


def test_residual_from_sums_is_the_residual_of_the_images() -> None:
    f, z = data()
    held_f, held_z = data(seed=1)
    solution = statistics(f, z).solve(0.5)
    error = held_z - held_f @ solution.matrix.T - solution.offset
    expected = float((error**2).sum() / ((held_z - held_z.mean(0)) ** 2).sum())
    assert statistics(held_f, held_z).residual(solution) == pytest.approx(expected, rel=1e-9)


def test_validation_picks_the_ridge_with_the_best_held_out_r2() -> None:
    f, z = data(40, 30)
    held_f, held_z = data(200, 30, seed=1)
    best, scores = statistics(f, z).validate(statistics(held_f, held_z))
    assert best.ridge == max(scores, key=scores.__getitem__)
    assert scores[best.ridge] > scores[min(scores)]  # little data: no penalty is worse than some
    for ridge, score in scores.items():
        assert 1 - statistics(held_f, held_z).residual(statistics(f, z).solve(ridge)) == pytest.approx(score, abs=1e-7)


def test_standardised_fit_ignores_feature_scale_and_the_plain_one_does_not() -> None:
    f, z = data()
    scale = torch.logspace(-2, 2, f.shape[1], dtype=torch.float64)
    for standardize, moved in ((True, False), (False, True)):
        first = statistics(f, z).solve(1.0, standardize=standardize)
        second = statistics(f * scale, z).solve(1.0, standardize=standardize)
        change = ((f * scale) @ second.matrix.T + second.offset - f @ first.matrix.T - first.offset).abs().max()
        assert (change > 1e-2) == moved
        assert moved or change < 1e-8


def test_constant_features_and_fewer_images_than_features_give_finite_solutions() -> None:
    f, z = data(8)
    f[:, 3] = 2.0
    for ridge in (0.0, 1e-3):
        for standardize in (False, True):
            solution = statistics(f, z).solve(ridge, standardize=standardize)
            assert torch.isfinite(solution.matrix).all()
            assert solution.matrix[:, 3].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("features", "targets", "words"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), r"\(B, 2\).*\(3, 5\)"),
        (torch.ones(3, 4), torch.ones(2, 2), r"\(2, 2\)"),
        (torch.full((3, 4), float("nan")), torch.ones(3, 2), "NaN"),
    ],
)
def test_bad_batches_are_refused(features: torch.Tensor, targets: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RidgeStatistics(4, 2).update(features, targets)


def test_too_few_images_or_a_negative_ridge_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        RidgeStatistics(4, 2).update(torch.ones(1, 4), torch.ones(1, 2)).solve(1.0)
    with pytest.raises(ValueError, match=">= 0"):
        statistics(*data()).solve(-1.0)


def test_sums_that_fade_weigh_old_pictures_less_and_keep_the_means() -> None:
    torch.manual_seed(0)
    features, targets = torch.randn(60, 5, dtype=torch.float64), torch.randn(60, 3, dtype=torch.float64)
    old, new = RidgeStatistics(5, 3).update(features[:40], targets[:40]), RidgeStatistics(5, 3)
    before = old.solve(0.1)
    old.decay(0.25)
    torch.testing.assert_close(old.solve(0.1).matrix, before.matrix)  # by itself it changes nothing
    faded = old.update(features[40:], targets[40:])
    for _ in range(4):  # the same weights, four times over
        new.update(features[40:], targets[40:])
    new.update(features[:40], targets[:40])
    torch.testing.assert_close(faded.solve(0.1).matrix, new.solve(0.1).matrix)
    assert float(faded.count) == 30
    restored = RidgeStatistics(5, 3)
    restored.load_state_dict(faded.state_dict())
    assert torch.equal(restored.solve(0.1).matrix, faded.solve(0.1).matrix)
    for factor in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            faded.decay(factor)
