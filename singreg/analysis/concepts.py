"""Concept level: how the angle to every concept changes when the null component goes, by bounded matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.functional import image_score, pairwise_angles, unit_rows
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator, Translator
from singreg.utils import all_reduce_sum, plain

CHUNK_ELEMENTS = 2**20  # images x concepts at a time: 4 MiB an array in float32
SUMS = ("before", "before²", "after", "after²", "AS", "AS²", "AS_abs", "kappa")
CLASS_SUMS = ("before", "after", "AS²")
NORMAL_95 = 1.959963984540054
Order = Literal["strongest", "weakest", "rises", "falls"]


class EquivalentPairs:
    """Translate features before and after the removal: (B, m) to z and z~, both (B, n) (paper eq. 4 and 9).

    For a linear translator z~ = f (A Π_p)ᵀ + (a + A Π_n μ), formed once in float64: no difference of large numbers.
    A and A Π_p are stacked, so z and z~ come out of one product.
    """

    def __init__(self, translator: Translator, null_space: NullSpace, *, mean: Tensor | None = None) -> None:
        self.translator, self.null_space, self.mean = translator, null_space, mean
        self._stacked: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        if isinstance(translator, LinearTranslator):
            matrix, offset = translator.matrix.double(), translator.offset.double()
            visible = (matrix @ null_space.basis.to(matrix)) @ null_space.basis.to(matrix).T
            kept = offset if mean is None else offset + (matrix - visible) @ mean.to(matrix)
            product, bias = torch.cat([matrix, visible]), torch.cat([offset, kept])
            self._stacked = {torch.float64: (product, bias), torch.float32: (product.float(), bias.float())}

    @torch.no_grad()
    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = T(f) and z~ = T(f~). Shape: (B, m), float32 or float64, to two (B, n) of the same dtype."""
        if not self._stacked:
            return self.translator(features), self.translator(self.null_space.remove(features, mean=self.mean))
        matrix, offset = self._stacked[features.dtype]
        z, equivalent = torch.split(torch.addmm(offset, features, matrix.T), self.translator.target_dim, dim=1)
        return z, equivalent


