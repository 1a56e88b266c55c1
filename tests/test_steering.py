"""Steering: closed forms against bisection and the textbook, logits kept, what is out of reach is flagged."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from singreg import steering
from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.steering import LARGEST_STEP, ConditionalGaussian, bisect_step, similarity_gradient, steer, unit_in_null
from singreg.translator import LinearTranslator
from tests.reference import formulas

M, C = 12, 4


def planted(dtype: torch.dtype = torch.float64, rows: int = 400) -> SimpleNamespace:
    """A head of 5 rows on 20 features, a linear translator to 12 dimensions, and features short and long."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((5, 20), (12, 20), (rows, 20), (12,), (rows, 12))
    drawn = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in shapes)
    weight, matrix, features, offset, text = drawn
    features = features * torch.logspace(-1, 1.5, rows, dtype=torch.float64)[:, None]
    matrix[0] *= 20  # one axis outweighs the others, so that many steps lead along z instead of away from it
    features, text, matrix, offset = (x.to(dtype) for x in (features, text, matrix, offset))
    space = NullSpace.from_weight(weight)
    linear = {"null_space": space, "translator": LinearTranslator(matrix, offset)}
    translate = lambda f: f @ matrix.T + offset  # noqa: E731
    known = {"weight": weight, "features": features, "text": text, "matrix": matrix, "linear": linear}
    return SimpleNamespace(space=space, translate=translate, **known)


def steering_direction(features: Tensor, text: Tensor, *, null_space: NullSpace, translator: Any) -> Tensor:
    return unit_in_null(similarity_gradient(features, text, translator), null_space)


@pytest.mark.parametrize("degrees", [5.0, 40.0, 89.9, 120.0])
def test_closed_form_step_is_the_bisected_one(degrees: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "LARGEST_STEP", 1e9)
    z, u = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    steps = steering.step_for_image_score(z, u, degrees)
    expected = bisect_step(lambda x: x, z, u, degrees)
    torch.testing.assert_close(steps, expected, rtol=1e-7, atol=0, equal_nan=True)
    reachable = torch.isfinite(steps)
    assert (angle(z, u)[~reachable] <= degrees + 1e-6).all()
    assert (angle(z, z + steps[:, None] * u)[reachable] - degrees).abs().max() < 1e-8


def slow_steering(translate: Any, null: Tensor, f: Tensor, text: Tensor) -> tuple[float, Tensor] | None:
    """(step, steered feature) at 40 degrees by autograd, the projector and bisection; None when out of reach."""
    leaf = f.clone().requires_grad_()
    cosine_similarity(translate(leaf), text, dim=0).backward()
    direction = null @ leaf.grad
    direction = direction / direction.norm()

    def turned(step: float) -> float:
        return float(formulas.angle_degrees(translate(f), translate(f + step * direction)))

    low, high = 0.0, 1e6 * float(f.norm())
    if turned(high) < 40:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if turned(middle) < 40 else (low, middle)
    return low, f + low * direction


def test_steering_at_forty_degrees_is_the_slow_search() -> None:
    w = planted(rows=40)
    fast, null = steer(w.features, w.text, **w.linear, image_score=40.0), formulas.null_projector(w.weight)
    for index, f in enumerate(w.features):
        found = slow_steering(w.translate, null, f, w.text[index])
        assert bool(fast.reachable[index]) == (found is not None)
        if found is not None:
            assert float(fast.step[index]) == pytest.approx(found[0], rel=1e-6)
            torch.testing.assert_close(fast.features[index], found[1], rtol=1e-6, atol=1e-6)
    assert 10 < int(fast.reachable.sum()) < 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steering_hits_the_image_score_keeps_logits_and_flags_the_rest(dtype: torch.dtype) -> None:
    w = planted(dtype)
    direction = steering_direction(w.features, w.text, **w.linear)
    for degrees in (40.0, 75.0):
        steered = steer(w.features, w.text, **w.linear, image_score=degrees)
        z, moved, reached = w.translate(w.features), w.translate(steered.features), steered.reachable
        # Out of reach is exactly what the half line z + ε u never turns to.
        assert torch.equal(reached, angle(z, direction @ w.matrix.T) > degrees)
        assert 50 < int(reached.sum()) < len(reached)
        assert (angle(z, moved)[reached] - degrees).abs().max() < 1e-3
        assert torch.equal(steered.features[~reached], w.features[~reached])
        in_rows = (steered.features - w.features).double() @ w.space.basis
        assert (in_rows.norm(dim=1) <= 1e-6 * steered.features.norm(dim=1)).all()
        bisected = bisect_step(w.translate, w.features, direction, degrees)
        within = steered.step <= LARGEST_STEP * w.features.norm(dim=1)  # False for NaN
        assert torch.equal(torch.isfinite(bisected), within)
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(bisected[within], steered.step[within], rtol=tolerance, atol=0)
    little = steer(w.features, w.text, **w.linear, image_score=2.0)
    closer = angle(w.translate(little.features), w.text) < angle(w.translate(w.features), w.text)
    assert closer[little.reachable].all()


