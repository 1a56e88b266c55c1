"""Training one arm on Accelerate: the same code for the control and the regularised arm, one process or many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from singreg.data.datasets import ImageSplit, make_loader
from singreg.data.loader import EpochSampler
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.training.balance import balance, measure_gradients, ramp_begins
from singreg.training.checkpoint import Checkpoints, Position
from singreg.training.config import FinetuneConfig
from singreg.training.processes import own_random_numbers, synchronise_batch_norm
from singreg.training.streaming import LoopTranslator
from singreg.training.task import FinetuneTask, parameter_groups, train_head_only, trained_backbone
from singreg.utils import progress
from singreg.workbench.stopping import StopRequest

logger = get_logger(__name__)
SKIPPED = 20
"""Steps in a row that fp16's scaler may skip: 2^20 is more than its whole range of scales from the first."""


class TrainingFailed(RuntimeError):
    """The loss or its gradient became NaN or infinite; names the step, the pictures and the last good checkpoint."""


@dataclass(frozen=True)
class Schedule:
    """Steps of an arm, all in optimiser steps."""

    steps_per_epoch: int
    total: int
    warmup: int
    refresh_at: tuple[int, ...]
    head_only: int = 0

    @classmethod
    def from_config(cls, config: FinetuneConfig, images: int) -> Schedule:
        """From the number of training pictures; the last incomplete batch of an epoch is dropped.

        Raises:
            ValueError: there are fewer pictures than one batch.
        """
        training = config.training
        per_epoch = images // training.batch_size
        if per_epoch == 0 and training.epochs:
            raise ValueError(
                f"the training part has {images} pictures, fewer than training.batch_size = {training.batch_size}; "
                "lower the batch size or give more pictures"
            )
        total = per_epoch * training.epochs
        parts = config.translator.refreshes + 1
        refresh = sorted({round(total * i / parts) for i in range(1, parts)} - {0, total})
        return cls(per_epoch, total, math.ceil(training.lr_warmup * total), tuple(refresh), round(training.head_first * total))

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then cosine decay to 0; a factor in [0, 1] for a step index."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        span = max(1, self.total - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warmup) / span)))


def micro_batch(config: FinetuneConfig, processes: int) -> int:
    """Pictures of one forward over all processes: the batch size divided by the accumulation steps (no shapes).

    Raises:
        ValueError: the batch cannot be split evenly.
    """
    training = config.training
    micro, rest = divmod(training.batch_size, training.accumulation)
    if rest or micro % processes:
        raise ValueError(
            f"training.batch_size = {training.batch_size} cannot be split evenly into {training.accumulation} "
            f"accumulation step(s) over {processes} process(es); choose a multiple of their product"
        )
    return micro


@dataclass(frozen=True)
class ArmCallbacks:
    """What happens beside the steps: log(step, figures), epoch_end(step, classifier, sing), refresh(classifier) of the translator.

    translator: is told of every batch and step of an arm with SingLoss, and saved and restored with it.
    """

    log: Callable[[int, dict[str, float]], None]
    epoch_end: Callable[[int, Classifier, SingLoss | None], None]
    refresh: Callable[[Classifier, SingLoss], None]
    translator: LoopTranslator | None = None


def train_arm(
    name: str,
    classifier: Classifier,
    sing: SingLoss | None,
    part: ImageSplit,
    config: FinetuneConfig,
    accelerator: Accelerator,
    folder: Path,
    callbacks: ArmCallbacks,
    *,
    resume: bool,
) -> Classifier:
    """Train one arm to the end and return its classifier, unwrapped. Seed, data order and schedule do not depend on the arm.

    Raises:
        TrainingFailed: a loss that is not finite; the last checkpoint in `folder` is kept.
    """
    set_seed(config.seed)
    training = config.training
    schedule = Schedule.from_config(config, len(part))
    synchronise_batch_norm(classifier, config, accelerator)
    task: torch.nn.Module = FinetuneTask(
        classifier, sing, label_smoothing=training.label_smoothing, l2_sp=training.l2_sp, compile=config.model.compile
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(
            classifier,
            learning_rate=training.learning_rate,
            head_factor=training.head_factor,
            decay=training.weight_decay,
        )
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.learning_rate_factor)
    loader = _training_loader(classifier, part, config, accelerator.num_processes, clean=sing is not None)
    sampler = loader.sampler
    assert isinstance(sampler, EpochSampler)
    task, optimizer, loader = accelerator.prepare(task, optimizer, loader)
    translator = callbacks.translator if sing is not None else None
    if sing is not None and translator is not None:
        translator.refresh(classifier, sing)
    accelerator.register_for_checkpointing(scheduler, *([] if translator is None else [translator]))
    checkpoints = Checkpoints(folder, keep=training.keep)
    arm = _Arm(name, task, optimizer, scheduler, accelerator, schedule, config, part, sampler, translator)
    try:
        with own_random_numbers(accelerator, config.seed):
            start = checkpoints.load_latest(accelerator, seed=config.seed) if resume else None
            _run(arm, loader, start or Position(0, 0, 0), checkpoints, callbacks)
    finally:
        accelerator._custom_objects.clear()  # the next arm registers its own schedule
    trained: FinetuneTask = accelerator.unwrap_model(task)
    accelerator.free_memory()
    return trained.classifier.eval()


