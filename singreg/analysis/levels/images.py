"""Image level: the pictures that lose most when the null component goes, and which concepts moved in each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.levels.concept_results import ConceptShift
from singreg.analysis.levels.image_results import By, ImageMeasurement, WorstImage
from singreg.analysis.levels.pairs import EquivalentPairs
from singreg.analysis.results import Rows
from singreg.data.datasets import ImageSplit
from singreg.functional import attribute_score, image_score, pairwise_angles, unit_rows
from singreg.nullspace import NullSpace
from singreg.translator import Translator
from singreg.utils import all_reduce_sum, gather_rows


class _Worst:
    """The `count` worst pictures so far, with their features: memory does not grow with the pictures seen."""

    def __init__(self, count: int, by: By, width: int) -> None:
        self.count, self.by = count, by
        self.rows: Rows = {name: np.zeros(0) for name in ("AS", "IS")}
        self.rows |= {name: np.zeros(0, np.int64) for name in ("index", "label", "predicted")}
        self.rows["features"] = np.zeros((0, width), np.float32)

    def add(self, rows: Rows) -> None:
        """Keep the worst of these and of those kept; equal scores go by the picture's number, so the order is the same anywhere."""
        joined = {name: np.concatenate([self.rows[name], rows[name]]) for name in self.rows}
        key = joined["AS"] if self.by == "AS" else -joined["IS"]
        kept = np.lexsort((joined["index"], key))[: self.count]
        self.rows = {name: values[kept] for name, values in joined.items()}

    def gather(self) -> Rows:
        """The worst of all processes."""
        found = gather_rows([self.rows])
        whole = _Worst(self.count, self.by, self.rows["features"].shape[1])
        whole.add(found)
        return whole.rows


@torch.no_grad()
def analyze_images(
    batches: Iterable[FeatureBatch],
    part: ImageSplit,
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
) -> ImageMeasurement:
    """The `count` worst pictures of a part and, for each, the `moved` concepts whose angle rose and fell most.

    Worst is the most negative AS of the true class (what the null held of it), or with by="IS" the largest displacement. One
    pass with memory for `count` pictures; concepts are measured on those only, in float64. Exact over processes. Fewer
    pictures than `count` are all returned.

    Shapes: texts (C, n) class prompts, concept_texts (K, n), mean (m,) for the centred removal; angles in degrees. `batches`
    come from `iterate_features` over `part`.

    Raises:
        ValueError: no labelled picture, a count below 1, an unknown `by`, or texts that do not fit names or translator.
    """
    _check(texts, class_names, concept_texts, concepts, translator, by, count, moved)
    pairs = EquivalentPairs(translator, null_space, mean=mean)
    worst = _Worst(count, by, translator.feature_dim)
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
        worst.add({name: values.cpu().numpy() for name, values in columns.items()})
    images, unlabelled = (int(value) for value in all_reduce_sum(counts))
    if not images:
        raise ValueError(f"part {part.name!r} has no labelled picture ({unlabelled} without a label), so none can be the worst")
    rows = worst.gather()
    moves = _moves(torch.from_numpy(rows["features"]).to(texts.device), pairs, concepts, concept_texts, moved)
    found = tuple(_worst_image(rows, place, part, class_names, *shifts) for place, shifts in enumerate(moves))
    return ImageMeasurement(by, pairs.centred, images, unlabelled, found, rows["features"])


def _check(
    texts: Tensor, class_names: Sequence[str], concept_texts: Tensor, concepts: Sequence[str], translator: Translator,
    by: str, count: int, moved: int,
) -> None:  # fmt: skip
    problems = []
    for kind, rows, names in (("texts", texts, class_names), ("concept_texts", concept_texts, concepts)):
        if rows.shape != (len(names), translator.target_dim):
            problems.append(f"expected {kind} ({len(names)}, {translator.target_dim}), got {tuple(rows.shape)}")
    if by not in ("AS", "IS"):
        problems.append(f'by must be "AS" (most negative) or "IS" (largest), got {by!r}')
    if count < 1 or moved < 0:
        problems.append(f"count must be at least 1 and moved at least 0, got {count} and {moved}")
    if problems:
        raise ValueError("; ".join(problems))


def _moves(
    features: Tensor, pairs: EquivalentPairs, concepts: Sequence[str], texts: Tensor, moved: int
) -> list[tuple[tuple[ConceptShift, ...], tuple[ConceptShift, ...]]]:
    """(rises, falls) of every picture, features (k, m), in float64."""
    target = unit_rows(texts.double())
    before, after = (pairwise_angles(unit_rows(z.double()), target)[0].cpu().numpy() for z in pairs(features.double()))
    moves = []
    for first, last in zip(before, after, strict=True):
        score = first - last
        order = np.argsort(score, kind="stable")

        def shift(place: int, first: np.ndarray = first, last: np.ndarray = last, score: np.ndarray = score) -> ConceptShift:
            return ConceptShift(concepts[place], float(first[place]), float(last[place]), float(score[place]))

        rises = tuple(shift(int(place)) for place in order[::-1][:moved] if score[place] > 0)
        falls = tuple(shift(int(place)) for place in order[:moved] if score[place] < 0)
        moves.append((rises, falls))
    return moves


def _worst_image(
    rows: Rows, place: int, part: ImageSplit, class_names: Sequence[str],
    rises: tuple[ConceptShift, ...], falls: tuple[ConceptShift, ...],
) -> WorstImage:  # fmt: skip
    index, label = int(rows["index"][place]), int(rows["label"][place])
    return WorstImage(
        index=index,
        image=part.identifier(index),
        label=label,
        class_name=class_names[label],
        predicted=class_names[int(rows["predicted"][place])],
        attribute_score=float(rows["AS"][place]),
        image_score=float(rows["IS"][place]),
        rises=rises,
        falls=falls,
    )
