"""Is the harmless variety still there? Held-out R² of what is not class, and of known attributes (METHOD section 8.5)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.features import FeatureBatch
from singreg.analysis.information import BlockFits
from singreg.utils import gather_rows


def harmless_rows(batches: Iterable[FeatureBatch], fits: BlockFits, texts: Tensor) -> dict[str, np.ndarray]:
    """Of each picture: index, |P(z - T f)|² and |P(z - z̄)|², P the projection off the span of the class prompts; each (N,).

    T is the fit on f of `fit_blocks`, z̄ these pictures' mean; 1 - Σ residual / Σ spread is R²(P z | f). Both are 0 where the
    prompts span the whole space (as many classes as VLM dimensions): nothing is left to measure.

    Shapes: texts (C, n).
    """
    span = torch.linalg.svd(texts.double().T, full_matrices=False)
    rank = int(torch.linalg.matrix_rank(texts.double()))
    inside = span.U[:, :rank]
    solution, basis = fits.solutions["features"], fits.basis["features"]
    rows = []
    for batch in batches:
        z = batch.embeddings.double()
        z = normalize(z, dim=1) if fits.normalize_targets else z
        read = (batch.features.to(basis) @ basis) @ solution.matrix.T + solution.offset
        off, error = (value - (value @ inside) @ inside.T for value in (z, z - read))
        rows.append({"index": batch.indices.numpy(), "off": off.cpu().numpy(), "residual": error.square().sum(1).cpu().numpy()})
    table = gather_rows(rows, sort_by="index")
    off = table.pop("off")
    full = rank == texts.shape[1]
    spread = np.square(off - off.mean(0)).sum(1)
    return {
        "index": table["index"],
        "residual": np.zeros_like(spread) if full else table["residual"],
        "spread": np.zeros_like(spread) if full else spread,
    }


def attribute_r2(
    batches: Iterable[FeatureBatch], fits: BlockFits, names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Held-out R² of every known attribute from f, Π_p f and Π_n f, by attribute and block; NaN for one that does not vary.

    `fits` and the batches have the attributes (B, k) in the place of embeddings.
    """
    rows = []
    for batch in batches:
        targets = batch.embeddings.double()
        figures = {"index": batch.indices.numpy(), "target": targets.cpu().numpy()}
        for block, basis in fits.basis.items():
            solution = fits.solutions[block]
            read = (batch.features.to(basis) @ basis) @ solution.matrix.T + solution.offset
            figures[block] = (targets - read).square().cpu().numpy()
        rows.append(figures)
    table = gather_rows(rows, sort_by="index")
    spread = np.square(table["target"] - table["target"].mean(0)).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = {block: np.where(spread > 0, 1 - table[block].sum(0) / spread, np.nan) for block in fits.basis}
    return {name: {block: float(r2[block][place]) for block in r2} for place, name in enumerate(names)}
