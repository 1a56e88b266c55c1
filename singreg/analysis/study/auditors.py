"""The auditors of a study arm, all from one pass: the whole audit part, its two disjoint halves, an MLP (METHOD section 8.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from singreg.analysis.features import PassSettings, gathered, iterate_features
from singreg.analysis.fitting import VALIDATION_EVERY
from singreg.analysis.fitting_mlp import fit_mlp_on_part
from singreg.analysis.study.agreement import translator_agreement
from singreg.data.datasets import ImageSplit
from singreg.metrics import COLUMNS, score_columns
from singreg.mlp import MLPSettings
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from singreg.translator import LinearTranslator, Translator, TranslatorInfo, translator_from_statistics

Pair = tuple[RidgeStatistics, RidgeStatistics]
"""Sums to fit on, and sums that choose λ."""


@dataclass(frozen=True)
class Auditor:
    """A translator of any kind and the mean feature (m,) of the pictures behind it."""

    translator: Translator
    mean: Tensor


def fit_auditors(
    classifier: Classifier,
    part: ImageSplit,
    embeddings: np.ndarray,
    *,
    ridge: float | None = None,
    halves: bool = True,
    mlp: MLPSettings | None = None,
    normalize_targets: bool = False,
    name: str = "auditor",
    invariance: Invariance = "logits",
    info: TranslatorInfo | None = None,
    settings: PassSettings | None = None,
) -> dict[str, Auditor]:
    """ "auditor", "auditor A" and "auditor B" (disjoint halves), "auditor mlp": one feature pass over the audit part.

    All linear ones are standardised by the head's blocks; `ridge` fixes λ, None lets every fifth picture choose each one's own.
    With `settings.cache` all that reads this part later finds the same features; the MLP needs it. For another VLM call it
    again with its embeddings and name="auditor VLM2". "auditor" is what `fit_on_part(standardize="blocks")` gives.

    Shapes: embeddings (N, n). Exact over processes.

    Raises:
        ValueError: an MLP without a cache folder, or halves of fewer than 2 pictures.
    """
    settings = settings or PassSettings()
    if mlp is not None and settings.cache is None:
        raise ValueError("an MLP auditor reads the features once an epoch: give PassSettings(cache=FOLDER) to keep them in")
    device = classifier.weight.device

    def sums() -> RidgeStatistics:
        return RidgeStatistics(classifier.feature_dim, embeddings.shape[1], device=device)

    pairs: dict[str, Pair] = {half: (sums(), sums()) for half in "AB"}
    for batch in gathered(iterate_features(classifier, part, embeddings, settings, f"fitting the {name}")):
        targets = normalize(batch.embeddings, dim=-1) if normalize_targets else batch.embeddings
        # Whole blocks of five go to one half, so that each half has its own every fifth picture and together they are the part's.
        held_out, first = batch.indices % VALIDATION_EVERY == 0, batch.indices // VALIDATION_EVERY % 2 == 0
        for half, mine in (("A", first), ("B", ~first)):
            for place, chosen in enumerate((mine & ~held_out, mine & held_out)):
                rows = chosen.to(device)
                pairs[half][place].update(batch.features[rows], targets[rows])
    for pair in pairs.values():
        for statistics in pair:
            statistics.reduce()
    whole = (sums().merge(pairs["A"][0]).merge(pairs["B"][0]), sums().merge(pairs["A"][1]).merge(pairs["B"][1]))
    basis = NullSpace.from_weight(classifier.weight, invariance=invariance, allow_empty=True).to(device).basis
    described = replace(info or TranslatorInfo(), normalized_targets=normalize_targets)
    fits = {name: whole, **({f"{name} {half}": pair for half, pair in pairs.items()} if halves else {})}
    found = {key: _auditor(pair, basis, ridge, described) for key, pair in fits.items()}
    if mlp is not None:
        network = fit_mlp_on_part(
            classifier, part, embeddings, mlp=mlp, normalize_targets=normalize_targets, info=described, settings=settings
        )
        found[f"{name} mlp"] = Auditor(network, found[name].mean)
    return found


def _auditor(pair: Pair, basis: Tensor, ridge: float | None, info: TranslatorInfo) -> Auditor:
    fit, validation = pair
    ridges = DEFAULT_RIDGES if ridge is None else (ridge,)
    translator = translator_from_statistics(fit, validation, ridges=ridges, standardize=basis, info=info)
    mean = (fit.f + validation.f) / (fit.count + validation.count)
    return Auditor(translator.to(basis.device), mean.float())


@dataclass(frozen=True)
class AgreementPoint:
    """Two auditors on disjoint sets of `images` pictures each: agreement of class directions; held out: cosine, AS⁻ (degrees)."""

    images: int
    agreement: float
    cosine: list[float]
    AS_neg: list[float]


def auditor_agreement_curve(
    features: Tensor,
    embeddings: Tensor,
    texts: Tensor,
    sizes: Sequence[int],
    *,
    ridge: float,
    basis: Tensor,
    held_out: tuple[Tensor, Tensor, Tensor],
    seed: int = 0,
) -> list[AgreementPoint]:
    """How many pictures an auditor needs: two disjoint draws of N against each other and against held-out pictures (METHOD 8.6).

    A larger draw contains the smaller ones, so sums are only ever added to. λ is fixed, standardisation is by the head's blocks.

    Shapes: features (N, m), embeddings (N, n), texts (C, n) unit rows, basis (m, r) of the head's row space, held_out features
    (H, m), embeddings (H, n), labels (H,).

    Raises:
        ValueError: sizes that are not at least 2 and at most N / 2.

    Example:
        >>> f = torch.randn(60, 4); z = f @ torch.randn(4, 3)
        >>> head = torch.eye(4)[:, :1]
        >>> points = auditor_agreement_curve(f, z, torch.eye(3), [10, 30], ridge=1e-6, basis=head, held_out=(f, z, torch.arange(60) % 3))
        >>> [point.images for point in points], round(points[-1].agreement, 3)
        ([10, 30], 1.0)
    """
    wrong = [size for size in sizes if not 2 <= size <= len(features) // 2]
    if wrong or not len(sizes):
        raise ValueError(f"two disjoint sets out of {len(features)} pictures hold 2 to {len(features) // 2} each, got sizes {list(sizes)}")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    both = [RidgeStatistics(features.shape[1], embeddings.shape[1], device=features.device) for _ in range(2)]
    space = NullSpace(basis.double(), basis.new_zeros(0).double())
    points, done = [], 0
    for size in sorted(set(sizes)):
        translators = []
        for place, statistics in enumerate(both):
            rows = order[place::2][done:size]
            statistics.update(features[rows], embeddings[rows])
            translators.append(LinearTranslator.from_solution(statistics.solve(ridge, standardize=basis.double())))
        done = size
        read = [_held_out(translator, space, texts, *held_out) for translator in translators]
        agreement = translator_agreement(translators[0], translators[1], texts)
        points.append(AgreementPoint(size, agreement, [cosine for cosine, _ in read], [harm for _, harm in read]))
    return points


def _held_out(
    translator: Translator, space: NullSpace, texts: Tensor, features: Tensor, embeddings: Tensor, labels: Tensor
) -> tuple[float, float]:
    """(mean cosine to the VLM's embeddings, AS⁻ in degrees of the paper's removal)."""
    z = translator(features)
    scores = score_columns(z, translator(space.remove(features)), texts[labels])
    return float(cosine_similarity(z, embeddings, dim=-1).mean()), float(torch.relu(-scores[COLUMNS.index("AS")]).mean())
