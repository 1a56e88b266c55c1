"""Natural twins: held-out pictures of different classes, close in a classifier's logits and far in an image encoder's space.

Nobody attacked anything here: what the logits cannot tell apart, another reading can (METHOD section 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.pixels.shares import share_interval

CHUNK = 512


@dataclass(frozen=True)
class Twins:
    """Two pictures by place in the part: largest |Δlogit|, and the angle between the encoder's embeddings (degrees)."""

    first: int
    second: int
    logit_distance: float
    angle: float


@dataclass(frozen=True)
class TwinReport:
    """Twins of one model by one encoder: share of pairs of different classes, share of pictures that have one, the closest ones.

    close: largest |Δlogit| that counts, the median between pictures of one class; far: degrees, the median angle between pictures
    of different classes. pairs: those of different classes. rate_interval: 95 % bootstrap over pictures, both limits as they are.
    """

    model: str
    encoder: str
    pictures: int
    pairs: int
    close: float
    far: float
    rate: float
    touched: float
    shown: list[Twins]
    rate_interval: tuple[float, float]


@torch.no_grad()
def natural_twins(
    logits: Tensor, embeddings: Tensor, labels: Tensor, *, model: str = "", encoder: str = "", shown: int = 8
) -> TwinReport:
    """Find the pairs of different classes that are as close in logits as pictures of one class, and as far as others in meaning.

    Both limits are medians of the same pictures, so a model with larger logits is held to a larger one. Ranked by the logit
    distance; no picture is shown twice.

    Shapes: logits (N, C), embeddings (N, n), labels (N,). Memory grows with N²: give a few thousand at most.

    Raises:
        ValueError: rows that do not fit, fewer than two classes, or no two pictures of one class.

    Example:
        >>> logits = torch.tensor([[0.0, 9.0], [0.1, 8.8], [9.0, 0.0], [0.05, 9.0]])
        >>> z = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 1.0]])
        >>> report = natural_twins(logits, z, torch.tensor([0, 0, 1, 1]))
        >>> [(t.first, t.second) for t in report.shown], report.rate
        ([(0, 3)], 0.5)
    """
    if not len(logits) == len(embeddings) == len(labels):
        raise ValueError(f"expected as many logits, embeddings and labels, got {len(logits)}, {len(embeddings)} and {len(labels)}")
    exact = logits.double()
    distance = torch.cat([torch.cdist(exact[start : start + CHUNK], exact, p=torch.inf) for start in range(0, len(exact), CHUNK)])
    unit = normalize(embeddings.double(), dim=-1)
    angle = torch.rad2deg(torch.arccos((unit @ unit.T).clamp(-1, 1)))
    upper = torch.ones_like(distance, dtype=torch.bool).triu(1)
    same = labels[:, None] == labels[None]
    if (problem := twins_problem(labels)) is not None:
        raise ValueError(problem)
    close, far = float(distance[upper & same].median()), float(angle[upper & ~same].median())
    twins = upper & ~same & (distance <= close) & (angle >= far)
    left, right = twins.nonzero(as_tuple=True)
    order = distance[left, right].argsort(stable=True)
    touched = torch.zeros(len(labels), dtype=torch.bool)
    touched[left], touched[right] = True, True
    return TwinReport(
        model, encoder, len(labels), int((upper & ~same).sum()), close, far,
        rate=float(twins.sum() / (upper & ~same).sum()), touched=float(touched.double().mean()),
        shown=_closest(left[order].tolist(), right[order].tolist(), distance, angle, shown),
        rate_interval=_rate_interval(twins, upper & ~same),
    )  # fmt: skip


def twins_problem(labels: Tensor) -> str | None:
    """Why no twins can be sought among pictures with these labels (N,), or None."""
    counts = np.unique(labels.numpy(), return_counts=True)[1]
    if len(counts) < 2 or counts.max() < 2:
        return "natural twins need pictures of at least two classes, and two pictures of one of them"
    return None


def _rate_interval(twins: Tensor, pairs: Tensor, *, resamples: int = 200, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the share of pairs, over pictures and not over pairs, which share pictures. Shapes: (N, N) bool."""
    count = len(twins)
    rng = np.random.default_rng(seed)
    drawn = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(resamples)])
    weights = torch.from_numpy(drawn).double()
    found, all_pairs = (((weights @ table.double()) * weights).sum(1) for table in (twins, pairs))
    shares = (found / all_pairs)[all_pairs > 0].numpy()
    low, high = np.quantile(shares, [0.025, 0.975]) if len(shares) else (0.0, 1.0)
    if not bool(twins.any()):  # draws from nothing are nothing; half as many pairs share no picture
        high = share_interval(0, max(1, count // 2))[2]
    return float(low), float(high)


def _closest(left: list[int], right: list[int], distance: Tensor, angle: Tensor, shown: int) -> list[Twins]:
    found: list[Twins] = []
    used: set[int] = set()
    for first, second in zip(left, right, strict=True):
        if len(found) < shown and not used & {first, second}:
            used |= {first, second}
            found.append(Twins(first, second, float(distance[first, second]), float(angle[first, second])))
    return found
