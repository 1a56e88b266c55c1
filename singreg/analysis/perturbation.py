"""Null-space validation: what null, random and row-space perturbations of equal norm do (METHOD section 4, paper fig. 9)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.results import Rows
from singreg.analysis.steering import in_its_own_dtype
from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator
from singreg.utils import gather_rows

KINDS = ("null", "random", "principal")
"""A random direction inside the null space, in all of feature space, inside the row space (the paper's principal space)."""
SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
IMAGES = 1024


@dataclass(frozen=True)
class PerturbationCurve:
    """One kind of perturbation over the relative norms of the report: mean, and 5 % and 95 % quantiles over pictures.

    Figures: "logit_change" (largest |Δlogit| of a picture, float64), "logit_change_float32" (the same in float32 arithmetic),
    "flipped" (share whose top-1 changes; no quantiles), "angle TRANSLATOR" (degrees between T f and T(f + δ)).
    """

    mean: dict[str, list[float]]
    low: dict[str, list[float]]
    high: dict[str, list[float]]


@dataclass(frozen=True)
class PerturbationReport:
    """sizes: |δ| / |f|. curves: by kind; a head without a null space has no "null", one of rank m no difference in "random".

    margin: mean gap between the two largest logits, what a change must reach to flip a decision. images: pictures used.
    """

    sizes: list[float]
    curves: dict[str, PerturbationCurve]
    margin: float
    images: int
    translators: list[str]

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict (no shapes)."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PerturbationReport:
        """Back from `to_json` (no shapes)."""
        return cls(**{**value, "curves": {kind: PerturbationCurve(**curve) for kind, curve in value["curves"].items()}})


def measure_perturbations(
    batches: Iterable[FeatureBatch],
    *,
    weight: Tensor,
    null_space: NullSpace,
    translators: Mapping[str, AnyTranslator],
    sizes: Sequence[float] = SIZES,
    chosen: np.ndarray | None = None,
    seed: int = 0,
) -> PerturbationReport:
    """Move every picture by δ of norm ρ|f| in a null, a random and a row-space direction; read logits and translated angle.

    Each picture has one Gaussian vector of its own, fixed by seed and index: "random" is its direction, "null" and "principal"
    those of its two parts. Logits are those of f + δ and of f, both computed, so the null's change is what rounding leaves.
    With the softmax's null space, changes are about their mean over classes. Exact over processes. Indices `chosen` limit the
    pictures (None: all); `evenly(len(part), IMAGES)` are enough.

    Shapes: weight (C, m), chosen (n,). Angles in degrees.

    Raises:
        ValueError: sizes that are not above 0, or no pictures.

    Example:
        >>> f = torch.randn(8, 3)
        >>> batch = FeatureBatch(f, f[:, :2], f, torch.zeros(8, dtype=torch.int64), torch.arange(8))
        >>> space = NullSpace.from_weight(torch.eye(3)[:2])
        >>> report = measure_perturbations([batch], weight=torch.eye(3)[:2], null_space=space, translators={"T": lambda f: f}, sizes=[0.1])
        >>> report.curves["null"].mean["logit_change"][0] < 1e-12 < report.curves["principal"].mean["logit_change"][0]
        True
    """
    if not sizes or min(sizes) <= 0:
        raise ValueError(f"relative norms of perturbations must be above 0, got {list(sizes)}")
    rows = []
    with torch.no_grad():
        for batch in batches:
            mine = torch.ones(len(batch.indices), dtype=torch.bool)
            if chosen is not None:
                mine = torch.from_numpy(np.isin(batch.indices.numpy(), chosen))
            features, indices = batch.features[mine.to(batch.features.device)].double(), batch.indices[mine]
            if not len(indices):
                continue
            found = _picture_figures(features, indices, weight.detach().double(), null_space, translators, sizes, seed)
            rows.append({name: value.cpu().numpy() for name, value in found.items()})
    return _report(gather_rows(rows, sort_by="index"), list(sizes), list(translators))


def _directions(indices: Tensor, space: NullSpace, seed: int) -> dict[str, Tensor]:
    """Unit directions (B, m) of every kind that exists; the same for a picture on any number of processes."""
    width = space.basis.shape[0]
    streams = (np.random.Generator(np.random.Philox(key=[seed, int(index)])) for index in indices)
    gaussian = torch.from_numpy(np.stack([stream.standard_normal(width) for stream in streams])).to(space.basis)
    null = space.component(gaussian)
    kinds = {"null": null, "random": gaussian, "principal": gaussian - null}
    empty = {"null": space.nullity == 0, "principal": space.rank == 0}
    return {kind: torch.nn.functional.normalize(d, dim=1) for kind, d in kinds.items() if not empty.get(kind, False)}


def _picture_figures(
    features: Tensor,
    indices: Tensor,
    weight: Tensor,
    space: NullSpace,
    translators: Mapping[str, AnyTranslator],
    sizes: Sequence[float],
    seed: int,
) -> dict[str, Tensor]:
    """Columns "KIND/FIGURE" (B, number of sizes) with the pictures' margin and index (B,)."""
    logits = features @ weight.T
    narrow = features.float() @ weight.float().T
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    readers = {f"angle {name}": in_its_own_dtype(translator) for name, translator in translators.items()}
    z = {name: read(features) for name, read in readers.items()}
    top = logits.topk(min(2, logits.shape[1]), dim=1)
    columns: dict[str, list[Tensor]] = {}
    for kind, direction in _directions(indices, space, seed).items():
        for size in sizes:
            moved = features + size * norm * direction
            changed = moved @ weight.T
            figures = {
                "logit_change": _largest(changed - logits, space),
                "logit_change_float32": _largest(moved.float() @ weight.float().T - narrow, space).double(),
                "flipped": (changed.argmax(1) != top.indices[:, 0]).double(),
                **{name: angle(z[name], read(moved)) for name, read in readers.items()},
            }
            for name, value in figures.items():
                columns.setdefault(f"{kind}/{name}", []).append(value)
    return {"index": indices, "margin": top.values[:, 0] - top.values[:, -1], **{k: torch.stack(v, dim=1) for k, v in columns.items()}}


def _largest(change: Tensor, space: NullSpace) -> Tensor:
    """Largest |Δlogit| of every picture, (B, C) to (B,)."""
    if space.invariance == "softmax":
        change = change - change.mean(1, keepdim=True)
    return change.abs().amax(1)


def _report(table: Rows, sizes: list[float], translators: list[str]) -> PerturbationReport:
    curves = {}
    for kind in KINDS:
        mine = {name.split("/", 1)[1]: values for name, values in table.items() if name.startswith(f"{kind}/")}
        if mine:
            spread = {name: np.quantile(values, (0.05, 0.95), axis=0) for name, values in mine.items() if name != "flipped"}
            curves[kind] = PerturbationCurve(
                mean={name: values.mean(0).tolist() for name, values in mine.items()},
                low={name: bounds[0].tolist() for name, bounds in spread.items()},
                high={name: bounds[1].tolist() for name, bounds in spread.items()},
            )
    return PerturbationReport(sizes, curves, float(table["margin"].mean()), len(table["index"]), translators)
