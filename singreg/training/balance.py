"""Balancing SingLoss against cross-entropy by the norms of their gradients (METHOD section 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from singreg.losses import SingLoss
from singreg.training.task import FinetuneTask, trained_backbone
from singreg.utils import all_reduce_sum


@dataclass(frozen=True)
class GradientNorms:
    """‖∇ CE‖ and ‖∇ λ·SING‖ at the current λ, and ‖∇ SING‖ without λ, over the backbone; the same on every process."""

    ce: float
    sing: float
    unweighted: float

    def figures(self) -> dict[str, Tensor]:
        """As TensorBoard names them: "gradient_ce" and "gradient_sing" (the weighted one), shapes ()."""
        return {"gradient_ce": torch.tensor(self.ce), "gradient_sing": torch.tensor(self.sing)}


def balanced_parameters(task: FinetuneTask) -> list[nn.Parameter]:
    """What norms are taken over: the trained backbone, or the head where it alone trains (no shapes).

    The head is left out otherwise: its gradient of cross-entropy is large and says nothing about features.
    """
    return trained_backbone(task.classifier) or [p for p in task.classifier.head.parameters() if p.requires_grad]


def measure_gradients(task: FinetuneTask, images: Tensor, labels: Tensor, clean: Tensor | None = None) -> GradientNorms:
    """Norms of both gradients on one batch, images and clean (B, 3, H, W), labels (B,); every process must call it.

    A pass of its own through the unwrapped task, in float32: neither DDP's reducer, nor `.grad`, nor the random state, nor a
    buffer (batch norm, SingLoss's means and step) notices it. Gradients are averaged over processes before their norm.

    Raises:
        ValueError: the task has no SingLoss.
    """
    sing = task.sing
    if sing is None:
        raise ValueError("gradients are balanced between cross-entropy and SingLoss; this task has no SingLoss")
    parameters, weight = balanced_parameters(task), sing.current_weight
    with _unnoticed(task, images.device), torch.autocast(images.device.type, enabled=False):
        ce, weighted, _ = task.losses(images, labels, clean)
        assert weighted is not None
        ce_norm = _norm(ce, parameters)
        sing_norm = _norm(weighted, parameters) if weight else 0.0
    return GradientNorms(ce_norm, sing_norm, sing_norm / weight if weight else 0.0)


def ramp_begins(sing: SingLoss) -> bool:
    """True at the first forward with λ > 0, where `balance` is called (no shapes). Depends on saved state alone."""
    return sing.weight > 0 and int(sing.step) == sing.warmup_steps * sing.accumulation


def balance(sing: SingLoss, norms: GradientNorms, share: float) -> GradientNorms:
    """Set `sing.scale` so that ‖∇ λ·SING‖ is `share` times ‖∇ CE‖ at full λ; returns the norms with that scale (no shapes).

    Raises:
        ValueError: a norm is 0 or not finite, so that no scale can do that.
    """
    scale = share * norms.ce / (sing.weight * norms.unweighted) if norms.unweighted > 0 else float("inf")
    if not 0 < scale < float("inf"):
        raise ValueError(
            f"loss.balance = {share} cannot be reached: on this batch the gradient of cross-entropy has norm {norms.ce:g} and that of "
            f"the terms {sorted(sing.terms)} has norm {norms.unweighted:g}; use other terms, a larger batch or loss.balance: 0"
        )
    sing.scale.fill_(scale)
    return replace(norms, sing=sing.current_weight * norms.unweighted)


def _norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """Norm of a loss's gradient, averaged over processes; a parameter that it does not depend on counts as 0."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if loss.requires_grad else ()
    found = {number: gradient for number, gradient in enumerate(gradients) if gradient is not None}
    world = torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1
    squares = [
        (all_reduce_sum(found[number] if number in found else torch.zeros_like(parameter)) / world).double().square().sum()
        for number, parameter in enumerate(parameters)
    ]
    return float(torch.stack(squares).sum().sqrt())


@contextmanager
def _unnoticed(task: FinetuneTask, device: torch.device) -> Iterator[None]:
    """Put buffers, random state, the loss's mode and last values back afterwards."""
    assert task.sing is not None
    sing, training = task.sing, task.sing.training
    kept = [(buffer, buffer.clone()) for buffer in task.classifier.buffers()]
    last = sing.last_terms, task.seen_features
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            sing.eval()  # neither counts a step nor moves its means
            yield
        finally:
            sing.train(training)
            sing.last_terms, task.seen_features = last
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)
