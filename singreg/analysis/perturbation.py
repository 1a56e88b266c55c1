"""What null, random and row-space perturbations of equal norm do (METHOD section 4, paper figure 9)."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.steering import in_its_own_dtype, largest_change
from singreg.functional import angle
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator
from singreg.utils import gather_rows, plain

KINDS = ("null", "random", "principal")
"""A random direction inside the null space, in all of feature space, inside the row space (the paper's principal)."""
SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
IMAGES = 1024


@torch.no_grad()
def measure_perturbations(
    batches: Iterable[FeatureBatch],
    *,
    weight: Tensor,
    null_space: NullSpace,
    translators: Mapping[str, AnyTranslator],
    chosen: np.ndarray,
    seed: int = 0,
) -> dict[str, Any]:
    """Move every image by δ of norm ρ|f| in a null, a random and a row-space direction; read logits and angle.

    Each image has one Gaussian vector, fixed by seed and index: "random" is its direction, "null" and "principal" those
    of its two parts. With the softmax's null space, changes are about their mean over classes. Exact over processes.

    Args:
        chosen: (n,) indices of the images used; `evenly(len(split), IMAGES)` are enough.

    Returns:
        margin (mean gap between the two largest logits) and curves by kind: means by size of the largest |Δlogit|, of
        null perturbations in float32 too, and of the angle of T f to T(f + δ).
    """
    rows = []
    for batch in batches:
        mine = torch.from_numpy(np.isin(batch.indices.numpy(), chosen))
        features, indices = batch.features[mine.to(batch.features.device)].double(), batch.indices[mine]
        if len(indices):
            found = _image_figures(features, indices, weight.detach().double(), null_space, translators, seed)
            rows.append({name: value.cpu().numpy() for name, value in found.items()})
    table = gather_rows(rows, sort_by="index")
    curves: dict[str, dict[str, np.ndarray]] = {}
    for name, values in table.items():
        kind, _, figure = name.partition("/")
        if figure:
            curves.setdefault(kind, {})[figure] = values.mean(0)
    figures: dict[str, Any] = {"sizes": list(SIZES), "curves": curves, "margin": table["margin"].mean()}
    return {**plain(figures), "images": len(table["index"]), "translators": list(translators)}


def _directions(indices: Tensor, space: NullSpace, seed: int) -> dict[str, Tensor]:
    """Unit directions (B, m) of every kind that exists; the same for an image on any number of processes."""
    width = space.basis.shape[0]
    streams = (np.random.Generator(np.random.Philox(key=[seed, int(index)])) for index in indices)
    gaussian = torch.from_numpy(np.stack([stream.standard_normal(width) for stream in streams])).to(space.basis)
    null = space.component(gaussian)
    kinds = {"null": null, "random": gaussian, "principal": gaussian - null}
    empty = {"null": space.nullity == 0, "principal": space.rank == 0}
    return {kind: torch.nn.functional.normalize(d, dim=1) for kind, d in kinds.items() if not empty.get(kind, False)}


def _image_figures(
    features: Tensor,
    indices: Tensor,
    weight: Tensor,
    space: NullSpace,
    translators: Mapping[str, AnyTranslator],
    seed: int,
) -> dict[str, Tensor]:
    """Columns "KIND/FIGURE" (B, number of sizes) with the images' margin and index (B,)."""
    logits, narrow = features @ weight.T, weight.float()
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    readers = {f"angle {name}": in_its_own_dtype(translator) for name, translator in translators.items()}
    z = {name: read(features) for name, read in readers.items()}
    top = logits.topk(min(2, logits.shape[1]), dim=1).values
    columns: dict[str, list[Tensor]] = {}
    for kind, direction in _directions(indices, space, seed).items():
        for size in SIZES:
            moved = features + size * norm * direction
            figures = {name: angle(z[name], read(moved)) for name, read in readers.items()}
            figures["logit_change"] = largest_change(moved @ weight.T - logits, space)
            if kind == "null":
                change = moved.float() @ narrow.T - features.float() @ narrow.T
                figures["logit_change_float32"] = largest_change(change, space).double()
            for name, value in figures.items():
                columns.setdefault(f"{kind}/{name}", []).append(value)
    stacked = {name: torch.stack(values, dim=1) for name, values in columns.items()}
    return {"index": indices, "margin": top[:, 0] - top[:, -1], **stacked}