def test_the_direction_is_the_projected_gradient_and_any_callable_is_steered_alike() -> None:
    w = planted()
    opaque = {"null_space": w.space, "translator": w.translate}
    z, unit = w.translate(w.features), normalize(w.text, dim=-1)
    cosine = cosine_similarity(z, unit, dim=-1)[:, None]
    gradient = (unit - cosine * normalize(z, dim=-1)) @ w.matrix  # eq. 11, but for its length: Aᵀ(t̂ - s ẑ)
    expected = normalize(w.space.component(gradient), dim=-1)
    for kind in (w.linear, opaque):
        torch.testing.assert_close(steering_direction(w.features, w.text, **kind), expected, atol=1e-9, rtol=0)
    fast, slow = (steer(w.features, w.text, **kind, image_score=40.0) for kind in (w.linear, opaque))
    assert torch.equal(fast.reachable, slow.reachable)
    torch.testing.assert_close(fast.features, slow.features, rtol=1e-8, atol=1e-8)
    for impossible in (0.0, 180.0, -3.0):
        with pytest.raises(ValueError, match="degrees"):
            steer(w.features, w.text, **w.linear, image_score=impossible)


def test_nothing_to_steer_is_unreachable_not_nan() -> None:
    blind = LinearTranslator(torch.eye(3)[:2], torch.zeros(2))  # does not see the null direction
    features, text = torch.rand(4, 3).double(), torch.tensor([1.0, 2.0]).double()
    space = NullSpace.from_weight(torch.eye(3)[:2])
    steered = steer(features, text, null_space=space, image_score=40.0, translator=blind)
    assert not steered.reachable.any()
    assert torch.equal(steered.features, features)


def test_a_network_is_steered_along_its_steepest_null_direction() -> None:
    torch.manual_seed(0)
    w = planted(rows=30)
    f = normalize(w.features, dim=1)
    network = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 12)).double()
    given = {"null_space": w.space, "translator": network}
    with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
        steering_direction(f, w.text, **given)
    network.eval()
    direction, null = steering_direction(f, w.text, **given), w.space.null_basis()
    assert all(parameter.grad is None for parameter in network.parameters())

    def slope(k: int) -> Tensor:  # by finite differences
        up, down = (cosine_similarity(network(f + s * null[:, k]), w.text, dim=-1) for s in (1e-5, -1e-5))
        return ((up - down) / 2e-5).detach()

    gains = torch.stack([slope(k) for k in range(null.shape[1])], dim=1)
    torch.testing.assert_close(direction, normalize(gains, dim=1) @ null.T, atol=1e-6, rtol=0)
    steered = steer(f, w.text, **given, image_score=10.0)
    assert steered.reachable.all()
    assert (angle(network(f), network(steered.features)) - 10).abs().max() < 1e-3
    assert ((steered.features - f) @ w.space.basis).abs().max() < 1e-9
    # A saturating network cannot be turned as far as one likes: beyond its reach is flagged, not invented.
    far = steer(f, w.text, **given, image_score=150.0)
    assert torch.isnan(far.step).all()
    assert torch.equal(far.features, f)


def test_bisection_is_bounded_and_needs_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    f = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])  # the first is 0, the third has no direction
    d = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    step = bisect_step(lambda x: x + torch.tensor([1.0, 0.0]), f, d, 60.0)
    wanted = torch.tensor([3**0.5, 2 * 3**0.5, torch.nan])
    torch.testing.assert_close(step, wanted, equal_nan=True, rtol=1e-5, atol=0)
    for largest, found in ((LARGEST_STEP, 572.96), (573.0, 572.96), (560.0, float("nan"))):  # ε = tan 89.9°
        monkeypatch.setattr(steering, "LARGEST_STEP", largest)
        step = bisect_step(lambda x: x, f[1:2], d[1:2], 89.9)
        assert step.item() == pytest.approx(found, rel=1e-3, nan_ok=True)


