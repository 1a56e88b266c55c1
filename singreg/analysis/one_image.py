"""Single images: what a classifier decides and what its null space holds of them, before and after the removal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from singreg.analysis.features import cached_features
from singreg.analysis.levels import describe_images, nearest_images
from singreg.data.datasets import ImageSplit
from singreg.data.embeddings import PassSettings
from singreg.data.splits import UNLABELLED, TableSplit
from singreg.metrics import COLUMNS, score_columns
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace, null_share
from singreg.translator import Translator
from singreg.utils import plain

CLASSES_SHOWN = 5  # with the highest logits


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
    embeddings: np.ndarray,
    texts: Tensor,
    concepts: Sequence[str],
    words: Tensor,
    *,
    null_space: NullSpace,
    translator: Translator,
    gallery: tuple[ImageSplit, np.ndarray, int] | None = None,
    settings: PassSettings | None = None,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Read each image of a split (N) by its label's prompt, or where it has none by that of the predicted class.

    Shape: embeddings (N, n), texts (C, n) of the classes, words (K, n) of the concepts.

    Args:
        gallery: a split, its embeddings (G, n) and how many nearest of its images to name.

    Returns:
        A row an image, with its scores, the cosine of T f to the image's own embedding and the largest change of a
        logit; and a dict an image, with the row, the concepts that moved most (`describe_images`), "logits" of the
        first classes before and after, and "near" in the gallery to T f (before) and T f~ (after).
    """
    stored = cached_features(classifier, split, settings or PassSettings())
    features = torch.from_numpy(np.array(stored)).to(texts.device)
    sides = {"before": features, "after": null_space.remove(features)}
    logits = {side: classifier.logits(each).float().cpu() for side, each in sides.items()}
    given = torch.from_numpy(split.labels)
    labels = torch.where(given == UNLABELLED, logits["before"].argmax(1), given)
    z, equivalent = (translator(each) for each in sides.values())
    scores = dict(zip(COLUMNS, score_columns(z, equivalent, texts[labels.to(texts.device)]), strict=True))
    own = torch.from_numpy(np.array(embeddings)).to(z)
    columns = {
        "label": labels,
        "attribute_score": scores["AS"],
        "image_score": scores["IS"],
        "kappa": scores["kappa"],
        "null_share": null_share(features, features - sides["after"]),
        "logit_change": (logits["after"] - logits["before"]).abs().amax(1),
        "cosine": torch.nn.functional.cosine_similarity(z, own, dim=1),
    }
    rows = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    rows.insert(0, "index", range(len(split)))
    rows.insert(1, "image", [split.identifier(place) for place in range(len(split))])
    reader: Any = {"null_space": null_space, "translator": translator}
    images = describe_images(classifier, features, rows, split.class_names, concepts, words, **reader)
    for place, image in enumerate(images):
        top = logits["before"][place].topk(min(CLASSES_SHOWN, len(split.class_names))).indices.tolist()
        shown = top if int(labels[place]) in top else [*top[:-1], int(labels[place])]
        names = [split.class_names[row] for row in shown]
        image["logits"] = {"class": names, **{side: each[place, shown] for side, each in logits.items()}}
        image["near"] = {}
    if gallery is not None:
        for side, each in sides.items():
            for image, near in zip(images, nearest_images(translator(each.double()), *gallery), strict=True):
                image["near"][side] = near
    return rows, plain(images)
