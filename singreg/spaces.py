"""Several classifiers and several vision-language models on the same images: what comparisons and attacks share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.passport import head_passport
from singreg.config import ComparedModel, RunConfig, VLMConfig
from singreg.data.embeddings import PassSettings
from singreg.data.splits import Splits
from singreg.models.classifier import Classifier
from singreg.models.heads import HeadError
from singreg.models.vlm import VisionLanguageModel
from singreg.nullspace import NullSpace
from singreg.setup import Setup, build_classifier, embed_splits, labels_for_head, open_vlm, pass_settings, try_one_batch


def open_model(model: ComparedModel, splits: Splits, config: RunConfig) -> Classifier:
    """Build a classifier, with or without a null space; what is untrained in it depends on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_classifier(model, splits, image_size=config.data.image_size, allow_empty=True)


@dataclass(frozen=True)
class Space:
    """One vision-language model's reading of the images.

    `texts` are unit rows (C, n) of the class prompts by class names, since heads may have other classes; `embeddings`
    are (N, n) by the split's name (bank, audit, test).
    """

    label: str
    vlm: VisionLanguageModel
    texts: dict[tuple[str, ...], Tensor]
    embeddings: dict[str, np.ndarray]
    passes: PassSettings

    def setup(self, classifier: Classifier, splits: Splits, model: ComparedModel) -> Setup:
        """Return one classifier in this space; `splits` have its labels."""
        texts = self.texts[splits.class_names]
        return Setup(splits, classifier, self.vlm, texts, self.embeddings, self.passes, model)


def open_spaces(config: Any, splits: Splits, names: Sequence[tuple[str, ...]], accelerator: Accelerator) -> list[Space]:
    """Open every vision-language model of a configuration, and embed images and the prompts of class names."""
    if not len(splits.audit):
        raise ValueError("no image is left for the auditor; give data.per_class.audit or data.scenes.audit")
    spaces, passes, vlms = [], pass_settings(config, accelerator), [config.vlm, *config.further_vlms]
    for each, label in zip(vlms, space_labels(vlms), strict=True):
        vlm = open_vlm(each, accelerator)
        texts = {every: vlm.embed_classes(every, tuple(each.templates)).to(accelerator.device) for every in names}
        embeddings = embed_splits(vlm, (splits.bank, splits.audit, splits.test), passes)
        spaces.append(Space(label, vlm, texts, embeddings, passes))
    return spaces


def space_labels(vlms: Sequence[VLMConfig]) -> list[str]:
    """Name every space: model and tag, or the folder's name; the same one twice gets a number."""
    parts = [(vlm.name.removeprefix("local-dir:"), vlm.pretrained) for vlm in vlms]
    names = [" ".join(Path(part).name for part in both if part) for both in parts]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]


def look_at_heads(
    models: Sequence[ComparedModel], splits: Splits, config: RunConfig
) -> tuple[list[dict[str, Any]], list[tuple[str, ...]]]:
    """Look at every head before any long work; models that cannot be built are named, all of them at once.

    Returns:
        Of every model label, source, passport (None without a linear head) and why it is omitted, or None; and the
        class names (C,) that prompts are needed for.
    """
    heads, names, problems = [], [], []
    for place, model in enumerate(models):
        head: dict[str, Any] = {"label": model.known_as, "source": model.name, "passport": None, "omitted": None}
        try:
            classifier = open_model(model, splits, config)
            head["passport"] = passport = {**head_passport(classifier), "tag": model.known_as}
            if NullSpace.from_weight(classifier.weight, invariance=model.invariance, allow_empty=True).nullity:
                labelled = labels_for_head(splits, classifier, model)
                try_one_batch(labelled, classifier, model)
                names.append(labelled.class_names)
            else:
                sizes = f"{passport['classes']} classes fill all {passport['features']} features"
                head["omitted"] = f"no null space: {sizes}, every direction moves a logit"
        except HeadError as error:
            head["omitted"] = f"no linear head: {error}"
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(f"models[{place}] ({model.known_as}): {error}")
        heads.append(head)
    if problems:
        raise ValueError("\n".join(problems))
    return heads, list(dict.fromkeys(names))
