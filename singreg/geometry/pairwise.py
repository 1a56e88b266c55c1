"""Angles between every row of one table and every row of another, by matrix products (METHOD section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from singreg.geometry.angles import DEGREES, angle

NEAR = {torch.float32: 0.8, torch.float64: 1 - 1e-12}  # |cos| from which the arccos of a rounded cosine is not trusted
REFINED_AT_ONCE = 4096


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| of every row, and 0 where x is 0. Shapes: (R, n) to (R, n), dtype kept.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 0.0], [0.0, 0.0]])).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


@torch.no_grad()
def pairwise_angles(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(angles, cosines) between unit rows: arccos of one matrix product, done again in float64 where that is not accurate.

    A float32 product of unit rows is off by up to 4e-7, so its arccos by up to 2e-5/sin θ degrees. Where |cos| is above 0.8
    (rare between pictures and texts) the pair is computed anew as `angle` does it, 2·atan2 in float64, at 0 and 180 too: every
    angle is right to 5e-5 degrees, every difference of two to 1e-4. Of float64 rows only those within 1e-4 degrees of 0 or 180
    need it, and all are right to 1e-7 degrees. No gradient passes.

    Shapes: x (B, n), y (K, n) unit (or zero) rows, both float32 or both float64; returns angles in degrees and cosines (B, K).

    Raises:
        ValueError: the last axes differ.

    Example:
        >>> angles, cosines = pairwise_angles(torch.eye(2), torch.tensor([[0.6, 0.8]]))
        >>> [round(value, 3) for value in angles.flatten().tolist()]
        [53.13, 36.87]
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"pairwise angles need rows (B, n) and (K, n), got {tuple(x.shape)} and {tuple(y.shape)}")
    cosines = (x @ y.T).clamp_(-1, 1)
    angles = torch.acos(cosines).mul_(DEGREES)
    for pairs in torch.split((cosines.abs() > NEAR[cosines.dtype]).nonzero(), REFINED_AT_ONCE):
        rows, columns = pairs.unbind(1)
        angles[rows, columns] = angle(x[rows].double(), y[columns].double()).to(angles)
    return angles, cosines
