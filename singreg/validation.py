"""Held-out images that are read after every epoch: the curves, and the epoch whose weights are worth keeping."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from singreg.analysis.features import iterate_features
from singreg.data.splits import ImageSplit
from singreg.loop import Arm
from singreg.metrics import SemanticLeakage
from singreg.plots import panels, styled
from singreg.report import log, log_image
from singreg.setup import Setup
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_sum, atomic_write

SHARE = 10  # a run sets one in so many of the labelled audit images of its smallest class aside, and as many of each
SHOWN = ("AS_neg", "AS_abs", "IS")
BARS = 30


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
                with atomic_write(self.kept) as path:
                    state = {name: value.cpu().contiguous().clone() for name, value in classifier.state_dict().items()}
                    save_file(state, path, {"top1": repr(top1), "step": str(step)})
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
