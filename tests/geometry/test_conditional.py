"""The conditional Gaussian of the null component: against the textbook formula, its steps, singular covariances, bad input."""

from __future__ import annotations

import pytest
import torch

from singreg.nullspace import NullSpace
from singreg.steering import ConditionalGaussian

M, C = 12, 4


def setup(seed: int = 0) -> tuple[NullSpace, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, root = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((C, M), (M, M)))
    mean = torch.randn(M, dtype=torch.float64, generator=generator)
    features = mean + torch.randn(5000, M, dtype=torch.float64, generator=generator) @ root.T
    return NullSpace.from_weight(weight), mean, root @ root.T, features


def slow_radius(space: NullSpace, mean: torch.Tensor, covariance: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """√((n - E[n|p])ᵀ S⁻¹ (n - E[n|p])) one feature at a time, with the Schur complement S."""
    q, n = space.basis, space.null_basis()
    pp, np_, nn = q.T @ covariance @ q, n.T @ covariance @ q, n.T @ covariance @ n
    schur = nn - np_ @ torch.linalg.inv(pp) @ np_.T
    radii = []
    for f in features:
        left = n.T @ (f - mean) - np_ @ torch.linalg.inv(pp) @ (q.T @ (f - mean))
        radii.append((left @ torch.linalg.solve(schur, left)).sqrt())
    return torch.stack(radii)


def test_radius_is_the_textbook_formula_and_natural_features_are_where_theory_puts_them() -> None:
    space, mean, covariance, features = setup()
    gaussian = ConditionalGaussian.from_moments(mean, covariance, space, floor=1e-12)
    assert gaussian.floored == 0
    radius = gaussian.radius(features)
    torch.testing.assert_close(radius[:50], slow_radius(space, mean, covariance, features[:50]), rtol=1e-6, atol=1e-6)
    # χ² with one degree of freedom a null dimension: mean d. Without the row-space part it would be far more.
    assert float(radius.square().mean()) == pytest.approx(space.nullity, rel=0.05)
    blind = torch.linalg.inv(space.null_basis().T @ covariance @ space.null_basis())
    shuffled = space.component(features.roll(1, 0)) + space.remove(features)
    assert float(gaussian.radius(shuffled).square().mean()) > 1.5 * space.nullity
    n = (shuffled - mean) @ space.null_basis()
    assert float(((n @ blind) * n).sum(1).mean()) == pytest.approx(space.nullity, rel=0.05)  # the control notices nothing


def test_steps_end_on_the_radius_and_are_the_largest() -> None:
    space, mean, covariance, features = setup(1)
    gaussian = ConditionalGaussian.from_moments(mean, covariance, space, floor=1e-9)
    features = features[:60]
    direction = torch.nn.functional.normalize(space.component(torch.randn(60, M, dtype=torch.float64)), dim=1)
    radii = torch.tensor([1.0, 2.5, 5.0], dtype=torch.float64)
    step = gaussian.step_for_radius(features, direction, radii)
    grid = torch.linspace(0, 100, 20001, dtype=torch.float64)
    for row in range(60):
        along = gaussian.radius(features[row] + grid[:, None] * direction[row])
        for column, radius in enumerate(radii):
            inside = torch.nonzero(along <= radius).flatten()
            if len(inside):
                assert abs(float(step[row, column]) - float(grid[inside[-1]])) <= 0.005 + 1e-9
            elif not torch.isnan(step[row, column]):  # the half line dips inside between two grid points
                assert float(gaussian.radius(features[row] + step[row, column] * direction[row])) == pytest.approx(float(radius))
    assert torch.isnan(step).any()
    assert torch.isfinite(step[:, 2]).any()
    assert torch.isnan(gaussian.step_for_radius(features, torch.zeros_like(direction), radii)).all()


def test_the_on_manifold_direction_gains_most_at_equal_radius() -> None:
    space, mean, covariance, _ = setup(2)
    gaussian = ConditionalGaussian.from_moments(mean, covariance, space, floor=1e-9)
    gradient = torch.randn(M, dtype=torch.float64)
    best = gaussian.on_manifold(gradient)
    assert space.split(best)[0].abs().max() < 1e-9 * best.norm()

    def gain(direction: torch.Tensor) -> torch.Tensor:  # per Mahalanobis length
        return direction @ gradient / torch.linalg.vector_norm(direction @ gaussian.whitening.T, dim=-1)

    others = space.component(torch.randn(500, M, dtype=torch.float64))
    assert (gain(others) <= gain(best) + 1e-9).all()
    assert gain(space.component(gradient)) < 0.99 * gain(best)  # the paper's own direction does not


def test_singular_covariances_are_held_at_the_floor() -> None:
    space, _, _, features = setup(3)
    few = features[:5]  # fewer pictures than dimensions
    scatter = torch.cov(few.T)
    gaussian = ConditionalGaussian.from_moments(few.mean(0), scatter, space, floor=1e-3)
    assert 0 < gaussian.floored < space.nullity
    radii = gaussian.radius(features)
    assert torch.isfinite(radii).all()
    assert radii[5:].median() > 3 * radii[:5].max()
    # A feature that never varies costs what the floor says, no more and no less.
    still = torch.eye(M, dtype=torch.float64)
    still[-1] = 0
    flat = NullSpace.from_weight(torch.eye(M, dtype=torch.float64)[:C])
    gaussian = ConditionalGaussian.from_moments(torch.zeros(M), still, flat, floor=0.01)
    assert gaussian.floored == 1
    step = torch.zeros(M, dtype=torch.float64)
    step[-1] = 1
    mean_variance = (M - C - 1) / (M - C)
    assert float(gaussian.radius(step)) == pytest.approx((0.01 * mean_variance) ** -0.5)
    assert float(gaussian.radius(torch.eye(M, dtype=torch.float64)[C])) == pytest.approx(1.0, rel=1e-6)


def test_bad_input_is_named() -> None:
    space, mean, covariance, _ = setup()
    make = ConditionalGaussian.from_moments
    with pytest.raises(ValueError, match=r"mean \(12,\) and covariance \(12, 12\), got \(12,\) and \(11, 11\)"):
        make(mean, covariance[1:, 1:], space)
    with pytest.raises(ValueError, match="NaN"):
        make(mean * float("nan"), covariance, space)
    with pytest.raises(ValueError, match=r"floor.*got 0"):
        make(mean, covariance, space, floor=0)
    with pytest.raises(ValueError, match="do not vary in the null space"):
        make(mean, torch.zeros(M, M), space)
    full = NullSpace.from_weight(torch.eye(M), allow_empty=True)
    with pytest.raises(ValueError, match="no null space"):
        make(mean, covariance, full)
