"""Angles and scores against arccos, at the ends where arccos fails, and their invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from singreg.functional import angle, attribute_score, image_score, kappa
from tests.reference import formulas


def test_angle_matches_arccos() -> None:
    x, y = torch.randn(50, 9, dtype=torch.float64), torch.randn(50, 9, dtype=torch.float64)
    torch.testing.assert_close(angle(x, y), formulas.angle_degrees(x, y))


@pytest.mark.parametrize("degrees", [1e-4, 0.06, 1.0, 179.94, 180.0])
def test_angle_is_exact_at_both_ends_in_float32(degrees: float) -> None:
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    x, y = torch.tensor([1.0, 0.0]), torch.stack([torch.cos(radians), torch.sin(radians)]).float()
    assert abs(angle(x, y).item() - degrees) < 2e-5  # float32 itself cannot place 180 better
    if degrees == 0.06:  # the control: what trap 3 measured
        arccos = torch.rad2deg(torch.arccos((x @ y / y.norm()).clamp(-1, 1)))
        assert abs(arccos.item() - degrees) > 5e-4


@pytest.mark.parametrize("y", [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
def test_gradient_is_finite_everywhere(y: list[float]) -> None:
    x, y_ = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor(y, requires_grad=True)
    angle(x, y_).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(y_.grad).all()


def test_gradcheck() -> None:
    x, y = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(angle, (x, y))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_attribute_score_is_bounded_by_image_score_and_scale_free(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, z_eq, t = (torch.randn(20, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    attribute, image = attribute_score(z, z_eq, t), image_score(z, z_eq)
    assert (attribute.abs() <= image + 1e-9).all()
    torch.testing.assert_close(attribute_score(scale * z, z_eq, t), attribute)


def test_kappa_is_its_definition_and_zero_at_chance() -> None:
    z, z_eq, t = (torch.randn(30, 7, dtype=torch.float64) for _ in range(3))
    before, after, moved = (torch.deg2rad(angle(*pair)) for pair in ((z, t), (z_eq, t), (z, z_eq)))
    expected = (after.cos() - before.cos() * moved.cos()) / (before.sin() * moved.sin())
    torch.testing.assert_close(kappa(z, z_eq, t), expected)
    many = torch.randn(20_000, 32)
    assert kappa(many, many + 0.5 * torch.randn_like(many), torch.randn(32)).mean().abs() < 0.02
    assert kappa(many, many, torch.randn(32)).abs().max() < 1  # nothing moved: defined, not NaN


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        angle(torch.ones(2, 3), torch.ones(2, 4))
