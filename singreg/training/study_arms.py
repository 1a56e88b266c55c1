"""How an arm's classifier is made from the common start: aligned, trained, mixed with the start (METHOD sections 6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from singreg.analysis.features import PassSettings, cached_features, gathered, iterate_features
from singreg.analysis.fitting import FittedTranslator
from singreg.terms import placebo_texts
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.models.edits import AlignedHead, align_head_, constrain_to_rows, interpolate_weights, release_rows
from singreg.reporting.tensorboard import TensorBoardLog
from singreg.ridge import RidgeStatistics
from singreg.training.config import FinetuneConfig
from singreg.training.experiment import Experiment
from singreg.training.head_only import train_head
from singreg.training.loop import ArmCallbacks, train_arm
from singreg.training.streaming import LoopTranslator
from singreg.training.study_config import ArmConfig
from singreg.training.study_store import ArmStore
from singreg.translator import LinearTranslator


@dataclass(frozen=True)
class Start:
    """What all arms begin with: the loop's translator, IS_ref (C,) in degrees, and the sums of the bank's features (m,)."""

    loop: FittedTranslator
    image_score_ref: Tensor
    statistics: RidgeStatistics


@dataclass(frozen=True)
class Made:
    """An arm's classifier in eval mode, the translator its loss saw last (None without the loss), and what to note about it."""

    classifier: Classifier
    loop: LinearTranslator | None
    notes: dict[str, Any]


def prepare_start(experiment: Experiment, features: str) -> Start:
    """Fit what all arms begin with on the starting classifier; its features are kept in the folder `features` (a path)."""
    stored = replace(experiment, settings=replace(experiment.settings, cache=features))
    classifier = experiment.classifier.eval()
    loop = stored.fit_loop_translator(classifier)
    embeddings = experiment.embeddings["bank"]
    statistics = RidgeStatistics(classifier.feature_dim, embeddings.shape[1], device=classifier.weight.device)
    for batch in gathered(iterate_features(classifier, experiment.parts.bank, embeddings, stored.settings, "statistics")):
        statistics.update(batch.features, batch.embeddings)
    return Start(loop, stored.reference_image_scores(classifier, loop), statistics.reduce())


class ArmMaker:
    """Makes classifiers of arms. Every arm's own configuration stands in the place of the experiment's."""

    def __init__(self, experiment: Experiment, start: Start, features: str, tensorboard: Path) -> None:
        self.experiment, self.start, self.features, self.tensorboard = experiment, start, features, tensorboard

    def make(self, arm: ArmConfig, config: FinetuneConfig, store: ArmStore, source: ArmStore | None) -> Made:
        """Edit and train as the arm says, and store its weights; a training that was interrupted goes on (no shapes)."""
        experiment = replace(self.experiment, config=config)
        classifier, notes = experiment.fresh_classifier(), {}
        if source is not None:
            source.load_weights(classifier)
        if arm.aligned:
            texts = placebo_texts(experiment.texts, config.loss.placebo)
            aligned = align_head_(classifier, self.start.loop.translator, texts, self.start.statistics)
            notes = _notes(aligned)
            if arm.constrain:
                constrain_to_rows(classifier, aligned.rows)
        loop: LinearTranslator | None = None
        if arm.train != "none":
            # Head-only arms refit on the starting backbone's features, which are stored.
            settings = replace(experiment.settings, cache=self.features if arm.train == "head" else None)
            keeper = replace(experiment, settings=settings).loop_translator(self.start.loop.translator)
            sing = None
            if config.loss.weight > 0:
                sing = experiment.sing_loss(classifier, self.start.loop, self.start.image_score_ref)
            classifier = self._train(arm, experiment, classifier, sing, keeper, store)
            loop = None if sing is None else keeper.current(sing)
        if arm.constrain:
            release_rows(classifier)
        if arm.interpolate != 1:
            classifier = interpolate_weights(self.experiment.classifier, classifier, arm.interpolate)
        if experiment.accelerator.is_main_process:
            store.save_weights(classifier)
        experiment.accelerator.wait_for_everyone()
        return Made(classifier.eval(), loop, notes)

    def _train(
        self, arm: ArmConfig, experiment: Experiment, classifier: Classifier, sing: SingLoss | None, keeper: LoopTranslator,
        store: ArmStore,
    ) -> Classifier:  # fmt: skip
        part, name = experiment.parts.train, f"{arm.name}, seed {store.seed}"
        if arm.train == "head":
            settings: PassSettings = experiment.settings
            features = cached_features(
                self.experiment.classifier, part, self.features,
                batch_size=settings.batch_size, workers=settings.workers, progress=settings.progress,
            )  # fmt: skip
            if sing is not None and keeper.stateful:
                keeper.refresh(classifier, sing)
            return train_head(name, classifier, sing, features, part.labels, experiment.config)
        log = TensorBoardLog(
            self.tensorboard / arm.name / f"seed-{store.seed}", enabled=experiment.accelerator.is_main_process
        )
        trained = train_arm(
            name, classifier, sing, part, experiment.config, experiment.accelerator, store.checkpoints,
            _callbacks(log, keeper), resume=True,
        )  # fmt: skip
        log.close()
        return trained


def _callbacks(log: TensorBoardLog, keeper: LoopTranslator) -> ArmCallbacks:
    def figures(step: int, values: dict[str, float]) -> None:
        if values:
            log.scalars({f"train/{name}": value for name, value in values.items()}, step)

    return ArmCallbacks(figures, lambda *_: None, keeper.refresh, keeper if keeper.stateful else None)


def _notes(aligned: AlignedHead) -> dict[str, Any]:
    names = ("rank_before", "rank", "free_rows", "raised", "logit_change")
    return {f"aligned_{name}": getattr(aligned, name) for name in names}
