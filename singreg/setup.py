"""From a configuration to the splits, models, texts and embeddings it names; complaints come before any long work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.features import PassSettings, iterate_features
from singreg.config import ModelConfig, RunConfig, VLMConfig, located
from singreg.data.datasets import ImageSplit, Splits, load_splits
from singreg.data.embeddings import cached_embeddings
from singreg.models.classifier import Classifier, label_names
from singreg.models.vlm import VisionLanguageModel
from singreg.nullspace import NullSpace
from singreg.translator import TranslatorInfo
from singreg.utils import cache_folder, sha256_of_json

logger = logging.getLogger(__name__)
BATCH_SIZE = 64  # where nothing is trained


@dataclass(frozen=True)
class Setup:
    """One classifier and one VLM on the splits of a data set: class prompts (C, n), embeddings (N, n) by split name."""

    splits: Splits
    classifier: Classifier
    vlm: VisionLanguageModel
    texts: Tensor
    embeddings: dict[str, np.ndarray]
    info: TranslatorInfo
    passes: PassSettings


def prepare(
    config: RunConfig,
    model: ModelConfig,
    accelerator: Accelerator,
    *,
    before_embedding: Callable[[Splits, Classifier], None] | None = None,
) -> Setup:
    """Load data and models and compute, or read back, the embeddings of bank, audit and test.

    Args:
        before_embedding: called when splits and classifier are there and the long work is not begun.
    """
    splits = load_splits(config.data)
    if not len(splits.audit):
        raise ValueError("the audit split is empty: no auditor can be fitted; give data.per_class.audit or unlabeled")
    classifier = build_classifier(model, splits, image_size=config.data.image_size)
    labelled = labels_for_head(splits, classifier, model)
    vlm = open_vlm(config.vlm, accelerator)
    passes = PassSettings(BATCH_SIZE, config.data.workers, progress=accelerator.is_local_main_process)
    if config.dry_run and accelerator.is_main_process:
        space = NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=True)
        share = space.nullity / classifier.feature_dim
        print(f"head: rank {space.rank}, nullity {space.nullity} ({share:.1%} of the dimensions)")
        print(f"images: {', '.join(f'{split.name} {len(split)}' for split in labelled)}")
        print(f"embedding those of bank, audit and test once; {cache_folder()} keeps them", flush=True)
    if before_embedding is not None:
        before_embedding(labelled, classifier)
    return Setup(
        splits=labelled,
        classifier=classifier.to(accelerator.device),
        vlm=vlm,
        texts=vlm.embed_classes(labelled.class_names, tuple(config.vlm.templates)).to(accelerator.device),
        embeddings=embed_splits(vlm, (splits.bank, splits.audit, splits.test), passes),  # the labels do not matter
        info=describe_pair(classifier, vlm),
        passes=passes,
    )


def describe_pair(classifier: Classifier, vlm: VisionLanguageModel) -> TranslatorInfo:
    """Return what a translator between two models is fitted on, for its file."""
    return TranslatorInfo(
        classifier=classifier.tag,
        head_hash=classifier.head_hash(),
        classifier_preprocessing=sha256_of_json(classifier.preprocessing),
        vlm=vlm.tag,
        vlm_weights_hash=vlm.weights_hash,
        vlm_preprocessing=sha256_of_json(vlm.preprocessing),
    )


def build_classifier(
    model: ModelConfig, splits: Splits, *, image_size: int | None = None, allow_empty: bool = False
) -> Classifier:
    """Build the classifier with its head kept, sliced to the splits' classes, or new."""
    sliced = model.head == "slice"
    classifier = Classifier.from_timm(
        model.source,
        pretrained=model.pretrained,
        head_mode=model.head,
        class_indices=splits.class_indices if sliced else None,
        class_names=splits.class_names,
        imagenet_rows=sliced,
        num_classes=len(splits.class_names) if model.head == "new" else None,
        image_size=image_size,
    )
    NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=allow_empty)  # or say so now
    if model.gradient_checkpointing:
        if model.batch_norm == "train":
            raise ValueError("model.gradient_checkpointing updates batch-norm statistics twice; set batch_norm: eval")
        try:
            classifier.model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, AttributeError) as error:
            raise ValueError(f"model.gradient_checkpointing: timm's {model.name} cannot ({error})") from error
    if model.compile and not hasattr(classifier.model, "forward_features"):
        raise ValueError(f"model.compile: timm's {model.name} has no forward_features to compile; set it to false")
    return classifier.to(memory_format=torch.channels_last)


def labels_for_head(splits: Splits, classifier: Classifier, model: ModelConfig) -> Splits:
    """With a kept head, give labels and names among all its rows; rows without names count in the data's order."""
    if classifier.num_classes < 2:
        raise ValueError(f"the data has one class alone, {splits.class_names[0]!r}; leakage is between at least two")
    if model.head != "keep":
        return splits
    tag, rows = classifier.tag, classifier.num_classes
    own = tuple(name for _, name in sorted(label_names(getattr(classifier.model, "pretrained_cfg", {})).items()))
    if own != splits.class_names and sorted(own) == sorted(splits.class_names):
        raise ValueError(f"the head of {tag} has the data's classes in another order; use model.head: slice")
    if rows == len(splits.class_names):
        if not own and splits.class_indices != tuple(range(rows)):
            logger.warning("no class names are stored with %s: its %d rows are taken in the data's order", tag, rows)
        return splits
    among = splits.among_imagenet()
    if len(among.class_names) != rows:
        what = f"the {rows} rows of {tag} mean: neither the data's {len(splits.class_names)} classes nor ImageNet's"
        raise ValueError(f"model.head: keep needs to know what {what}; use model.head: slice or new")
    return among


def open_vlm(config: VLMConfig, accelerator: Accelerator) -> VisionLanguageModel:
    """Open the vision-language model on the accelerator's device."""
    return VisionLanguageModel.from_open_clip(
        located(config.name, "vlm"), config.pretrained, device=str(accelerator.device)
    )


def embed_splits(vlm: VisionLanguageModel, splits: Sequence[ImageSplit], passes: PassSettings) -> dict[str, np.ndarray]:
    """Return image embeddings (N, n) by the split's name, computed once and memory-mapped from the cache."""
    settings: dict[str, Any] = {"batch_size": passes.batch_size, "workers": passes.workers, "progress": passes.progress}
    return {split.name: cached_embeddings(vlm, split, **settings) for split in splits}


def try_one_batch(setup: Setup) -> None:
    """Run one batch of test images through the classifier and print its shapes: a dry run's last step."""
    count = min(BATCH_SIZE, len(setup.splits.test))
    split, embeddings = setup.splits.test.subset(range(count)), setup.embeddings["test"][:count]
    passes = replace(setup.passes, progress=False)
    batch = next(iterate_features(setup.classifier, split, embeddings, passes, "dry run"))
    if setup.passes.progress:
        shapes = f"features {tuple(batch.features.shape)}, logits {tuple(batch.logits.shape)}"
        print(f"one batch: {shapes}, embeddings {tuple(batch.embeddings.shape)}")
        print("dry run: nothing was measured, no run folder was made")
