"""How easily features are steered through the null space towards another prompt (METHOD sections 4 and 9)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.features import FeatureBatch
from singreg.analysis.statistics import paired_ratio
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator, steer
from singreg.utils import gather_rows, plain

SAME_PROMPT = 1 - 1e-6  # cosine above which two prompts are one: a class is no rival of its own prompt
CHUNK_ELEMENTS = 2**22  # of the widest array of a chunk of rows: 32 MiB in float64


def largest_change(change: Tensor, null_space: NullSpace) -> Tensor:
    """Return the largest |Δlogit| (R,) of changes (R, C); the softmax null lets all logits move together."""
    if null_space.invariance == "softmax":
        change = change - change.mean(1, keepdim=True)
    return change.abs().amax(1)


@dataclass(frozen=True)
class SteeringRows:
    """Rows (image, target prompt): places image, source and target (R,), features (R, m) float64, text (R, n) unit.

    The target's rivals are the class prompts, class_texts (C, n), but where they are the target itself, same (R, C).
    """

    image: Tensor
    source: Tensor
    target: Tensor
    features: Tensor
    text: Tensor
    class_texts: Tensor
    same: Tensor

    def read(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angle of z (R, n) to the target prompt in degrees (R,) and whether it outranks all rivals (R,)."""
        unit = normalize(z, dim=-1)
        own = (unit * self.text).sum(-1)
        rivals = (unit @ self.class_texts.T).masked_fill(self.same, -torch.inf)
        return torch.rad2deg(torch.arccos(own.clamp(-1, 1))), own > rivals.amax(-1)


@dataclass(frozen=True)
class PairPlan:
    """Which of S source classes are steered towards which of K prompts.

    source_labels (S,) rows of the head; texts (K, n) and all classes' prompts class_texts (C, n), unit rows;
    wanted (S, K) bool; chosen (N,) bool: images steered.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_labels: Tensor
    texts: Tensor
    class_texts: Tensor
    wanted: Tensor
    chosen: np.ndarray

    def rows(self, batches: Iterable[FeatureBatch]) -> Iterator[SteeringRows]:
        """Yield every (chosen image, wanted target) once, in chunks of whole images."""
        for batch in batches:
            mine, device = torch.from_numpy(self.chosen[batch.indices.numpy()]), batch.features.device
            texts, class_texts = (each.to(device).double() for each in (self.texts, self.class_texts))
            features, labels = batch.features[mine.to(device)].double(), batch.labels[mine.to(device)]
            image, same = batch.indices[mine].to(device), texts @ class_texts.T >= SAME_PROMPT
            source = (labels[:, None] == self.source_labels.to(device)).int().argmax(1)
            widest = len(texts) * (features.shape[1] + texts.shape[1] + len(class_texts))
            together = max(1, CHUNK_ELEMENTS // widest)
            for start in range(0, len(image), together):
                place, target = self.wanted.to(device)[source[start : start + together]].nonzero(as_tuple=True)
                place = place + start
                places = image[place], source[place], target
                yield SteeringRows(*places, features[place], texts[target], class_texts, same[target])


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
    rows = torch.tensor(list(source_labels))
    return PairPlan(names, tuple(targets), rows, target_texts, class_texts, wanted, chosen)


def _drawn(wanted: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the wanted pairs (S, K), every source's first random target before any source's second."""
    rng = np.random.default_rng(seed)
    draw = np.where(wanted.cpu().numpy(), rng.random(wanted.shape), np.inf)
    turn = np.argsort(np.argsort(draw, axis=1), axis=1) + rng.random((len(wanted), 1))
    order = np.argsort(np.where(np.isfinite(draw), turn, np.inf), axis=None)[: min(count, int(wanted.sum()))]
    kept = torch.zeros_like(wanted).flatten()
    kept[torch.from_numpy(order)] = True
    return kept.reshape(wanted.shape)


