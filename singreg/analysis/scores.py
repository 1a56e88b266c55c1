"""Model level: every figure of METHOD sections 3 and 8 on a split, by several translators; and the head's passport."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from singreg.analysis.crossfit import CrossFit, summarize
from singreg.analysis.features import FeatureBatch, FittedTranslator, gathered, iterate_features
from singreg.analysis.statistics import ENDS, resampled_means
from singreg.data.embeddings import PassSettings
from singreg.data.splits import ImageSplit
from singreg.metrics import COLUMNS, columns_of, score_columns, summarize_columns
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace, null_share
from singreg.translator import Translator
from singreg.utils import gather_rows, plain

Rows = dict[str, np.ndarray]
CENTRED = "centred "  # before the names of the figures of f - Π_n (f - μ), METHOD section 8.4
ROW_FIGURES = ("AS", "IS", "kappa")
INTERVALS = ("AS_neg", "AS_abs", "IS", "kappa")
LOOSE = 1e-3
"""The second tolerance of a head's rank, relative to the largest singular value."""
VISIBLE = 10.0
"""Degrees of IS below which a change is hardly seen in an image (METHOD section 3)."""
ILL_CONDITIONED = 1e3
"""cond(W) above which projections in float32 are not trusted (METHOD section 6)."""
Passport = Mapping[str, Any]


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


def chance_angle(passport: Passport) -> float:
    """Return asin √share, the degrees by which losing a random subspace of this size turns an isotropic feature."""
    return math.degrees(math.asin(math.sqrt(passport["null_dimensions"])))


def judge_passport(passport: Passport) -> str:
    """Say in one sentence whether there is a null space to speak of."""
    if not passport["nullity"]:
        return "no null space: every feature direction moves a logit, nothing to measure"
    if (angle := chance_angle(passport)) < VISIBLE:
        return f"null space too small to see: removing as many random dimensions turns a feature by {angle:.1f}°"
    return "has a null space"


def compare_passports(passports: Sequence[Passport]) -> list[str]:
    """Warn where a null space is missing, too small, ill-conditioned, or too unlike the others' to compare scores.

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
        if p["conditioning"] < 1 / ILL_CONDITIONED:
            cond = 1 / p["conditioning"] if p["conditioning"] else math.inf
            said = "a projection in float32 is not exact enough, use float64."
            warnings.append(f"{p['tag']}: σ_max/σ_min is {cond:.1e}; {said}")
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
