"""Training one arm on Accelerate: the same steps for the control and the regularised arm, one process or many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, synchronize_rng_states
from torch import Tensor, nn
from torch.utils.data import DataLoader

from singreg.checkpoints import Checkpoints, Position
from singreg.config import FinetuneConfig
from singreg.data.datasets import ImageSplit, make_loader
from singreg.data.embeddings import take_rows
from singreg.loop_translator import LoopTranslator
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.task import (
    FinetuneTask,
    Schedule,
    balance,
    measure_gradients,
    micro_batch,
    parameter_groups,
    ramp_begins,
    synchronise_batch_norm,
    train_head_only,
    trained_backbone,
)
from singreg.utils import broadcast_from_first, progress, seed_process

CLIP = 1.0  # the gradient's norm is clipped to this
LOG_EVERY = 10  # optimiser steps between points of the curves
SKIPPED = 20  # steps in a row that fp16's scaler may skip: 2^20 is more than its whole range of scales from the first


class TrainingFailed(RuntimeError):
    """The loss or its gradient became NaN or infinite; names the arm, the step and the images."""


@dataclass
class Arm:
    """One arm's model, optimiser and data as accelerate prepared them.

    Args:
        plain: the task without DDP around it.
        sampler: of the loader; it takes the epoch.
        translator: None in the control.
        skipped: steps in a row that fp16's scaler skipped.
    """

    name: str
    config: FinetuneConfig
    accelerator: Accelerator
    split: ImageSplit
    schedule: Schedule
    task: nn.Module
    plain: FinetuneTask
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: DataLoader[Any]
    sampler: Any
    translator: LoopTranslator | None
    skipped: int = 0


@dataclass(frozen=True)
class Step:
    """An optimiser step that was just made: where the arm stands, and the figures where the log wants a point."""

    position: Position
    ends_epoch: bool
    figures: dict[str, float]

    @property
    def number(self) -> int:
        """Optimiser steps done, this one included."""
        return self.position.step


def prepare_arm(
    name: str,
    classifier: Classifier,
    sing: SingLoss | None,
    translator: LoopTranslator | None,
    split: ImageSplit,
    config: FinetuneConfig,
    accelerator: Accelerator,
) -> Arm:
    """Set the seed, wrap classifier and loss into one task and prepare it with optimiser, schedule and data.

    Seed, order of the images and schedule do not depend on the arm. Micro-batches are shuffled; with SingLoss and an
    augmentation each has a second view, the one the vision-language model saw.
    """
    set_seed(config.seed)
    synchronise_batch_norm(classifier, config, accelerator)
    plain = FinetuneTask(classifier, sing, l2_sp=config.training.l2_sp, compile=config.model.compile)
    optimizer = torch.optim.AdamW(parameter_groups(classifier, config))
    schedule = Schedule.from_config(config, len(split))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.learning_rate_factor)
    augmentation = config.data.augmentation
    loader = make_loader(
        split,
        classifier.train_transform(augmentation),
        micro_batch(config, accelerator),
        clean_transform=classifier.transform if sing is not None and augmentation != "none" else None,
        shuffle=True,
        seed=config.seed,
        workers=config.data.workers,
        drop_last=True,
    )
    sampler = loader.sampler
    prepared = accelerator.prepare(plain, optimizer, scheduler, loader)
    if sing is None or translator is None:
        translator = None
    elif translator.streams:
        translator.refresh(classifier, sing)
    task, optimizer, scheduler, loader = prepared
    return Arm(
        name=name,
        config=config,
        accelerator=accelerator,
        split=split,
        schedule=schedule,
        task=task,
        plain=plain,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        sampler=sampler,
        translator=translator,
    )


def resume(arm: Arm, checkpoints: Checkpoints) -> Position:
    """Restore the newest checkpoint of an arm, with the sums of its translator; return where it stands."""
    position, tensors = checkpoints.load_latest(seed=arm.config.seed)
    if arm.translator is not None and tensors:
        arm.translator.statistics.load_state_dict(tensors)
    return position


def save(arm: Arm, checkpoints: Checkpoints, position: Position) -> None:
    """Write a checkpoint of an arm, with the sums of its translator where it streams."""
    streams = arm.translator is not None and arm.translator.streams
    checkpoints.save(position, arm.translator.statistics.state_dict() if streams and arm.translator else None)


def steps(arm: Arm, start: Position) -> Iterator[Step]:
    """Train from a position to the end, yielding after every optimiser step.

    A position whose due work was not done is yielded again first. What the caller does between two steps (see `follow`)
    comes before the next one.

    Raises:
        TrainingFailed: a loss or gradient that is not finite; nothing was updated with it.
    """
    described = f"training {arm.name}"
    shown = arm.accelerator.is_local_main_process
    return progress(_steps(arm, start), described, total=arm.schedule.total, done=start.step, enabled=shown)


def follow(arm: Arm, step: Step) -> None:
    """Let the loop's translator follow the classifier after a step: a refresh, or streaming's solution, where due."""
    sing = arm.plain.sing
    if sing is None or arm.translator is None:
        return
    if step.number in arm.schedule.refresh_at:
        arm.translator.refresh(arm.plain.classifier, sing)
    if arm.translator.streams:
        arm.translator.step_ended(step.number, arm.plain.classifier, sing)


def finish(arm: Arm) -> Classifier:
    """Return the trained classifier, unwrapped and in eval mode; accelerate lets go of the arm."""
    classifier = arm.plain.classifier
    arm.accelerator.free_memory()
    return classifier.eval()


def _steps(arm: Arm, start: Position) -> Iterator[Step]:
    accelerator, per_epoch = arm.accelerator, arm.schedule.steps_per_epoch
    step, micro_steps = start.step, per_epoch * accelerator.gradient_accumulation_steps
    if start.due:
        yield Step(replace(start, due=False), step % per_epoch == 0, {})
    for epoch in range(start.epoch, arm.config.training.epochs):
        used = start.batches if epoch == start.epoch else 0
        batches: Any = accelerator.skip_first_batches(arm.loader, used) if used else arm.loader
        # A prepared loader sets its own count of epochs when it starts, and counts only those it was read to the end
        # of. It does not find the sampler when batches are skipped on several processes.
        batches.set_epoch(epoch)
        arm.sampler.set_epoch(epoch)
        _train_mode(arm, step)
        for batch in itertools.islice(batches, micro_steps - used):
            outputs = micro_step(arm, batch, step)
            used += 1
            if accelerator.sync_gradients:
                step += 1
                yield Step(Position(step, epoch, used), step % per_epoch == 0, _figures(arm, outputs, step))
                _train_mode(arm, step)


def _train_mode(arm: Arm, step: int) -> None:
    arm.task.train()
    if step < arm.schedule.head_only:
        train_head_only(arm.plain.classifier)


def micro_step(arm: Arm, batch: Sequence[Tensor], step: int) -> dict[str, Tensor]:
    """Run forward and backward of one micro-batch, and the optimiser's step where it is the last of its batch."""
    *views, labels, indices = batch
    accelerator, task = arm.accelerator, arm.plain
    with accelerator.accumulate(arm.task):
        measured = _balance(arm, views, labels, step)
        with accelerator.autocast():
            outputs: dict[str, Tensor] = arm.task(views[0], labels, *views[1:])
        outputs.update(measured)
        if not bool(torch.isfinite(outputs["loss"])):
            raise TrainingFailed(_failure(arm, "loss", outputs, indices, step))
        accelerator.backward(outputs["loss"])
        if arm.translator is not None and arm.translator.streams and task.seen_features is not None:
            arm.translator.observe(task.seen_features, indices)
        if accelerator.sync_gradients:
            if step < arm.schedule.head_only:
                for parameter in trained_backbone(task.classifier):
                    parameter.grad = None  # AdamW passes it over: no step, no decay, no moments
            outputs["gradient_norm"] = torch.as_tensor(accelerator.clip_grad_norm_(arm.task.parameters(), CLIP))
            _check_gradient(arm, outputs, indices, step)
        arm.optimizer.step()
        arm.optimizer.zero_grad()
        if accelerator.sync_gradients:
            outputs["learning_rate"] = torch.tensor(arm.scheduler.get_last_lr()[0])
            arm.scheduler.step()
    return outputs


