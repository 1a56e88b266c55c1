"""Image level: the images that lose most with the null component, which concepts moved, and their nearest images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.concepts import EquivalentPairs
from singreg.analysis.features import FeatureBatch
from singreg.data.datasets import ImageSplit
from singreg.functional import attribute_score, image_score, pairwise_angles, unit_rows
from singreg.nullspace import NullSpace
from singreg.translator import Translator
from singreg.utils import all_reduce_sum, gather_rows

Rows = dict[str, np.ndarray]
CHUNK = 4096  # gallery images at a time
MOVED = 5  # concepts shown of an image, each way


@torch.no_grad()
def analyze_images(
    batches: Iterable[FeatureBatch],
    split: ImageSplit,
    texts: Tensor,
    concepts: Sequence[str],
    concept_texts: Tensor,
    *,
    null_space: NullSpace,
    translator: Translator,
    class_names: Sequence[str],
    count: int = 12,
) -> tuple[dict[str, Any], np.ndarray]:
    """Find the `count` worst images of a split and, for each, the concepts whose angle rose and fell most.

    Worst is the most negative AS of the true class. Exact over processes.

    Shape: texts (C, n) class prompts, concept_texts (K, n).

    Returns:
        Of each worst image its names, scores and the concepts that come closer (rises) and move away (falls); and the
        features (count, m) of the worst, for `nearest_images`.
    """
    pairs = EquivalentPairs(translator, null_space)
    worst: Rows | None = None
    counts = torch.zeros(2, dtype=torch.float64, device=texts.device)
    for batch in batches:
        known = batch.labels >= 0
        counts += torch.stack([known.sum(), (~known).sum()])
        features, labels = batch.features[known], batch.labels[known]
        z, equivalent = pairs(features)
        columns = {
            "AS": attribute_score(z, equivalent, texts[labels].to(z)).double(),
            "IS": image_score(z, equivalent).double(),
            "index": batch.indices[known.to(batch.indices.device)],
            "label": labels,
            "predicted": batch.logits[known].argmax(1),
            "features": features,
        }
        new = {name: values.cpu().numpy() for name, values in columns.items()}
        joined = new if worst is None else {name: np.concatenate([worst[name], new[name]]) for name in new}
        worst = _worst(joined, count)
    images, unlabelled = (int(value) for value in all_reduce_sum(counts))
    kept = _worst(gather_rows([] if worst is None else [worst]), count)
    moves = _moves(torch.from_numpy(kept["features"]).to(texts.device), pairs, concepts, concept_texts)
    found = []
    for place, index in enumerate(kept["index"].tolist()):
        label, predicted = int(kept["label"][place]), int(kept["predicted"][place])
        named = {"label": label, "class_name": class_names[label], "predicted": class_names[predicted]}
        scores = {"attribute_score": float(kept["AS"][place]), "image_score": float(kept["IS"][place])}
        found.append({"index": index, "image": split.identifier(index), **named, **scores, **moves[place]})
    facts = {"by": "AS", "centred": False, "images": images, "unlabelled": unlabelled}
    return {**facts, "worst": found}, kept["features"]


def _worst(rows: Rows, count: int) -> Rows:
    """The worst rows; equal scores go by the image's number, so the order is the same on any number of processes."""
    kept = np.lexsort((rows["index"], rows["AS"]))[:count]
    return {name: values[kept] for name, values in rows.items()}


def _moves(
    features: Tensor, pairs: EquivalentPairs, concepts: Sequence[str], texts: Tensor
) -> list[dict[str, list[dict[str, Any]]]]:
    """Of every image's features (k, m): which concepts come closer and which move away, in float64."""
    target = unit_rows(texts.double())
    before, after = (pairwise_angles(unit_rows(z.double()), target)[0].cpu().numpy() for z in pairs(features.double()))
    moves = []
    for first, last in zip(before, after, strict=True):
        order = np.argsort(first - last, kind="stable")
        shifts = [
            {"concept": concepts[k], "before": float(b), "after": float(a), "score": float(b - a)}
            for k, b, a in zip(order, first[order], last[order], strict=True)
        ]
        rises = [shift for shift in shifts[::-1][:MOVED] if shift["score"] > 0]
        moves.append({"rises": rises, "falls": [shift for shift in shifts[:MOVED] if shift["score"] < 0]})
    return moves


def nearest_images(
    features: Tensor,
    indices: Sequence[int],
    split: ImageSplit,
    gallery: ImageSplit,
    embeddings: np.ndarray,
    *,
    pairs: EquivalentPairs,
    k: int = 4,
    steered: Tensor,
) -> list[dict[str, Any]]:
    """Find the k gallery images nearest to T(f), to T(f~) and to T of the steered features, in float64.

    Copies of an image in the gallery are left out of its own neighbours, by content. Equal angles go by the gallery's
    order.

    Args:
        indices: of the images in `split` that the features are of.

    Shape: features and steered (Q, m), embeddings (G, n) of the gallery.

    Raises:
        ValueError: the gallery has fewer than k other images.
    """
    digests = split.digests[np.asarray(indices, dtype=np.int64)]
    queries = *pairs(features.double()), pairs(steered.double())[0]
    before, after, moved = (_nearest(z, k, digests, gallery, embeddings) for z in queries)
    return [
        {"index": index, "image": split.identifier(index), "before": first, "after": last, "steered": further}
        for index, first, last, further in zip(indices, before, after, moved, strict=True)
    ]


@torch.no_grad()
def _nearest(
    queries: Tensor, k: int, exclude: np.ndarray, gallery: ImageSplit, embeddings: np.ndarray
) -> list[list[dict[str, Any]]]:
    """The k gallery images at the smallest angle to queries (Q, n), without those of a digest in exclude (Q, 32)."""
    own = max((int((gallery.digests == row).all(-1).sum()) for row in exclude), default=0)
    if not 1 <= k <= len(gallery) - own:
        without = f", {own} of them the image itself" if own else ""
        raise ValueError(f"{k} images were asked of a gallery which has {len(gallery)}{without}: ask for fewer")
    unit = unit_rows(queries.double().cpu())
    best = torch.full((len(unit), 0), torch.inf, dtype=torch.float64)
    places = torch.zeros(len(unit), 0, dtype=torch.int64)
    for start in range(0, len(gallery), CHUNK):
        stop = min(start + CHUNK, len(gallery))
        rows = unit_rows(torch.from_numpy(np.asarray(embeddings[start:stop], dtype=np.float64)))
        angles, _ = pairwise_angles(unit, rows)
        same = (gallery.digests[None, start:stop] == exclude[:, None]).all(-1)
        angles[torch.from_numpy(same)] = torch.inf
        seen = torch.cat([places, torch.arange(start, stop).expand(len(unit), -1)], dim=1)
        joined, order = torch.cat([best, angles], dim=1).sort(dim=1, stable=True)
        best, places = joined[:, :k], seen.gather(1, order[:, :k])
    return [
        [{"index": at, "image": gallery.identifier(at), "angle": angle} for at, angle in zip(row, degrees, strict=True)]
        for row, degrees in zip(places.tolist(), best.tolist(), strict=True)
    ]
