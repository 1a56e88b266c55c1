"""Model level: every figure of METHOD 3, 8 and 10 on a split; what two auditors agree on; the head's passport."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.features import FeatureBatch, FittedTranslator, gathered, iterate_features
from singreg.analysis.statistics import ENDS, resampled_means
from singreg.analysis.steering import steering_targets
from singreg.data.embeddings import PassSettings
from singreg.data.splits import ImageSplit
from singreg.functional import attribute_score, image_score
from singreg.losses import contrast_basis
from singreg.metrics import COLUMNS, columns_of, score_columns, summarize_columns
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace, null_share
from singreg.steering import Maximiser, similarity_gradient
from singreg.translator import LinearTranslator, Translator
from singreg.utils import gather_rows, plain

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
Rows = dict[str, np.ndarray]
CENTRED = "centred "  # before the names of the figures of f - Π_n (f - μ), METHOD section 8.4
ROW_FIGURES = ("AS", "IS", "kappa")
INTERVALS = ("AS_neg", "AS_abs", "IS", "kappa")
LOOSE = 1e-3
"""The second tolerance of a head's rank, relative to the largest singular value."""
VISIBLE = 10.0
"""Degrees of IS below which a change is hardly seen in an image (METHOD section 3)."""


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


def analyze_model(
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    texts: Tensor,
    translators: Mapping[str, Translator],
    *,
    mean: Tensor,
    auditor: FittedTranslator | None = None,
    invariance: Invariance = "logits",
    settings: PassSettings | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Measure one classifier on the images of a split in one pass, with all translators. Exact over processes.

    Args:
        mean: (m,) feature mean for the centred removal (METHOD section 8.4).
        auditor: adds "audit", every figure by it and its two halves (METHOD section 8.8); it is one of the translators.

    Shape: embeddings (N, n), texts (C, n) unit rows.

    Returns:
        One row an image ("AS/NAME", "IS/NAME", "kappa/NAME" of each translator, also with "centred " before them), and
        a dict of figures by translator, of the head and of the model.
    """
    unlabelled = int((np.asarray(split.labels) < 0).sum())
    if not len(split) or unlabelled:
        counts = f"it has {len(split)} images, {unlabelled} of them unlabelled"
        raise ValueError(f"split {split.name!r} must hold labelled images to be measured on; {counts}")
    space = NullSpace.from_weight(classifier.weight, invariance=invariance).to(texts.device)
    crossfit = CrossFit(auditor, texts, space) if auditor is not None else None
    columns, middle = [], torch.from_numpy(embeddings.mean(0, dtype=np.float64)).to(texts.device)
    for batch in gathered(iterate_features(classifier, split, embeddings, settings or PassSettings(), "measuring")):
        null = space.component(batch.features)
        removed = {"": batch.features - null, CENTRED: space.remove(batch.features, mean=mean)}
        figures = _image_figures(batch, null, texts) | {"from_mean": (batch.embeddings - middle).square().sum(1)}
        for name, translator in translators.items():
            z, text = translator(batch.features), texts[batch.labels]
            for kind, equivalent in removed.items():
                scores = dict(zip(COLUMNS, score_columns(z, translator(equivalent), text), strict=True))
                figures |= {f"{kind}{figure}/{name}": scores[figure] for figure in ROW_FIGURES}
            figures |= {f"{figure}/{name}": value for figure, value in _quality(z, batch, texts).items()}
        figures |= crossfit.read(batch) if crossfit is not None else {}
        columns.append({name: value.cpu().numpy() for name, value in figures.items()})
    rows = gather_rows(columns, sort_by="index")
    rows["image"] = np.array([split.identifier(int(i)) for i in rows["index"]])
    found = {
        "images": len(rows["index"]),
        "top1": rows["correct"].mean(),
        "null_share": rows["null_share"].mean(),
        "null_energy": rows["null_energy"].sum() / rows["energy"].sum(),
        "vlm_zero_shot": rows["vlm_correct"].mean(),
        "head": head_passport(classifier, space),
        "translators": {n: _translator_figures(t, rows, n) for n, t in translators.items()},
    }
    if crossfit is not None:
        found["audit"] = summarize(rows)
    return pd.DataFrame(rows), plain(found)


def head_passport(classifier: Classifier, space: NullSpace | None = None) -> dict[str, Any]:
    """Return the sizes, ranks, null share of the dimensions, σ_min / σ_max and hash of a head; needs no data.

    By default the null space is that of the logits.
    """
    if space is None:
        space = NullSpace.from_weight(classifier.weight.detach(), allow_empty=True)
    sigma = space.singular_values
    classes, features = classifier.weight.shape
    return {
        "tag": classifier.tag,
        "classes": classes,
        "features": features,
        "rank": space.rank,
        "rank_loose": int((sigma > LOOSE * sigma[0]).sum()),
        "nullity": space.nullity,
        "null_dimensions": space.nullity / features,
        "conditioning": float(sigma[space.rank - 1] / sigma[0]) if space.rank else 0.0,
        "head_hash": classifier.head_hash(),
    }


def _image_figures(batch: FeatureBatch, null: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """The figures of each image (B,) that need no translator."""
    vlm = torch.nn.functional.normalize(batch.embeddings, dim=-1) @ texts.T
    return {
        "index": batch.indices,
        "label": batch.labels,
        "correct": (batch.logits.argmax(1) == batch.labels).double(),
        "vlm_correct": (vlm.argmax(1) == batch.labels).double(),
        "null_share": null_share(batch.features, null).double(),
        "null_energy": null.double().square().sum(1),
        "energy": batch.features.double().square().sum(1),
    }


def _quality(z: Tensor, batch: FeatureBatch, texts: Tensor) -> dict[str, Tensor]:
    """How good each image's translation z (B, n) is: its cosine to the embedding, |T f - z|², zero-shot hit."""
    return {
        "cosine": torch.nn.functional.cosine_similarity(z, batch.embeddings, dim=-1).double(),
        "missed": (z - batch.embeddings).double().square().sum(1),
        "named": ((torch.nn.functional.normalize(z, dim=-1) @ texts.T).argmax(1) == batch.labels).double(),
    }


def _translator_figures(translator: Translator, rows: Rows, name: str) -> dict[str, Any]:
    """One translator's scores and its quality from all images' rows."""
    kept = ([torch.from_numpy(rows[f"{kind}{figure}/{name}"]) for figure in ROW_FIGURES] for kind in ("", CENTRED))
    table, centred = (columns_of(*figures) for figures in kept)
    drawn = resampled_means(table[[COLUMNS.index(key) for key in INTERVALS]].T.numpy(), groups=rows["label"])
    info, spread = translator.info, rows["from_mean"].sum()
    return {
        "overall": summarize_columns(table.sum(1)),
        "centred": summarize_columns(centred.sum(1)),
        "intervals": dict(zip(INTERVALS, np.quantile(drawn[1:], ENDS, axis=0).T.tolist(), strict=True)),
        "cosine": rows[f"cosine/{name}"].mean(),
        "r2": 1 - rows[f"missed/{name}"].sum() / spread if spread > 0 else np.nan,
        "zero_shot": rows[f"named/{name}"].mean(),
        "ridge": info.ridge,
        "fit_images": info.images,
    }


def chance_angle(passport: Mapping[str, Any]) -> float:
    """Return asin √share, the degrees by which losing a random subspace of this size turns an isotropic feature."""
    return math.degrees(math.asin(math.sqrt(passport["null_dimensions"])))


def judge_passport(passport: Mapping[str, Any]) -> str:
    """Say in one sentence whether there is a null space to speak of."""
    if not passport["nullity"]:
        return "no null space: every feature direction moves a logit, nothing to measure"
    if (angle := chance_angle(passport)) < VISIBLE:
        return f"null space too small to see: removing as many random dimensions turns a feature by {angle:.1f}°"
    return "has a null space"


def compare_passports(passports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warn where a null space is missing, too small, or too unlike the others' to compare scores.

    Heads are too different when their chance angles differ by more than can be seen in an image.
    """
    warnings = []
    for p in passports:
        if (verdict := judge_passport(p)) != "has a null space":
            warnings.append(f"{p['tag']} ({p['classes']} classes, {p['features']} features): {verdict}.")
        loose = math.degrees(math.asin(math.sqrt(1 - p["rank_loose"] / p["features"])))
        if loose - chance_angle(p) > VISIBLE:
            warnings.append(
                f"{p['tag']} has {p['rank'] - p['rank_loose']} more directions with singular values below {LOOSE:g} of "
                "the largest: nearly null, they count as row space here; its null space depends on the tolerance."
            )
    usable = sorted((p for p in passports if p["nullity"]), key=chance_angle, reverse=True)
    if usable and chance_angle(usable[0]) - chance_angle(usable[-1]) > VISIBLE:
        large, small = (
            f"{p['tag']} has {p['nullity']} of {p['features']} dimensions in its null space "
            f"({100 * p['null_dimensions']:.0f} %)"
            for p in (usable[0], usable[-1])
        )
        warnings.append(
            f"{large}, {small}: removing that many random dimensions already turns a feature by "
            f"{chance_angle(usable[0]):.0f}° and {chance_angle(usable[-1]):.0f}°, so compare their scores only beside "
            "their chance levels."
        )
    if len({p["classes"] for p in passports}) > 1:
        counts = ", ".join(f"{p['tag']} {p['classes']}" for p in passports)
        warnings.append(
            f"The heads have different numbers of classes ({counts}), so class prompts and ranks are not the same."
        )
    return warnings
