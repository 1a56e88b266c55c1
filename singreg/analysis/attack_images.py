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
from singreg.data.classes import resolve_classes
from singreg.data.datasets import ImageSplit
from singreg.models.classifier import Classifier
from singreg.models.edits import NullDroppedClassifier
from singreg.models.heads import as_features
from singreg.translator import Translator
from singreg.utils import atomic_write

ATTACK, ONE_STEP, RANDOM = "attack", "one step", "random"
"""Arms: the ascent, the single gradient step, a random direction."""
NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution
CHUNK = 512  # rows of the table of distances made at once


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
        name = self.classifier.head_name.rpartition(".")[0]
        captured: list[Tensor] = []
        whole_head = self.classifier.model.get_submodule(name)
        handle = whole_head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            logits = self.classifier(seen)
        finally:
            handle.remove()
        return as_features(captured[0], name), logits

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


def save_attacked(
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


def choose_images(
    split: ImageSplit, count: int, targets: Sequence[str] | None, seed: int
) -> tuple[pd.DataFrame, list[str]]:
    """Choose labelled images evenly over classes, and for each a target class other than its own.

    Returns:
        A row an image (image: its place in the split, identifier, label, target), at most `count`; and the names of
        those left out because they are of one colour.

    Raises:
        ValueError: unknown targets, a class that is the only target of its own images, or nothing to see in any.
    """
    names = split.class_names
    allowed = list(range(len(names)))
    if targets is not None:
        allowed = [names.index(name) for name in resolve_classes(list(targets), names).keys]
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


def share_interval(count: int, total: int) -> list[float]:
    """Return [share, low, high] by Wilson's 95 % interval, which does not shrink to nothing at 0 or at 1.

    Example:
        >>> [round(value, 3) for value in share_interval(0, 128)]
        [0.0, 0.0, 0.029]
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"expected 0 to {total} of at least 1 image, got {count} of {total}")
    share, square = count / total, NORMAL**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = NORMAL / (1 + square / total) * (share * (1 - share) / total + square / (4 * total**2)) ** 0.5
    return [share, 0.0 if count == 0 else middle - half, 1.0 if count == total else middle + half]


@torch.no_grad()
def natural_twins(logits: Tensor, embeddings: Tensor, labels: Tensor, *, shown: int = 8) -> dict[str, Any]:
    """Find pairs of images of two classes that are close in logits and far apart in meaning; nobody attacked them.

    Close: largest |Δlogit| at most the median between images of one class, so a model with larger logits is held to a
    larger limit. Far: angle at least the median between images of different classes.

    Args:
        shown: how many pairs are listed, closest first, no image twice.

    Returns:
        pictures; pairs of two classes; close (logits), far (degrees); rate of twins among the pairs and its 95 %
        bootstrap interval over images; touched, the share of images with a twin; shown (first, second,
        logit_distance, angle).

    Shape:
        logits (N, C), embeddings (N, n), labels (N,). Memory grows with N².

    Raises:
        ValueError: rows that do not fit, fewer than two classes, or no two images of one class.

    Example:
        >>> logits = torch.tensor([[0.0, 9.0], [0.1, 8.8], [9.0, 0.0], [0.05, 9.0]])
        >>> z = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 1.0]])
        >>> twins = natural_twins(logits, z, torch.tensor([0, 0, 1, 1]))
        >>> [(t["first"], t["second"]) for t in twins["shown"]], twins["rate"]
        ([(0, 3)], 0.5)
    """
    if not len(logits) == len(embeddings) == len(labels):
        raise ValueError(f"expected equally many rows, got {len(logits)}, {len(embeddings)} and {len(labels)}")
    if (problem := twins_problem(labels)) is not None:
        raise ValueError(problem)
    exact, unit = logits.double(), normalize(embeddings.double(), dim=-1)
    distance = torch.cat([torch.cdist(chunk, exact, p=torch.inf) for chunk in torch.split(exact, CHUNK)])
    angle = torch.rad2deg(torch.arccos((unit @ unit.T).clamp(-1, 1)))
    upper = torch.ones_like(distance, dtype=torch.bool).triu(1)
    same = labels[:, None] == labels[None]
    pairs = upper & ~same
    close, far = float(distance[upper & same].median()), float(angle[pairs].median())
    twins = pairs & (distance <= close) & (angle >= far)
    left, right = twins.nonzero(as_tuple=True)
    order = distance[left, right].argsort(stable=True)
    listed: list[dict[str, Any]] = []
    used: set[int] = set()
    for i, j in zip(left[order].tolist(), right[order].tolist(), strict=True):
        if len(listed) < shown and not used & {i, j}:
            used |= {i, j}
            logit_distance, apart = float(distance[i, j]), float(angle[i, j])
            listed.append({"first": i, "second": j, "logit_distance": logit_distance, "angle": apart})
    return {
        "pictures": len(labels),
        "pairs": int(pairs.sum()),
        "close": close,
        "far": far,
        "rate": float(twins.sum() / pairs.sum()),
        "touched": float((twins | twins.T).any(1).double().mean()),
        "shown": listed,
        "rate_interval": _rate_interval(twins, pairs),
    }


def twins_problem(labels: Tensor) -> str | None:
    """Return why no twins can be sought among images with these labels (N,), or None."""
    counts = np.unique(labels.numpy(), return_counts=True)[1]
    if len(counts) < 2 or counts.max() < 2:
        return "natural twins need images of at least two classes, and two images of one of them"
    return None


def _rate_interval(twins: Tensor, pairs: Tensor, *, resamples: int = 200, seed: int = 0) -> tuple[float, float]:
    """Draw images and not pairs, which share images."""
    count = len(twins)
    rng = np.random.default_rng(seed)
    drawn = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(resamples)])
    weights = torch.from_numpy(drawn).double()
    found, all_pairs = (((weights @ table.double()) * weights).sum(1) for table in (twins, pairs))
    shares = (found / all_pairs)[all_pairs > 0].numpy()
    low, high = np.quantile(shares, [0.025, 0.975]) if len(shares) else (0.0, 1.0)
    if not bool(twins.any()):  # draws from nothing are nothing; half as many pairs share no image
        high = share_interval(0, max(1, count // 2))[2]
    return float(low), float(high)
