"""Steering: the closed-form step against bisection, logits kept, unreachable angles counted."""

from __future__ import annotations

import pytest
import torch

from singreg.geometry.angles import angle
from singreg.geometry.nullspace import NullSpace
from singreg.geometry.steering import steer, steering_direction, step_for_image_score


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
