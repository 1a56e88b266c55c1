"""Image level: what a classifier decides of an image, and what its null space holds of it (METHOD section 3)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from singreg.analysis.features import cached_features
from singreg.analysis.levels import Order, select_concepts
from singreg.data.embeddings import PassSettings
from singreg.data.splits import UNLABELLED, ImageSplit, TableSplit
from singreg.functional import pairwise_angles, unit_rows
from singreg.metrics import COLUMNS, score_columns
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace, null_share
from singreg.translator import Translator
from singreg.utils import plain

CLASSES_SHOWN = 5  # with the highest logits
WAYS: tuple[Order, ...] = ("rises", "falls")
MOVED = 5  # concepts shown, each way
GALLERY_CHUNK = 4096  # gallery images at a time


def open_images(files: Sequence[str] | str, class_names: Sequence[str], label: str | None = None) -> ImageSplit:
    """Return image files as a split of unlabelled images, or of images of the class `label`."""
    if label is not None and label not in class_names:
        raise ValueError(f"label: expected one of {len(class_names)} classes ({class_names[0]}, ...), got {label!r}")
    paths = [files] if isinstance(files, str) else files
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise FileNotFoundError(f"image: there is no file {missing[0]}")
    labels = [UNLABELLED if label is None else list(class_names).index(label)] * len(paths)
    split = TableSplit.from_files("image", paths, class_names, labels)
    if split.examine(range(len(paths))):
        row, why = next(iter(split.bad.items()))
        raise ValueError(f"image: {paths[row]} cannot be read ({why})")
    return split


@torch.no_grad()
def explain_images(
    classifier: Classifier,
    split: ImageSplit,
    chosen: np.ndarray,
    embeddings: np.ndarray,
    texts: Tensor,
    concepts: Sequence[str],
    words: Tensor,
    *,
    null_space: NullSpace,
    translator: Translator,
    settings: PassSettings,
    gallery: tuple[ImageSplit, np.ndarray, int] | None = None,
) -> list[dict[str, Any]]:
    """Read each chosen image of a split (N) by its label's prompt, or where it has none by that of the predicted class.

    Shape: embeddings (N, n), texts (C, n) of the classes, words (K, n) of the concepts.

    Args:
        chosen: places of the images in the split.
        gallery: a split, its embeddings (G, n) and how many nearest of its images to name.

    Returns:
        A dict an image: what and where it is, its scores, the cosine of T f to its own embedding, the largest change of
        a logit, the concepts that come closer (rises) and move away (falls), "logits" of the first classes before and
        after, and "near" in the gallery to T f (before) and T f~ (after).
    """
    features = torch.from_numpy(cached_features(classifier, split, settings)[chosen]).to(texts.device)
    sides = {"before": features, "after": null_space.remove(features)}
    logits = {side: classifier.logits(each).float().cpu() for side, each in sides.items()}
    given, predicted = torch.from_numpy(split.labels[chosen]), logits["before"].argmax(1)
    labels = torch.where(given == UNLABELLED, predicted, given)
    z, equivalent = (translator(each) for each in sides.values())
    scores = dict(zip(COLUMNS, score_columns(z, equivalent, texts[labels.to(texts.device)]), strict=True))
    own = torch.from_numpy(embeddings[chosen]).to(z)
    columns = {
        "label": labels,
        "attribute_score": scores["AS"],
        "image_score": scores["IS"],
        "kappa": scores["kappa"],
        "null_share": null_share(features, features - sides["after"]),
        "logit_change": (logits["after"] - logits["before"]).abs().amax(1),
        "cosine": torch.nn.functional.cosine_similarity(z, own, dim=1),
    }
    rows = pd.DataFrame({"index": chosen, **{name: column.cpu().numpy() for name, column in columns.items()}})
    exact = features.double()
    moves = _moves(translator(exact), translator(null_space.remove(exact)), concepts, words)
    near = (
        {side: nearest_images(translator(each.double()), *gallery) for side, each in sides.items()} if gallery else {}
    )
    images, names = [], split.class_names
    for place, row in enumerate(rows.to_dict("records")):
        top = logits["before"][place].topk(min(CLASSES_SHOWN, len(names))).indices.tolist()
        shown = top if row["label"] in top else [*top[:-1], row["label"]]
        image = {"image": split.identifier(row["index"]), "class_name": names[row["label"]]}
        image |= {"predicted": names[predicted[place]], **row, **moves[place]}
        image["logits"] = {
            "class": [names[at] for at in shown],
            **{s: each[place, shown] for s, each in logits.items()},
        }
        images.append(plain(image | {"near": {side: found[place] for side, found in near.items()}}))
    return images


def _moves(z: Tensor, equivalent: Tensor, concepts: Sequence[str], words: Tensor) -> list[dict[Any, Any]]:
    """The concepts that come closer to each image and those that go away, the farthest first; z and z~ (B, n)."""
    target, found = unit_rows(words.double()), []
    angles = (pairwise_angles(unit_rows(each), target)[0].cpu().numpy() for each in (z, equivalent))
    for before, after in zip(*angles, strict=True):
        moves = {"concept": concepts, "before": before, "after": after, "AS": before - after}
        found.append({order: select_concepts(moves, order, MOVED).to_dict("records") for order in WAYS})
    return found


@torch.no_grad()
def nearest_images(queries: Tensor, gallery: ImageSplit, embeddings: np.ndarray, k: int) -> list[list[dict[str, Any]]]:
    """Find the k gallery images at the smallest angles to translated features, equal ones in the gallery's order.

    Shape: queries (Q, n), embeddings (G, n) of the gallery.
    """
    unit, angles = unit_rows(queries.double().cpu()), []
    for start in range(0, len(gallery), GALLERY_CHUNK):
        chunk = torch.from_numpy(np.asarray(embeddings[start : start + GALLERY_CHUNK], dtype=np.float64))
        angles.append(pairwise_angles(unit, unit_rows(chunk))[0])
    nearest, places = torch.cat(angles, dim=1).sort(dim=1, stable=True)
    return [
        [{"index": at, "image": gallery.identifier(at), "angle": angle} for at, angle in zip(row, degrees, strict=True)]
        for row, degrees in zip(places[:, :k].tolist(), nearest[:, :k].tolist(), strict=True)
    ]
