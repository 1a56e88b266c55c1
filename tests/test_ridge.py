"""Streamed ridge against scikit-learn and the normal equations; merging, λ by validation, invariances, processes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from singreg.nullspace import NullSpace
from singreg.ridge import DEFAULT_RIDGES, RidgeSolution, RidgeStatistics
from tests.processes import run_processes
from tests.reference import formulas


def data(count: int = 300, width: int = 12, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.diag(torch.logspace(-2, 1, width).double())
    f = torch.randn(count, width, generator=generator, dtype=torch.float64) @ scales
    z = (f + 3) @ torch.randn(width, dim, generator=generator, dtype=torch.float64)
    return f + 3, z + torch.randn(count, dim, generator=generator, dtype=torch.float64)


def statistics(f: Tensor, z: Tensor) -> RidgeStatistics:
    return RidgeStatistics(f.shape[1], z.shape[1]).update(f, z)


def residual(solution: RidgeSolution, f: Tensor, z: Tensor) -> float:
    """1 - R², image by image."""
    error = z - f @ solution.matrix.T - solution.offset
    return float((error**2).sum() / ((z - z.mean(0)) ** 2).sum())


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


def test_float32_batches_are_summed_in_float64() -> None:
    """Trap 9: float32 Gram sums are 2e-4 off."""
    f, z = (x.float() for x in data(4000))
    exact = statistics(f.double(), z.double()).solve(1e-4).matrix
    assert (statistics(f, z).solve(1e-4).matrix - exact).abs().max() < 1e-10
    gram = (f.T @ f).double()  # the control
    assert (gram - f.double().T @ f.double()).abs().max() > 1e-6


def test_sums_in_any_batches_and_order_are_those_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    f, z = (torch.randn(1300, n, generator=generator, dtype=torch.float64) for n in (30, 2))
    sums = statistics(f[600:1200], z[600:1200]).update(f[:600], z[:600]) + statistics(f[1200:], z[1200:])
    kept = RidgeStatistics(30, 2)
    kept.load_state_dict(sums.state_dict())
    whole = statistics(f, z)
    for name, value in whole.state_dict().items():
        assert torch.equal(kept.state_dict()[name], sums.state_dict()[name])
        torch.testing.assert_close(sums.state_dict()[name], value, atol=1e-8, rtol=1e-9)
    basis = f[:30, :2]
    mapped, direct = sums.mapped(basis).solve(0.1), statistics(f @ basis, z).solve(0.1)
    torch.testing.assert_close(mapped.matrix, direct.matrix)


@pytest.mark.parametrize("standardize", [None, torch.eye(13)[:, :4].double()], ids=["not", "block"])
def test_residuals_of_the_whole_path_are_those_of_its_solutions(standardize: Tensor | None) -> None:
    (f, z), (held_f, held_z) = data(), data(seed=1)
    f, held_f = torch.cat([f, f[:, :1]], 1), torch.cat([held_f, held_f[:, :1]], 1)  # one direction does not vary
    path, ridges = statistics(f, z).path(standardize=standardize), [0.0, 1e-6, 0.1, 10.0]
    expected = [residual(path.solve(ridge), held_f, held_z) for ridge in ridges]
    assert path.residuals(statistics(held_f, held_z), ridges) == pytest.approx(expected, rel=1e-8)
    assert max(expected) > 1.01 * min(expected)


def test_validation_picks_the_ridge_with_the_best_held_out_r2() -> None:
    (f, z), held_out = data(40, 30), data(200, 30, seed=1)
    scores = {ridge: 1 - residual(statistics(f, z).solve(ridge), *held_out) for ridge in DEFAULT_RIDGES}
    best = statistics(f, z).validated(statistics(*held_out))
    assert best == max(scores, key=scores.__getitem__)
    assert scores[best] > scores[min(scores)]  # little data: no penalty is worse than some


@pytest.mark.parametrize("standardize", ["not", "block"])
def test_the_agreed_ridge_is_the_best_of_the_slow_products(standardize: str) -> None:
    f, z = data(60, 30)
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))
    scales = {"not": np.eye(30), "block": formulas.block_scale(f.numpy(), weight)}
    options = {"not": None, "block": NullSpace.from_weight(weight).basis}
    halves = [(f[half::2].numpy(), z[half::2].numpy()) for half in (0, 1)]
    slow = {ridge: formulas.agreement(halves, scales[standardize], ridge) for ridge in DEFAULT_RIDGES}
    pair = [statistics(f[half::2], z[half::2]) for half in (0, 1)]
    best = max(slow, key=lambda ridge: max(slow[ridge][0], 0) * max(slow[ridge][1], 0))
    for one, other in (pair, pair[::-1]):
        assert one.agreed(other, standardize=options[standardize]) == pytest.approx((best, *slow[best]), abs=1e-7)
    assert min(DEFAULT_RIDGES) < best < max(DEFAULT_RIDGES)


def test_noise_in_directions_of_little_variance_asks_for_more_ridge_than_r2_does() -> None:
    """A fit to that noise costs hardly any R², and is what a step in feature space follows."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(4000, 24, generator=generator, dtype=torch.float64) * torch.tensor([1.0] * 4 + [0.01] * 20)
    z = f[:, :4] @ torch.randn(4, 5, generator=generator, dtype=torch.float64)
    z = z + 0.5 * torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    pair = [statistics(f[half::2], z[half::2]) for half in (0, 1)]
    by_r2 = pair[0].validated(pair[1])
    ridge, r2, cosine = pair[0].agreed(pair[1])
    assert ridge >= 10 * by_r2
    assert cosine > 0.9
    assert r2 > 0.5
    matrices = [each.solve(by_r2).matrix.flatten() for each in pair]
    assert torch.cosine_similarity(*matrices, dim=0) < cosine - 0.02
    quiet = [statistics(f[half::2], f[half::2, :4] @ torch.eye(4, 5).double()) for half in (0, 1)]
    assert quiet[0].agreed(quiet[1])[0] == min(DEFAULT_RIDGES)  # the control: without noise there is none to avoid


