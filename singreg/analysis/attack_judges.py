"""Attacked images judged from their 8-bit files; beside them ordinary robustness, and twins that nobody attacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.attack import LEVELS, Budget, ascend
from singreg.analysis.attack_images import RANDOM, PixelModel, away_from_label, load_images
from singreg.data.corruption import KINDS, CorruptedSplit
from singreg.data.datasets import ImageSplit
from singreg.functional import angle
from singreg.models.vlm import VisionLanguageModel
from singreg.translator import Translator

READINGS = ("fooled the translator", "fooled the translators", "fooled the VLM", "changed meaning")
"""Who saw the target first, from the attacked translator alone to all image encoders, of which there must be two."""
SEVERITY = 3  # of the corruptions
NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution
CHUNK = 512  # rows of the table of distances made at once


class Judge(NamedTuple):
    """What reads image files to embeddings (B, n), and the class prompts (C, n) in its space as unit rows."""

    read: Callable[[Sequence[Path]], Tensor]
    texts: Tensor


def encoder_judge(vlm: VisionLanguageModel, texts: Tensor) -> Judge:
    """Return a real image encoder with its own preprocessing; the attack never saw it."""

    def read(paths: Sequence[Path]) -> Tensor:
        rows = []
        for path in paths:
            with Image.open(path) as image:
                rows.append(vlm.transform(image.convert("RGB")))
        return vlm.embed_images(torch.stack(rows)).cpu()

    return Judge(read, texts.cpu())


def translator_judge(model: PixelModel, translator: Translator, texts: Tensor) -> Judge:
    """Return a reader of a classifier's translated features."""

    @torch.no_grad()
    def read(paths: Sequence[Path]) -> Tensor:
        features, _ = model(load_images(paths).to(model.mean.device))
        translated: Tensor = translator(features)
        return translated.float().cpu()

    return Judge(read, texts.cpu())


