"""How easily features are steered through the null space towards another class's prompt (METHOD sections 4 and 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from singreg.analysis.results import SteeringSummary
from singreg.geometry.angles import angle
from singreg.geometry.nullspace import NullSpace
from singreg.geometry.steering import steer
from singreg.translation.translator import LinearTranslator


def steering_targets(labels: Tensor, indices: Tensor, classes: int, *, seed: int = 0) -> Tensor:
    """A target class other than its own for every picture, fixed by seed and picture. Shapes: (B,), (B,) to (B,) int64."""
    # A hash of the index, not a generator: the same on any number of processes and for every model compared.
    mixed = (indices.to(torch.int64) + 1 + seed * 7919) * 2654435761 % (2**32)
    return (labels + 1 + mixed.to(labels.device) % (classes - 1)) % classes


def measure_steering(
    features: Tensor,
    labels: Tensor,
    indices: Tensor,
    *,
    texts: Tensor,
    null_space: NullSpace,
    attacker: LinearTranslator,
    judge: LinearTranslator | None = None,
    image_score: float = 40.0,
    seed: int = 0,
) -> SteeringSummary:
    """Steer every picture to a fixed image score towards another class's prompt and read what the judge sees.

    `attacker` finds direction and step; `judge` (default: the attacker) reads AS towards the target and whether its prompt
    outranks all classes. Logits do not change by construction. One gradient step: a lower bound of what an attacker can do.

    Shapes: features (N, m), labels and indices (N,), texts (C, n). Angles in degrees, steps relative to |f|.

    Raises:
        ValueError: fewer than two classes.
    """
    if len(texts) < 2:
        raise ValueError(f"steering needs at least 2 classes to choose a target from, got texts {tuple(texts.shape)}")
    judge = judge or attacker
    targets = steering_targets(labels, indices, len(texts), seed=seed)
    steered = steer(
        features,
        texts[targets],
        matrix=attacker.matrix.to(features),
        offset=attacker.offset.to(features),
        null_space=null_space,
        image_score=image_score,
    )
    ok = steered.reachable
    if not bool(ok.any()):
        nan = float("nan")
        return SteeringSummary(image_score, nan, nan, nan, 0.0, 0.0, len(features))
    before, after = judge(features[ok]), judge(steered.features[ok])
    moved = angle(before, texts[targets[ok]]) - angle(after, texts[targets[ok]])
    ranked = torch.nn.functional.normalize(after, dim=-1) @ texts.T
    step = steered.step[ok] / torch.linalg.vector_norm(features[ok], dim=-1)
    return SteeringSummary(
        image_score=image_score,
        attribute_score=float(moved.mean()),
        attribute_score_std=float(moved.std(correction=0)),
        step=float(step.mean()),
        reachable=float(ok.float().mean()),
        success=float((ranked.argmax(1) == targets[ok]).float().sum() / len(features)),
        images=len(features),
    )
