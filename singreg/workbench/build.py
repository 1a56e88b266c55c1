"""From a configuration to the parts, models, texts and embeddings it names; every complaint comes before any long work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.features import PassSettings
from singreg.data.datasets import ImageSplit, Splits, load_splits
from singreg.data.embeddings import cached_embeddings
from singreg.models.classifier import Classifier
from singreg.models.vlm import VisionLanguageModel
from singreg.nullspace import NullSpace
from singreg.translator import TranslatorInfo
from singreg.utils import sha256_of_json
from singreg.workbench.config import JobConfig, ModelConfig, VisionLanguageConfig

logger = logging.getLogger(__name__)
ASSETS = Path(__file__).parents[1] / "assets"


def model_name(name: str, kind: str) -> str:
    """ "demo" becomes the packaged folder of that kind ("classifier" or "vlm"); any other name is itself (a name or path)."""
    return f"local-dir:{ASSETS / f'demo_{kind}'}" if name == "demo" else name


def build_classifier(
    model: ModelConfig, parts: Splits, *, image_size: int | None = None, allow_empty: bool = False
) -> Classifier:
    """The classifier as configured, its head kept, sliced to the parts' classes, or new (C, m); `image_size` in pixels.

    Raises:
        ValueError: "slice" or "keep" with classes whose head rows are not known, or (unless `allow_empty`) a head without a
            null space.
    """
    classifier = Classifier.from_timm(
        model_name(model.name, "classifier"),
        pretrained=model.pretrained,
        head_mode=model.head,
        class_indices=parts.class_indices if model.head == "slice" else None,
        class_names=parts.class_names,
        imagenet_rows=model.head == "slice",
        num_classes=len(parts.class_names) if model.head == "new" else None,
        image_size=image_size,
    )
    NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=allow_empty)  # no null space: say so now
    if model.gradient_checkpointing:
        _checkpoint_gradients(classifier, model)
    if model.compile and not hasattr(classifier.model, "forward_features"):
        raise ValueError(f"model.compile: timm's {model.name} has no forward_features to compile; set it to false")
    return classifier.to(memory_format=torch.channels_last) if model.channels_last else classifier


def _checkpoint_gradients(classifier: Classifier, model: ModelConfig) -> None:
    switch = getattr(classifier.model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise AssertionError("gradient checkpointing not supported")
        switch(True)
    except AssertionError as error:  # what timm's models without it raise
        raise ValueError(f"model.gradient_checkpointing: timm's {model.name} cannot ({error}); set it to false") from error
    if model.batch_norm == "train":
        raise ValueError(
            "model.gradient_checkpointing runs every layer twice, which would update batch-norm statistics twice; set model.batch_norm "
            "to eval"
        )


def _stored_names(stored: Any) -> tuple[str, ...]:
    """timm's label names in the order of the rows: it keeps a list, or a mapping by row, or none."""
    return tuple(stored[row] for row in sorted(stored, key=int)) if isinstance(stored, dict) else tuple(stored or ())


def labels_for_head(parts: Splits, classifier: Classifier, model: ModelConfig) -> Splits:
    """With a kept head, labels and names become those of all its C rows; rows without names are trusted to be in the data's order.

    Raises:
        ValueError: it is not known what the head's rows mean, or the weights name them in another order than the data.
    """
    cfg: dict[str, Any] = getattr(classifier.model, "pretrained_cfg", {})  # type: ignore[assignment]
    own = _stored_names(cfg.get("label_names"))
    if model.head == "keep" and own != parts.class_names and sorted(own) == sorted(parts.class_names):
        raise ValueError(
            f"the head of {classifier.tag} has the data's classes in another order ({', '.join(own[:4])}, ...), so its rows would be "
            "taken for other classes; use model.head: slice, which goes by name"
        )
    if model.head != "keep":
        return parts
    if classifier.num_classes == len(parts.class_names):
        if not own and parts.class_indices != tuple(range(classifier.num_classes)):
            logger.warning(
                "model.head: keep: no class names are stored with %s, so its %d rows are taken in the data's order (%s, ...)",
                classifier.tag, classifier.num_classes, ", ".join(parts.class_names[:4]),
            )  # fmt: skip
        return parts
    among = parts.among_imagenet()
    if len(among.class_names) != classifier.num_classes:
        raise ValueError(
            f"model.head: keep needs to know what the {classifier.num_classes} rows of {classifier.tag} mean: it is neither the data's "
            f"{len(parts.class_names)} classes nor ImageNet-1k's; use model.head: slice or new"
        )
    return among


