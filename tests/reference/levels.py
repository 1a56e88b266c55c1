"""The slow, obvious formulas of the concept and image level in float64 loops: one picture and one concept at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference import formulas


def degrees(x: Tensor, y: Tensor) -> float:
    """The angle between two vectors by their parallelogram, right at 0 and 180."""
    x, y = x.double() / x.double().norm(), y.double() / y.double().norm()
    return math.degrees(2 * math.atan2(float((x - y).norm()), float((x + y).norm())))


def translations(
    features: Tensor, weight: Tensor, matrix: Tensor, offset: Tensor, mean: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(T f, T f~) of every picture through the (m, m) null projector of a full SVD."""
    null = formulas.null_projector(weight)
    mu = torch.zeros(features.shape[1], dtype=torch.float64) if mean is None else mean.double()
    pairs = []
    for f in features.double():
        equivalent = f - null @ (f - mu)
        pairs.append((matrix.double() @ f + offset.double(), matrix.double() @ equivalent + offset.double()))
    return pairs


def concept_angles(pairs: list[tuple[Tensor, Tensor]], texts: Tensor) -> tuple[Tensor, Tensor]:
    """Angles before and after, (N, K) each."""
    before = [[degrees(z, text) for text in texts] for z, _ in pairs]
    after = [[degrees(z_eq, text) for text in texts] for _, z_eq in pairs]
    return torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
