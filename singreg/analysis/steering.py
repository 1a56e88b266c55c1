"""How easily features are steered through the null space towards another prompt (METHOD sections 4 and 9)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from singreg.analysis.features import FeatureBatch
from singreg.analysis.statistics import paired_ratio
from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, Steered, steer
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_max, all_reduce_sum, gather_rows, plain

SAME_PROMPT = 1 - 1e-6  # cosine above which two prompts are one: a class is no rival of its own prompt
CHUNK_ELEMENTS = 2**22  # of the widest array of a chunk of rows: 32 MiB in float64
SUMS = ("rows", "reachable", "AS", "AS²", "AS_abs", "success", "step")


def in_its_own_dtype(translator: AnyTranslator) -> AnyTranslator:
    """Wrap a translator so that it runs in the dtype of its weights and answers in that of its input."""
    if isinstance(translator, LinearTranslator) or not isinstance(translator, nn.Module):
        return translator
    dtype = next((p.dtype for p in [*translator.parameters(), *translator.buffers()] if p.is_floating_point()), None)
    if dtype is None:
        return translator

    def call(features: Tensor) -> Tensor:
        translated: Tensor = translator(features.to(dtype))
        return translated.to(features.dtype)

    return call


def own_prompt(text: Tensor, class_texts: Tensor) -> Tensor:
    """Where a class prompt is the target prompt itself, and so no rival. Shape: (R, n), (C, n) to (R, C) bool."""
    return text @ class_texts.T >= SAME_PROMPT


def outranks(own: Tensor, classes: Tensor, same: Tensor) -> Tensor:
    """Whether the target prompt is nearer than every class prompt but its own, from cosines.

    Shape: own (R,), classes (R, C), same (R, C) bool; returns (R,) bool.
    """
    return own > classes.masked_fill(same, -torch.inf).amax(-1)


def judged(
    judge: AnyTranslator, features: Tensor, text: Tensor, class_texts: Tensor, same: Tensor
) -> tuple[Tensor, Tensor]:
    """Read a judge's angle to the target prompt in degrees (R,) and whether it outranks all class prompts (R,) bool.

    Shape: features (R, m) float64, text (R, n), class_texts (C, n) unit rows, same (R, C) from `own_prompt`.
    """
    unit = torch.nn.functional.normalize(in_its_own_dtype(judge)(features), dim=-1)
    own = (unit * text).sum(-1)
    return torch.rad2deg(torch.arccos(own.clamp(-1, 1))), outranks(own, unit @ class_texts.T, same)


@dataclass(frozen=True)
class SteeringRows:
    """Rows (image, target prompt): places image, source and target (R,), features (R, m) float64, text (R, n) unit."""

    image: Tensor
    source: Tensor
    target: Tensor
    features: Tensor
    text: Tensor


@dataclass(frozen=True)
class PairPlan:
    """Which of S source classes are steered towards which of K prompts.

    source_labels (S,) rows of the head, texts (K, n) unit rows, wanted (S, K) bool, chosen (N,) bool: images steered.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_labels: Tensor
    texts: Tensor
    wanted: Tensor
    chosen: np.ndarray

    def select(self, batch: FeatureBatch) -> SelectedImages:
        """Return the chosen images of a batch, b of its B, with the place of their class among the sources."""
        device = batch.features.device
        highest = max(int(self.source_labels.max()), int(batch.labels.max()))
        place = torch.full((highest + 1,), -1, device=device)
        place[self.source_labels.to(device)] = torch.arange(len(self.sources), device=device)
        mine = torch.from_numpy(self.chosen[batch.indices.numpy()])
        kept = mine.to(device)
        return SelectedImages(batch.features[kept].double(), place[batch.labels[kept]], batch.indices[mine])


