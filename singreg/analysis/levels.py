"""Class and concept level: what the model level says of single classes and words (METHOD section 3)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.statistics import ENDS, NORMAL, resampled_means
from singreg.functional import pairwise_angles, unit_rows
from singreg.nullspace import NullSpace
from singreg.translator import Translator
from singreg.utils import all_reduce_sum, plain

CHUNK_ELEMENTS = 2**20  # images x concepts at a time: 4 MiB an array in float32
SUMS = ("before", "after", "AS", "AS²", "kappa")
Order = Literal["strongest", "rises", "falls"]


def analyze_classes(rows: pd.DataFrame, class_names: Sequence[str]) -> dict[str, Any]:
    """Measure AS and IS of every class by the auditor, from the rows of `analyze_model`.

    Returns:
        classes, the leakiest (AS⁻) first, with means and intervals by figure (None for a single image); intervals
        resample a class's images. The names of empty classes.
    """
    score = rows["AS/auditor"].astype(float)
    figures = {"AS": score, "AS_neg": (-score).clip(lower=0), "AS_abs": score.abs()}
    figures |= {name: rows[f"{name}/auditor"] for name in ("IS", "kappa")}
    table = pd.DataFrame({**figures, "accuracy": rows["correct"]}, dtype=float)
    classes: list[dict[str, Any]] = []
    for label, images in table.groupby(rows["label"].astype(int)):
        intervals: dict[str, Any] = dict.fromkeys(table.columns)
        if len(images) > 1:
            drawn = resampled_means(images.to_numpy(), seed=int(str(label)))
            intervals = dict(zip(table.columns, np.quantile(drawn[1:], ENDS, axis=0).T, strict=True))
        named = {"label": label, "name": class_names[int(str(label))], "images": len(images)}
        classes.append({**named, "means": images.mean().to_dict(), "intervals": intervals})
    classes.sort(key=lambda each: (-each["means"]["AS_neg"], each["label"]))
    empty = [name for label, name in enumerate(class_names) if not (rows["label"] == label).any()]
    return {"classes": plain(classes), "empty": empty}


def joint_distribution(rows: pd.DataFrame, *, translator: str = "auditor") -> dict[str, Any]:
    """Describe the joint distribution of IS and AS by one translator (paper figure 4).

    Returns:
        mean of (IS, AS) in degrees; ratio, mean IS / mean |AS|; and the confidence ellipses at 1 and 2 sigma, with full
        width and height, and the tilt of the width in degrees.
    """
    cloud = rows[[f"IS/{translator}", f"AS/{translator}"]].to_numpy(np.float64)
    mean, absolute, ellipses = cloud.mean(0), np.abs(cloud[:, 1]).mean(), []
    if len(cloud) > 2:
        values, vectors = np.linalg.eigh(np.cov(cloud.T))
        height, width = 2 * np.sqrt(np.maximum(values, 0))
        tilt = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
        ellipses = [{"sigma": s, "width": s * width, "height": s * height, "tilt": tilt} for s in (1.0, 2.0)]
    ratio = mean[0] / absolute if absolute > 0 else None
    return plain({"mean": mean, "ratio": ratio, "ellipses": ellipses})


@torch.no_grad()
def analyze_concepts(
    batches: Iterable[FeatureBatch],
    concepts: Sequence[str],
    texts: Tensor,
    *,
    null_space: NullSpace,
    translator: Translator,
) -> dict[str, Any]:
    """Measure the angle of every concept to every image before (T f) and after (T f~) the removal.

    Angles in float32, right to 1e-4 degrees; sums in float64. Exact over processes.

    Shape: texts (K, n), one row a concept in the translator's space.

    Returns:
        images, and overall (K,) concept, before, after, AS with AS_low and AS_high (normal 95 % interval) and kappa.
    """
    texts, rows = unit_rows(texts.detach().float()), max(1, CHUNK_ELEMENTS // len(texts))
    overall = torch.zeros(len(SUMS), len(texts), dtype=torch.float64, device=texts.device)
    count = overall.new_zeros(())
    for batch in batches:
        for features in torch.split(batch.features, rows):
            z, equivalent = unit_rows(translator(features)), unit_rows(translator(null_space.remove(features)))
            (before, cosines), (after, _) = pairwise_angles(z, texts), pairwise_angles(equivalent, texts)
            # κ: the cosine between the way from z to z~ and that to the text, both at right angles to z.
            travel = unit_rows(equivalent - z * (z * equivalent).sum(1, keepdim=True))
            kappa = travel @ texts.T / (1 - cosines.square()).clamp_min(1e-12).sqrt()
            before, after = before.double(), after.double()
            score = before - after
            columns = before, after, score, score.square(), kappa.clamp(-1, 1).double()
            overall += torch.stack([column.sum(0) for column in columns])
            count += len(features)
    overall, count = all_reduce_sum(overall), all_reduce_sum(count)
    means = dict(zip(SUMS, overall / count, strict=True))
    half = NORMAL * (means.pop("AS²") - means["AS"].square()).clamp_min(0).sqrt() / count.sqrt()
    means |= {"AS_low": means["AS"] - half, "AS_high": means["AS"] + half}
    return {"images": int(count), "overall": plain({"concept": list(concepts), **means})}


def select_concepts(columns: Mapping[str, Any], order: Order, count: int) -> pd.DataFrame:
    """Return the `count` concepts that moved most by AS: of all, of those that came closer, or that went away."""
    table = pd.DataFrame(columns)
    key = {"strongest": -table["AS"].abs(), "rises": -table["AS"], "falls": table["AS"]}[order]
    key = key.sort_values(kind="stable")
    places = key.index if order == "strongest" else key[key < 0].index
    return table.loc[places[:count]].reset_index(drop=True)
