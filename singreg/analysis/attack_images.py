"""The images of an attack: which ones, how a classifier reads them, what is wanted of them, their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.attack import LEVELS, Ascent, Budget, Judged, Reading, ascend, one_step, random_images
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.models.edits import NullDroppedClassifier
from singreg.translator import Translator
from singreg.utils import atomic_write

ATTACK, ONE_STEP, RANDOM = "attack", "one step", "random"
"""Arms: the ascent, the single gradient step, a random direction."""


@dataclass(frozen=True)
class PixelModel:
    """A classifier behind its normalisation, as a function of images in [0, 1] at its input size.

    Of a classifier whose null space was dropped the features are those before the dropping, which a white-box attacker
    reads just as well.

    Attributes:
        mean: (3, 1, 1) of the normalisation.
        std: (3, 1, 1) of the normalisation.
    """

    classifier: Classifier
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, classifier: Classifier) -> PixelModel:
        """Wrap a timm classifier, which says how it normalises.

        Raises:
            ValueError: a classifier made from a plain module.
        """
        known = classifier.preprocessing
        if "mean" not in known or "std" not in known:
            raise ValueError(
                f"{classifier.tag} does not say how it normalises; give PixelModel its mean and std (3, 1, 1)"
            )
        device = classifier.weight.device
        mean, std = (torch.tensor(known[name], device=device)[:, None, None] for name in ("mean", "std"))
        return cls(classifier, mean, std)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, m) and logits (B, C) of images (B, 3, H, W), differentiable."""
        seen = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if not isinstance(self.classifier, NullDroppedClassifier):
            return self.classifier.features_and_logits(seen)
        captured: list[Tensor] = []
        whole_head = self.classifier.model.get_submodule(self.classifier.head_name.rpartition(".")[0])
        handle = whole_head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            logits = self.classifier(seen)
        finally:
            handle.remove()
        return captured[0].flatten(1), logits

    def image(self, split: ImageSplit, index: int) -> Tensor:
        """Return an image as the classifier's transform resizes and cuts it, (3, H, W) on the 8-bit grid in [0, 1]."""
        seen = self.classifier.transform(split.image(index)).to(self.mean)
        return (LEVELS * (seen * self.std + self.mean)).round().clamp(0, LEVELS) / LEVELS


def save_image(image: Tensor, path: Path) -> None:
    """Write an image (3, H, W) on the 8-bit grid as PNG, whole or not at all."""
    values = (LEVELS * image).round().byte().permute(1, 2, 0).cpu().numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(values).save(temporary, format="png")


def load_images(paths: Sequence[Path]) -> Tensor:
    """Read PNG files of one size as (B, 3, H, W) in [0, 1]: to-tensor and nothing else."""
    rows = []
    for path in paths:
        with Image.open(path) as image:
            rows.append(np.asarray(image.convert("RGB"), dtype=np.float32) / LEVELS)
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def save_batch(
    found: Mapping[tuple[str, str], Tensor], originals: Tensor, chosen: pd.DataFrame, folder: Path, at: Path
) -> pd.DataFrame:
    """Write attacked images by (budget, arm), and the originals, below `folder / at`.

    Args:
        chosen: rows of `choose_images`, one for each original.

    Returns:
        One row an attacked image: budget, arm, those of `chosen`, and the paths original and file inside `folder`.

    Shape:
        originals and all images found: (B, 3, H, W).
    """
    names = [at / "original" / f"{index:06d}.png" for index in chosen["image"]]
    for path, image in zip(names, originals, strict=True):
        save_image(image, folder / path)
    frames = []
    for (budget, arm), images in found.items():
        under = at / budget.replace("/", "-").replace(" ", "-") / arm.replace(" ", "-")
        paths = [under / name.name for name in names]
        for path, image in zip(paths, images, strict=True):
            save_image(image, folder / path)
        frame = chosen.assign(original=[p.as_posix() for p in names], file=[p.as_posix() for p in paths])
        frame.insert(0, "budget", budget)
        frame.insert(1, "arm", arm)
        frames.append(frame)
    rows: pd.DataFrame = pd.concat(frames, ignore_index=True)
    return rows