def open_vlm(config: VisionLanguageConfig, accelerator: Accelerator) -> VisionLanguageModel:
    """The vision-language model as configured, on the accelerator's device (no shapes)."""
    name = model_name(config.name, "vlm")
    return VisionLanguageModel.from_open_clip(name, config.pretrained, device=str(accelerator.device))


def embed_parts(
    vlm: VisionLanguageModel, parts: Sequence[ImageSplit], cache: str, *, batch_size: int, workers: int, progress: bool
) -> dict[str, np.ndarray]:
    """Embeddings (N, n) by part name, computed once and memory-mapped from the cache path."""
    return {
        part.name: cached_embeddings(vlm, part, cache, batch_size=batch_size, workers=workers, progress=progress)
        for part in parts
    }


def describe_pair(classifier: Classifier, vlm: VisionLanguageModel, *, normalized_targets: bool = False) -> TranslatorInfo:
    """What a translator between the two is fitted on, for its file (no shapes)."""
    return TranslatorInfo(
        classifier=classifier.tag,
        head_hash=classifier.head_hash(),
        classifier_preprocessing=sha256_of_json(classifier.preprocessing),
        vlm=vlm.tag,
        vlm_weights_hash=vlm.weights_hash,
        vlm_preprocessing=sha256_of_json(vlm.preprocessing),
        normalized_targets=normalized_targets,
    )


def describe_head(classifier: Classifier, model: ModelConfig) -> str:
    """Rank and nullity of W (C, m) in words, for a dry run."""
    space = NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=True)
    share = space.nullity / classifier.feature_dim
    return f"head: rank {space.rank}, nullity {space.nullity} ({share:.1%} of the dimensions)"


def describe_parts(parts: Splits, cache: str) -> str:
    """How many pictures there are in each part, and what is about to be done to them, for a dry run (no shapes)."""
    counts = {part.name: len(part) for part in (parts.train, parts.bank, parts.audit, parts.test)}
    embedded = counts["bank"] + counts["audit"] + counts["test"]
    return (
        f"pictures: {', '.join(f'{name} {count}' for name, count in counts.items())}\n"
        f"embedding the {embedded} pictures of bank, audit and test once; {cache} keeps them, so the real run will not do it again"
    )


@dataclass
class Bench:
    """One classifier and one VLM set up on the parts of a data set.

    texts (C, n) unit rows of the class prompts; embeddings (N, n) by part name; info: what translators are fitted on.
    """

    accelerator: Accelerator
    parts: Splits
    classifier: Classifier
    vlm: VisionLanguageModel
    texts: Tensor
    embeddings: dict[str, np.ndarray]
    info: TranslatorInfo
    settings: PassSettings

    @classmethod
    def build(
        cls,
        config: JobConfig,
        model: ModelConfig,
        accelerator: Accelerator,
        *,
        batch_size: int = 64,
        normalize_targets: bool = False,
        before_embedding: Callable[[Splits, Classifier], None] | None = None,
    ) -> Bench:
        """Load data and models and compute (or read back) the embeddings (N, n) of bank, audit and test.

        `before_embedding` is called when parts and classifier are there and the long work is not begun, to complain or to tell.

        Raises:
            ValueError: an empty audit part, a head without a null space, classes or pictures that are not there.
        """
        pictures = load_splits(replace(config.data, cache_dir=config.data.cache_dir or config.cache))
        if not len(pictures.audit):
            raise ValueError("the audit part is empty, so no auditor could be fitted; give data.audit_per_class or unlabeled pictures")
        classifier = build_classifier(model, pictures, image_size=config.data.image_size)
        parts = labels_for_head(pictures, classifier, model)
        vlm = open_vlm(config.vlm, accelerator)
        shown = accelerator.is_local_main_process
        if config.dry_run and accelerator.is_main_process:
            print(f"{describe_head(classifier, model)}\n{describe_parts(parts, config.cache)}", flush=True)
        if before_embedding is not None:
            before_embedding(parts, classifier)
        embeddings = embed_parts(
            vlm, (pictures.bank, pictures.audit, pictures.test), config.cache,  # the cache need not know about relabelling
            batch_size=config.vlm.batch_size, workers=config.data.workers, progress=shown,
        )  # fmt: skip
        return cls(
            accelerator=accelerator,
            parts=parts,
            classifier=classifier.to(accelerator.device),
            vlm=vlm,
            texts=vlm.embed_classes(parts.class_names, tuple(config.vlm.templates)).to(accelerator.device),
            embeddings=embeddings,
            info=describe_pair(classifier, vlm, normalized_targets=normalize_targets),
            settings=PassSettings(batch_size=batch_size, workers=config.data.workers, progress=shown),
        )
