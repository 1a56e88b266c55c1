"""Held-out images that are read after every epoch: the curves, and the epoch whose weights are worth keeping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from singreg.analysis.features import evenly, iterate_features
from singreg.config import FinetuneConfig
from singreg.data.datasets import ImageSplit
from singreg.metrics import SemanticLeakage
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.plots import panels, styled
from singreg.report import log, log_image
from singreg.setup import Setup
from singreg.task import Schedule
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_sum, atomic_write

WATCHED = 256  # images of a point where no epoch is chosen by them
SHARE = 10  # of a class's audit images one in so many is set aside where an epoch is chosen by them
SHOWN = ("AS_neg", "AS_abs", "IS")
BARS = 30


def validation_count(config: FinetuneConfig, setup: Setup) -> int:
    """Return how many labelled audit images of every class an epoch is chosen by; 0 where none is chosen."""
    if not config.training.best_checkpoint:
        return 0
    labels = setup.splits.audit.labels
    return max(1, min(np.unique(labels[labels >= 0], return_counts=True)[1], default=0) // SHARE)


class Validation:
    """What an arm shows of held-out images, and its best epoch, which a resumed run finds again.

    The images are those of no other use, `setup.held`; without them some of the auditor's, which the classifier never
    trains on, and no epoch can be chosen. `folder` is that of the arm's checkpoints.
    """

    def __init__(self, config: FinetuneConfig, setup: Setup, accelerator: Accelerator, folder: Path) -> None:
        self.setup, self.invariance, self.accelerator = setup, config.model.invariance, accelerator
        self.images = setup.held or _watched(setup)
        self.patience = config.training.patience * Schedule(config, len(setup.splits.train)).steps_per_epoch
        self.chooses = bool(config.training.best_checkpoint)
        if self.chooses and setup.held is None:
            raise ValueError("training.best_checkpoint needs validation images: set validation_per_class")
        self.kept, self.best, self.step = folder / "best.safetensors", -1.0, 0
        if self.kept.is_file():
            with safe_open(self.kept, framework="pt") as file:
                self.best, self.step = float(file.metadata()["top1"]), int(file.metadata()["step"])

    def look(self, classifier: Classifier, judge: LinearTranslator, step: int) -> dict[str, str]:
        """Log top-1, AS and IS by a translator (curves, no evidence) and keep the best weights; return it in words.

        Every process calls it. The start, step 0, is no epoch to choose.
        """
        if self.images is None:
            return {}
        texts, passes = self.setup.texts, replace(self.setup.passes, progress=False)
        space = NullSpace.from_weight(classifier.weight, invariance=self.invariance).to(texts.device)
        scores, right = SemanticLeakage(texts).to(texts.device), torch.zeros((), device=texts.device)
        for batch in iterate_features(classifier, *self.images, passes, "watching"):
            scores.update(judge(batch.features), judge(space.remove(batch.features)), batch.labels)
            right += (batch.logits.argmax(1) == batch.labels).sum()
        found, top1 = scores.compute(), float(all_reduce_sum(right)) / len(self.images[0])
        log(self.accelerator, {"val/top1": top1, **{f"watch/{name}": found[name] for name in SHOWN}}, step)
        log_image(self.accelerator, "watch/histogram", _histogram(scores), step)
        if self.chooses and step and top1 > self.best:
            self.best, self.step = top1, step
            if self.accelerator.is_main_process:
                with atomic_write(self.kept) as path:
                    state = {name: value.cpu().contiguous().clone() for name, value in classifier.state_dict().items()}
                    save_file(state, path, {"top1": repr(top1), "step": str(step)})
            self.accelerator.wait_for_everyone()
        return {"AS⁻": f"{found['AS_neg']:.1f}°", "top-1": f"{top1:.1%}"}

    def gives_up(self, step: int) -> bool:
        """Whether an arm at a step has waited for a better epoch long enough."""
        return 0 < self.patience <= step - self.step

    def restore(self, classifier: Classifier) -> bool:
        """Load the best epoch's weights in place; return whether there are any."""
        found = self.chooses and self.kept.is_file()
        if found:
            classifier.load_state_dict(load_file(self.kept, device=str(classifier.weight.device)))
        return found


def _watched(setup: Setup) -> tuple[ImageSplit, np.ndarray] | None:
    """Some labelled images of the auditor, evenly spaced so that every class is among them, or None without labels."""
    split = setup.splits.audit
    labelled = np.flatnonzero(split.labels >= 0)
    if not len(labelled):
        return None
    chosen = labelled[evenly(len(labelled), WATCHED)]
    return split.subset(chosen), setup.embeddings["audit"][chosen]


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
