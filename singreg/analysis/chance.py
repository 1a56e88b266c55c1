"""The chance level of every score: random null spaces and shuffled texts, in one pass (METHOD sections 8.2 and 8.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.metrics import COLUMNS, score_columns, summarize_columns
from singreg.nullspace import NullSpace, RandomSubspace, matched_coefficients
from singreg.steering import AnyTranslator
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_sum, plain

FIGURES = ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "kappa")
KINDS = ("dimension", "energy", "texts")
Spaces = list[RandomSubspace]


def measure_chance(
    batches: Iterable[FeatureBatch],
    *,
    texts: Tensor,
    null_space: NullSpace,
    translators: Mapping[str, AnyTranslator],
    mean: Tensor,
    draws: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measure the scores of the real removal beside `draws` random ones of each kind, for both removals.

    "dimension": Π_n becomes the projection P on a uniformly random subspace of the same dimension. "energy": every
    image is displaced by δ = α g + β P g with |δ| = |Π_n g| and δ·g = |δ|² (see `matched_coefficients`), so the same
    energy leaves every image, at the same angle to it, in a random direction; g is f, or f - mean where centred.
    "texts": the real removal read against the text of another class (a random cycle through all classes).

    One pass over this process's batches of labelled images; exact over processes.

    Args:
        mean: (m,) feature mean of the centred removal.

    Shape: texts (C, n) unit rows.

    Returns:
        By translator the settings, and for the removals "paper" and "centred" the observed figures, the energy share
        removed, and levels by kind: mean and spread (standard deviation) over draws, per_class means and energy.
    """
    if null_space.nullity == 0:
        raise ValueError("this head has no null space, so there is no removal whose chance level could be measured")
    width = null_space.basis.shape[0]
    subspaces = [RandomSubspace.draw(width, null_space.nullity, seed=(seed, draw)) for draw in range(draws)]
    orders = [_cycle(len(texts), seed=(seed, draw)) for draw in range(draws)]
    readers = {name: _Reader(translator, texts, subspaces, orders) for name, translator in translators.items()}
    energy = torch.zeros(2, 1 + 2 * draws, dtype=torch.float64)
    whole = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            paper = _Removal.of(batch.features, null_space, subspaces)
            for place, removal in enumerate((paper, paper.centred(mean, null_space))):
                energy[place] += removal.energy.cpu()
                whole[place] += removal.squared.double().sum().cpu()
                for reader in readers.values():
                    reader.update(place, removal, batch.labels)
    removed = all_reduce_sum(energy) / all_reduce_sum(whole)[:, None]
    facts = {"draws": draws, "seed": seed, "features": width, "dimensions": null_space.nullity}
    return {name: reader.result(removed, facts) for name, reader in readers.items()}


def _cycle(classes: int, *, seed: int | Sequence[int]) -> Tensor:
    """A random order of all classes in which each is followed by another: (C,) int64 without a fixed point."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(classes))
    followed = torch.empty_like(order)
    followed[order] = order.roll(1)
    return followed


class _Removal:
    """One batch under one removal: g = f - origin, its null part, and its coefficients in every random basis."""

    def __init__(self, features: Tensor, origin: Tensor, null: Tensor, inside: list[Tensor], subspaces: Spaces) -> None:
        self.features, self.origin, self.null = features, origin, null
        self.coefficients, self.subspaces = inside, subspaces
        self.whole = features - origin
        self.squared = self.whole.square().sum(1)
        sums = [c.square().sum(1) for c in inside]
        random = [self.squared - i if s.complement else i for s, i in zip(subspaces, sums, strict=True)]
        safe = self.squared.clamp_min(torch.finfo(self.squared.dtype).tiny)
        share = (self.null.square().sum(1) / safe).clamp(0, 1)
        self.matched = [matched_coefficients(share, (r / safe).clamp(0, 1)) for r in random]
        # |α g + β P g|² is measured, not assumed.
        energy = [a**2 * self.squared + (2 * a * b + b**2) * r for r, (a, b) in zip(random, self.matched, strict=True)]
        self.energy = torch.stack([r.double().sum() for r in (share * self.squared, *random, *energy)])

    @classmethod
    def of(cls, features: Tensor, space: NullSpace, subspaces: Spaces) -> _Removal:
        """The paper's removal, g = f."""
        coefficients = [features @ subspace.basis.to(features) for subspace in subspaces]
        return cls(features, torch.zeros_like(features[0]), space.component(features), coefficients, subspaces)

    def centred(self, mean: Tensor, space: NullSpace) -> _Removal:
        """The same batch with g = f - mean: its projections follow from the mean's, without another product."""
        mean = mean.to(self.features)
        shifted = [c - mean @ s.basis.to(mean) for c, s in zip(self.coefficients, self.subspaces, strict=True)]
        return _Removal(self.features, mean, self.null - space.component(mean), shifted, self.subspaces)


