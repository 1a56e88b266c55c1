"""Unique information: can anything be read from f that cannot be read from Π_p f? (METHOD section 8.5)

AS moves as much for a copy of the row space's content in the null space as for content that is nowhere else. Fits on other
pictures tell them apart: of the image embedding by ridge regression, of the class by a fresh linear probe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.fitting import VALIDATION_EVERY
from singreg.analysis.information_results import BLOCKS, UniqueInformation
from singreg.analysis.probe import LinearProbe, fit_probe, one_hot
from singreg.analysis.results import Rows
from singreg.analysis.statistics import mean_interval, paired_difference, resampled_means
from singreg.nullspace import NullSpace
from singreg.ridge import DEFAULT_RIDGES, RidgeSolution, RidgeStatistics
from singreg.utils import all_reduce_sum, gather_rows

Pair = tuple[RidgeStatistics, RidgeStatistics]
"""Sums to fit on, and sums that choose the penalty."""


@dataclass(frozen=True)
class BlockFits:
    """Fits on f, Π_p f and Π_n f by name. basis: (m, k) of each, in whose coordinates the fits are; target_mean (n,)."""

    basis: dict[str, Tensor]
    solutions: dict[str, RidgeSolution]
    probes: dict[str, LinearProbe]
    target_mean: Tensor
    images: int
    labelled: int
    seen: Tensor
    normalize_targets: bool


def fit_blocks(
    batches: Iterable[FeatureBatch],
    *,
    null_space: NullSpace,
    classes: int,
    target_dim: int,
    ridges: Sequence[float] = DEFAULT_RIDGES,
    normalize_targets: bool = False,
) -> BlockFits:
    """Fit z and the class on f, Π_p f and Π_n f, in one pass over this process's batches; every fifth picture chooses λ.

    Only the sums for f are streamed, O(m²): those of the blocks follow from them. For f the two blocks are standardised each
    as a whole, so a null space that was shrunk or turned gives the same fits. Exact over processes.

    Shapes: C = classes, n = target_dim; a picture's label is -1 where it has none.

    Raises:
        ValueError: no null space, no pictures, or labelled ones of fewer than 2 classes.
    """
    if null_space.nullity == 0:
        raise ValueError("this head has no null space, so there is no information in it to measure")
    width, device = null_space.basis.shape[0], null_space.basis.device
    embedding, label = (
        (RidgeStatistics(width, size, device=device), RidgeStatistics(width, size, device=device)) for size in (target_dim, classes)
    )
    for batch in batches:
        held_out = (batch.indices % VALIDATION_EVERY == 0).to(batch.features.device)
        targets, known = _targets(batch, normalize_targets), batch.labels >= 0
        for place, chosen in enumerate((~held_out, held_out)):
            embedding[place].update(batch.features[chosen], targets[chosen])
            both = chosen & known
            label[place].update(batch.features[both], one_hot(batch.labels[both], classes))
    for statistics in (*embedding, *label):
        statistics.reduce()
    whole = _merged(embedding)
    basis = _bases(whole, null_space)
    solved = {name: _chosen(embedding, columns, ridges) for name, columns in basis.items()}
    labels = _merged(label)
    probes = {name: fit_probe(labels.mapped(columns), _chosen(label, columns, ridges).ridge) for name, columns in basis.items()}
    return BlockFits(
        basis, solved, probes, whole.z / whole.count, int(whole.count), int(labels.count), labels.z > 0, normalize_targets
    )


def _targets(batch: FeatureBatch, normalize: bool) -> Tensor:
    return torch.nn.functional.normalize(batch.embeddings, dim=-1) if normalize else batch.embeddings


def _merged(pair: Pair) -> RidgeStatistics:
    return RidgeStatistics(*pair[0].fz.shape, device=pair[0].ff.device).merge(pair[0]).merge(pair[1])


def _bases(whole: RidgeStatistics, space: NullSpace) -> dict[str, Tensor]:
    """Coordinates of every block: Q, N, and for f both side by side, each over its root mean standard deviation."""
    row, null = space.basis, space.null_basis()
    scatter, _, _ = whole.centred()
    level = [((scatter @ part) * part).sum() / max(part.shape[1], 1) for part in (row, null)]
    # A block that does not vary stays as it is: whatever its scale, ridge gives it nothing.
    least = torch.finfo(scatter.dtype).eps * torch.diagonal(whole.ff).sum()
    scaled = [part / (value / whole.count).sqrt() if bool(value > least) else part for part, value in zip((row, null), level, strict=True)]
    return dict(zip(BLOCKS, (torch.cat(scaled, dim=1), row, null), strict=True))


def _chosen(pair: Pair, basis: Tensor, ridges: Sequence[float]) -> RidgeSolution:
    """λ by held-out R², then the fit to all pictures."""
    fit, held_out = (statistics.mapped(basis) for statistics in pair)
    best, _ = fit.validate(held_out, ridges=ridges)
    return fit.merge(held_out).solve(best.ridge)


def measure_information(batches: Iterable[FeatureBatch], fits: BlockFits, *, resamples: int = 1000) -> UniqueInformation:
    """Held-out R² and class accuracy of the fits on other pictures than theirs, with paired bootstrap intervals.

    One pass over this process's batches, one row of figures a picture. R² is against the mean of these pictures' embeddings.

    Raises:
        ValueError: no pictures, or no labelled ones.
    """
    rows, target_sum = [], torch.zeros_like(fits.target_mean)
    for batch in batches:
        targets = _targets(batch, fits.normalize_targets).to(target_sum)
        target_sum += targets.sum(0)
        figures = {"index": batch.indices, "label": batch.labels, "spread": (targets - fits.target_mean).square().sum(1)}
        figures["seen"] = (batch.labels >= 0) & fits.seen[batch.labels.clamp_min(0)]
        for name, basis in fits.basis.items():
            inside = batch.features.to(basis) @ basis
            solution = fits.solutions[name]
            figures[f"r2 {name}"] = (targets - inside @ solution.matrix.T - solution.offset).square().sum(1)
            figures[f"accuracy {name}"] = (fits.probes[name].predict(inside) == batch.labels).double()
        rows.append({name: value.cpu().numpy() for name, value in figures.items()})
    table = gather_rows(rows, sort_by="index")
    labelled = table["label"] >= 0
    if not labelled.any():
        raise ValueError(f"none of the {len(labelled)} pictures has a label, so no probe for the class can be judged")
    mean = all_reduce_sum(target_sum) / len(labelled)
    # Σ|z - z̄|² about these pictures' own mean, from the sums about the fit's.
    shift = float((mean - fits.target_mean).square().sum())
    return _information(table, labelled, shift, fits, resamples)


def _information(table: Rows, labelled: np.ndarray, shift: float, fits: BlockFits, resamples: int) -> UniqueInformation:
    residuals = np.stack([table[f"r2 {name}"] for name in BLOCKS] + [table["spread"]], axis=1)
    drawn = np.concatenate([residuals.mean(0)[None], resampled_means(residuals, groups=table["label"], resamples=resamples)])
    r2 = 1 - drawn[:, :3] / (drawn[:, 3:] - shift)
    values = {**{f"r2 {name}": r2[:, place] for place, name in enumerate(BLOCKS)}, "unique": r2[:, 0] - r2[:, 1]}
    intervals = {name: np.quantile(value[1:], [0.025, 0.975]).tolist() for name, value in values.items()}
    hits = {name: table[f"accuracy {name}"][labelled] for name in BLOCKS}
    classes = table["label"][labelled]
    majority = fits.probes["features"].majority
    hits["chance"] = (table["label"][labelled] == majority).astype(np.float64)
    for name, hit in hits.items():
        intervals["chance" if name == "chance" else f"accuracy {name}"] = list(mean_interval(hit, groups=classes, resamples=resamples)[1:])
    gain = paired_difference(hits["features"], hits["row_space"], groups=classes, resamples=resamples)
    intervals["unique_accuracy"] = list(gain[1:])
    return UniqueInformation(
        r2={name: float(values[f"r2 {name}"][0]) for name in BLOCKS},
        unique=float(values["unique"][0]),
        accuracy={name: float(hits[name].mean()) for name in BLOCKS},
        unique_accuracy=gain[0],
        chance=float(hits["chance"].mean()),
        intervals=intervals,
        ridges={
            **{f"r2 {name}": solution.ridge for name, solution in fits.solutions.items()},
            **{f"accuracy {name}": probe.ridge for name, probe in fits.probes.items()},
        },
        images=len(labelled),
        labelled=int(labelled.sum()),
        unseen=int((labelled & ~table["seen"]).sum()),
        fit_images=fits.images,
        fit_labelled=fits.labelled,
    )
