"""Training the head alone on stored features of a frozen backbone: seconds where fine-tuning takes minutes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from singreg.data.embeddings import take_rows
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.training.config import FinetuneConfig
from singreg.training.loop import Schedule, TrainingFailed
from singreg.training.task import parameter_groups
from singreg.utils import broadcast_from_first


def train_head(
    name: str,
    classifier: Classifier,
    sing: SingLoss | None,
    features: np.ndarray,
    labels: np.ndarray,
    config: FinetuneConfig,
) -> Classifier:
    """Train W and b on features (N, m) with labels (N,) by AdamW on CE + SingLoss, in place; returned in eval mode.

    The schedule is that of fine-tuning (linear warm-up, cosine decay, λ's ramp), the head's rate its rate times `head_factor`. The
    features stay as they are, so the loop's translator needs no refresh: terms that do not move W have nothing to do here. Every
    process trains on whole batches, and the first one's head goes to all. Depends on the seed alone: the order of the pictures.

    Raises:
        TrainingFailed: a loss or gradient that is not finite. ValueError: features that do not fit the head or the labels.
    """
    if features.ndim != 2 or features.shape[1] != classifier.feature_dim or labels.shape != features.shape[:1]:
        raise ValueError(
            f"expected features (N, {classifier.feature_dim}) and labels (N,), got {features.shape} and {labels.shape}"
        )
    training, schedule = config.training, Schedule.from_config(config, len(labels))
    classifier.tune("head", batch_norm=config.model.batch_norm).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(
            classifier, learning_rate=training.learning_rate, head_factor=training.head_factor, decay=training.weight_decay
        )
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.learning_rate_factor)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if sing is not None:
        sing.train()
    for step, rows in enumerate(batches(len(labels), training.batch_size, training.epochs, config.seed)):
        f = take_rows(features, rows).to(classifier.weight)
        y = torch.from_numpy(labels[rows]).to(classifier.weight.device)
        loss = nn.functional.cross_entropy(classifier.logits(f).float(), y, label_smoothing=training.label_smoothing)
        if sing is not None:
            loss = loss + _in_micro_batches(sing, f, y, training.accumulation)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(trained, training.clip)
        if not bool(torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingFailed(
                f"arm {name!r}: the loss ({float(loss.detach())}) or its gradient ({float(norm)}) is not finite at step {step + 1}; "
                "nothing was updated with it. Lower training.learning_rate or loss.weight"
            )
        optimizer.step()
        scheduler.step()
    broadcast_from_first([each.detach() for each in trained])
    return classifier.eval()


def _in_micro_batches(sing: SingLoss, features: Tensor, labels: Tensor, accumulation: int) -> Tensor:
    """The mean loss over as many forwards as fine-tuning takes a step, or λ's ramp would be that many times too slow."""
    parts = zip(features.chunk(accumulation), labels.chunk(accumulation), strict=True)
    return torch.stack([sing(f, y) for f, y in parts]).mean()


def batches(count: int, size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Places (size,) of every step: each epoch in an order of its own that seed and epoch fix; an incomplete batch is dropped.

    Example:
        >>> [rows.shape for rows in batches(7, 3, 2, seed=0)]
        [(3,), (3,), (3,), (3,)]
    """
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))
