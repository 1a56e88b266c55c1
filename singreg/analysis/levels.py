"""Class, concept and image level: what the model level says of classes, words and images (METHOD section 3)."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch, cached_features
from singreg.analysis.statistics import ENDS, NORMAL, resampled_means
from singreg.classes import imagenet_names, read_list
from singreg.data.embeddings import PassSettings
from singreg.data.splits import UNLABELLED, ImageSplit, TableSplit
from singreg.functional import pairwise_angles, unit_rows
from singreg.metrics import COLUMNS, score_columns
from singreg.models.classifier import Classifier
from singreg.models.vlm import VisionLanguageModel
from singreg.nullspace import NullSpace, null_share
from singreg.translator import Translator
from singreg.utils import all_reduce_sum, plain

CHUNK_ELEMENTS = 2**20  # images x concepts at a time: 4 MiB an array in float32
SUMS = ("before", "after", "AS", "AS²", "kappa")
Order = Literal["strongest", "rises", "falls"]
CLASSES_SHOWN = 5  # with the highest logits
WAYS: tuple[Order, ...] = ("rises", "falls")
MOVED = 5  # concepts shown, each way
GALLERY_CHUNK = 4096  # gallery images at a time
CONCEPTS_FOLDER = Path(__file__).parents[1] / "data/concepts"
IMAGENET = "imagenet"
DEFAULT_TEMPLATE = "an image of {concept}"
# The prompt of each bank's concepts; the paper's own for ImageNet's classes.
BANK_TEMPLATES = {"colours": "an image of something {concept}", "scenes": "an image of a {concept}"}
BANK_TEMPLATES |= {"textures": "an image of something with a {concept} texture", IMAGENET: "an image of a {concept}"}
BANK_TEMPLATES |= {"materials": "an image of something made of {concept}", "parts": "a close-up image of a {concept}"}
LONGEST = 200  # characters; a text tower cuts longer prompts off without a word


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


@dataclass(frozen=True)
class ConceptBank:
    """K concepts in words, and the bank or file each is from ("own" for words)."""

    concepts: tuple[str, ...]
    banks: tuple[str, ...]


def load_concepts(sources: Sequence[str]) -> ConceptBank:
    """Read each concept once from banks, text files (one a line, `#` begins a comment) and concepts in words."""
    entries = [entry for source in sources for entry in _entries(source)]
    bad = [f"{bank}: {c[:40]!r}" for bank, c in entries if len(c) > LONGEST or not any(map(str.isalnum, c))]
    if bad:
        raise ValueError(f"expected concepts of letters, at most {LONGEST} characters each, got {'; '.join(bad[:20])}")
    kept: dict[str, tuple[str, str]] = {}
    for bank, concept in entries:
        kept.setdefault(" ".join(concept.casefold().split()), (concept, bank))
    if not kept:
        raise ValueError(f"no concept in {sources}; banks ({', '.join(sorted(BANK_TEMPLATES))}), files or concepts")
    return ConceptBank(*zip(*kept.values(), strict=True))


def embed_concepts(vlm: VisionLanguageModel, bank: ConceptBank, templates: Sequence[str] | None = None) -> Tensor:
    """Return one unit row a concept (K, n), by `templates` with {concept}; None takes each bank's own."""
    wanted = [tuple(templates or [BANK_TEMPLATES.get(name, DEFAULT_TEMPLATE)]) for name in bank.banks]
    rows: dict[int, Tensor] = {}
    for group in dict.fromkeys(wanted):
        places = [place for place, own in enumerate(wanted) if own == group]
        prompts = [template.replace("{concept}", "{class}") for template in group]
        rows |= zip(places, vlm.embed_classes([bank.concepts[place] for place in places], prompts), strict=True)
    return torch.stack([rows[place] for place in range(len(wanted))])


def _entries(source: str) -> Iterator[tuple[str, str]]:
    """(bank, concept) of every entry of a bank, a file or a concept in words."""
    path = Path(source).expanduser()
    path = path if path.is_file() else CONCEPTS_FOLDER / f"{source}.txt"  # a user's file goes before a built-in name
    if source != IMAGENET and path.is_file():
        yield from ((path.stem, concept) for concept in read_list(path))
    elif source == IMAGENET:
        yield from ((source, concept) for concept in imagenet_names())
    elif re.fullmatch(r".*(\.\w{2,4}|[/\\].*)", source):
        raise FileNotFoundError(f"there is no concept file {source}")
    else:
        yield "own", source.strip()


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
