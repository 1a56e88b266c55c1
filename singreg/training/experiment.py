"""A fine-tuning experiment: what is built once, and how each model state is measured. The recipe tells the story."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from singreg.analysis.features import PassSettings
from singreg.analysis.fitting import FittedTranslator, fit_on_part, reference_image_scores, refit
from singreg.analysis.model import analyze_model
from singreg.analysis.results import ModelMeasurement
from singreg.data.embeddings import cached_embeddings
from singreg.data.loading import load_parts
from singreg.data.parts import Parts
from singreg.files import sha256_of_json
from singreg.geometry.nullspace import NullSpace
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.models.vision_language import VisionLanguageModel
from singreg.training.config import FinetuneConfig
from singreg.training.loop import Schedule
from singreg.translation.ridge import DEFAULT_RIDGES
from singreg.translation.translator import LinearTranslator, TranslatorInfo

logger = get_logger(__name__)
ASSETS = Path(__file__).parents[1] / "assets"


def model_name(name: str, kind: str) -> str:
    """ "demo" becomes the packaged folder of that kind ("classifier" or "vlm"); any other name is itself (a name or path)."""
    return f"local-dir:{ASSETS / f'demo_{kind}'}" if name == "demo" else name


@dataclass
class Experiment:
    """Parts, embeddings, texts and the starting classifier. embeddings (N, n) by part name; texts (C, n) unit rows."""

    config: FinetuneConfig
    accelerator: Accelerator
    parts: Parts
    classifier: Classifier
    texts: Tensor
    embeddings: dict[str, np.ndarray]
    info: TranslatorInfo

    @classmethod
    def build(cls, config: FinetuneConfig, accelerator: Accelerator) -> Experiment:
        """Load data and models and compute (or read back) the embeddings; every complaint comes before any training."""
        pictures = load_parts(config.data)
        if not len(pictures.audit):
            raise ValueError("the audit part is empty, so no auditor could be fitted; give data.audit_per_class or unlabeled pictures")
        classifier = build_classifier(config, pictures)
        parts = _labels_for_head(pictures, classifier, config)
        NullSpace.from_weight(classifier.weight, invariance=config.model.invariance)  # no null space: say so now
        Schedule.from_config(config, len(parts.train))
        vlm = VisionLanguageModel.from_open_clip(
            model_name(config.vlm.name, "vlm"), config.vlm.pretrained, device=str(accelerator.device)
        )
        texts = vlm.embed_classes(parts.class_names, tuple(config.vlm.templates)).to(accelerator.device)
        embeddings: dict[str, np.ndarray] = {
            part.name: cached_embeddings(
                vlm,
                part,
                config.cache,
                batch_size=config.vlm.batch_size,
                workers=config.data.workers,
                progress=accelerator.is_local_main_process,
            )
            for part in (pictures.bank, pictures.audit, pictures.test)  # the cache need not know about relabelling
        }
        info = TranslatorInfo(
            classifier=classifier.tag,
            classifier_preprocessing=sha256_of_json(classifier.preprocessing),
            vlm=vlm.tag,
            vlm_weights_hash=vlm.weights_hash,
            vlm_preprocessing=sha256_of_json(vlm.preprocessing),
            normalized_targets=config.translator.normalize_targets,
        )
        classifier = classifier.to(accelerator.device)
        return cls(config, accelerator, parts, classifier, texts, embeddings, info)

    @property
    def settings(self) -> PassSettings:
        """How measuring passes read pictures (no shapes)."""
        return PassSettings(
            batch_size=self.config.training.measure_batch_size,
            workers=self.config.data.workers,
            progress=self.accelerator.is_local_main_process,
        )

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
            standardize=True,
            normalize_targets=self.config.translator.normalize_targets,
            info=replace(self.info, head_hash=classifier.head_hash()),
            settings=self.settings,
            description="fitting the auditor",
        )

    def refresh(self, classifier: Classifier, sing: SingLoss, previous: LinearTranslator) -> LinearTranslator:
        """Refit the loop's translator on today's features of the bank and hand it to the loss. Matrix (n, m)."""
        info = replace(previous.info, head_hash=classifier.head_hash())
        previous = LinearTranslator(previous.matrix, previous.offset, info)
        current = refit(classifier, self.parts.bank, self.embeddings["bank"], previous, settings=self.settings)
        sing.set_translator(current)
        return current

    def sing_loss(self, classifier: Classifier, fitted: FittedTranslator, image_score_ref: Tensor) -> SingLoss:
        """SingLoss for a copy of the starting classifier, its references from the model before (C classes)."""
        loss, schedule = self.config.loss, Schedule.from_config(self.config, len(self.parts.train))
        forwards = schedule.total * self.config.training.accumulation
        sing = SingLoss(
            classifier,
            fitted.translator,
            self.texts,
            weight=loss.weight,
            terms=loss.terms,
            warmup_steps=round(loss.warmup * forwards),
            ramp_steps=round(loss.ramp * forwards),
            confusable=loss.confusable,
            momentum=loss.momentum,
            invariance=self.config.model.invariance,
        ).to(self.accelerator.device)
        class_means = torch.where(torch.isnan(fitted.class_means), fitted.mean, fitted.class_means)
        return sing.calibrate(fitted.mean, class_means, image_score_ref)

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


def build_classifier(config: FinetuneConfig, parts: Parts) -> Classifier:
    """The classifier as configured, its head kept, sliced to the parts' classes, or new (C, m).

    Raises:
        ValueError: "slice" or "keep" with classes whose head rows are not known.
    """
    model = config.model
    classifier = Classifier.from_timm(
        model_name(model.name, "classifier"),
        pretrained=model.pretrained,
        head_mode=model.head,
        class_indices=parts.class_indices if model.head == "slice" else None,
        class_names=parts.class_names,
        num_classes=len(parts.class_names) if model.head == "new" else None,
        image_size=config.data.image_size,
    )
    return classifier.to(memory_format=torch.channels_last) if model.channels_last else classifier


def _labels_for_head(parts: Parts, classifier: Classifier, config: FinetuneConfig) -> Parts:
    """With a kept head, labels and names become those of all its rows."""
    if config.model.head != "keep" or classifier.num_classes == len(parts.class_names):
        return parts
    among = parts.among_imagenet()
    if len(among.class_names) != classifier.num_classes:
        raise ValueError(
            f"model.head: keep needs to know what the {classifier.num_classes} rows of {classifier.tag} mean: it is neither the data's "
            f"{len(parts.class_names)} classes nor ImageNet-1k's; use model.head: slice or new"
        )
    return among
