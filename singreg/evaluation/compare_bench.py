"""What a comparison stands on: the pictures, every head's passport, every space; all complaints come before any long work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.comparing.results import ComparedHead
from singreg.analysis.features import PassSettings
from singreg.analysis.old_passport import head_passport
from singreg.data.datasets import Splits, load_splits
from singreg.evaluation.compare_config import CompareConfig, ComparedModelConfig
from singreg.models.classifier import Classifier
from singreg.models.heads import HeadError
from singreg.translator import TranslatorInfo
from singreg.utils import sha256_of_json
from singreg.workbench.build import build_classifier, embed_parts, labels_for_head, open_vlm
from singreg.workbench.config import VisionLanguageConfig


@dataclass
class Space:
    """One vision-language model's reading of the pictures; the model itself is not kept.

    embeddings (N, n) by part name; texts (C, n) by class names, since heads may have other classes; info: its half of what
    translators are fitted on.
    """

    label: str
    embeddings: dict[str, np.ndarray]
    texts: dict[tuple[str, ...], Tensor]
    info: TranslatorInfo


@dataclass
class ModelBench:
    """One classifier in one space: what translators are fitted and scores are measured on. Shapes as in `Bench`."""

    classifier: Classifier
    parts: Splits
    texts: Tensor
    embeddings: dict[str, np.ndarray]
    info: TranslatorInfo
    settings: PassSettings


@dataclass
class CompareBench:
    """The pictures, every head's passport, and every space; all complaints come when it is built."""

    accelerator: Accelerator
    pictures: Splits
    heads: list[ComparedHead]
    spaces: list[Space]
    settings: PassSettings

    @classmethod
    def build(cls, config: CompareConfig, accelerator: Accelerator) -> CompareBench:
        """Load data, look at every head, then embed pictures and prompts in every space (embeddings (N, n), texts (C, n)).

        Raises:
            ValueError: models that cannot be built, all of them at once; an empty audit part.
        """
        refuse_unknown_names(config.models)
        pictures = load_splits(replace(config.data, cache_dir=config.data.cache_dir or config.cache))
        if not len(pictures.audit):
            raise ValueError("the audit part is empty, so no auditor could be fitted; give data.audit_per_class or unlabeled pictures")
        heads, names = _look_at_heads(config, pictures)
        settings = PassSettings(config.batch_size, config.data.workers, accelerator.is_local_main_process, config.cache)
        labels = space_labels(config.vlms)
        spaces = [_open_space(config, vlm, label, pictures, names, accelerator) for vlm, label in zip(config.vlms, labels, strict=True)]
        return cls(accelerator, pictures, heads, spaces, settings)


def space_labels(vlms: Sequence[VisionLanguageConfig]) -> list[str]:
    """A short name for every space: model and tag, or the folder's name; the same one twice gets a number (no shapes)."""
    labels: list[str] = []
    for vlm in vlms:
        name = Path(vlm.name).name if vlm.name.startswith("local-dir:") else vlm.name
        label = name if vlm.pretrained is None else f"{name} {Path(vlm.pretrained).name}"
        before = sum(other == label or other.startswith(f"{label} (") for other in labels)
        labels.append(f"{label} ({before + 1})" if before else label)
    return labels


def refuse_unknown_names(models: Sequence[ComparedModelConfig]) -> None:
    """What can be said of the names in no time: plain ones must be timm's, folders must hold a model."""
    problems = []
    for place, model in enumerate(models):
        try:
            name = model.resolved().name
        except FileNotFoundError as error:
            problems.append(f"models[{place}].name: {error}")
            continue
        if name == "demo" or ":" in name:
            continue
        if "/" in name or not timm.is_model(name.split(".")[0]):
            problems.append(f"models[{place}].name: {name!r} is neither a folder nor a model that timm knows")
        elif model.pretrained and "." in name and name not in timm.list_pretrained(name.split(".")[0] + ".*"):
            known = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*"))
            problems.append(f"models[{place}].name: timm has no weights {name!r}; it has {known}")
    if problems:
        raise ValueError("\n".join(problems))


def open_model(config: CompareConfig, model: ComparedModelConfig, pictures: Splits) -> Classifier:
    """The classifier with its head as configured (C, m), with or without a null space; what is untrained hangs on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_classifier(model.resolved(), pictures, image_size=config.data.image_size, allow_empty=True)


def _look_at_heads(config: CompareConfig, pictures: Splits) -> tuple[list[ComparedHead], list[tuple[str, ...]]]:
    """Every head's passport, and the class names (C,) that prompts are needed for."""
    heads, names, problems = [], [], []
    for place, model in enumerate(config.models):
        label = model.known_as
        try:
            classifier = open_model(config, model, pictures)
            passport = head_passport(classifier)
            passport = replace(passport, summary=replace(passport.summary, tag=label))
            nullity = passport.summary.nullity if model.invariance == "logits" else passport.softmax_nullity
            if nullity:
                names.append(labels_for_head(pictures, classifier, model.resolved()).class_names)
        except HeadError as error:
            heads.append(ComparedHead(label, model.name, None, f"no linear head: {error}"))
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(f"models[{place}] ({label}): {error}")
        else:
            classes, width = passport.summary.classes, passport.summary.features
            why = None if nullity else f"no null space: {classes} classes fill all {width} features, every direction moves a logit"
            heads.append(ComparedHead(label, model.name, passport, why))
    if problems:
        raise ValueError("\n".join(problems))
    return heads, list(dict.fromkeys(names))


def _open_space(
    config: CompareConfig, vlm_config: VisionLanguageConfig, label: str, pictures: Splits, names: list[tuple[str, ...]],
    accelerator: Accelerator,
) -> Space:  # fmt: skip
    vlm = open_vlm(vlm_config, accelerator)
    embeddings = embed_parts(
        vlm, (pictures.bank, pictures.audit, pictures.test), config.cache,
        batch_size=vlm_config.batch_size, workers=config.data.workers, progress=accelerator.is_local_main_process,
    )  # fmt: skip
    texts = {classes: vlm.embed_classes(classes, tuple(vlm_config.templates)).to(accelerator.device) for classes in names}
    info = TranslatorInfo(
        vlm=vlm.tag,
        vlm_weights_hash=vlm.weights_hash,
        vlm_preprocessing=sha256_of_json(vlm.preprocessing),
        normalized_targets=config.translator.normalize_targets,
    )
    return Space(label, embeddings, texts, info)
