"""Training one arm on Accelerate, with and without the loss alike; the curves of held-out images, the best epoch."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, synchronize_rng_states
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from singreg.analysis.features import iterate_features
from singreg.config import FinetuneConfig
from singreg.data.splits import ImageSplit, make_loader
from singreg.losses import TERMS
from singreg.metrics import SemanticLeakage
from singreg.plots import panels, styled
from singreg.report import log, log_image
from singreg.runs import Checkpoints, Position, Run
from singreg.setup import Setup
from singreg.task import FinetuneTask, LoopTranslator, Schedule, make_optimizer, micro_batch
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_sum, seed_process, write_tensors

CLIP = 1.0  # the gradient's norm is clipped to this
CHECKPOINT_EVERY = 200  # optimiser steps, beside every epoch's end
LOG_EVERY = 10  # optimiser steps between points of the curves
TAGS = {name: f"sing/{name}" for name in TERMS}
TAGS |= {"correct": "top1", "sing": "sing/total", "sing_weight": "sing/weight"}
SKIPPED = 20  # steps in a row that fp16's scaler may skip: 2^20 is more than its whole range of scales from the first
SHARE = 10  # a run sets one in so many of the labelled audit images of its smallest class aside, and as many of each
SHOWN = ("AS_neg", "AS_abs", "IS")
BARS = 30


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


def validation_images(audit: ImageSplit, per_class: int | None = None) -> np.ndarray:
    """Return which labelled audit images are validation images, (N,) bool: the first `per_class` of every class.

    By default a tenth of the smallest class's, at least one, and none where a class has a single image.
    """
    labels = pd.Series(audit.labels)
    fewest = min(labels[labels >= 0].value_counts(), default=0)
    if per_class is None:
        per_class = max(1, fewest // SHARE) if fewest > 1 else 0
    if per_class and fewest <= per_class:
        raise ValueError(
            f"a class of the audit split has no more than the {per_class} images to set aside for validation; lower "
            "validation_per_class, or give it more (data.per_class.audit, data.scenes.audit)"
        )
    chosen = (labels >= 0) & (labels.groupby(labels).cumcount() < per_class)
    return np.asarray(chosen)


def hold_out(setup: Setup, per_class: int | None = None) -> Setup:
    """Take validation images, and their embeddings, out of the auditor's."""
    audit, embeddings = setup.splits.audit, setup.embeddings["audit"]
    chosen = validation_images(audit, per_class)
    if not chosen.any():
        return setup
    taken, kept = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    splits = replace(setup.splits, audit=audit.subset(kept, "audit"))
    left = {**setup.embeddings, "audit": embeddings[kept]}
    return replace(setup, splits=splits, embeddings=left, held=(audit.subset(taken, "validation"), embeddings[taken]))


class Validation:
    """What an arm shows of held-out images, and its best epoch, which a resumed run finds again.

    The images are those of no other use, `setup.held`; without them there are no curves and no epoch can be chosen.
    """

    def __init__(self, arm: Arm) -> None:
        self.setup, self.accelerator, training = arm.keeper.setup, arm.accelerator, arm.config.training
        self.patience, self.chooses = training.patience * arm.schedule.steps_per_epoch, bool(training.best_checkpoint)
        self.kept, self.best, self.step = arm.checkpoints.folder / "best.safetensors", -1.0, 0
        if self.kept.is_file():
            with safe_open(self.kept, framework="pt") as file:
                self.best, self.step = float(file.metadata()["top1"]), int(file.metadata()["step"])

    def look(self, judge: LinearTranslator, step: int) -> dict[str, str]:
        """Log top-1, AS and IS by a translator (curves, no evidence) and keep the best weights; return it in words.

        Every process calls it. The start, step 0, is no epoch to choose.
        """
        if self.setup.held is None:
            return {}
        texts, passes = self.setup.texts, replace(self.setup.passes, progress=False)
        classifier, space = self.setup.classifier, self.setup.space
        scores, right = SemanticLeakage(texts).to(texts.device), torch.zeros((), device=texts.device)
        for batch in iterate_features(classifier, *self.setup.held, passes, "watching"):
            scores.update(judge(batch.features), judge(space.remove(batch.features)), batch.labels)
            right += (batch.logits.argmax(1) == batch.labels).sum()
        found, top1 = scores.compute(), float(all_reduce_sum(right)) / len(self.setup.held[0])
        log(self.accelerator, {"val/top1": top1, **{f"watch/{name}": found[name] for name in SHOWN}}, step)
        log_image(self.accelerator, "watch/histogram", _histogram(scores), step)
        if self.chooses and step and top1 > self.best:
            self.best, self.step = top1, step
            if self.accelerator.is_main_process:
                write_tensors(self.kept, classifier.state_dict(), {"top1": repr(top1), "step": str(step)})
            self.accelerator.wait_for_everyone()
        return {"AS⁻": f"{found['AS_neg']:.1f}°", "top-1": f"{top1:.1%}"}

    def gives_up(self, step: int) -> bool:
        """Whether an arm at a step has waited for a better epoch long enough."""
        return 0 < self.patience <= step - self.step

    def restore(self) -> bool:
        """Load the best epoch's weights in place; return whether there are any."""
        found = self.chooses and self.kept.is_file()
        if found:
            self.setup.classifier.load_state_dict(load_file(self.kept, device=str(self.setup.texts.device)))
        return found


def _histogram(scores: SemanticLeakage) -> np.ndarray:
    """Draw AS and IS of all processes' images as one image (1, height, width, 3), in bars over the degrees taken."""
    with scores.sync_context():  # torchmetrics sums over processes in `compute`, but not where the state is read
        counts = scores.histogram.cpu().numpy()
    figure, (axes,) = panels(width=5.0, height=3.2)
    places = np.linspace(-180, 180, counts.shape[1], endpoint=False)
    taken = places[counts.any(0)]
    ends = taken.min() - 1, taken.max() + 1
    for name, values in zip(("AS", "IS"), counts, strict=True):
        axes.hist(places, bins=BARS, range=ends, weights=values, alpha=0.6, label=name)
    styled(axes).set_xlabel("degrees")
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[None, ..., :3]  # type: ignore[no-untyped-call]
