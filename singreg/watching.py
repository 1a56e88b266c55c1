"""AS and IS of some held-out images while an arm trains: curves for the trackers, no evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg

from singreg.analysis.features import iterate_features
from singreg.metrics import SemanticLeakage
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.plots import panels, styled
from singreg.setup import Setup
from singreg.translator import Translator

WATCHED = 256
"""Images of a point of the curves."""


def watch(
    classifier: Classifier, setup: Setup, translators: Mapping[str, Translator], invariance: Invariance = "logits"
) -> dict[str, SemanticLeakage]:
    """Return AS and IS of some labelled audit images by each translator, from one pass: curves, no evidence."""
    split = setup.splits.audit
    labelled = np.flatnonzero(split.labels >= 0)
    if not len(labelled):
        return {}
    # Evenly spaced, so that every class is among them however the split is ordered.
    places = torch.linspace(0, len(labelled) - 1, min(WATCHED, len(labelled))).long()
    chosen = labelled[places.numpy()]
    space = NullSpace.from_weight(classifier.weight, invariance=invariance).to(setup.texts.device)
    metrics = {name: SemanticLeakage(setup.texts).to(setup.texts.device) for name in translators}
    passes = replace(setup.passes, progress=False)
    embeddings = setup.embeddings["audit"][chosen]
    for batch in iterate_features(classifier, split.subset(chosen), embeddings, passes, "watching"):
        removed = space.remove(batch.features)
        for name, translator in translators.items():
            metrics[name].update(translator(batch.features), translator(removed), batch.labels)
    return metrics


def log_watched(accelerator: Accelerator, tag: str, scores: SemanticLeakage, step: int) -> None:
    """Log overall figures and the histogram of all processes' images under a tag; every process must call it."""
    accelerator.log({f"{tag}/{name}": float(value) for name, value in scores.compute().items()}, step=step)
    with scores.sync_context():  # torchmetrics sums over processes in `compute`, but not where the state is read
        counts = scores.histogram.cpu().numpy()
    figure, (axes,) = panels(width=5.0, height=3.2)
    for name, values in zip(("AS", "IS"), counts, strict=True):
        places = np.linspace(-180, 180, len(values), endpoint=False)
        axes.hist(places, bins=90, range=(-180, 180), weights=values, alpha=0.6, label=name)
    styled(axes).set_xlabel("degrees")
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    image = np.asarray(canvas.buffer_rgba())[None, ..., :3]  # type: ignore[no-untyped-call]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"{tag}/histogram": image}, step=step, **layout)
