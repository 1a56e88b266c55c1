"""A classifier and a translator as functions of 8-bit pictures, and what an attacker wants of them (METHOD section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.pixels.budgets import LEVELS, Judged, Reading
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.models.edits import NullDroppedClassifier
from singreg.models.heads import as_features
from singreg.translator import Translator
from singreg.utils import atomic_write


@dataclass(frozen=True)
class PixelModel:
    """A classifier behind its normalisation: pictures (B, 3, H, W) in [0, 1] at its input size to features and logits.

    mean, std (3, 1, 1): of the normalisation. Of a classifier whose null space was dropped the features are those before the
    dropping, which a white-box attacker reads just as well.
    """

    classifier: Classifier
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, classifier: Classifier) -> PixelModel:
        """Of a timm classifier, which says how it normalises (mean and std (3,)).

        Raises:
            ValueError: a classifier made from a plain module; call the constructor with its mean and std.
        """
        known = classifier.preprocessing
        if "mean" not in known or "std" not in known:
            raise ValueError(f"{classifier.tag} does not say how it normalises; use PixelModel(classifier, mean=..., std=...) of (3, 1, 1)")
        device = classifier.weight.device
        mean, std = (torch.tensor(known[name], device=device)[:, None, None] for name in ("mean", "std"))
        return cls(classifier, mean, std)

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(features (B, m), logits (B, C)) of pictures (B, 3, H, W) in [0, 1], differentiable."""
        images = ((pictures - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if not isinstance(self.classifier, NullDroppedClassifier):
            return self.classifier.features_and_logits(images)
        name = self.classifier.head_name.rpartition(".")[0]
        captured: list[Tensor] = []
        handle = self.classifier.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            logits = self.classifier(images)
        finally:
            handle.remove()
        return as_features(captured[0], name), logits

    def picture(self, part: ImageSplit, index: int) -> Tensor:
        """Picture `index` as the classifier's transform resizes and cuts it, (3, H, W) in [0, 1] on the 8-bit grid."""
        seen = self.classifier.transform(part.image(index)).to(self.mean)
        return (LEVELS * (seen * self.std + self.mean)).round().clamp(0, LEVELS) / LEVELS


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture (3, H, W) on the 8-bit grid to the path as PNG, whole or not at all."""
    values = (LEVELS * picture).round().byte().permute(1, 2, 0).cpu().numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(values).save(temporary, format="png")


def load_pictures(paths: Sequence[Path]) -> Tensor:
    """PNG files of one size as (B, 3, H, W) in [0, 1]: to-tensor and nothing else.

    Raises:
        FileNotFoundError: a file is missing.
    """
    rows = []
    for path in paths:
        with Image.open(path) as picture:
            rows.append(np.asarray(picture.convert("RGB"), dtype=np.float32) / LEVELS)
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def towards_prompt(model: PixelModel, translator: Translator, logits: Tensor, target: Tensor, tau: float) -> Judged:
    """Steering: cos(T(f(x)), t), while |logits − `logits`| ≤ τ for every class and the decision stays.

    Shapes: logits (B, C) of the untouched pictures, target (B, n) unit rows.
    """
    decision = logits.argmax(1, keepdim=True)

    def judged(pictures: Tensor) -> Reading:
        features, now = model(pictures)
        gain = (normalize(translator(features), dim=-1) * target).sum(1)
        rivals = now.scatter(1, decision, -torch.inf).amax(1, keepdim=True)
        stays = 1 + (rivals - now.gather(1, decision)) / tau
        return Reading(gain, (now - logits) / tau, stays)

    return judged


def without_limits(model: PixelModel, translator: Translator, texts: Tensor, targets: Sequence[int]) -> Judged:
    """The target prompt's cosine over the best other one's, under no constraint: what no sound attack fails at.

    Shapes: texts (C, n) unit rows, targets (B,) places in them.
    """
    wanted = torch.tensor(list(targets), device=texts.device)[:, None]

    def judged(pictures: Tensor) -> Reading:
        cosines = normalize(translator(model(pictures)[0]), dim=-1) @ texts.T
        return Reading.free(cosines.gather(1, wanted)[:, 0] - cosines.scatter(1, wanted, -torch.inf).amax(1))

    return judged


def away_from_decision(
    model: PixelModel, translator: Translator, texts: Tensor, cosines: Tensor, decision: Tensor, tolerance: float
) -> Judged:
    """The opposite: another class outranks the decision, while every cosine of T(f(x)) to the texts stays within the tolerance.

    Shapes: texts (C, n) unit rows, cosines (B, C) of the untouched pictures, decision (B,).
    """

    def judged(pictures: Tensor) -> Reading:
        features, now = model(pictures)
        own = now.gather(1, decision[:, None])[:, 0]
        rivals = now.scatter(1, decision[:, None], -torch.inf).amax(1)
        held = (normalize(translator(features), dim=-1) @ texts.T - cosines) / tolerance
        return Reading(rivals - own, held, held[:, :0])

    return judged


def away_from_label(model: PixelModel, labels: Tensor) -> Judged:
    """Ordinary adversarial pictures: the largest other logit over the label's, under no constraint. Shapes: labels (B,)."""

    def judged(pictures: Tensor) -> Reading:
        _, now = model(pictures)
        own = now.gather(1, labels[:, None])[:, 0]
        return Reading.free(now.scatter(1, labels[:, None], -torch.inf).amax(1) - own)

    return judged
