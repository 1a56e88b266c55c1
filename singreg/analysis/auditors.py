"""Several auditors of one classifier from one pass, and how many images an auditor needs (METHOD section 8.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from singreg.analysis.features import PassSettings, cached_features, gathered, iterate_features
from singreg.analysis.fitting import VALIDATION_EVERY, fit_mlp_on_split, translator_agreement
from singreg.data.datasets import ImageSplit
from singreg.data.embeddings import take_rows
from singreg.metrics import COLUMNS, score_columns
from singreg.mlp import MLPSettings
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from singreg.translator import LinearTranslator, Translator, TranslatorInfo, translator_from_statistics

Images = tuple[ImageSplit, np.ndarray]
"""A split with its image embeddings (N, n)."""


def fit_auditors(
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    *,
    ridge: float | None = None,
    halves: bool = True,
    mlp: MLPSettings | None = None,
    name: str = "auditor",
    invariance: Invariance = "logits",
    info: TranslatorInfo | None = None,
    settings: PassSettings | None = None,
) -> tuple[dict[str, Translator], Tensor]:
    """Fit "auditor", "auditor A" and "auditor B" (disjoint halves) and "auditor mlp" in one pass over the audit split.

    The linear ones are standardised by the head's blocks, as `fit_on_split` does it. Exact over processes.

    Args:
        ridge: fixes λ; None lets every fifth image choose each one's own.
        mlp: fit a network too; it reads the features of `settings.cache`.
        name: instead of "auditor", for another vision-language model's embeddings.

    Shape: embeddings (N, n).

    Returns:
        The translators by name, and the mean feature (m,).

    Raises:
        ValueError: an MLP without a cache folder, or halves of fewer than 2 images.
    """
    settings = settings or PassSettings()
    if mlp is not None and settings.cache is None:
        raise ValueError("an MLP auditor reads the features once an epoch: give PassSettings(cache=FOLDER)")
    device = classifier.weight.device

    def sums() -> RidgeStatistics:
        return RidgeStatistics(classifier.feature_dim, embeddings.shape[1], device=device)

    pairs = {half: (sums(), sums()) for half in "AB"}  # what is fitted on, and what chooses λ
    for batch in gathered(iterate_features(classifier, split, embeddings, settings, f"fitting the {name}")):
        # Whole blocks of five go to one half, so that each has its own every fifth image and both are the split's.
        held_out, first = batch.indices % VALIDATION_EVERY == 0, batch.indices // VALIDATION_EVERY % 2 == 0
        for half, mine in (("A", first), ("B", ~first)):
            for statistics, chosen in zip(pairs[half], (mine & ~held_out, mine & held_out), strict=True):
                rows = chosen.to(device)
                statistics.update(batch.features[rows], batch.embeddings[rows])
    for pair in pairs.values():
        for statistics in pair:
            statistics.reduce()
    whole = (sums().merge(pairs["A"][0]).merge(pairs["B"][0]), sums().merge(pairs["A"][1]).merge(pairs["B"][1]))
    basis = NullSpace.from_weight(classifier.weight, invariance=invariance, allow_empty=True).to(device).basis
    ridges = DEFAULT_RIDGES if ridge is None else (ridge,)
    found: dict[str, Translator] = {}
    for key, (fit, validation) in {
        name: whole,
        **({f"{name} {h}": p for h, p in pairs.items()} if halves else {}),
    }.items():
        translator = translator_from_statistics(fit, validation, ridges=ridges, standardize=basis, info=info)
        found[key] = translator.to(device)
    if mlp is not None:
        found[f"{name} mlp"] = fit_mlp_on_split(classifier, split, embeddings, mlp=mlp, info=info, settings=settings)
    mean = (whole[0].f + whole[1].f) / (whole[0].count + whole[1].count)
    return found, mean.float()


def agreement_curve(
    features: Tensor,
    embeddings: Tensor,
    texts: Tensor,
    sizes: Sequence[int],
    *,
    ridge: float,
    basis: Tensor,
    held_out: tuple[Tensor, Tensor, Tensor],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare two auditors on disjoint draws of N images, N by N (METHOD section 8.6): how many does one need?

    A larger draw contains the smaller ones. λ is fixed, standardisation is by the head's blocks.

    Shape:
        features (N, m), embeddings (N, n), texts (C, n) unit rows, basis (m, r) of the head's row space, held out:
        features (H, m), embeddings (H, n), labels (H,).

    Returns:
        For each size: images, agreement of the class directions, and of both on the held-out images cosine and AS_neg.

    Raises:
        ValueError: sizes that are not at least 2 and at most N / 2.

    Example:
        >>> f = torch.randn(60, 4); z = f @ torch.randn(4, 3)
        >>> options = {"ridge": 1e-6, "basis": torch.eye(4)[:, :1], "held_out": (f, z, torch.arange(60) % 3)}
        >>> points = agreement_curve(f, z, torch.eye(3), [10, 30], **options)
        >>> [point["images"] for point in points], round(points[-1]["agreement"], 3)
        ([10, 30], 1.0)
    """
    if not len(sizes) or not all(2 <= size <= len(features) // 2 for size in sizes):
        raise ValueError(
            f"two disjoint sets out of {len(features)} images hold 2 to {len(features) // 2} each, got {list(sizes)}"
        )
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    both = [RidgeStatistics(features.shape[1], embeddings.shape[1], device=features.device) for _ in range(2)]
    space = NullSpace(basis.double(), basis.new_zeros(0).double())
    f, z, labels = held_out
    removed = space.remove(f)
    points, done = [], 0
    for size in sorted(set(sizes)):
        pair: list[LinearTranslator] = []
        for place, statistics in enumerate(both):
            rows = order[place::2][done:size]
            statistics.update(features[rows], embeddings[rows])
            pair.append(LinearTranslator.from_solution(statistics.solve(ridge, standardize=basis.double())))
        done = size
        scores = [score_columns(T(f), T(removed), texts[labels])[COLUMNS.index("AS")] for T in pair]
        points.append(
            {
                "images": size,
                "agreement": translator_agreement(pair[0], pair[1], texts),
                "cosine": [float(cosine_similarity(T(f), z, dim=-1).mean()) for T in pair],
                "AS_neg": [float(torch.relu(-score).mean()) for score in scores],
            }
        )
    return points


def auditor_need(
    classifier: Classifier,
    pool: Sequence[tuple[ImageSplit, np.ndarray, np.ndarray]],
    held_out: Images,
    texts: Tensor,
    sizes: Sequence[int],
    *,
    ridge: float,
    invariance: Invariance = "logits",
    settings: PassSettings,
) -> list[dict[str, Any]]:
    """Take `agreement_curve` for a classifier; sizes that the images cannot fill are left out.

    As many images are drawn as the largest size needs, and only their rows are read from the stored features. Every
    process computes the same.

    Args:
        pool: splits with their embeddings (N, n) and the rows that may be drawn: those no training sees.
    """
    counts = [len(allowed) for *_, allowed in pool]
    usable = sorted({size for size in sizes if size <= sum(counts) // 2})
    if not usable:
        return []

    def rows(split: ImageSplit, embeddings: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        return take_rows(cached_features(classifier, split, settings), chosen), take_rows(embeddings, chosen)

    drawn = np.sort(np.random.default_rng(0).permutation(sum(counts))[: 2 * usable[-1]])  # read as they lie
    places = np.split(drawn, np.searchsorted(drawn, np.cumsum(counts)[:-1]))
    starts = np.cumsum([0, *counts[:-1]])
    parts = [
        rows(split, embeddings, allowed[mine - start])
        for (split, embeddings, allowed), mine, start in zip(pool, places, starts, strict=True)
        if len(mine)
    ]
    features, embeddings = (torch.cat(each) for each in zip(*parts, strict=True))
    basis = NullSpace.from_weight(classifier.weight.cpu(), invariance=invariance).basis
    every = (*rows(*held_out, np.arange(len(held_out[0]))), torch.from_numpy(held_out[0].labels.copy()))
    return agreement_curve(features, embeddings, texts.cpu(), usable, ridge=ridge, basis=basis, held_out=every)