def _run(
    arm: _Arm, loader: DataLoader[tuple[Tensor, ...]], start: Position, checkpoints: Checkpoints, callbacks: ArmCallbacks
) -> None:
    """All steps from a position on, with what happens beside them and a checkpoint where one is due or wanted."""
    accelerator, per_epoch, every = arm.accelerator, arm.schedule.steps_per_epoch, arm.config.training.checkpoint_every
    if start.refresh_due:
        _between_steps(arm, start, callbacks)
    steps = progress(
        arm.steps(loader, start), f"training {arm.name}", total=arm.schedule.total, done=start.step,
        enabled=accelerator.is_local_main_process,
    )  # fmt: skip
    with StopRequest(accelerator) as request:
        for position in steps:
            callbacks.log(position.step, arm.figures)
            if request.came():  # looked for before the translator's refresh, which may encode a million pictures
                checkpoints.save(accelerator, replace(position, refresh_due=True))
                request.end()
            _between_steps(arm, position, callbacks)
            if position.step % per_epoch == 0 or position.step % every == 0:
                checkpoints.save(accelerator, position)


def _between_steps(arm: _Arm, position: Position, callbacks: ArmCallbacks) -> None:
    """What follows a step, before a checkpoint of it is written."""
    classifier, sing = arm.plain.classifier, arm.plain.sing
    if sing is not None and position.step in arm.schedule.refresh_at:
        callbacks.refresh(classifier, sing)
    if sing is not None and arm.translator is not None:
        arm.translator.step_ended(position.step, classifier, sing)
    if position.step % arm.schedule.steps_per_epoch == 0:
        callbacks.epoch_end(position.step, classifier, sing)


