"""Angles and scores against arccos, at the ends where arccos fails, and their invariants."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from singreg import functional
from singreg.functional import angle, attribute_score, image_score, kappa, pairwise_angles, unit_rows
from tests.reference import formulas


@pytest.mark.parametrize("degrees", [1e-4, 0.06, 1.0, 179.94, 180.0])
def test_angle_is_exact_at_both_ends_in_float32(degrees: float) -> None:
    """Trap 3: arccos of a clamped cosine is not."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    x, y = torch.tensor([1.0, 0.0]), torch.stack([torch.cos(radians), torch.sin(radians)]).float()
    assert abs(angle(x, y).item() - degrees) < 2e-5  # float32 itself cannot place 180 better
    if degrees == 0.06:
        arccos = torch.rad2deg(torch.arccos((x @ y / y.norm()).clamp(-1, 1)))
        assert abs(arccos.item() - degrees) > 5e-4


def test_angle_is_that_of_arccos_with_its_gradient_and_widths_must_agree() -> None:
    x, y = (torch.randn(50, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(angle(x, y), formulas.angle_degrees(x, y))
    assert torch.autograd.gradcheck(angle, (x[:4], y[:4]))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        angle(torch.ones(2, 3), torch.ones(2, 4))


@pytest.mark.parametrize("y", [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
def test_gradient_is_finite_everywhere(y: list[float]) -> None:
    x, other = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor(y, requires_grad=True)
    angle(x, other).backward()
    assert torch.isfinite(torch.cat([x.grad, other.grad])).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_attribute_score_is_bounded_by_image_score_and_scale_free(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, z_eq, t = (torch.randn(20, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    attribute = attribute_score(z, z_eq, t)
    assert (attribute.abs() <= image_score(z, z_eq) + 1e-9).all()
    torch.testing.assert_close(attribute_score(scale * z, z_eq, t), attribute)
    assert (attribute_score(t, z_eq, t) < 0).all()  # the removal led away from the prompt: leakage


def test_kappa_is_its_definition_and_zero_at_chance() -> None:
    z, z_eq, t = (torch.randn(30, 7, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(kappa(z, z_eq, t), formulas.scores(z, z_eq, t)["kappa"])
    many = torch.randn(20_000, 32)
    assert kappa(many, many + 0.5 * torch.randn_like(many), torch.randn(32)).mean().abs() < 0.02
    assert kappa(many, many, torch.randn(32)).abs().max() < 1  # nothing moved: defined, not NaN


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-7)])
@patch.object(functional, "REFINED_AT_ONCE", 7)
def test_pairwise_angles_are_right_from_0_to_180(dtype: torch.dtype, tolerance: float) -> None:
    """Vectors of 768 dimensions at planted angles; arccos of the cosine alone is the control."""
    generator = torch.Generator().manual_seed(0)
    base, across = torch.linalg.qr(torch.randn(768, 2, generator=generator, dtype=torch.float64)).Q.T
    ends = [0, 1e-6, 1e-4, 1e-3, 0.01, 0.5, 5, 30, 36, 37, 60, 90, 120, 144, 150, 179, 179.9999, 180]
    degrees = torch.tensor(ends, dtype=torch.float64)
    radians = degrees.deg2rad()[:, None]
    rows = unit_rows((radians.cos() * base + radians.sin() * across).to(dtype))
    x = unit_rows(base.to(dtype)[None])
    truth = angle(x.double(), rows.double())  # of the rounded rows themselves
    found, cosines = pairwise_angles(x, rows)
    assert (found[0].double() - truth).abs().max() < tolerance
    assert (truth - degrees).abs().max() < (1e-5 if dtype == torch.float32 else 1e-10)
    torch.testing.assert_close(cosines[0].double(), degrees.deg2rad().cos(), atol=1e-6, rtol=0)
    control = torch.rad2deg(torch.acos((x @ rows.T).clamp(-1, 1)))[0].double()
    assert (control - truth).abs().max() > 2 * tolerance


def test_pairwise_angles_are_those_of_angle_one_by_one() -> None:
    x, y = (unit_rows(torch.randn(count, 9)) for count in (6, 5))
    y[2] = 0
    found, _ = pairwise_angles(x, y)
    torch.testing.assert_close(found, torch.stack([angle(row[None], y) for row in x]), atol=5e-5, rtol=0)
    assert found[:, 2].tolist() == [90.0] * 6  # a zero vector, as `angle` has it
