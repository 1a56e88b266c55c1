"""A fine-tuning experiment: what is built once, and how each model state is fitted and measured. The recipe tells the story."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.comparison import no_claim
from singreg.analysis.features import PassSettings
from singreg.analysis.old_fitting import FittedTranslator, fit_on_part, reference_image_scores
from singreg.analysis.model import analyze_model
from singreg.analysis.results import ModelMeasurement
from singreg.data.datasets import ImageSplit, Splits
from singreg.terms import resolve_terms
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.models.vlm import hash_of_state
from singreg.ridge import DEFAULT_RIDGES
from singreg.training.config import FinetuneConfig
from singreg.training.loop import Schedule, micro_batch
from singreg.training.processes import refuse_batch_norm
from singreg.training.streaming import LoopTranslator
from singreg.translator import LinearTranslator, TranslatorInfo
from singreg.workbench.build import Bench


@dataclass
class Experiment:
    """Splits, embeddings, texts and the starting classifier. embeddings (N, n) by part name; texts (C, n) unit rows.

    validation: pictures to choose on, of no other part (a study's; see study_validation.hold_out).
    """

    config: FinetuneConfig
    accelerator: Accelerator
    parts: Splits
    classifier: Classifier
    texts: Tensor
    embeddings: dict[str, np.ndarray]
    info: TranslatorInfo
    settings: PassSettings
    validation: ImageSplit | None = None

    @classmethod
    def build(cls, config: FinetuneConfig, accelerator: Accelerator) -> Experiment:
        """Load data and models and compute (or read back) the embeddings (N, n); every complaint comes before any training."""
        micro_batch(config, accelerator.num_processes)
        refuse_batch_norm(config, accelerator)

        def before_embedding(parts: Splits, classifier: Classifier) -> None:
            schedule = Schedule.from_config(config, len(parts.train))
            if not (config.dry_run and accelerator.is_main_process):
                return
            print(f"steps: {schedule.total} ({schedule.steps_per_epoch} an epoch), translator refreshed after {list(schedule.refresh_at)}")
            if refused := no_claim(len(parts.audit), classifier.feature_dim, config.auditor.images_per_feature):
                print(refused, flush=True)

        bench = Bench.build(
            config, config.model, accelerator,
            batch_size=config.training.measure_batch_size, normalize_targets=config.translator.normalize_targets,
            before_embedding=before_embedding,
        )  # fmt: skip
        # The vision-language model is not kept: its embeddings are all that training needs of it.
        return cls(config, accelerator, bench.parts, bench.classifier, bench.texts, bench.embeddings, bench.info, bench.settings)

    def inputs(self) -> dict[str, str]:
        """Hashes of all a run starts from beside its configuration, by what they are called in messages (no shapes)."""
        pictures = {f"{part} pictures": getattr(self.parts, part).fingerprint for part in ("train", "bank", "audit", "test")}
        return {
            **pictures,
            "starting classifier": hash_of_state(self.classifier.model),
            "classifier's preprocessing": self.info.classifier_preprocessing,
            "vision-language model": self.info.vlm_weights_hash,
            "vision-language model's preprocessing": self.info.vlm_preprocessing,
        }

    def fresh_classifier(self) -> Classifier:
        """A copy of the starting classifier, tuned as configured: every arm begins here (no shapes)."""
        classifier = copy.deepcopy(self.classifier)
        classifier.tune(self.config.model.tuning, batch_norm=self.config.model.batch_norm)
        return classifier

    def fit_loop_translator(self, classifier: Classifier) -> FittedTranslator:
        """The translator the loss sees, from the bank's pictures; mean (m,) and class means (C, m) come with it."""
        chosen = self.config.translator.ridge
        return fit_on_part(
            classifier,
            self.parts.bank,
            self.embeddings["bank"],
            ridges=DEFAULT_RIDGES if chosen is None else (chosen,),
            standardize=self.config.translator.standardize,
            invariance=self.config.model.invariance,
            normalize_targets=self.config.translator.normalize_targets,
            info=replace(self.info, head_hash=classifier.head_hash()),
            settings=self.settings,
            description="fitting the loop's translator",
        )

    def fit_auditor(self, classifier: Classifier) -> FittedTranslator:
        """A translator from the audit part only, standardised, with its own λ (METHOD section 8.6). Matrix (n, m)."""
        chosen = self.config.auditor.ridge
        return fit_on_part(
            classifier,
            self.parts.audit,
            self.embeddings["audit"],
            ridges=DEFAULT_RIDGES if chosen is None else (chosen,),
            standardize=self.config.auditor.standardize,
            invariance=self.config.model.invariance,
            normalize_targets=self.config.translator.normalize_targets,
            info=replace(self.info, head_hash=classifier.head_hash()),
            settings=self.settings,
            description="fitting the auditor",
        )

    def loop_translator(self, first: LinearTranslator) -> LoopTranslator:
        """Keeper of the loop's translator for one arm, beginning with the one fitted before. Matrix (n, m)."""
        return LoopTranslator(
            first, self.parts.bank, self.embeddings["bank"], self.config.translator, self.accelerator,
            invariance=self.config.model.invariance, settings=self.settings, seed=self.config.seed,
        )  # fmt: skip

    def sing_loss(self, classifier: Classifier, fitted: FittedTranslator, image_score_ref: Tensor) -> SingLoss:
        """SingLoss for a copy of the starting classifier, its references from the model before (C classes)."""
        loss, schedule = self.config.loss, Schedule.from_config(self.config, len(self.parts.train))
        sing = SingLoss(
            classifier,
            fitted.translator,
            self.texts,
            weight=loss.weight,
            terms=resolve_terms(loss.preset, loss.terms),
            placebo=loss.placebo,
            warmup_steps=round(loss.warmup * schedule.total),
            ramp_steps=round(loss.ramp * schedule.total),
            accumulation=self.config.training.accumulation,
            confusable=loss.confusable,
            momentum=loss.momentum,
            class_momentum=loss.class_momentum,
            invariance=self.config.model.invariance,
        ).to(self.accelerator.device)
        return sing.calibrate(fitted.mean, fitted.class_means, image_score_ref)

    def reference_image_scores(self, classifier: Classifier, fitted: FittedTranslator) -> Tensor:
        """IS_ref (C,) in degrees from labelled pictures of the bank, model before."""
        return reference_image_scores(
            classifier,
            self.parts.bank,
            self.embeddings["bank"],
            fitted,
            invariance=self.config.model.invariance,
            settings=self.settings,
        )

    def measure(
        self, classifier: Classifier, translators: dict[str, LinearTranslator], mean: Tensor
    ) -> ModelMeasurement:
        """All figures of a classifier on the test part by the given translators; mean (m,) centres the removal."""
        return analyze_model(
            classifier,
            self.parts.test,
            self.embeddings["test"],
            self.texts,
            translators,
            mean=mean,
            invariance=self.config.model.invariance,
            settings=self.settings,
        )
