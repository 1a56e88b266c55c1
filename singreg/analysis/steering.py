"""How easily features are steered through the null space towards another prompt (METHOD sections 4 and 9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, steer
from singreg.translator import LinearTranslator

SAME_PROMPT = 1 - 1e-6  # cosine above which two prompts are one: a class is no rival of its own prompt


def steering_arguments(translator: AnyTranslator, like: Tensor) -> dict[str, Any]:
    """Return how `steer` and its parts take a translator: matrix and offset in the dtype of `like`, or a callable."""
    if isinstance(translator, LinearTranslator):
        return {"matrix": translator.matrix.to(like), "offset": translator.offset.to(like)}
    return {"translator": in_its_own_dtype(translator)}


def in_its_own_dtype(translator: AnyTranslator) -> AnyTranslator:
    """Wrap a translator so that it runs in the dtype of its weights and answers in that of its input."""
    if isinstance(translator, LinearTranslator) or not isinstance(translator, nn.Module):
        return translator
    dtype = next((p.dtype for p in [*translator.parameters(), *translator.buffers()] if p.is_floating_point()), None)
    if dtype is None:
        return translator

    def call(features: Tensor) -> Tensor:
        translated: Tensor = translator(features.to(dtype))
        return translated.to(features.dtype)

    return call


def own_prompt(text: Tensor, class_texts: Tensor) -> Tensor:
    """Where a class prompt is the target prompt itself, and so no rival. Shape: (R, n), (C, n) to (R, C) bool."""
    return text @ class_texts.T >= SAME_PROMPT


def outranks(own: Tensor, classes: Tensor, same: Tensor) -> Tensor:
    """Whether the target prompt is nearer than every class prompt but its own, from cosines.

    Shape: own (R,), classes (R, C), same (R, C) bool; returns (R,) bool.
    """
    return own > classes.masked_fill(same, -torch.inf).amax(-1)


def steering_targets(labels: Tensor, indices: Tensor, classes: int, *, seed: int = 0) -> Tensor:
    """Choose a target class other than its own for every image, fixed by seed and index. Shape: (B,), (B,) to (B,)."""
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
    attacker: AnyTranslator,
    judge: AnyTranslator | None = None,
    image_score: float = 40.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Steer every image to a fixed image score towards another class's prompt and read what the judge sees.

    Logits do not change by construction. One gradient step: a lower bound of what an attacker can do.

    Args:
        attacker: finds direction and step.
        judge: reads AS towards the target and whether its prompt outranks all classes; None takes the attacker.
        image_score: in degrees (paper table 1: 40).

    Shape: features (N, m), labels and indices (N,), texts (C, n) unit rows.

    Returns:
        image_score; attribute_score and attribute_score_std (degrees) and step (mean ε / |f|) over the reachable, NaN
        where none is; reachable and success, shares of all; images.

    Raises:
        ValueError: fewer than two classes.
    """
    if len(texts) < 2:
        raise ValueError(f"steering needs at least 2 classes to choose a target from, got texts {tuple(texts.shape)}")
    judge = judge or attacker
    targets = steering_targets(labels, indices, len(texts), seed=seed)
    arguments = steering_arguments(attacker, features)
    steered = steer(features, texts[targets], null_space=null_space, image_score=image_score, **arguments)
    ok = steered.reachable
    targets, start = targets[ok], features[ok]
    before, after = judge(start), judge(steered.features[ok])
    moved = angle(before, texts[targets]) - angle(after, texts[targets])
    won = (torch.nn.functional.normalize(after, dim=-1) @ texts.T).argmax(1) == targets
    return {
        "image_score": image_score,
        "attribute_score": float(moved.mean()),
        "attribute_score_std": float(moved.std(correction=0)) if len(moved) else float("nan"),
        "step": float((steered.step[ok] / torch.linalg.vector_norm(start, dim=-1)).mean()),
        "reachable": float(ok.float().mean()),
        "success": float(won.float().sum() / len(features)),
        "images": len(features),
    }
