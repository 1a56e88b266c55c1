"""Training one arm on Accelerate: the same steps for the control and the regularised arm, one process or many."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, synchronize_rng_states
from torch import Tensor

from singreg.checkpoints import Checkpoints, Position
from singreg.config import FinetuneConfig
from singreg.data.splits import make_loader
from singreg.losses import TERMS
from singreg.runs import Run
from singreg.task import FinetuneTask, LoopTranslator, Schedule, make_optimizer, micro_batch
from singreg.utils import seed_process

CLIP = 1.0  # the gradient's norm is clipped to this
CHECKPOINT_EVERY = 200  # optimiser steps, beside every epoch's end
LOG_EVERY = 10  # optimiser steps between points of the curves
TAGS = {name: f"sing/{name}" for name in TERMS}
TAGS |= {"correct": "top1", "sing": "sing/total", "sing_weight": "sing/weight"}
SKIPPED = 20  # steps in a row that fp16's scaler may skip: 2^20 is more than its whole range of scales from the first


class TrainingFailed(RuntimeError):
    """The loss or its gradient became NaN or infinite; names the arm, the step and the images."""


class Arm:
    """One arm's model, optimiser and data, prepared by accelerate, and the steps that train it.

    Seed, order of the images and schedule do not depend on the arm. Micro-batches are shuffled; with SingLoss and an
    augmentation each has a second view, the one the vision-language model saw.
    """

    def __init__(self, name: str, keeper: LoopTranslator, config: FinetuneConfig, run: Run) -> None:
        setup, sing, accelerator = keeper.setup, keeper.sing, run.accelerator
        classifier, split = setup.classifier, setup.splits.train
        set_seed(config.seed)
        self.name, self.keeper, self.config, self.accelerator, self.split = name, keeper, config, accelerator, split
        self.plain = FinetuneTask(classifier, sing, l2_sp=config.training.l2_sp, compile=config.model.compile)
        self.schedule = Schedule(config, len(split))
        optimizer = make_optimizer(classifier, config)
        self.rates = self.schedule.rates(optimizer)  # a function of the step, so checkpoints need not hold it
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
        self.sampler: Any = loader.sampler  # takes the epoch
        self.task, self.optimizer, self.loader = accelerator.prepare(self.plain, optimizer, loader)
        self.checkpoints = Checkpoints(run.folder / "checkpoints" / name, accelerator)
        self.skipped = 0  # steps in a row that fp16's scaler skipped

    def steps(self, start: Position) -> Iterator[tuple[Position, dict[str, float]]]:
        """Train from a position to the end, yielding after every optimiser step; now and then with figures to log.

        A position whose due work was not done is yielded again first. What the caller does between two steps comes
        before the next one. `TrainingFailed` comes before anything is updated with what is not finite.
        """
        accelerator, step = self.accelerator, start.step
        micro_steps = self.schedule.steps_per_epoch * accelerator.gradient_accumulation_steps
        if start.due:
            yield replace(start, due=False), {}
        for epoch in range(start.epoch, self.config.training.epochs):
            used = start.batches if epoch == start.epoch else 0
            batches: Any = accelerator.skip_first_batches(self.loader, used) if used else self.loader
            # A prepared loader sets its own count of epochs when it starts, and counts only those it was read to the
            # end of. It does not find the sampler when batches are skipped on several processes.
            batches.set_epoch(epoch)
            self.sampler.set_epoch(epoch)
            self.task.train()
            for batch in itertools.islice(batches, micro_steps - used):
                outputs = micro_step(self, batch, step)
                used += 1
                if accelerator.sync_gradients:
                    step += 1
                    yield Position(step, epoch, used), self._averaged(outputs) if step % LOG_EVERY == 0 else {}
                    self.task.train()

    def _averaged(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(outputs)
        values = torch.stack([outputs[name].detach().float().to(self.accelerator.device) for name in names])
        tags = [f"train/{TAGS.get(name, name)}" for name in names]
        return dict(zip(tags, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))


def micro_step(arm: Arm, batch: Sequence[Tensor], step: int) -> dict[str, Tensor]:
    """Run forward and backward of one micro-batch, and the optimiser's step where it is the last of its batch."""
    *views, labels, indices = batch
    accelerator = arm.accelerator
    embeddings = None if arm.keeper.sing is None else arm.keeper.seen(indices, labels.device)
    clean = views[1] if len(views) > 1 else None
    with accelerator.accumulate(arm.task):
        with accelerator.autocast():
            outputs: dict[str, Tensor] = arm.task(views[0], labels, clean, embeddings)
        if not bool(torch.isfinite(outputs["loss"])):
            raise TrainingFailed(_failure(arm, "loss", outputs, indices, step))
        accelerator.backward(outputs["loss"])
        if accelerator.sync_gradients:
            outputs["gradient_norm"] = torch.as_tensor(accelerator.clip_grad_norm_(arm.task.parameters(), CLIP))
            _check_gradient(arm, outputs, indices, step)
            arm.rates.step_update(step + 1)
            outputs["learning_rate"] = torch.tensor(arm.optimizer.param_groups[0]["lr"])
        arm.optimizer.step()
        arm.optimizer.zero_grad()
    return outputs


def _check_gradient(arm: Arm, outputs: dict[str, Tensor], indices: Tensor, step: int) -> None:
    """With fp16 the scaler skips a step and goes on with a smaller scale, which helps within a few steps or never."""
    arm.skipped = 0 if bool(torch.isfinite(outputs["gradient_norm"])) else arm.skipped + 1
    scaled = arm.accelerator.scaler is not None
    if arm.skipped > (SKIPPED - 1 if scaled else 0):
        what = f"gradient, the {SKIPPED}th in a row at ever smaller fp16 scales," if scaled else "gradient"
        raise TrainingFailed(_failure(arm, what, outputs, indices, step))


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