class _Reader:
    """One translator's running sums: table (2 removals, 1 + 3 draws, 10 columns, C classes), float64."""

    def __init__(self, translator: AnyTranslator, texts: Tensor, subspaces: Spaces, orders: list[Tensor]) -> None:
        self.translator, self.texts, self.subspaces, self.orders = translator, texts, subspaces, orders
        self.linear = translator if isinstance(translator, LinearTranslator) else None
        matrix = None if self.linear is None else self.linear.matrix.double()
        self.products = [] if matrix is None else [matrix @ s.basis.to(texts.device) for s in subspaces]
        slots = 1 + len(KINDS) * len(subspaces)
        self.table = torch.zeros(2, slots, len(COLUMNS), len(texts), dtype=torch.float64, device=texts.device)

    def update(self, place: int, removal: _Removal, labels: Tensor) -> None:
        """Add a batch's ten columns for the real removal, then draw by draw for each kind of chance."""
        z = self.translator(removal.features)
        real = self.translator(removal.features - removal.null)
        texts, draws = self.texts.to(z), len(self.subspaces)
        self.table[place, 0].index_add_(1, labels, score_columns(z, real, texts[labels]))
        for draw in range(draws):
            whole, matched = self._random(removal, z, draw)
            shuffled = texts[self.orders[draw].to(labels.device)[labels]]
            for kind, (z_eq, text) in enumerate(((whole, texts[labels]), (matched, texts[labels]), (real, shuffled))):
                self.table[place, 1 + kind * draws + draw].index_add_(1, labels, score_columns(z, z_eq, text))

    def _random(self, removal: _Removal, z: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """(T(f - P g), T(f - α g - β P g)), each (B, n)."""
        subspace, f = self.subspaces[draw], removal.features
        alpha, beta = (value[:, None] for value in removal.matched[draw])
        if self.linear is None:
            part = subspace.component(removal.whole)
            return self.translator(f - part), self.translator(f - alpha * removal.whole - beta * part)
        # A P g = A B Bᵀ g through thin products: the displaced features themselves are never formed.
        moved = removal.coefficients[draw] @ self.products[draw].to(f).T
        along = z - self.linear(removal.origin)
        moved = along - moved if subspace.complement else moved
        return z - moved, z - alpha * along - beta * moved

    def result(self, removed: Tensor, facts: Mapping[str, int]) -> dict[str, Any]:
        """Figures over all processes; removed (2, 1 + 2 draws) energy shares."""
        table = all_reduce_sum(self.table)
        images = int(table[0, 0, 0].sum())
        both = {name: _scores(table[place], removed[place]) for place, name in enumerate(("paper", "centred"))}
        found: dict[str, Any] = plain({"images": images, **facts, **both})
        return found


def _scores(table: Tensor, removed: Tensor) -> dict[str, Any]:
    """From one removal's sums (1 + 3 draws, 10, C) and energy shares (1 + 2 draws,)."""
    overall, by_class = summarize_columns(table.sum(2).T), summarize_columns(table.transpose(0, 1))
    draws, levels = len(removed) // 2, {}
    for place, kind in enumerate(KINDS):
        rows = slice(1 + place * draws, 1 + (place + 1) * draws)
        levels[kind] = {
            "mean": {name: overall[name][rows].mean() for name in FIGURES},
            "spread": {name: overall[name][rows].std() for name in FIGURES},
            "per_class": {name: by_class[name][rows].mean(0) for name in FIGURES},
            "energy": removed[0] if kind == "texts" else removed[rows].mean(),
        }
    return {"observed": {name: overall[name][0] for name in FIGURES}, "energy": removed[0], "levels": levels}
