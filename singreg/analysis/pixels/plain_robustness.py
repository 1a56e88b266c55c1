"""Ordinary robustness, so that nobody buys one kind with the other unseen: PGD in L-infinity, clean and corrupted accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from singreg.analysis.pixels.ascent import ascend
from singreg.analysis.pixels.budgets import Budget
from singreg.analysis.pixels.model import PixelModel, away_from_label
from singreg.data.corruption import KINDS, CorruptedSplit
from singreg.data.datasets import ImageSplit


@dataclass(frozen=True)
class PlainRobustness:
    """Shares of pictures still right, in [0, 1]: untouched, under PGD by 255ths (keys as text), and corrupted by kind."""

    model: str
    pictures: int
    clean: float
    adversarial: dict[str, float]
    corrupted: dict[str, float]


def still_right(
    model: PixelModel, pictures: Tensor, labels: Tensor, sizes: Sequence[float], *, steps: int, restarts: int, seed: int
) -> dict[str, Tensor]:
    """Which pictures keep their right answer, (B,) bool by "clean" and by L-infinity budget in 255ths, judged on 8-bit pictures.

    PGD on the margin (largest other logit over the label's). What fell at a smaller budget stays fallen at a larger one; only
    what still stands is attacked. Shapes: pictures (B, 3, H, W) in [0, 1] on the 8-bit grid, labels (B,).
    """
    with torch.no_grad():
        standing = model(pictures)[1].argmax(1) == labels
    found = {"clean": standing}
    for place, size in enumerate(sorted(sizes)):
        standing = standing.clone()
        rows = standing.nonzero().flatten()
        if len(rows):
            generator = torch.Generator().manual_seed(seed + place)
            attack = ascend(
                away_from_label(model, labels[rows]), pictures[rows], Budget("linf", size),
                steps=steps, restarts=restarts, generator=generator,
            )  # fmt: skip
            with torch.no_grad():
                standing[rows] = model(attack.images)[1].argmax(1) == labels[rows]
        found[f"{size:g}"] = standing
    return found


@torch.no_grad()
def corrupted_right(model: PixelModel, part: ImageSplit, labels: Tensor, *, severity: int, batch_size: int = 64) -> dict[str, Tensor]:
    """Which pictures of a part are right when blurred, noisy, or of low contrast: (N,) bool by kind. Shapes: labels (N,), head's rows."""
    found = {}
    for kind in KINDS:
        corrupted = CorruptedSplit(part, kind, severity)
        right = []
        for start in range(0, len(part), batch_size):
            rows = range(start, min(start + batch_size, len(part)))
            pictures = torch.stack([model.picture(corrupted, row) for row in rows])
            right.append(model(pictures)[1].argmax(1).cpu() == labels[start : start + batch_size])
        found[kind] = torch.cat(right)
    return found
