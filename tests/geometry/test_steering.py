"""Steering: the closed-form step against bisection, logits kept, unreachable angles counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.steering import LARGEST_STEP, bisect_step, steer, steering_direction, step_for_image_score


def bisect(z: torch.Tensor, u: torch.Tensor, degrees: float) -> float:
    """First step at which the angle is reached, found by doubling and bisection; NaN if it never is."""
    low, high = 0.0, 1e-6
    while float(angle(z, z + high * u)) < degrees:
        low, high = high, 2 * high
        if high > 1e9:
            return float("nan")
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(angle(z, z + middle * u)) < degrees else (low, middle)
    return high


@pytest.mark.parametrize("degrees", [5.0, 40.0, 89.9, 120.0])
def test_step_matches_bisection(degrees: float) -> None:
    z, u = torch.randn(12, 6, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    steps = step_for_image_score(z, u, degrees)
    for row, step in enumerate(steps):
        expected = bisect(z[row], u[row], degrees)
        if expected != expected:
            assert torch.isnan(step)
            assert float(angle(z[row], u[row])) <= degrees + 1e-6
        else:
            assert abs(float(step) - expected) <= 1e-7 * expected
            assert abs(float(angle(z[row], z[row] + step * u[row])) - degrees) < 1e-8


def test_direction_is_the_projected_gradient_and_steering_keeps_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, matrix = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((4, 12), (7, 12)))
    offset, text = torch.randn(7, dtype=torch.float64, generator=generator), torch.randn(7, dtype=torch.float64, generator=generator)
    space = NullSpace.from_weight(weight)
    features = torch.randn(6, 12, dtype=torch.float64, generator=generator).requires_grad_()
    torch.nn.functional.cosine_similarity(features @ matrix.T + offset, text[None], dim=-1).sum().backward()
    expected = torch.nn.functional.normalize(space.component(features.grad), dim=-1)
    features = features.detach()
    torch.testing.assert_close(
        steering_direction(features, text, matrix=matrix, offset=offset, null_space=space), expected, atol=1e-10, rtol=0
    )
    steered = steer(features, text, matrix=matrix, offset=offset, null_space=space, image_score=20.0)
    assert ((steered.features - features) @ weight.T).abs().max() < 1e-9
    z, moved = features @ matrix.T + offset, steered.features @ matrix.T + offset
    assert bool(steered.reachable.any())
    assert (angle(z, moved)[steered.reachable] - 20).abs().max() < 1e-8
    assert (angle(moved, text) < angle(z, text))[steered.reachable].all()
    assert torch.equal(steered.features[~steered.reachable], features[~steered.reachable])


def test_nothing_to_steer_is_unreachable_not_nan() -> None:
    space = NullSpace.from_weight(torch.eye(3)[:2].double())
    matrix = torch.eye(3).double()[:2]  # the translator does not see the null direction
    features, text = torch.rand(4, 3).double(), torch.tensor([1.0, 2.0]).double()
    steered = steer(features, text, matrix=matrix, offset=torch.zeros(2).double(), null_space=space, image_score=40.0)
    assert not steered.reachable.any()
    assert torch.equal(steered.features, features)


@pytest.mark.parametrize("degrees", [0.0, 180.0, -3.0])
def test_impossible_angles_are_refused(degrees: float) -> None:
    with pytest.raises(ValueError, match="degrees"):
        step_for_image_score(torch.ones(2), torch.ones(2), degrees)


def planted(dtype: torch.dtype, rows: int = 400) -> tuple[NullSpace, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head of 5 rows on 20 features, a translator to 12 dimensions, and features with a row-space part large or small."""
    generator = torch.Generator().manual_seed(7)
    weight, matrix = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((5, 20), (12, 20)))
    features, offset = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((rows, 20), (12,)))
    text = torch.randn(rows, 12, dtype=torch.float64, generator=generator)
    features = features * torch.logspace(-1, 1.5, rows, dtype=torch.float64)[:, None]
    matrix[0] *= 20  # one axis outweighs the others, so that many steps lead along z instead of away from it
    return NullSpace.from_weight(weight), features.to(dtype), text.to(dtype), matrix.to(dtype), offset.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_hits_the_image_score_and_is_the_bisected_step(dtype: torch.dtype) -> None:
    space, features, text, matrix, offset = planted(dtype)

    def translate(f: torch.Tensor) -> torch.Tensor:
        return f @ matrix.T + offset

    for degrees in (40.0, 75.0):
        steered = steer(features, text, matrix=matrix, offset=offset, null_space=space, image_score=degrees)
        z, moved = translate(features), translate(steered.features)
        direction = steering_direction(features, text, matrix=matrix, offset=offset, null_space=space)
        # Out of reach is exactly what the half line z + ε u never turns to, and it is counted.
        limit = angle(z, direction @ matrix.T)
        assert torch.equal(steered.reachable, limit > degrees)
        assert int((~steered.reachable).sum()) > 0
        assert int(steered.reachable.sum()) > 50
        assert (angle(z, moved)[steered.reachable] - degrees).abs().max() < 1e-3
        bounded = bisect_step(translate, features, direction, degrees)
        within = steered.step <= LARGEST_STEP * features.norm(dim=1)  # False for NaN
        assert torch.equal(torch.isfinite(bounded), within)
        bisected = bisect_step(translate, features, direction, degrees, largest=1e9)
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(bisected[steered.reachable], steered.step[steered.reachable], rtol=tolerance, atol=0)