class _ConceptSums:
    """Running float64 sums: eight figures by concept (8, K), three by class and concept (3, C, K), and of IS."""

    def __init__(self, texts: Tensor, classes: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=texts.device)

        self.texts = texts
        self.overall, self.by_class = zeros(len(SUMS), len(texts)), zeros(len(CLASS_SUMS), classes, len(texts))
        self.class_images, self.counts, self.image = zeros(classes), zeros(2), zeros(2)

    def add(self, z: Tensor, equivalent: Tensor, labels: Tensor) -> None:
        """Add images: z, z~ (B, n), labels (B,) with -1 for unlabelled."""
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
        for row, values in enumerate((before, after, squares[2])):
            self.by_class[row].index_add_(0, labels[known], values[known])

    def _kappa(self, z: Tensor, equivalent: Tensor, cosines: Tensor) -> Tensor:
        """κ (B, K): cosine between the tangent at z towards z~ and that towards the text, τ·t / sin θ with τ ⊥ z."""
        travel = equivalent - z * (z * equivalent).sum(1, keepdim=True)
        sine = (1 - cosines.square()).clamp_min(0).sqrt()
        along: Tensor = unit_rows(travel) @ self.texts.T
        safe = torch.where(sine > 0, sine, torch.ones_like(sine))
        kappa = torch.where(sine > 0, along / safe, torch.zeros_like(sine))
        return kappa.clamp_(-1, 1)

    def figures(self) -> dict[str, Any]:
        """Means and deviations over all processes; every process must call it, one without images too."""
        for name in ("overall", "by_class", "class_images", "counts", "image"):
            setattr(self, name, all_reduce_sum(getattr(self, name)))
        images = int(self.counts.sum())
        table = dict(zip(SUMS, (self.overall / images).cpu().numpy(), strict=True))
        overall: dict[str, np.ndarray] = {}
        for name in ("before", "after", "AS"):
            deviation = np.sqrt(np.maximum(table[f"{name}²"] - table[name] ** 2, 0))
            overall |= {name: table[name], f"{name}_std": deviation}
        half = NORMAL_95 * overall["AS_std"] / np.sqrt(images)
        overall |= {"AS_abs": table["AS_abs"], "AS_low": table["AS"] - half, "AS_high": table["AS"] + half}
        with np.errstate(invalid="ignore"):  # a class without images is NaN
            before, after, squares = (self.by_class / self.class_images[None, :, None]).cpu().numpy()
        score = before - after
        deviation = np.sqrt(np.maximum(squares - score**2, 0))
        per_class = {"before": before, "after": after, "AS": score, "AS_std": deviation}
        mean, square = (self.image / images).tolist()
        return {
            "images": images,
            "unlabelled": int(self.counts[1]),
            "image_score": mean,
            "image_score_std": max(square - mean**2, 0.0) ** 0.5,
            "class_images": self.class_images.long(),
            "overall": {**overall, "kappa": table["kappa"]},
            "per_class": {name: values.round(5) for name, values in per_class.items()},
        }


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
) -> dict[str, Any]:
    """Measure the angle of every concept to every image before (T f) and after (T f~) the removal (METHOD section 3).

    Float32 products of unit rows in chunks, right to 1e-4 degrees, sums in float64. Exact over processes.

    Args:
        mean: feature mean for the centred removal; None for the paper's.

    Shape: texts (K, n), one row a concept in the translator's space; mean (m,).

    Returns:
        Of all images, overall (K,) before, after, AS with _std, AS_abs, AS_low and AS_high (normal 95 % interval) and
        kappa; per_class (C, K) before, after, AS, AS_std (None for a class without images); the mean image score.

    Raises:
        ValueError: text embeddings that are zero or not finite.
    """
    if not bool(texts.isfinite().all()) or not bool(texts.any(dim=1).all()):
        bad = [concepts[i] for i in (~texts.isfinite().all(1) | ~texts.any(1)).nonzero().flatten().tolist()]
        raise ValueError(f"text embeddings that are zero or not finite: {', '.join(map(repr, bad))}")
    pairs = EquivalentPairs(translator, null_space, mean=mean)
    sums = _ConceptSums(unit_rows(texts.detach().float()), len(class_names))
    rows = max(1, CHUNK_ELEMENTS // len(texts))
    for batch in batches:
        for features, labels in zip(torch.split(batch.features, rows), torch.split(batch.labels, rows), strict=True):
            sums.add(*pairs(features), labels)
    names = {"concepts": list(concepts), "class_names": list(class_names), "centred": mean is not None}
    figures = {name: plain(value) for name, value in sums.figures().items()}
    return {**names, **figures}


def select_concepts(
    found: Mapping[str, Any], order: Order = "strongest", count: int = 10, label: int | None = None
) -> pd.DataFrame:
    """Return the `count` concepts that moved most or least by mean AS, overall or for the images of one class.

    "strongest" and "weakest" are by |AS|; "rises" come closer (AS > 0), "falls" move away (AS < 0).
    """
    if label is None:
        table = pd.DataFrame(found["overall"])
    else:
        images = found["class_images"][label]
        table = pd.DataFrame({name: values[label] for name, values in found["per_class"].items()})
        half = NORMAL_95 * table["AS_std"] / images**0.5 if images > 1 else np.nan
        table = table.assign(AS_low=table["AS"] - half, AS_high=table["AS"] + half)
    table.insert(0, "concept", found["concepts"])
    score = table["AS"]
    keys = {"strongest": -score.abs(), "weakest": score.abs(), "rises": -score, "falls": score}
    key = keys[order].sort_values(kind="stable")
    places = key[key < 0].index if order in ("rises", "falls") else key.index
    chosen: pd.DataFrame = table.loc[places[:count]].reset_index(drop=True)
    return chosen
