"""What null, random and row-space perturbations of equal norm do (METHOD section 4, paper figure 9)."""

import itertools
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
    exact, narrow, rows = weight.detach().double(), weight.detach().float(), []
    readers = {f"angle {name}": in_its_own_dtype(translator) for name, translator in translators.items()}
    for batch in batches:
        mine = torch.from_numpy(np.isin(batch.indices.numpy(), chosen))
        features, indices = batch.features[mine.to(batch.features.device)].double(), batch.indices[mine]
        if not len(indices):
            continue
        logits, norm = features @ exact.T, torch.linalg.vector_norm(features, dim=1, keepdim=True)
        z, columns = {name: read(features) for name, read in readers.items()}, dict[str, list[Tensor]]()
        for (kind, direction), size in itertools.product(_directions(indices, null_space, seed).items(), SIZES):
            moved = features + size * norm * direction
            figures = {name: angle(z[name], read(moved)) for name, read in readers.items()}
            figures["logit_change"] = largest_change(moved @ exact.T - logits, null_space)
            if kind == "null":
                change = moved.float() @ narrow.T - features.float() @ narrow.T
                figures["logit_change_float32"] = largest_change(change, null_space).double()
            for name, value in figures.items():
                columns.setdefault(f"{kind}/{name}", []).append(value)
        top = logits.topk(min(2, logits.shape[1]), dim=1).values
        found = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        found |= {"index": indices, "margin": top[:, 0] - top[:, -1]}
        rows.append({name: value.cpu().numpy() for name, value in found.items()})
    table = gather_rows(rows, sort_by="index")
    curves: dict[str, dict[str, np.ndarray]] = {}
    for name, values in table.items():
        kind, _, figure = name.partition("/")
        if figure:
            curves.setdefault(kind, {})[figure] = values.mean(0)
    sizes = {"images": len(table["index"]), "sizes": SIZES, "translators": list(translators)}
    return plain({**sizes, "curves": curves, "margin": table["margin"].mean()})


def _directions(indices: Tensor, space: NullSpace, seed: int) -> dict[str, Tensor]:
    """Unit directions (B, m) of every kind that exists; the same for an image on any number of processes."""
    width = space.basis.shape[0]
    streams = (np.random.Generator(np.random.Philox(key=[seed, int(index)])) for index in indices)
    gaussian = torch.from_numpy(np.stack([stream.standard_normal(width) for stream in streams])).to(space.basis)
    null = space.component(gaussian)
    kinds = {"null": null} if space.nullity else {}
    kinds |= {"random": gaussian, "principal": gaussian - null}
    return {kind: torch.nn.functional.normalize(direction, dim=1) for kind, direction in kinds.items()}