def test_any_callable_is_steered_as_the_linear_translator_it_is() -> None:
    space, features, text, matrix, offset = planted(torch.float64)
    linear = {"matrix": matrix, "offset": offset}
    opaque = {"translator": lambda f: f @ matrix.T + offset}
    torch.testing.assert_close(
        steering_direction(features, text, null_space=space, **opaque), steering_direction(features, text, null_space=space, **linear)
    )
    fast, slow = (steer(features, text, null_space=space, image_score=40.0, **kind) for kind in (linear, opaque))
    assert torch.equal(fast.reachable, slow.reachable)
    torch.testing.assert_close(fast.features, slow.features, rtol=1e-8, atol=1e-8)


def test_non_linear_translator_gradient_step_and_logits() -> None:
    torch.manual_seed(0)
    space, features, text, _, _ = planted(torch.float64, rows=30)
    network = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 12)).double()
    features = features / features.norm(dim=1, keepdim=True)
    with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
        steering_direction(features, text, null_space=space, translator=network)
    network.eval()
    direction = steering_direction(features, text, null_space=space, translator=network)
    assert all(parameter.grad is None for parameter in network.parameters())
    # The gain along d̂ equals the length of the projected gradient, and no other null direction gains more.
    null = space.null_basis()
    gains = torch.stack([_slope(network, features, text, null[:, k].expand_as(features)) for k in range(null.shape[1])], dim=1)
    torch.testing.assert_close(direction, torch.nn.functional.normalize(gains, dim=1) @ null.T, atol=1e-6, rtol=0)
    steered = steer(features, text, null_space=space, translator=network, image_score=10.0)
    assert steered.reachable.all()
    assert (angle(network(features), network(steered.features)) - 10).abs().max() < 1e-3
    assert space.split(steered.features - features)[0].abs().max() < 1e-9
    # A saturating network cannot be turned as far as one likes: beyond its reach is flagged, not invented.
    far = steer(features, text, null_space=space, translator=network, image_score=150.0)
    assert not far.reachable.any()
    assert torch.isnan(far.step).all()
    assert torch.equal(far.features, features)


def _slope(network: nn.Module, features: torch.Tensor, text: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    up, down = (torch.nn.functional.cosine_similarity(network(features + s * direction), text, dim=-1) for s in (1e-5, -1e-5))
    return ((up - down) / 2e-5).detach()


def test_bisection_is_bounded_and_needs_no_norm() -> None:
    f, d = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    step = bisect_step(lambda x: x + torch.tensor([1.0, 0.0]), f, d, 60.0)  # the first feature is 0, the third has no direction
    torch.testing.assert_close(step, torch.tensor([3**0.5, 2 * 3**0.5, torch.nan]), equal_nan=True, rtol=1e-5, atol=0)
    nearly = bisect_step(lambda x: x, f[1:2], d[1:2], 89.9)  # ε = tan 89.9° = 573
    assert nearly.item() == pytest.approx(572.96, rel=1e-3)
    assert torch.isnan(bisect_step(lambda x: x, f[1:2], d[1:2], 89.9, largest=560.0)).all()
    assert bisect_step(lambda x: x, f[1:2], d[1:2], 89.9, largest=573.0).item() == pytest.approx(572.96, rel=1e-3)
    with pytest.raises(ValueError, match="largest step"):
        bisect_step(lambda x: x, f, d, 40.0, largest=0.0)


def test_a_translator_is_given_one_way() -> None:
    space, features, text, matrix, offset = planted(torch.float64, rows=3)
    for kinds in ({}, {"matrix": matrix}, {"matrix": matrix, "offset": offset, "translator": nn.Identity()}):
        with pytest.raises(ValueError, match="either as matrix= and offset="):
            steer(features, text, null_space=space, image_score=40.0, **kinds)  # type: ignore[arg-type]