@torch.no_grad()
def judge_images(
    attacked: pd.DataFrame,
    folder: Path,
    model: PixelModel,
    judges: Mapping[str, Judge],
    budgets: Sequence[Budget],
    *,
    tau: float,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Read every attacked image and its original again from the PNG files; nothing the attack reported is believed.

    Args:
        attacked: rows of `save_batch`.

    Returns:
        The rows with kept (within the budget, every logit within τ, the decision stays), logit_change, decision,
        decision_before, linf (255ths), l2; and by judge: rise, the angle gained towards the target, shift, the angle
        between the two readings (degrees), first and first_before, whether the target outranks all class prompts.
    """
    known, frames = {budget.label: budget for budget in budgets}, []
    for start in range(0, len(attacked), batch_size):
        chunk = attacked.iloc[start : start + batch_size]
        before, after = ([folder / path for path in chunk[name]] for name in ("original", "file"))
        x, y = load_images(before), load_images(after)
        old, new = (model(images.to(model.mean.device))[1].float().cpu() for images in (x, y))
        moved, change = (LEVELS * (y - x)).round() / LEVELS, (new - old).abs().amax(1)
        lengths = {"linf": Budget("linf", 0).lengths(moved), "l2": Budget("l2", 0).lengths(moved)}
        own = [known[label] for label in chunk["budget"]]
        within = [float(lengths[b.norm][row]) <= b.radius * (1 + 1e-6) + 1e-9 for row, b in enumerate(own)]
        kept = torch.tensor(within) & (change <= tau) & (old.argmax(1) == new.argmax(1))
        columns = {"kept": kept, "logit_change": change, "decision": new.argmax(1), "decision_before": old.argmax(1)}
        columns |= {"linf": LEVELS * lengths["linf"], "l2": lengths["l2"]}
        targets = torch.tensor(chunk["target"].to_numpy())
        for name, judge in judges.items():
            was, now, texts = judge.read(before).double(), judge.read(after).double(), judge.texts.double()
            columns[f"rise {name}"] = angle(was, texts[targets]) - angle(now, texts[targets])
            columns[f"shift {name}"] = angle(was, now)
            for figure, z in (("first", now), ("first_before", was)):
                columns[f"{figure} {name}"] = (normalize(z, dim=-1) @ texts.T).argmax(1) == targets
        frames.append(chunk.assign(**{name: values.numpy() for name, values in columns.items()}))
    found: pd.DataFrame = pd.concat(frames, ignore_index=True)
    return found


def judges_of(judged: pd.DataFrame) -> list[str]:
    """Return the names of the judges behind rows of `judge_images`."""
    return [name.removeprefix("rise ") for name in judged.columns if name.startswith("rise ")]


def won(judged: pd.DataFrame, judge: str) -> pd.Series:
    """Return whether the target became first by that judge, all else kept."""
    found: pd.Series = judged["kept"] & judged[f"first {judge}"] & ~judged[f"first_before {judge}"]
    return found


def counted_rise(judged: pd.DataFrame, judge: str) -> pd.Series:
    """Return rises as they count: 0 for what was not kept, but for random directions, which are held to nothing."""
    found: pd.Series = judged[f"rise {judge}"].where(judged["kept"] | (judged["arm"] == RANDOM), 0.0)
    return found


def readings_of(judged: pd.DataFrame, encoders: Sequence[str]) -> pd.Series:
    """Return who was fooled by each image: the highest of READINGS, or "" for nobody.

    "changed meaning" needs two image encoders or more, all of which put the target first; one that does beside another
    that does not is a fooled encoder.
    """
    seen = {name: won(judged, name) for name in judges_of(judged)}
    counts = sum((seen[name].astype(int) for name in encoders), start=pd.Series(0, index=judged.index))
    found = pd.Series("", index=judged.index)
    found[seen["fitted"]] = READINGS[0]
    found[seen["auditor"]] = READINGS[1]
    found[counts > 0] = READINGS[2]
    found[(counts == len(encoders)) & (len(encoders) >= 2)] = READINGS[3]
    return found


def still_right(
    model: PixelModel, images: Tensor, labels: Tensor, sizes: Sequence[float], *, steps: int = 10, seed: int
) -> dict[str, Tensor]:
    """Return which images keep their right answer under PGD on the margin, (B,) bool by "clean" and by 255ths.

    What fell at a smaller budget stays fallen at a larger one; only what still stands is attacked.

    Shape: images (B, 3, H, W) on the 8-bit grid, labels (B,) among the head's rows.
    """
    with torch.no_grad():
        standing = model(images)[1].argmax(1) == labels
    found = {"clean": standing}
    for place, size in enumerate(sorted(sizes)):
        standing = standing.clone()
        rows = standing.nonzero().flatten()
        if len(rows):
            generator = torch.Generator().manual_seed(seed + place)
            judged = away_from_label(model, labels[rows])
            attack = ascend(judged, images[rows], Budget("linf", size), steps=steps, generator=generator)
            with torch.no_grad():
                standing[rows] = model(attack.images)[1].argmax(1) == labels[rows]
        found[f"{size:g}"] = standing
    return found


@torch.no_grad()
def corrupted_right(model: PixelModel, split: ImageSplit, labels: Tensor, *, batch_size: int = 64) -> dict[str, Tensor]:
    """Return which images of a split are right when blurred, noisy or of low contrast, (N,) bool by kind."""
    found = {}
    for kind in KINDS:
        corrupted = CorruptedSplit(split, kind, SEVERITY)
        right = []
        for start in range(0, len(split), batch_size):
            rows = range(start, min(start + batch_size, len(split)))
            images = torch.stack([model.image(corrupted, row) for row in rows])
            right.append(model(images)[1].argmax(1).cpu() == labels[start : start + batch_size])
        found[kind] = torch.cat(right)
    return found


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
def natural_twins(
    logits: Tensor, embeddings: Tensor, labels: Tensor, *, places: np.ndarray | None = None, shown: int = 8
) -> dict[str, Any]:
    """Find pairs of images of two classes that are close in logits and far apart in meaning; nobody attacked them.

    Close: largest |Δlogit| at most the median between images of one class, so a model with larger logits is held to a
    larger limit. Far: angle at least the median between images of different classes.

    Args:
        places: what the images are called in the answer, their place among these rows by default.
        shown: how many pairs are listed, closest first, no image twice.

    Returns:
        images; pairs of two classes; close (logits), far (degrees); rate of twins among the pairs and its 95 %
        bootstrap interval over images; touched, the share of images with a twin; shown.

    Shape: logits (N, C), embeddings (N, n), labels (N,). Memory grows with N².

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
    called = [int(place) for place in (range(len(labels)) if places is None else places)]
    listed: list[dict[str, Any]] = []
    used: set[int] = set()
    for i, j in zip(left[order].tolist(), right[order].tolist(), strict=True):
        if len(listed) < shown and not used & {i, j}:
            used |= {i, j}
            apart = {"logit_distance": float(distance[i, j]), "angle": float(angle[i, j])}
            listed.append({"first": called[i], "second": called[j], **apart})
    return {
        "images": len(labels),
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
