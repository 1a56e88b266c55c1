"""What two auditors of disjoint images agree on: class information in the null space, and steering judged by the other.

A translator's own error is what an attack made on it follows, and what a quadratic form in it counts twice. So each
figure here is crafted with one auditor and read with the other, both ways (METHOD section 10.3).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.features import FeatureBatch, FittedTranslator
from singreg.analysis.statistics import ENDS, resampled_means
from singreg.analysis.steering import steering_targets
from singreg.functional import attribute_score, image_score
from singreg.losses import contrast_basis
from singreg.nullspace import NullSpace
from singreg.steering import Maximiser, similarity_gradient
from singreg.translator import LinearTranslator

DEVIATIONS = (1, 2, 4)  # steps in standard deviations of the null component along the step
SHARES = (0.1, 0.25)  # steps in shares of |f|
BUDGETS = tuple(f"{k} sd" for k in DEVIATIONS) + tuple(f"{share:.0%} of |f|" for share in SHARES)
KINDS = ("cross", "self")

AUDITOR = "auditor"
"""What the translator that claims rest on is called."""
RATIOS = {
    "class_variance": (("null scores",), ("scores",)),
    "unique_r2": (("missed by rows", "-missed"), ("spread",)),
    "row_r2": (("spread", "-missed by rows"), ("spread",)),
    "harmless_r2": (("harmless spread", "-harmless missed"), ("harmless spread",)),
}
"""Figures that are a ratio of sums of columns."""
SUMMED = {name.lstrip("-") for pair in RATIOS.values() for side in pair for name in side}
MEANS = ("contrast AS_abs", "orthogonal IS", *(f"{kind} {budget}" for budget in BUDGETS for kind in KINDS))
AUDITED = {*SUMMED, *MEANS}
"""The columns that two auditors read."""


class CrossFit:
    """Reads batches of test images with an auditor and its two halves; columns (B,) by name, one row an image.

    Shape: texts (C, n) unit rows of the class prompts.
    """

    def __init__(self, auditor: FittedTranslator, texts: Tensor, space: NullSpace) -> None:
        self.texts, self.space, self.whole = texts.double(), space, auditor.translator
        ridge, statistics = auditor.translator.info.ridge, auditor.statistics
        self.halves = [
            LinearTranslator.from_solution(each.solve(ridge, standardize=space.basis)) for each in auditor.halves
        ]
        # R² asks what can be predicted, so its ridge is the one that predicts best, not the one that points best.
        best = auditor.halves[0].validated(auditor.halves[1], standardize=space.basis)
        self.full = LinearTranslator.from_solution(statistics.solve(best, standardize=space.basis))
        first, second = (each.mapped(space.basis) for each in auditor.halves)
        inside = (first + second).solve(first.validated(second))
        self.rows = LinearTranslator(inside.matrix @ space.basis.T, inside.offset)
        self.covariance = statistics.centred()[0] / statistics.count
        self.mean, self.embedding_mean = statistics.f / statistics.count, statistics.z / statistics.count
        self.maximisers = [Maximiser(each, space) for each in self.halves]
        self.contrasts = contrast_basis(self.texts)
        self.common = normalize(self.texts.mean(0), dim=0)[:, None]
        left, sigma, _ = torch.linalg.svd(self.texts.T, full_matrices=False)
        self.prompts = left[:, sigma > 1e-6 * sigma[0]]  # their span

    def read(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Return every column of `AUDITED` for a batch."""
        features = batch.features.double()
        return {**self._angles(features, batch.labels), **self._information(features, batch), **self._steered(batch)}

    def _angles(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """|AS| without the direction all prompts share, and IS of the part that no prompt speaks of, in degrees."""
        z, z_eq = (self.whole(each) for each in (features, self.space.remove(features)))
        contrast = [_without(each, self.common) for each in (z, z_eq, self.texts[labels])]
        aside = [_without(each, self.prompts) for each in (z, z_eq)]
        return {"contrast AS_abs": attribute_score(*contrast).abs(), "orthogonal IS": image_score(*aside)}

    def _information(self, features: Tensor, batch: FeatureBatch) -> dict[str, Tensor]:
        """Products of the two auditors' class scores, and squared errors along the contrasts and beside the prompts."""
        moved = features - self.mean
        rows = [self.texts @ each.matrix.to(features) for each in self.halves]
        scores = [moved @ each.T for each in rows]
        null = [moved @ self.space.component(each).T for each in rows]
        z = batch.embeddings.double()
        errors = {
            "spread": z - self.embedding_mean,
            "missed": z - self.full(features),
            "missed by rows": z - self.rows(features),
        }
        found = {name: (error @ self.contrasts).square().sum(1) for name, error in errors.items()}
        beside = {name: _without(errors[name], self.prompts).square().sum(1) for name in ("spread", "missed")}
        found |= {f"harmless {name}": value for name, value in beside.items()}
        return found | {"null scores": (null[0] * null[1]).sum(1), "scores": (scores[0] * scores[1]).sum(1)}

    def _steered(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Whether the target prompt outranks all others after a null step, by the other auditor and by the attacked."""
        features = batch.features.double()
        targets = steering_targets(batch.labels, batch.indices, len(self.texts))
        found = {f"{kind} {budget}": torch.zeros(len(targets)).to(features) for budget in BUDGETS for kind in KINDS}
        for place, attacked in enumerate(self.halves):
            for budget, moved in zip(BUDGETS, self._crafted(place, features, targets), strict=True):
                for kind, judge in (("self", attacked), ("cross", self.halves[1 - place])):
                    named = (normalize(judge(moved), dim=-1) @ self.texts.T).argmax(1) == targets
                    found[f"{kind} {budget}"] += named.to(features) / 2
        return found

    def _crafted(self, place: int, features: Tensor, targets: Tensor) -> list[Tensor]:
        """The features (B, m) after a step of every budget towards the targets' prompts, made on one auditor."""
        text = self.texts[targets]
        gradient = self.space.component(similarity_gradient(features, text, self.halves[place]))
        # δ = k Σ_n g / √(gᵀ Σ_n g): of all null steps that lie k standard deviations away, the one that gains most.
        direction = self.space.component(gradient @ self.covariance)
        variance = (gradient * direction).sum(1, keepdim=True)
        # Where no null component varies, rounding alone is left of the variance, and its root would be any length.
        known = variance > torch.finfo(variance.dtype).eps * gradient.norm(dim=1, keepdim=True) * direction.norm(
            dim=1, keepdim=True
        )
        unit = torch.where(known, direction / variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt(), 0.0)
        length = torch.linalg.vector_norm(features, dim=1)
        climb = self.maximisers[place].maximise
        steps = [k * unit for k in DEVIATIONS] + [climb(features, text, s * length)[0] for s in SHARES]
        return [features + step for step in steps]


def _without(vectors: Tensor, directions: Tensor) -> Tensor:
    """Vectors (..., n) without their part in the span of orthonormal directions (n, k)."""
    return vectors - (vectors @ directions) @ directions.T


def audited_columns(rows: Mapping[str, Any] | pd.DataFrame) -> dict[str, np.ndarray]:
    """Return what every figure by the auditor is averaged from, (N,) by name, from the rows of `analyze_model`."""
    columns = {name: rows[name] for name in sorted(AUDITED)} | {"top1": rows["correct"]}
    for kind in ("", "centred "):
        score = np.asarray(rows[f"{kind}AS/{AUDITOR}"])
        columns |= {f"{kind}AS_neg": np.maximum(-score, 0), f"{kind}AS_abs": np.abs(score)}
        columns[f"{kind}IS"] = rows[f"{kind}IS/{AUDITOR}"]
    if "AS/loop" in rows:
        columns["loop AS_neg"] = np.maximum(-np.asarray(rows["AS/loop"]), 0)
    return {name: np.asarray(values, np.float64) for name, values in columns.items()}


def resampled_figures(columns: Mapping[str, np.ndarray], groups: np.ndarray) -> dict[str, np.ndarray]:
    """Return every figure from columns (N,), then those of images drawn with replacement, (1 + resamples,) by name.

    The draws hang on `groups` alone, so that figures of two models on the same images are paired.
    """
    means = resampled_means(np.stack(list(columns.values()), axis=1), groups=groups).T
    return figures(dict(zip(columns, means, strict=True)))


def summarize(rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return every figure by the auditor with "intervals" (95 %, over classes and images)."""
    found = resampled_figures(audited_columns(rows), rows["label"])
    intervals = {name: np.quantile(value[1:], ENDS).tolist() for name, value in found.items()}
    return {**{name: float(value[0]) for name, value in found.items()}, "intervals": intervals}


def figures(means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every figure from means (...) of the columns, such as those of one resampling of the images."""

    def total(names: tuple[str, ...]) -> np.ndarray:
        signed = [-means[name[1:]] if name.startswith("-") else means[name] for name in names]
        return np.asarray(sum(signed))

    found = {name: total(above) / total(below) for name, (above, below) in RATIOS.items()}
    return found | {name: value for name, value in means.items() if name not in SUMMED}