def steering_targets(labels: Tensor, indices: Tensor, classes: int) -> Tensor:
    """Choose a target class other than its own for every image, fixed by its index. Shape: (B,), (B,) to (B,)."""
    # A hash of the index, not a generator: the same on any number of processes and for every model compared.
    mixed = (indices.to(torch.int64) + 1) * 2654435761 % (2**32)
    return (labels + 1 + mixed.to(labels.device) % (classes - 1)) % classes


@torch.no_grad()
def steer_pairs(
    batches: Iterable[FeatureBatch],
    plan: PairPlan,
    *,
    weight: Tensor,
    null_space: NullSpace,
    attackers: Mapping[str, AnyTranslator],
    image_score: float = 40.0,
) -> list[dict[str, Any]]:
    """Steer every planned (source, target) to a fixed image score and read AS towards the target (paper table 1).

    One gradient step each, in float64, so all figures are lower bounds. Every attacker also judges every steering.
    Exact over processes; memory grows by one row for each image and target.

    Shape: weight (C, m).

    Returns:
        For each attacker and judge: overall figures and matrices (S, K) of AS, AS_abs (degrees) and step (ε / |f|) over
        the reachable, success and reachable over all; intervals of AS (95 %, over source classes and images);
        logit_change (largest |Δlogit|).
    """
    columns, how = [], dict[str, Any](null_space=null_space, image_score=image_score)
    for rows in plan.rows(batches):
        f, found = rows.features, {"image": rows.image, "source": rows.source, "target": rows.target}
        before = {judge: rows.read(translator(f))[0] for judge, translator in attackers.items()}
        for attacker, attacked in attackers.items():
            steered = steer(f, rows.text, translator=attacked, **how)
            found[f"reachable/{attacker}"] = ok = steered.reachable
            found[f"step/{attacker}"] = steered.step / torch.linalg.vector_norm(f, dim=-1)
            found[f"logits/{attacker}"] = largest_change((steered.features - f) @ weight.to(f).T, null_space)
            for judge, translator in attackers.items():
                after, won = rows.read(translator(steered.features))
                found[f"AS/{attacker}/{judge}"] = torch.where(ok, before[judge] - after, torch.nan)
                found[f"success/{attacker}/{judge}"] = won & ok
        columns.append({name: values.cpu().numpy() for name, values in found.items()})
    table = pd.DataFrame(gather_rows(columns, sort_by="image"))
    return [plain(_table1(table, plan, attacker, judge)) for attacker in attackers for judge in attackers]


def _table1(table: pd.DataFrame, plan: PairPlan, attacker: str, judge: str) -> dict[str, Any]:
    """The figures of one attacker and judge from a row for each image and target."""
    figures = pd.DataFrame({name: table[f"{name}/{attacker}/{judge}"] for name in ("AS", "success")}, dtype=float)
    figures = figures.assign(AS_abs=figures["AS"].abs(), step=table[f"step/{attacker}"])
    figures["reachable"] = table[f"reachable/{attacker}"].astype(float)
    cells, sums = figures.groupby([table["source"], table["target"]]), figures.groupby(table["image"]).sum()
    overall = {**figures.mean(), "AS_abs_std": figures["AS_abs"].std(ddof=0)}
    overall |= {"images": len(sums), "rows": len(table), "pairs": cells.ngroups}
    shape = len(plan.sources), len(plan.targets)
    every = pd.MultiIndex.from_product([range(size) for size in shape])
    matrices = cells.mean().assign(images=cells.size()).reindex(every)
    matrices["images"] = matrices["images"].fillna(0)
    classes = table.groupby("image")["source"].first().to_numpy()
    return {
        "attacker": attacker,
        "judge": judge,
        "overall": overall,
        "intervals": {"AS": paired_ratio(sums["AS"].to_numpy(), sums["reachable"].to_numpy(), groups=classes)[1:]},
        "matrices": {name: values.to_numpy().reshape(shape) for name, values in matrices.items()},
        "logit_change": table[f"logits/{attacker}"].max(),
    }