def _training_loader(
    classifier: Classifier, part: ImageSplit, config: FinetuneConfig, processes: int, *, clean: bool
) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled micro-batches; with `clean` and an augmentation a second view, the one the vision-language model saw."""
    return make_loader(
        part,
        classifier.train_transform(config.data.augmentation),
        micro_batch(config, processes),
        clean_transform=classifier.transform if clean and config.data.augmentation != "none" else None,
        shuffle=True,
        seed=config.seed,
        workers=config.data.workers,
        drop_last=True,
    )


class _Arm:
    """The inner loop: micro-batches, accumulation, clipping, schedule."""

    def __init__(
        self,
        name: str,
        task: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        accelerator: Accelerator,
        schedule: Schedule,
        config: FinetuneConfig,
        part: ImageSplit,
        sampler: EpochSampler,
        translator: LoopTranslator | None = None,
    ) -> None:
        self.sampler, self.translator = sampler, translator
        self.plain: FinetuneTask = accelerator.unwrap_model(task)
        self.name, self.task, self.optimizer, self.scheduler = name, task, optimizer, scheduler
        self.accelerator, self.schedule, self.config, self.part = accelerator, schedule, config, part
        self.figures: dict[str, float] = {}
        self.skipped = 0

    def steps(self, loader: DataLoader[tuple[Tensor, ...]], start: Position) -> Iterator[Position]:
        """Run from a position to the end, yielding after every optimiser step."""
        step, accumulation = start.step, self.config.training.accumulation
        for epoch in range(start.epoch, self.config.training.epochs):
            skipped = start.batches if epoch == start.epoch else 0
            batches: Any = self.accelerator.skip_first_batches(loader, skipped) if skipped else loader
            # A prepared loader sets its own count of epochs when it starts, and counts only those it was read to the end of. It does
            # not find the sampler when batches are skipped on several processes.
            batches.set_epoch(epoch)
            self.sampler.set_epoch(epoch)
            wanted = self.schedule.steps_per_epoch * accumulation - skipped
            self._train_mode(step)
            for used, batch in enumerate(itertools.islice(batches, wanted), start=skipped + 1):
                self._micro_step(batch, step)
                if self.accelerator.sync_gradients:
                    step += 1
                    yield Position(step, epoch, used)
                    self._train_mode(step)

    def _train_mode(self, step: int) -> None:
        self.task.train()
        if step < self.schedule.head_only:
            train_head_only(self.plain.classifier)

    def _micro_step(self, batch: tuple[Tensor, ...], step: int) -> None:
        *views, labels, indices = batch
        accelerator = self.accelerator
        with accelerator.accumulate(self.task):
            measured = self._balance(views, labels, step)
            with accelerator.autocast():
                outputs = self.task(views[0], labels, *views[1:])
            outputs.update(measured)
            loss = outputs["loss"]
            if not bool(torch.isfinite(loss)):
                raise TrainingFailed(self._failure("loss", outputs, indices, step))
            accelerator.backward(loss)
            if self.translator is not None and self.plain.seen_features is not None:
                self.translator.observe(self.plain.seen_features, indices)
            if accelerator.sync_gradients:
                if step < self.schedule.head_only:
                    for parameter in trained_backbone(self.plain.classifier):
                        parameter.grad = None  # AdamW passes it over: no step, no decay, no moments
                norm = torch.as_tensor(accelerator.clip_grad_norm_(self.task.parameters(), self.config.training.clip))
                outputs["gradient_norm"] = norm
                self._check_gradient(outputs, indices, step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                outputs["learning_rate"] = torch.tensor(self.scheduler.get_last_lr()[0])
                self.scheduler.step()
        self._collect(outputs, step)

    def _check_gradient(self, outputs: dict[str, Tensor], indices: Tensor, step: int) -> None:
        """With fp16 the scaler skips a step by itself and goes on with a smaller scale, which helps within a few steps or never."""
        self.skipped = 0 if bool(torch.isfinite(outputs["gradient_norm"])) else self.skipped + 1
        if self.skipped > (0 if self.accelerator.scaler is None else SKIPPED - 1):
            what = "gradient" if self.accelerator.scaler is None else f"gradient, the {SKIPPED}th in a row at ever smaller fp16 scales,"
            raise TrainingFailed(self._failure(what, outputs, indices, step))

    def _log_due(self, step: int) -> bool:
        return self.accelerator.sync_gradients and (step + 1) % self.config.training.log_every == 0

    def _balance(self, views: Sequence[Tensor], labels: Tensor, step: int) -> dict[str, Tensor]:
        """Balance λ where its ramp begins, on that step's first micro-batch; both gradients' norms where the log wants them."""
        sing, share = self.plain.sing, self.config.loss.balance
        begins = sing is not None and share > 0 and ramp_begins(sing)
        if sing is None or share <= 0 or not (begins or self._log_due(step)):
            return {}
        norms = measure_gradients(self.plain, views[0], labels, *views[1:])
        if begins:
            norms = balance(sing, norms, share)
        return norms.figures()

    def _collect(self, outputs: dict[str, Tensor], step: int) -> None:
        """Figures for the log, averaged over processes, only when a point is due."""
        self.figures = {}
        if self._log_due(step):
            names = sorted(outputs)
            values = torch.stack([outputs[name].detach().float().to(self.accelerator.device) for name in names])
            mean = self.accelerator.reduce(values, reduction="mean")
            self.figures = dict(zip(names, mean.tolist(), strict=True))

    def _failure(self, what: str, outputs: dict[str, Tensor], indices: Tensor, step: int) -> str:
        parts = {name: float(value.detach()) for name, value in outputs.items()}
        pictures = ", ".join(self.part.identifier(int(i)) for i in indices)
        return (
            f"arm {self.name!r}: the {what} is not finite at step {step + 1} ({parts}); nothing was updated with it. Pictures of the "
            f"batch: {pictures}. Lower training.learning_rate or loss.weight and use another --name: with other settings it is another run"
        )