@dataclass(frozen=True)
class SelectedImages:
    """Images to steer: features (b, m) float64, source (b,) into the plan's sources, indices (b,) into the split."""

    features: Tensor
    source: Tensor
    indices: Tensor

    def rows(self, plan: PairPlan, classes: int) -> Iterator[SteeringRows]:
        """Yield every (image, wanted target) once, in chunks of bounded memory; C classes are ranked in each."""
        image, target = plan.wanted.to(self.source.device)[self.source].nonzero(as_tuple=True)
        limit = max(1, CHUNK_ELEMENTS // (self.features.shape[1] + plan.texts.shape[1] + classes))
        texts = plan.texts.to(self.features)
        for start in range(0, len(image), limit):
            here, there = image[start : start + limit], target[start : start + limit]
            yield SteeringRows(here, self.source[here], there, self.features[here], texts[there])


def plan_pairs(
    labels: np.ndarray,
    class_names: Sequence[str],
    class_texts: Tensor,
    source_labels: Sequence[int],
    targets: Sequence[str],
    target_texts: Tensor,
    *,
    images_per_source: int | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
) -> PairPlan:
    """Pair every source class with every target prompt but its own.

    Args:
        max_pairs: draw so many pairs, evenly over sources; None takes all.

    Shape: labels (N,) of the split's images, class_texts (C, n) and target_texts (K, n) unit rows.

    Raises:
        ValueError: source classes without images, and sources whose every target is their own prompt, all at once.

    Example:
        >>> labels, names, texts = np.array([0, 1, 1]), ["cat", "dog"], torch.eye(3)
        >>> plan = plan_pairs(labels, names, texts[:2], [0, 1], ["dog", "a hat"], texts[1:])
        >>> plan.wanted.tolist(), plan.chosen.tolist()
        ([[True, True], [False, True]], [True, True, True])
    """
    wanted = class_texts[list(source_labels)].double() @ target_texts.double().T < SAME_PROMPT
    problems = []
    empty = [class_names[label] for label in source_labels if not (labels == label).any()]
    if empty:
        problems.append(f"source classes without test images: {', '.join(empty)}")
    alone = [class_names[label] for label, row in zip(source_labels, wanted.tolist(), strict=True) if not any(row)]
    if alone:
        problems.append(f"the only target is the source itself, which is no steering: {', '.join(alone)}")
    if problems:
        raise ValueError("; ".join(problems))
    if max_pairs is not None:
        wanted = _drawn(wanted, max_pairs, seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label, row in zip(source_labels, wanted.tolist(), strict=True):
        if any(row):
            chosen[np.flatnonzero(labels == label)[:images_per_source]] = True
    names = tuple(class_names[label] for label in source_labels)
    return PairPlan(names, tuple(targets), torch.tensor(list(source_labels)), target_texts, wanted, chosen)


def _drawn(wanted: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the wanted pairs (S, K), every source's first random target before any source's second."""
    rng = np.random.default_rng(seed)
    draw = np.where(wanted.cpu().numpy(), rng.random(wanted.shape), np.inf)
    turn = np.argsort(np.argsort(draw, axis=1), axis=1) + rng.random((len(wanted), 1))
    order = np.argsort(np.where(np.isfinite(draw), turn, np.inf), axis=None)[: min(count, int(wanted.sum()))]
    kept = np.zeros(wanted.numel(), dtype=bool)
    kept[order] = True
    return torch.from_numpy(kept.reshape(wanted.shape)).to(wanted.device)


def steering_targets(labels: Tensor, indices: Tensor, classes: int, *, seed: int = 0) -> Tensor:
    """Choose a target class other than its own for every image, fixed by seed and index. Shape: (B,), (B,) to (B,)."""
    # A hash of the index, not a generator: the same on any number of processes and for every model compared.
    mixed = (indices.to(torch.int64) + 1 + seed * 7919) * 2654435761 % (2**32)
    return (labels + 1 + mixed.to(labels.device) % (classes - 1)) % classes


def measure_steering(
    features: Tensor,
    labels: Tensor,
    indices: Tensor,
    *,
    texts: Tensor,
    null_space: NullSpace,
    attacker: AnyTranslator,
    judge: AnyTranslator | None = None,
    image_score: float = 40.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Steer every image to a fixed image score towards another class's prompt and read what the judge sees.

    Logits do not change by construction. One gradient step: a lower bound of what an attacker can do.

    Args:
        attacker: finds direction and step.
        judge: reads AS towards the target and whether its prompt outranks all classes; None takes the attacker.
        image_score: in degrees (paper table 1: 40).

    Shape: features (N, m), labels and indices (N,), texts (C, n) unit rows.

    Returns:
        image_score; attribute_score and attribute_score_std (degrees) and step (mean ε / |f|) over the reachable, NaN
        where none is; reachable and success, shares of all; images.

    Raises:
        ValueError: fewer than two classes.
    """
    if len(texts) < 2:
        raise ValueError(f"steering needs at least 2 classes to choose a target from, got texts {tuple(texts.shape)}")
    judge = judge or attacker
    targets = steering_targets(labels, indices, len(texts), seed=seed)
    fixed = in_its_own_dtype(attacker)
    steered = steer(features, texts[targets], null_space=null_space, image_score=image_score, translator=fixed)
    ok = steered.reachable
    targets, start = targets[ok], features[ok]
    before, after = judge(start), judge(steered.features[ok])
    moved = angle(before, texts[targets]) - angle(after, texts[targets])
    won = (torch.nn.functional.normalize(after, dim=-1) @ texts.T).argmax(1) == targets
    return {
        "image_score": image_score,
        "attribute_score": float(moved.mean()),
        "attribute_score_std": float(moved.std(correction=0)) if len(moved) else float("nan"),
        "step": float((steered.step[ok] / torch.linalg.vector_norm(start, dim=-1)).mean()),
        "reachable": float(ok.float().mean()),
        "success": float(won.float().sum() / len(features)),
        "images": len(features),
    }


@torch.no_grad()
def steer_pairs(
    batches: Iterable[FeatureBatch],
    plan: PairPlan,
    *,
    texts: Tensor,
    weight: Tensor,
    null_space: NullSpace,
    attackers: Mapping[str, AnyTranslator],
    judges: Mapping[str, AnyTranslator] | None = None,
    image_score: float = 40.0,
) -> list[dict[str, Any]]:
    """Steer every planned (source, target) to a fixed image score and read AS towards the target (paper table 1).

    One gradient step each, in float64, so all figures are lower bounds. Exact over processes; memory grows by one row
    for each image. AS, AS_abs and step are over reachable images; success and reachable are shares of all.

    Args:
        judges: translators that read every attacker's steering; None takes the attackers.
        image_score: in degrees.

    Shape: texts (C, n) unit rows of all class prompts, weight (C, m).

    Returns:
        For each attacker and judge: attacker, judge; overall and intervals (95 %, over source classes and images) of
        AS, AS_abs (degrees), step (ε / |f|), success, reachable; overall also counts pairs, rows and images; matrices
        (S, K) of the same, None where nothing was steered or reached; calibration_error (largest |IS - wanted| of the
        reachable, by the attacker); logit_change (largest |Δlogit|).
    """
    judges = judges or attackers
    exact, wide = texts.double(), weight.detach().double()
    keys = [(attacker, judge) for attacker in attackers for judge in judges]
    tables = {key: exact.new_zeros(len(SUMS), len(plan.sources), len(plan.targets)) for key in keys}
    extremes = {attacker: exact.new_zeros(2) for attacker in attackers}
    columns = []
    for batch in batches:
        images = plan.select(batch)
        sums = {key: exact.new_zeros(len(SUMS), len(images.indices)) for key in keys}
        for rows in images.rows(plan, len(texts)):
            pair, same = rows.source * len(plan.targets) + rows.target, own_prompt(rows.text, exact)
            for attacker, translator in attackers.items():
                T = in_its_own_dtype(translator)
                steered = steer(rows.features, rows.text, null_space=null_space, translator=T, image_score=image_score)
                found = _extremes(rows, steered, translator, wide, null_space, image_score)
                extremes[attacker] = torch.maximum(extremes[attacker], found)
                for judge, reader in judges.items():
                    values = _summable(rows, steered, reader, exact, same)
                    tables[attacker, judge].flatten(1).index_add_(1, pair, values)
                    sums[attacker, judge].index_add_(1, rows.image, values)
        own = {"index": images.indices.numpy(), "class": images.source.cpu().numpy()}
        columns.append({**own, **{f"{a}|{j}": value.T.cpu().numpy() for (a, j), value in sums.items()}})
    by_image = gather_rows(columns, sort_by="index")
    largest = {attacker: all_reduce_max(value) for attacker, value in extremes.items()}
    return [
        {
            "attacker": a,
            "judge": j,
            **_table1(all_reduce_sum(tables[a, j]), by_image[f"{a}|{j}"], by_image["class"], largest[a]),
        }
        for a, j in keys
    ]


def _extremes(
    rows: SteeringRows, steered: Steered, attacker: AnyTranslator, weight: Tensor, null_space: NullSpace, degrees: float
) -> Tensor:
    """(2,): largest |IS - wanted| of the reachable by the attacker, largest |Δlogit|; 0 where nothing was steered."""
    translate = in_its_own_dtype(attacker)
    error = (angle(translate(rows.features), translate(steered.features)) - degrees).abs()
    change = (steered.features - rows.features) @ weight.T
    if null_space.invariance == "softmax":
        change = change - change.mean(1, keepdim=True)
    zero = error.new_zeros(1)
    largest = [torch.cat([found, zero]).max() for found in (error[steered.reachable], change.abs().flatten())]
    return torch.stack(largest)


def _summable(rows: SteeringRows, steered: Steered, judge: AnyTranslator, texts: Tensor, same: Tensor) -> Tensor:
    """The figures of every row, (7, R) in the order of `SUMS`; 0 where the angle is out of reach."""
    before, _ = judged(judge, rows.features, rows.text, texts, same)
    after, won = judged(judge, steered.features, rows.text, texts, same)
    moved, ok = before - after, steered.reachable.to(before)
    step = torch.nan_to_num(steered.step) / torch.linalg.vector_norm(rows.features, dim=-1)
    return torch.stack([torch.ones_like(ok), *(ok * each for each in (ok, moved, moved**2, moved.abs(), won, step))])


def _table1(table: Tensor, by_image: np.ndarray, classes: np.ndarray, extremes: Tensor) -> dict[str, Any]:
    """Figures from sums (7, S, K) over all processes, and (N, 7) of each image."""
    overall = _means(table.sum((1, 2)))
    overall |= {"images": (by_image[:, 0] > 0).sum(), "rows": table[0].sum(), "pairs": (table[0] > 0).sum()}
    intervals: dict[str, list[float | None]] = {}
    for name in ("AS", "AS_abs", "step", "success", "reachable"):
        above, below = (
            by_image[:, SUMS.index(n)] for n in (name, "rows" if name in ("success", "reachable") else "reachable")
        )
        intervals[name] = list(paired_ratio(above, below, groups=classes)[1:]) if below.any() else [None, None]
    figures = {
        "overall": {name: float(value) for name, value in overall.items()},
        "intervals": intervals,
        "matrices": _means(table),
        "calibration_error": extremes[0] if overall["AS"].isfinite() else None,
        "logit_change": extremes[1],
    }
    found: dict[str, Any] = plain(figures)
    return found


def _means(sums: Tensor) -> dict[str, Any]:
    """Means from sums (7, ...), each (...); NaN where nothing was steered or reached."""
    table = dict(zip(SUMS, sums, strict=True))
    rows, reached = table["rows"], table["reachable"]
    figures = {name: table[name] / reached for name in ("AS", "AS_abs", "step")}
    for name in ("AS", "AS_abs"):  # (|AS|)² is AS²
        figures[f"{name}_std"] = (table["AS²"] / reached - figures[name] ** 2).clamp_min(0).sqrt()
    return {**figures, "success": table["success"] / rows, "reachable": reached / rows, "images": rows}