def _check_gradient(arm: Arm, outputs: dict[str, Tensor], indices: Tensor, step: int) -> None:
    """With fp16 the scaler skips a step and goes on with a smaller scale, which helps within a few steps or never."""
    arm.skipped = 0 if bool(torch.isfinite(outputs["gradient_norm"])) else arm.skipped + 1
    scaled = arm.accelerator.scaler is not None
    if arm.skipped > (SKIPPED - 1 if scaled else 0):
        what = f"gradient, the {SKIPPED}th in a row at ever smaller fp16 scales," if scaled else "gradient"
        raise TrainingFailed(_failure(arm, what, outputs, indices, step))


def _log_due(arm: Arm, step: int) -> bool:
    return arm.accelerator.sync_gradients and step % LOG_EVERY == 0


def _balance(arm: Arm, views: Sequence[Tensor], labels: Tensor, step: int) -> dict[str, Tensor]:
    """Balance λ where its ramp begins, on that step's first micro-batch; both norms where the log wants them."""
    sing, share = arm.plain.sing, arm.config.loss.balance
    if sing is None or share <= 0:
        return {}
    begins = ramp_begins(sing)
    if not (begins or _log_due(arm, step + 1)):
        return {}
    norms = measure_gradients(arm.plain, views[0], labels, *views[1:])
    return (balance(sing, norms, share) if begins else norms).figures()