def choose_images(split: ImageSplit, count: int, targets: Sequence[int], seed: int) -> tuple[pd.DataFrame, list[str]]:
    """Choose labelled images evenly over classes, and for each a class among `targets` other than its own.

    Returns:
        A row an image (image: its place in the split, identifier, label, target), at most `count`; and the names of
        those left out because they are of one colour.

    Raises:
        ValueError: a class that is the only target of its own images, or nothing to see in any.
    """
    names, allowed = split.class_names, list(targets)
    rng = np.random.default_rng([seed, 7])
    order = rng.permutation(np.flatnonzero(split.labels >= 0))
    rank = np.zeros(len(order), dtype=np.int64)
    for label in np.unique(split.labels[order]):
        mine = split.labels[order] == label
        rank[mine] = np.arange(mine.sum())
    kept: list[int] = []
    left_out: list[str] = []
    for index in order[np.lexsort((split.labels[order], rank))].tolist():
        if len(kept) == count:
            break
        pixels = np.asarray(split.image(index).convert("RGB"))
        if (pixels == pixels[:1, :1]).all():
            left_out.append(split.identifier(index))
        else:
            kept.append(index)
    if not kept:
        raise ValueError(
            f"expected labelled test images, got none but {len(left_out)} of one colour, in which nothing is to be seen"
        )
    labels = split.labels[kept]
    if own := sorted({names[label] for label in labels if not {*allowed} - {int(label)}}):
        raise ValueError(f"targets: {', '.join(own)} is the only target of its own images; name another class too")
    drawn = [int(rng.choice([target for target in allowed if target != label])) for label in labels]
    identifiers = [split.identifier(index) for index in kept]
    return pd.DataFrame({"image": kept, "identifier": identifiers, "label": labels, "target": drawn}), left_out


def towards_prompt(model: PixelModel, translator: Translator, logits: Tensor, target: Tensor, tau: float) -> Judged:
    """Maximise cos(T(f(x)), t) while every logit stays within τ of `logits` (B, C), and the decision stays.

    Shape: target (B, n) unit rows.
    """
    decision = logits.argmax(1, keepdim=True)

    def judged(images: Tensor) -> Reading:
        features, now = model(images)
        gain = (normalize(translator(features), dim=-1) * target).sum(1)
        rivals = now.scatter(1, decision, -torch.inf).amax(1, keepdim=True)
        stays = 1 + (rivals - now.gather(1, decision)) / tau
        return Reading(gain, (now - logits) / tau, stays)

    return judged


def away_from_label(model: PixelModel, labels: Tensor) -> Judged:
    """Maximise the largest other logit over the label's, under no constraint: ordinary adversarial images."""

    def judged(images: Tensor) -> Reading:
        _, now = model(images)
        own = now.gather(1, labels[:, None])[:, 0]
        return Reading.free(now.scatter(1, labels[:, None], -torch.inf).amax(1) - own)

    return judged


@dataclass(frozen=True)
class AttackSettings:
    """How images are attacked; `tau` is how far any logit may move."""

    budgets: Sequence[Budget]
    tau: float
    steps: int = 40
    restarts: int = 2
    seed: int = 0


def attack_images(
    model: PixelModel, translator: Translator, x: Tensor, target: Tensor, settings: AttackSettings, *, number: int
) -> tuple[dict[tuple[str, str], Tensor], pd.DataFrame]:
    """Attack a batch of images at every budget, a larger one of a norm starting from what the smaller one found.

    Args:
        number: of the batch; every random number hangs on (seed, number, place of the budget).

    Returns:
        Images (B, 3, H, W) by (budget, arm), and the climbs: a row an image (row), budget and kind of pass with the
        degrees gained by one_step, by what it began from, and by these passes alone.

    Shape:
        x (B, 3, H, W) on the 8-bit grid, target (B, n) unit rows.
    """
    with torch.no_grad():
        _, logits = model(x)
    judged = towards_prompt(model, translator, logits, target, settings.tau)
    found: dict[tuple[str, str], Tensor] = {}
    climbs: list[pd.DataFrame] = []
    best: dict[str, Tensor] = {}
    for place, budget in enumerate(settings.budgets):
        seed = np.random.SeedSequence([settings.seed, number, place + 3]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        steps, restarts, start = settings.steps, settings.restarts, best.get(budget.norm)
        ascent = ascend(judged, x, budget, steps=steps, restarts=restarts, generator=generator, start=start)
        single = one_step(judged, x, budget)
        best[budget.norm] = found[budget.label, ATTACK] = ascent.images
        found[budget.label, ONE_STEP] = single.images
        found[budget.label, RANDOM] = random_images(x, budget, generator)
        assert ascent.began is not None
        shared: dict[str, Any] = {"row": range(len(x)), "budget": budget.label}
        shared |= {"one_step": _degrees(single), "began": _degrees(ascent, ascent.began)}
        for kind, after in ascent.alone.items():
            climbs.append(pd.DataFrame({**shared, "kind": kind, "alone": _degrees(ascent, after)}))
    return found, pd.concat(climbs, ignore_index=True)


def _degrees(ascent: Ascent, after: Tensor | None = None) -> np.ndarray:
    before, after = (value.clamp(-1, 1).arccos() for value in (ascent.before, ascent.after if after is None else after))
    degrees: np.ndarray = torch.rad2deg(before - after).cpu().numpy()
    return degrees
