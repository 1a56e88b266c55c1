"""AS and IS of some held-out pictures while an arm trains: curves for TensorBoard, no evidence."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from singreg.analysis.features import PassSettings, iterate_features
from singreg.metrics import SemanticLeakage
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.reporting.tensorboard import TensorBoardLog
from singreg.training.experiment import Experiment
from singreg.translator import LinearTranslator


def watch(
    experiment: Experiment, classifier: Classifier, translators: Mapping[str, LinearTranslator]
) -> dict[str, SemanticLeakage]:
    """AS/IS of some labelled audit pictures by each translator, matrix (n, m), all from one pass; empty where none are wanted."""
    part = experiment.parts.audit
    labelled = torch.from_numpy(part.labels >= 0).nonzero().flatten()
    count = min(experiment.config.training.watch, len(labelled))
    if count == 0:
        return {}
    # Evenly spaced, so that every class is among them however the part is ordered.
    chosen = labelled[torch.linspace(0, len(labelled) - 1, count).long()].numpy()
    device = experiment.texts.device
    space = NullSpace.from_weight(classifier.weight, invariance=experiment.config.model.invariance).to(device)
    metrics = {name: SemanticLeakage(experiment.texts).to(device) for name in translators}
    settings = PassSettings(experiment.settings.batch_size, experiment.settings.workers, progress=False)
    embeddings = experiment.embeddings["audit"][chosen]
    for batch in iterate_features(classifier, part.subset(chosen), embeddings, settings, "watching"):
        removed = space.remove(batch.features)
        for name, translator in translators.items():
            metrics[name].update(translator(batch.features), translator(removed), batch.labels)
    return metrics


def log_watched(log: TensorBoardLog, tag: str, watched: SemanticLeakage, step: int) -> None:
    """Overall figures and the histogram of all processes' pictures under a tag; every process must call it (no shapes)."""
    log.scalars({f"{tag}/{name}": float(value) for name, value in watched.compute().items()}, step)
    with watched.sync_context():  # torchmetrics sums over processes in `compute`, but not where the state is read
        log.figure(f"{tag}/histogram", watched.plot()[0], step)