def _figures(arm: Arm, outputs: dict[str, Tensor], step: int) -> dict[str, float]:
    """Figures for the log, averaged over processes, where a point is due."""
    if not _log_due(arm, step):
        return {}
    names = sorted(outputs)
    values = torch.stack([outputs[name].detach().float().to(arm.accelerator.device) for name in names])
    return dict(zip(names, arm.accelerator.reduce(values, reduction="mean").tolist(), strict=True))


def _failure(arm: Arm, what: str, outputs: dict[str, Tensor], indices: Tensor, step: int) -> str:
    terms = {name: float(value.detach()) for name, value in outputs.items()}
    images = ", ".join(arm.split.identifier(int(i)) for i in indices)
    return (
        f"arm {arm.name!r}: the {what} is not finite at step {step + 1} ({terms}); nothing was updated with it. Images "
        f"of the batch: {images}. Lower training.learning_rate or loss.weight and use another --out"
    )


@contextmanager
def own_random_numbers(accelerator: Accelerator, seed: int) -> Iterator[None]:
    """Each process but the first draws its own dropout masks inside; outside, all draw as the first does.

    The first keeps its state, so that one process gives what it gave. The order of images has a seed of its own.
    """
    if accelerator.num_processes == 1:
        yield
        return
    if accelerator.process_index:
        seed_process(seed, accelerator.process_index)
    yield
    # Not after a failure: the others may never come.
    synchronize_rng_states(["torch", "cuda"] if accelerator.device.type == "cuda" else ["torch"])


def train_head(
    classifier: Classifier,
    sing: SingLoss | None,
    features: np.ndarray,
    labels: np.ndarray,
    config: FinetuneConfig,
    *,
    name: str = "head",
) -> Classifier:
    """Train W and b on stored features by AdamW on CE + SingLoss, in place; return the classifier in eval mode.

    The schedule is that of fine-tuning. The features stay as they are, so the loop's translator needs no refresh. Every
    process trains on whole batches, and the first one's head goes to all. The order of the images depends on the seed.

    Shape:
        features (N, m), labels (N,).

    Raises:
        TrainingFailed: a loss or gradient that is not finite.
        ValueError: features that do not fit the head or the labels.
    """
    if features.ndim != 2 or features.shape[1] != classifier.feature_dim or labels.shape != features.shape[:1]:
        raise ValueError(
            f"expected features (N, {classifier.feature_dim}) and labels (N,), got {features.shape} and {labels.shape}"
        )
    training, schedule = config.training, Schedule.from_config(config, len(labels))
    classifier.tune("head", batch_norm=config.model.batch_norm).train()
    optimizer = torch.optim.AdamW(parameter_groups(classifier, config))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.learning_rate_factor)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if sing is not None:
        sing.train()
    for step, rows in enumerate(head_batches(len(labels), training.batch_size, training.epochs, config.seed)):
        f = take_rows(features, rows).to(classifier.weight)
        y = torch.from_numpy(labels[rows]).to(classifier.weight.device)
        loss = nn.functional.cross_entropy(classifier.logits(f).float(), y)
        if sing is not None:  # in as many forwards as fine-tuning takes a step, or λ's ramp would be too slow
            chunks = zip(f.chunk(sing.accumulation), y.chunk(sing.accumulation), strict=True)
            loss = loss + torch.stack([sing(*chunk) for chunk in chunks]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(trained, CLIP)
        if not bool(torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingFailed(
                f"arm {name!r}: the loss ({float(loss.detach())}) or its gradient ({float(norm)}) is not finite at "
                f"step {step + 1}; nothing was updated with it. Lower training.learning_rate or loss.weight"
            )
        optimizer.step()
        scheduler.step()
    broadcast_from_first([each.detach() for each in trained])
    return classifier.eval()


def head_batches(count: int, size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows (size,) of every step: each epoch in an order that seed and epoch fix, no incomplete batch.

    Example:
        >>> [rows.shape for rows in head_batches(7, 3, 2, seed=0)]
        [(3,), (3,), (3,), (3,)]
    """
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))
