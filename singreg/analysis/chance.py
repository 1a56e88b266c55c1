"""What chance does: random null spaces, shuffled texts, random perturbations of equal norm (METHOD 4, 8.2, 8.3)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.steering import largest_change
from singreg.functional import angle
from singreg.metrics import COLUMNS, score_columns, summarize_columns
from singreg.nullspace import NullSpace
from singreg.steering import AnyTranslator
from singreg.utils import all_reduce_sum, gather_rows, plain

FIGURES = ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "kappa")
KINDS = ("dimension", "energy", "texts")
PERTURBATIONS = ("null", "random", "principal")
"""A random direction inside the null space, in all of feature space, inside the row space (the paper's principal)."""
SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
IMAGES = 1024


def random_projection(width: int, dimension: int, *, seed: int | Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return the projection on a random subspace of d = `dimension` of m = `width` features, the same for a seed.

    Shape: it maps (..., m) to (..., m).
    """
    thin = min(dimension, width - dimension)  # of the subspace and its complement, whichever is thinner
    # NumPy's generator takes several numbers as a seed; torch's uses the lower 32 bits of one.
    gaussian = torch.from_numpy(np.random.default_rng(seed).standard_normal((width, thin)))
    basis: Tensor = torch.linalg.qr(gaussian).Q

    def component(features: Tensor) -> Tensor:
        spanning = basis.to(features)
        inside = (features @ spanning) @ spanning.T
        return features - inside if dimension > thin else inside

    return component


def matched_coefficients(null_share: Tensor, random_share: Tensor) -> tuple[Tensor, Tensor]:
    """Return (α, β) of δ = α g + β P g that is as long as Π_n g and at the same angle to g (METHOD section 8.2).

    With s² = |Π_n g|²/|g|² and p² = |P g|²/|g|²: β = √(s²(1-s²) / (p²(1-p²))), α = s² - β p². Then |δ|² = δ·g = s²|g|²,
    as for an orthogonal projection: δ is Π_n g turned about g at random. β = 0 where p² is 0 or 1.

    Shape: s², p² (...) in [0, 1] to two (...).
    """
    across, least = random_share * (1 - random_share), torch.finfo(random_share.dtype).eps
    wanted = (null_share * (1 - null_share)).clamp_min(0)
    beta = torch.where(across > least, wanted / across.clamp_min(least), 0).sqrt()
    return null_share - beta * random_share, beta


@torch.no_grad()
def measure_chance(
    batches: Iterable[FeatureBatch],
    *,
    texts: Tensor,
    null_space: NullSpace,
    translator: AnyTranslator,
    mean: Tensor,
    draws: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the scores of the real removal beside `draws` random ones of each kind, for both removals.

    "dimension": Π_n becomes the projection P on a uniformly random subspace of the same dimension. "energy": every
    image is displaced by δ = α g + β P g with |δ| = |Π_n g| and δ·g = |δ|² (see `matched_coefficients`), so the same
    energy leaves every image, at the same angle to it, in a random direction; g is f, or f - mean where centred.
    "texts": the real removal read against the text of another class (a random cycle through all classes).

    One pass over this process's batches of labelled images; exact over processes.

    Shape: texts (C, n) unit rows, mean (m,).

    Returns:
        For the removals "paper" and "centred" the observed figures, the energy share removed, and levels by kind: mean
        and spread (standard deviation) over draws, and energy.
    """
    sizes = len(null_space.basis), null_space.nullity
    projections = [random_projection(*sizes, seed=(seed, draw)) for draw in range(draws)]
    cycles = [_cycle(len(texts), (seed, draw)).to(texts.device) for draw in range(draws)]
    # By removal: the real one, then draw by draw of each kind; the squares removed, and of what they were removed from.
    sums = torch.zeros(2, 1 + len(KINDS) * draws, len(COLUMNS), dtype=torch.float64, device=texts.device)
    energy, whole = (torch.zeros(2, size, dtype=torch.float64) for size in (sums.shape[1], 1))
    for batch in batches:
        f, own = batch.features, texts.to(batch.features)[batch.labels]
        z, parts = translator(f), [project(f) for project in projections]
        for place, origin in enumerate((torch.zeros_like(f[0]), mean.to(f))):
            g, null = f - origin, null_space.component(f - origin)
            real, squared = translator(f - null), g.square().sum(1)
            share = _share(null, squared)
            cases = [(null, real, own)]
            for project, part in zip(projections, parts, strict=True):
                random = part - project(origin)
                cases.append((random, translator(f - random), own))
            for random, _, _ in cases[1 : 1 + draws]:
                alpha, beta = (c[:, None] for c in matched_coefficients(share, _share(random, squared)))
                delta = alpha * g + beta * random
                cases.append((delta, translator(f - delta), own))
            cases += [(null, real, texts.to(f)[cycle[batch.labels]]) for cycle in cycles]
            whole[place] += squared.double().sum().cpu()
            for row, (delta, z_eq, text) in enumerate(cases):
                sums[place, row] += score_columns(z, z_eq, text).sum(1)
                energy[place, row] += delta.square().sum(1).double().sum().cpu()
    sums, removed = all_reduce_sum(sums), all_reduce_sum(energy) / all_reduce_sum(whole)
    both = {name: _levels(sums[k], removed[k], draws) for k, name in enumerate(("paper", "centred"))}
    return {"images": int(sums[0, 0, 0]), **plain(both)}


def _share(part: Tensor, squared: Tensor) -> Tensor:
    return (part.square().sum(1) / squared.clamp_min(torch.finfo(squared.dtype).tiny)).clamp(0, 1)


def _cycle(classes: int, seed: tuple[int, int]) -> Tensor:
    """A random order of all classes in which each is followed by another: (C,) int64 without a fixed point."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(classes))
    followed = torch.empty_like(order)
    followed[order] = order.roll(1)
    return followed


def _levels(sums: Tensor, removed: Tensor, draws: int) -> dict[str, Any]:
    """One removal's figures from sums (1 + 3 draws, 10) and energy shares (1 + 3 draws,)."""
    figures, levels = summarize_columns(sums.T), {}
    for place, kind in enumerate(KINDS):
        rows = slice(1 + place * draws, 1 + (place + 1) * draws)
        mean, spread = ({name: of(figures[name][rows]) for name in FIGURES} for of in (torch.mean, torch.std))
        levels[kind] = {"mean": mean, "spread": spread, "energy": removed[rows].mean()}
    return {"observed": {name: figures[name][0] for name in FIGURES}, "energy": removed[0], "levels": levels}


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
    for batch in batches:
        mine = torch.from_numpy(np.isin(batch.indices.numpy(), chosen))
        features, indices = batch.features[mine.to(batch.features.device)].double(), batch.indices[mine]
        if not len(indices):
            continue
        logits, norm = features @ exact.T, torch.linalg.vector_norm(features, dim=1, keepdim=True)
        top, near = logits.topk(min(2, logits.shape[1]), dim=1).values, features.float() @ narrow.T
        z, found = {n: read(features) for n, read in translators.items()}, {"index": indices}
        found["margin"] = top[:, 0] - top[:, -1]
        for kind, direction in _directions(indices, null_space, seed).items():
            moved = [features + size * norm * direction for size in SIZES]
            figures = {f"angle {n}": [angle(z[n], read(x)) for x in moved] for n, read in translators.items()}
            figures["logit_change"] = [largest_change(x @ exact.T - logits, null_space) for x in moved]
            if kind == "null":
                changes = [largest_change(x.float() @ narrow.T - near, null_space).double() for x in moved]
                figures["logit_change_float32"] = changes
            found |= {f"{kind}/{name}": torch.stack(values, dim=1) for name, values in figures.items()}
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