def test_standardised_fits_ignore_what_they_claim_to() -> None:
    """By block: a rotation and a rescaling of the null block."""
    f, z = data()
    space = NullSpace.from_weight(torch.randn(4, 12, generator=torch.Generator().manual_seed(2)))
    null = space.null_basis()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)).double()).Q
    turned = f - space.component(f) + 1e-3 * (f @ null @ turn) @ null.T
    for standardize, same in ((space.basis, True), (None, False)):
        first, second = (statistics(x, z).solve(1.0, standardize=standardize) for x in (f, turned))
        change = (turned @ second.matrix.T + second.offset - f @ first.matrix.T - first.offset).abs().max()
        assert (change < 1e-7) if same else (change > 1e-2)
        halves = [(statistics(x[::2], z[::2]), statistics(x[1::2], z[1::2])) for x in (f, turned)]
        agreed = [one.agreed(other, standardize=standardize) for one, other in halves]
        assert (agreed[0] == pytest.approx(agreed[1], abs=1e-7)) == same


def test_constant_features_and_fewer_images_than_features_give_finite_solutions() -> None:
    f, z = data(8)
    f[:, 3] = 2.0
    for ridge in (0.0, 1e-3):
        for standardize in (None, torch.eye(12)[:, :4].double()):
            solution = statistics(f, z).solve(ridge, standardize=standardize)
            assert torch.isfinite(solution.matrix).all()
            if standardize is None:
                assert solution.matrix[:, 3].abs().max() < 1e-6


def test_bad_input_is_refused() -> None:
    for features, targets, words in (
        (torch.ones(3, 4), torch.ones(3, 5), r"\(B, 2\).*\(3, 5\)"),
        (torch.ones(3, 4), torch.ones(2, 2), r"\(2, 2\)"),
        (torch.full((3, 4), float("nan")), torch.ones(3, 2), "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            RidgeStatistics(4, 2).update(features, targets)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        RidgeStatistics(4, 2).update(torch.ones(1, 4), torch.ones(1, 2)).solve(1.0)
    with pytest.raises(ValueError, match=">= 0"):
        statistics(*data()).solve(-1.0)


def _reduced(rank: int, world: int) -> np.ndarray:
    f, z = data(301)
    return statistics(f[rank::world], z[rank::world]).reduce().solve(0.1).matrix.numpy()


def test_processes_with_uneven_shares_find_the_solution_of_all_rows() -> None:
    alone = statistics(*data(301)).solve(0.1).matrix.numpy()
    for found in run_processes(2, _reduced):
        np.testing.assert_allclose(found, alone, atol=1e-10)
