"""Image level: the images that lose most with the null component, which concepts moved, and their nearest images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

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

By = Literal["AS", "IS"]
Rows = dict[str, np.ndarray]
CHUNK = 4096  # gallery images at a time


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
    mean: Tensor | None = None,
    by: By = "AS",
    count: int = 12,
    moved: int = 5,
) -> tuple[dict[str, Any], np.ndarray]:
    """Find the `count` worst images of a split and, for each, the `moved` concepts whose angle rose and fell most.

    Worst is the most negative AS of the true class (what the null held of it), or with by="IS" the largest
    displacement. One pass with memory for `count` images; concepts are measured on those only, in float64. Exact over
    processes.

    Args:
        batches: from `iterate_features` over `split`.
        mean: feature mean for the centred removal; None for the paper's.

    Shape: texts (C, n) class prompts, concept_texts (K, n), mean (m,). Angles in degrees.

    Returns:
        by, centred, images (labelled ones searched), unlabelled, and worst: of each image index, image (its name),
        label, class_name, predicted, attribute_score, image_score, and the concepts that come closer (rises) and move
        away (falls); and the features (count, m) of the worst, for `nearest_images`.

    Raises:
        ValueError: no labelled image, a count below 1, an unknown `by`, or texts that do not fit names or translator.
    """
    for rows, names in ((texts, class_names), (concept_texts, concepts)):
        if rows.shape != (expected := (len(names), translator.target_dim)):
            raise ValueError(f"expected texts {expected}, got {tuple(rows.shape)}")
    if by not in ("AS", "IS") or count < 1:
        raise ValueError(f'by must be "AS" or "IS" and count at least 1, got {by!r} and {count}')
    pairs = EquivalentPairs(translator, null_space, mean=mean)
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
        worst = _worst(joined, by, count)
    images, unlabelled = (int(value) for value in all_reduce_sum(counts))
    if not images:
        raise ValueError(
            f"split {split.name!r} has no labelled image ({unlabelled} without a label): none can be worst"
        )
    kept = _worst(gather_rows([] if worst is None else [worst]), by, count)
    moves = _moves(torch.from_numpy(kept["features"]).to(texts.device), pairs, concepts, concept_texts, moved)
    found = [
        {
            "index": int(index),
            "image": split.identifier(int(index)),
            "label": int(kept["label"][place]),
            "class_name": class_names[int(kept["label"][place])],
            "predicted": class_names[int(kept["predicted"][place])],
            "attribute_score": float(kept["AS"][place]),
            "image_score": float(kept["IS"][place]),
            **moves[place],
        }
        for place, index in enumerate(kept["index"])
    ]
    facts = {"by": by, "centred": mean is not None, "images": images, "unlabelled": unlabelled}
    return {**facts, "worst": found}, kept["features"]


def _worst(rows: Rows, by: By, count: int) -> Rows:
    """The worst rows; equal scores go by the image's number, so the order is the same on any number of processes."""
    kept = np.lexsort((rows["index"], rows["AS"] if by == "AS" else -rows["IS"]))[:count]
    return {name: values[kept] for name, values in rows.items()}


def _moves(
    features: Tensor, pairs: EquivalentPairs, concepts: Sequence[str], texts: Tensor, moved: int
) -> list[dict[str, list[dict[str, Any]]]]:
    """Of every image's features (k, m): which concepts come closer and which move away, in float64."""
    target = unit_rows(texts.double())
    before, after = (pairwise_angles(unit_rows(z.double()), target)[0].cpu().numpy() for z in pairs(features.double()))
    moves = []
    for first, last in zip(before, after, strict=True):
        order = np.argsort(first - last, kind="stable")
        shifts = [
            {
                "concept": concepts[k],
                "before": float(first[k]),
                "after": float(last[k]),
                "score": float(first[k] - last[k]),
            }
            for k in order
        ]
        rises = [shift for shift in shifts[::-1][:moved] if shift["score"] > 0]
        moves.append({"rises": rises, "falls": [shift for shift in shifts[:moved] if shift["score"] < 0]})
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
    steered: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Find the k gallery images nearest to T(f), to T(f~) and, when given, to T of the steered features.

    Copies of an image in the gallery are left out of its own neighbours, by content. Angles in degrees, in float64;
    equal ones go by the gallery's order. The gallery's embeddings are read in chunks.

    Args:
        indices: of the images in `split` that the features are of.

    Shape: features and steered (Q, m), embeddings (G, n) of the gallery.

    Returns:
        Of every image index, image (its name) and before, after, steered (or None): index, image and angle, nearest
        first.

    Raises:
        ValueError: the gallery has fewer than k other images, or shapes that do not fit.
    """
    if len(features) != len(indices) or (steered is not None and steered.shape != features.shape):
        given = "" if steered is None else f" and {tuple(steered.shape)}"
        raise ValueError(
            f"{len(indices)} images need features ({len(indices)}, m) and steered ones of the same shape, got "
            f"{tuple(features.shape)}{given}"
        )
    places = np.asarray(indices, dtype=np.int64)
    digests = split.digests[places]
    before, after = (_nearest(z, k, digests, gallery, embeddings) for z in pairs(features.double()))
    moved: Sequence[list[dict[str, Any]] | None] = [None] * len(places)
    if steered is not None:
        moved = _nearest(pairs(steered.double())[0], k, digests, gallery, embeddings)
    return [
        {"index": index, "image": split.identifier(index), "before": first, "after": last, "steered": further}
        for index, first, last, further in zip(places.tolist(), before, after, moved, strict=True)
    ]


@torch.no_grad()
def _nearest(
    queries: Tensor, k: int, exclude: np.ndarray, gallery: ImageSplit, embeddings: np.ndarray
) -> list[list[dict[str, Any]]]:
    """The k gallery images at the smallest angle to queries (Q, n), without those of a digest in exclude (Q, 32)."""
    if embeddings.shape != (len(gallery), queries.shape[1]):
        expected = (len(gallery), queries.shape[1])
        raise ValueError(f"expected embeddings {expected} of the gallery {gallery.name!r}, got {embeddings.shape}")
    own = max((int((gallery.digests == row).all(-1).sum()) for row in exclude), default=0)
    if not 1 <= k <= len(gallery) - own:
        without = f", {own} of them the image itself" if own else ""
        raise ValueError(
            f"{k} nearest images were asked of the gallery {gallery.name!r}, which has {len(gallery)}{without}: "
            "ask for fewer (at least 1), or give a larger gallery"
        )
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