def natural(seed: int = 0, **options: Any) -> SimpleNamespace:
    """A head of 4 rows on 12 features, 5,000 correlated features and their conditional Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((C, M), (M, M), (M,), (5000, M))
    weight, root, mean, normal = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in shapes)
    space, covariance = NullSpace.from_weight(weight), root @ root.T
    gaussian = ConditionalGaussian.from_moments(mean, covariance, space, **options)
    features = mean + normal @ root.T
    return SimpleNamespace(space=space, mean=mean, covariance=covariance, features=features, gaussian=gaussian)


def test_radius_is_the_textbook_formula_and_natural_features_are_where_theory_puts_them() -> None:
    w = natural(floor=1e-12)
    gaussian = w.gaussian
    assert gaussian.floored == 0
    # √((n - E[n|p])ᵀ S⁻¹ (n - E[n|p])) one feature at a time, with the Schur complement S
    q, n = w.space.basis, w.space.null_basis()
    gain = n.T @ w.covariance @ q @ torch.linalg.inv(q.T @ w.covariance @ q)
    schur = n.T @ w.covariance @ n - gain @ q.T @ w.covariance @ n
    left = [n.T @ (f - w.mean) - gain @ (q.T @ (f - w.mean)) for f in w.features[:50]]
    slow = torch.stack([(x @ torch.linalg.solve(schur, x)).sqrt() for x in left])
    radius = gaussian.radius(w.features)
    torch.testing.assert_close(radius[:50], slow, rtol=1e-6, atol=1e-6)
    # χ² with one degree of freedom a null dimension: mean d. Without the row-space part it would be far more.
    assert float(radius.square().mean()) == pytest.approx(w.space.nullity, rel=0.05)
    shuffled = w.space.component(w.features.roll(1, 0)) + w.space.remove(w.features)
    assert float(gaussian.radius(shuffled).square().mean()) > 1.5 * w.space.nullity
    blind = (shuffled - w.mean) @ n  # the control, without the condition, notices nothing
    squared = ((blind @ torch.linalg.inv(n.T @ w.covariance @ n)) * blind).sum(1)
    assert float(squared.mean()) == pytest.approx(w.space.nullity, rel=0.05)


def test_steps_end_on_the_radius_and_are_the_largest() -> None:
    w = natural(1, floor=1e-9)
    gaussian, features = w.gaussian, w.features[:60]
    direction = normalize(w.space.component(torch.randn(60, M, dtype=torch.float64)), dim=1)
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
                end = gaussian.radius(features[row] + step[row, column] * direction[row])
                assert float(end) == pytest.approx(float(radius))
    assert torch.isnan(step).any()
    assert torch.isfinite(step[:, 2]).any()
    assert torch.isnan(gaussian.step_for_radius(features, torch.zeros_like(direction), radii)).all()


def test_singular_covariances_are_held_at_the_floor() -> None:
    w = natural(3)
    few = w.features[:5]  # fewer images than dimensions
    gaussian = ConditionalGaussian.from_moments(few.mean(0), torch.cov(few.T), w.space, floor=1e-3)
    assert 0 < gaussian.floored < w.space.nullity
    radii = gaussian.radius(w.features)
    assert torch.isfinite(radii).all()
    assert radii[5:].median() > 3 * radii[:5].max()
    # A feature that never varies costs what the floor says, no more and no less.
    still = torch.eye(M, dtype=torch.float64)
    still[-1] = 0
    flat = NullSpace.from_weight(torch.eye(M)[:C])
    gaussian = ConditionalGaussian.from_moments(torch.zeros(M), still, flat, floor=0.01)
    assert gaussian.floored == 1
    radius = gaussian.radius(torch.eye(M))
    assert float(radius[-1]) == pytest.approx((0.01 * (M - C - 1) / (M - C)) ** -0.5)
    assert float(radius[C]) == pytest.approx(1.0, rel=1e-6)


def test_features_that_do_not_vary_in_the_null_space_are_named() -> None:
    w = natural()
    with pytest.raises(ValueError, match="do not vary in the null space"):
        ConditionalGaussian.from_moments(w.mean, torch.zeros(M, M), w.space)
