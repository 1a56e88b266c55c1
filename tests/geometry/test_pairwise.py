"""Pairwise angles by one product against `angle`, at every angle from 0 to 180, in both precisions."""

from __future__ import annotations

import math

import pytest
import torch

from singreg import functional as module
from singreg.functional import angle, pairwise_angles, unit_rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-7)])
def test_every_angle_from_0_to_180_is_right(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of 768 dimensions at planted angles; arccos of the float32 cosine alone is the control."""
    monkeypatch.setattr(module, "REFINED_AT_ONCE", 7)
    g = torch.Generator().manual_seed(0)
    base, across = torch.linalg.qr(torch.randn(768, 2, generator=g, dtype=torch.float64)).Q.T
    degrees = torch.tensor([0, 1e-6, 1e-4, 1e-3, 0.01, 0.5, 5, 30, 36, 37, 60, 90, 120, 144, 150, 179, 179.9999, 180], dtype=torch.float64)
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


def test_pairs_of_many_rows_are_those_of_angle_one_by_one() -> None:
    g = torch.Generator().manual_seed(1)
    x, y = (unit_rows(torch.randn(count, 9, generator=g)) for count in (6, 5))
    y[2] = 0
    found, _ = pairwise_angles(x, y)
    torch.testing.assert_close(found, torch.stack([angle(row[None], y) for row in x]), atol=3e-5, rtol=0)
    assert found[:, 2].tolist() == [90.0] * 6  # a zero vector, as `angle` has it
    assert math.isclose(float(found[1, 1]), float(angle(x[1], y[1])), abs_tol=5e-5)


def test_widths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows \(B, n\) and \(K, n\), got \(2, 3\) and \(2, 4\)"):
        pairwise_angles(torch.ones(2, 3), torch.ones(2, 4))
