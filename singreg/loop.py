"""Training one arm on Accelerate: the same steps for the control and the regularised arm, one process or many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, synchronize_rng_states
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from singreg import task as tasks
from singreg.analysis.features import iterate_features
from singreg.checkpoints import Checkpoints, Position
from singreg.config import FinetuneConfig
from singreg.data.datasets import ImageSplit, make_loader
from singreg.loop_translator import LoopTranslator
from singreg.losses import SingLoss
from singreg.metrics import SemanticLeakage
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.plots import panels, styled
from singreg.setup import Setup
from singreg.translator import LinearTranslator
from singreg.utils import progress, seed_process

CLIP = 1.0  # the gradient's norm is clipped to this
LOG_EVERY = 10  # optimiser steps between points of the curves
WATCHED = 256  # held-out images of a point of AS and IS
SKIPPED = 20  # steps in a row that fp16's scaler may skip: 2^20 is more than its whole range of scales from the first


class TrainingFailed(RuntimeError):
    """The loss or its gradient became NaN or infinite; names the arm, the step and the images."""


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


class Arm:
    """One arm's model, optimiser and data, prepared by accelerate, and the steps that train it.

    Seed, order of the images and schedule do not depend on the arm. Micro-batches are shuffled; with SingLoss and an
    augmentation each has a second view, the one the vision-language model saw. Without SingLoss nobody needs `keeper`.

    Args:
        folder: of the arm's checkpoints.
    """

    def __init__(
        self,
        name: str,
        classifier: Classifier,
        sing: SingLoss | None,
        keeper: LoopTranslator,
        split: ImageSplit,
        config: FinetuneConfig,
        accelerator: Accelerator,
        folder: Path,
    ) -> None:
        set_seed(config.seed)
        tasks.synchronise_batch_norm(classifier, config, accelerator)
        self.name, self.split, self.config, self.accelerator = name, split, config, accelerator
        self.plain = tasks.FinetuneTask(classifier, sing, l2_sp=config.training.l2_sp, compile=config.model.compile)
        self.schedule = tasks.Schedule(config, len(split))
        optimizer = torch.optim.AdamW(tasks.parameter_groups(classifier, config))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.learning_rate_factor)
        augmentation = config.data.augmentation
        loader = make_loader(
            split,
            classifier.train_transform(augmentation),
            tasks.micro_batch(config, accelerator),
            clean_transform=classifier.transform if sing is not None and augmentation != "none" else None,
            shuffle=True,
            seed=config.seed,
            workers=config.data.workers,
            drop_last=True,
        )
        self.sampler: Any = loader.sampler  # takes the epoch
        prepared = accelerator.prepare(self.plain, optimizer, scheduler, loader)
        self.task, self.optimizer, self.scheduler, self.loader = prepared
        self.translator = keeper if sing is not None else None
        self.checkpoints = Checkpoints(folder, accelerator)
        self.skipped = 0  # steps in a row that fp16's scaler skipped

    def resume(self) -> Position:
        """Restore the newest checkpoint; return where the arm stands."""
        return self.checkpoints.load_latest(seed=self.config.seed)

    def save(self, position: Position) -> None:
        """Write a checkpoint."""
        self.checkpoints.save(position)

    def steps(self, start: Position) -> Iterator[Step]:
        """Train from a position to the end, yielding after every optimiser step.

        A position whose due work was not done is yielded again first. What the caller does between two steps (see
        `follow`) comes before the next one. `TrainingFailed` comes before anything is updated with what is not finite.
        """
        shown, total = self.accelerator.is_local_main_process, self.schedule.total
        return progress(self._steps(start), f"training {self.name}", total=total, done=start.step, enabled=shown)

    def follow(self, step: Step) -> None:
        """Let the loop's translator follow the classifier after the steps of the schedule."""
        sing, keeper = self.plain.sing, self.translator
        if sing is not None and keeper is not None and step.number in self.schedule.refresh_at:
            keeper.refresh(self.plain.classifier, sing)

    def finish(self) -> Classifier:
        """Return the trained classifier, unwrapped and in eval mode; accelerate lets go of the arm."""
        self.accelerator.free_memory()
        return self.plain.classifier.eval()

    def _steps(self, start: Position) -> Iterator[Step]:
        accelerator, per_epoch = self.accelerator, self.schedule.steps_per_epoch
        step, micro_steps = start.step, per_epoch * accelerator.gradient_accumulation_steps
        if start.due:
            yield Step(replace(start, due=False), step % per_epoch == 0, {})
        for epoch in range(start.epoch, self.config.training.epochs):
            used = start.batches if epoch == start.epoch else 0
            batches: Any = accelerator.skip_first_batches(self.loader, used) if used else self.loader
            # A prepared loader sets its own count of epochs when it starts, and counts only those it was read to the
            # end of. It does not find the sampler when batches are skipped on several processes.
            batches.set_epoch(epoch)
            self.sampler.set_epoch(epoch)
            self._train_mode(step)
            for batch in itertools.islice(batches, micro_steps - used):
                outputs = micro_step(self, batch, step)
                used += 1
                if accelerator.sync_gradients:
                    step += 1
                    figures = self._averaged(outputs) if step % LOG_EVERY == 0 else {}
                    yield Step(Position(step, epoch, used), step % per_epoch == 0, figures)
                    self._train_mode(step)

    def _train_mode(self, step: int) -> None:
        self.task.train()
        if step < self.schedule.head_only:
            tasks.train_head_only(self.plain.classifier)

    def _averaged(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(outputs)
        values = torch.stack([outputs[name].detach().float().to(self.accelerator.device) for name in names])
        return dict(zip(names, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))


def micro_step(arm: Arm, batch: Sequence[Tensor], step: int) -> dict[str, Tensor]:
    """Run forward and backward of one micro-batch, and the optimiser's step where it is the last of its batch."""
    *views, labels, indices = batch
    accelerator, keeper = arm.accelerator, arm.translator
    embeddings = None if keeper is None else keeper.seen(indices, labels.device)
    clean = views[1] if len(views) > 1 else None
    with accelerator.accumulate(arm.task):
        with accelerator.autocast():
            outputs: dict[str, Tensor] = arm.task(views[0], labels, clean, embeddings)
        if not bool(torch.isfinite(outputs["loss"])):
            raise TrainingFailed(_failure(arm, "loss", outputs, indices, step))
        accelerator.backward(outputs["loss"])
        if accelerator.sync_gradients:
            if step < arm.schedule.head_only:
                for parameter in tasks.trained_backbone(arm.plain.classifier):
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


def _failure(arm: Arm, what: str, outputs: dict[str, Tensor], indices: Tensor, step: int) -> str:
    terms = {name: float(value.detach()) for name, value in outputs.items()}
    images = ", ".join(arm.split.identifier(int(i)) for i in indices)
    return (
        f"arm {arm.name!r}: the {what} is not finite at step {step + 1} ({terms}); nothing was updated with it. Images "
        f"of the batch: {images}. Lower training.learning_rate or loss.weight and use another --out"
    )


def watch(
    classifier: Classifier,
    setup: Setup,
    translator: LinearTranslator,
    invariance: Invariance,
    accelerator: Accelerator,
    step: int,
) -> None:
    """Log AS and IS of some labelled audit images by a translator: curves, no evidence; every process calls it."""
    split = setup.splits.audit
    labelled = np.flatnonzero(split.labels >= 0)
    if not len(labelled):
        return
    # Evenly spaced, so that every class is among them however the split is ordered.
    chosen = labelled[torch.linspace(0, len(labelled) - 1, min(WATCHED, len(labelled))).long().numpy()]
    space = NullSpace.from_weight(classifier.weight, invariance=invariance).to(setup.texts.device)
    scores = SemanticLeakage(setup.texts).to(setup.texts.device)
    passes, embeddings = replace(setup.passes, progress=False), setup.embeddings["audit"][chosen]
    for batch in iterate_features(classifier, split.subset(chosen), embeddings, passes, "watching"):
        scores.update(translator(batch.features), translator(space.remove(batch.features)), batch.labels)
    accelerator.log({f"watch/{name}": float(value) for name, value in scores.compute().items()}, step=step)
    image = _histogram(scores)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"watch/histogram": image}, step=step, **layout)


def _histogram(scores: SemanticLeakage) -> np.ndarray:
    """Draw AS and IS of all processes' images as one image (1, height, width, 3)."""
    with scores.sync_context():  # torchmetrics sums over processes in `compute`, but not where the state is read
        counts = scores.histogram.cpu().numpy()
    figure, (axes,) = panels(width=5.0, height=3.2)
    places = np.linspace(-180, 180, counts.shape[1], endpoint=False)
    for name, values in zip(("AS", "IS"), counts, strict=True):
        axes.hist(places, bins=90, range=(-180, 180), weights=values, alpha=0.6, label=name)
    styled(axes).set_xlabel("degrees")
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[None, ..., :3]  # type: ignore[no-untyped-call]


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
