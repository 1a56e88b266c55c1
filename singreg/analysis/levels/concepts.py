"""Concept level: how the angle to every concept changes when the null component goes, by bounded matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.levels.concept_results import CLASS_FIGURES, FIGURES, NORMAL_95, ConceptMeasurement
from singreg.analysis.levels.pairs import EquivalentPairs
from singreg.functional import image_score, pairwise_angles, unit_rows
from singreg.nullspace import NullSpace
from singreg.translator import Translator
from singreg.utils import all_reduce_sum

CHUNK_ELEMENTS = 2**20  # pictures x concepts at a time: 4 MiB an array in float32
SUMS = ("before", "before²", "after", "after²", "AS", "AS²", "AS_abs", "kappa")
CLASS_SUMS = ("before", "after", "AS²")


class _ConceptSums:
    """Running float64 sums: of the eight figures by concept (8, K), of three by class and concept (3, C, K), and of IS."""

    def __init__(self, texts: Tensor, classes: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=texts.device)

        self.texts = texts
        self.overall, self.by_class = zeros(len(SUMS), len(texts)), zeros(len(CLASS_SUMS), classes, len(texts))
        self.class_images, self.counts, self.image = zeros(classes), zeros(2), zeros(2)

    def add(self, z: Tensor, equivalent: Tensor, labels: Tensor) -> None:
        """Add pictures: z, z~ (B, n), labels (B,) with -1 for unlabelled."""
        z, equivalent = unit_rows(z), unit_rows(equivalent)
        moved = image_score(z, equivalent).double()
        self.image += torch.stack([moved.sum(), moved.square().sum()])
        known = labels >= 0
        self.counts += torch.stack([known.sum(), (~known).sum()])
        self.class_images += torch.bincount(labels[known], minlength=len(self.class_images))
        before, cosines = pairwise_angles(z, self.texts)
        after, _ = pairwise_angles(equivalent, self.texts)
        kappa = self._kappa(z, equivalent, cosines)
        before, after = before.double(), after.double()
        score = before - after
        squares = [before.square(), after.square(), score.square()]
        columns = (before, squares[0], after, squares[1], score, squares[2], score.abs(), kappa)
        for row, values in enumerate(columns):
            self.overall[row] += values.sum(0, dtype=torch.float64)
        everyone = bool(known.all())
        for row, values in enumerate((before, after, squares[2])):
            self.by_class[row].index_add_(0, labels[known], values if everyone else values[known])

    def _kappa(self, z: Tensor, equivalent: Tensor, cosines: Tensor) -> Tensor:
        """κ (B, K): cosine between the tangent at z towards z~ and that towards the text, which is τ·t / sin θ with τ ⊥ z."""
        travel = equivalent - z * (z * equivalent).sum(1, keepdim=True)
        sine = (1 - cosines.square()).clamp_min(0).sqrt()
        along: Tensor = unit_rows(travel) @ self.texts.T
        return torch.where(sine > 0, along / torch.where(sine > 0, sine, torch.ones_like(sine)), torch.zeros_like(sine)).clamp_(-1, 1)

    def reduce(self) -> None:
        """Sum over processes; every process must call it, one without pictures too (no shapes)."""
        for name in ("overall", "by_class", "class_images", "counts", "image"):
            setattr(self, name, all_reduce_sum(getattr(self, name)))


@torch.no_grad()
def analyze_concepts(
    batches: Iterable[FeatureBatch],
    concepts: Sequence[str],
    texts: Tensor,
    *,
    null_space: NullSpace,
    translator: Translator,
    class_names: Sequence[str],
    mean: Tensor | None = None,
) -> ConceptMeasurement:
    """Angles of every concept to every picture before (T f) and after (T f~) the removal: means, deviations, by class too.

    Float32 products of unit rows in chunks of about a million pairs, angles right to 1e-4 degrees (`pairwise_angles` says how),
    sums in float64: memory does not grow with the pictures. Exact over processes: every picture is counted once.

    Shapes: texts (K, n), one row a concept in the translator's space; mean (m,) asks for the centred removal, None for the
    paper's. Angles in degrees. `batches` come from `iterate_features`, with a cache folder when they are read again.

    Raises:
        ValueError: no picture, widths or labels that do not fit, texts that are zero or not finite, a concept or class without
            text, or a concept named twice.

    Example:
        >>> from singreg.translator import LinearTranslator
        >>> f = torch.tensor([[1.0, 1.0]]); label = torch.tensor([0])
        >>> batch = FeatureBatch(f, f, f, label, label)
        >>> found = analyze_concepts([batch], ["seen", "hidden"], torch.eye(2), class_names=["x"],
        ...     null_space=NullSpace.from_weight(torch.tensor([[1.0, 0.0]])), translator=LinearTranslator(torch.eye(2), torch.zeros(2)))
        >>> [(shift.concept, round(shift.score, 3)) for shift in found.select("strongest")]
        [('seen', 45.0), ('hidden', -45.0)]
    """
    _check(concepts, texts, translator, class_names)
    pairs = EquivalentPairs(translator, null_space, mean=mean)
    sums = _ConceptSums(unit_rows(texts.detach().float()), len(class_names))
    rows = max(1, CHUNK_ELEMENTS // len(texts))
    for batch in batches:
        if len(batch.labels) and int(batch.labels.max()) >= len(class_names):
            raise ValueError(f"a picture has label {int(batch.labels.max())}, but there are {len(class_names)} class names")
        for features, labels in zip(torch.split(batch.features, rows), torch.split(batch.labels, rows), strict=True):
            sums.add(*pairs(features), labels)
    sums.reduce()
    return _measurement(sums, concepts, class_names, centred=pairs.centred)


def _check(concepts: Sequence[str], texts: Tensor, translator: Translator, class_names: Sequence[str]) -> None:
    problems = []
    if texts.ndim != 2 or len(texts) != len(concepts) or not len(concepts) or texts.shape[1] != translator.target_dim:
        problems.append(
            f"expected texts ({len(concepts)}, {translator.target_dim}), a row for each of at least one concept, got {tuple(texts.shape)}"
        )
    elif not bool(texts.isfinite().all()) or not bool(texts.any(dim=1).all()):
        bad = [concepts[i] for i in (~texts.isfinite().all(1) | ~texts.any(1)).nonzero().flatten().tolist()]
        problems.append(f"text embeddings that are zero or not finite: {', '.join(map(repr, bad))}")
    for kind, names in (("concept", concepts), ("class", class_names)):
        blank = [place for place, name in enumerate(names) if not name.strip()]
        if blank:
            problems.append(f"{kind} names without text at positions {blank} of {len(names)}")
    twice = sorted({name for name in concepts if list(concepts).count(name) > 1}) if len(set(concepts)) < len(concepts) else []
    if twice:
        problems.append(f"concepts named twice: {', '.join(map(repr, twice))}; `load_concepts` leaves repeated ones out")
    if problems:
        raise ValueError("; ".join(problems))


def _measurement(sums: _ConceptSums, concepts: Sequence[str], class_names: Sequence[str], *, centred: bool) -> ConceptMeasurement:
    """Means and deviations of the sums over all processes."""
    images = int(sums.counts.sum())
    if not images:
        raise ValueError("there is no picture to measure concepts on: the stream of features was empty")
    table = dict(zip(SUMS, (sums.overall / images).cpu().numpy(), strict=True))
    overall = {name: table[name] for name in ("before", "after", "AS", "AS_abs", "kappa")}
    for name in ("before", "after", "AS"):
        overall[f"{name}_std"] = np.sqrt(np.maximum(table[f"{name}²"] - table[name] ** 2, 0))
    half = NORMAL_95 * overall["AS_std"] / np.sqrt(images)
    overall |= {"AS_low": overall["AS"] - half, "AS_high": overall["AS"] + half}
    with np.errstate(invalid="ignore"):  # a class without pictures is NaN
        before, after, squares = (sums.by_class / sums.class_images[None, :, None]).cpu().numpy()
    score = before - after
    per_class = {"before": before, "after": after, "AS": score, "AS_std": np.sqrt(np.maximum(squares - score**2, 0))}
    mean, square = (sums.image / images).tolist()
    return ConceptMeasurement(
        concepts=tuple(concepts),
        class_names=tuple(class_names),
        images=images,
        unlabelled=int(sums.counts[1]),
        centred=centred,
        image_score=mean,
        image_score_std=max(square - mean**2, 0.0) ** 0.5,
        class_images=sums.class_images.cpu().numpy().astype(np.int64),
        overall={name: overall[name] for name in FIGURES},
        per_class={name: per_class[name].round(5) for name in CLASS_FIGURES},
    )
