"""The chance level of every score: random null spaces and shuffled texts, in one pass (METHOD sections 8.2 and 8.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.chance_results import FIGURES, KINDS, ChanceLevel, ChanceReport, ChanceScores
from singreg.analysis.features import FeatureBatch
from singreg.metrics import COLUMNS, score_columns, summarize_columns
from singreg.nullspace import NullSpace, RandomSubspace, matched_coefficients
from singreg.steering import AnyTranslator
from singreg.translator import LinearTranslator
from singreg.utils import all_reduce_sum


def measure_chance(
    batches: Iterable[FeatureBatch],
    *,
    texts: Tensor,
    null_space: NullSpace,
    translators: Mapping[str, AnyTranslator],
    mean: Tensor,
    draws: int = 8,
    seed: int = 0,
) -> dict[str, ChanceReport]:
    """Scores of the real removal beside `draws` random ones of each kind, for the paper's removal and the centred one.

    "dimension": Π_n becomes the projection P on a uniformly random subspace of the same dimension. "energy": every picture is
    displaced by δ = α g + β P g with |δ| = |Π_n g| and δ·g = |δ|² (see `matched_coefficients`), so the same energy leaves every
    single picture, at the same angle to it, in a random direction. g is f, or f - mean for the centred removal. "texts": the
    real removal read against the text of another class (a random cycle through all classes), IS unchanged.

    One pass over this process's batches of labelled pictures; exact over processes. Memory: `draws` bases (m, k) with
    k = min(nullity, rank), and for a linear translator their images (n, k); nothing grows with the pictures.

    Shapes: texts (C, n) unit rows, mean (m,). Angles in degrees.

    Raises:
        ValueError: no null space, fewer than 2 classes or draws, no pictures, or unlabelled ones.

    Example:
        >>> from singreg.translator import LinearTranslator
        >>> f, z = torch.randn(64, 4), torch.randn(64, 3)
        >>> batch = FeatureBatch(f, f[:, :2], z, torch.arange(64) % 2, torch.arange(64))
        >>> report = measure_chance([batch], texts=torch.eye(3)[:2], null_space=NullSpace.from_weight(torch.eye(4)[:2]), mean=f.mean(0),
        ...                         translators={"T": LinearTranslator(torch.randn(3, 4), torch.zeros(3))}, draws=2)["T"]
        >>> report.images, sorted(report.paper.levels), report.dimensions
        (64, ['dimension', 'energy', 'texts'], 2)
    """
    if null_space.nullity == 0:
        raise ValueError("this head has no null space, so there is no removal whose chance level could be measured")
    if len(texts) < 2 or draws < 2:
        raise ValueError(f"chance levels need at least 2 classes and 2 draws, got texts {tuple(texts.shape)} and {draws} draws")
    width = null_space.basis.shape[0]
    subspaces = [RandomSubspace.draw(width, null_space.nullity, seed=(seed, draw)) for draw in range(draws)]
    orders = [_cycle(len(texts), seed=(seed, draw)) for draw in range(draws)]
    readers = {name: _Reader(translator, texts, subspaces, orders) for name, translator in translators.items()}
    energy = torch.zeros(2, 1 + 2 * draws, dtype=torch.float64)
    whole = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            if len(batch.labels) and int(batch.labels.min()) < 0:
                raise ValueError("chance levels are for labelled pictures; a picture without a label has no text of its own")
            paper = _Removal.of(batch.features, null_space, subspaces)
            removals = [paper, paper.centred(mean, null_space)]
            for place, removal in enumerate(removals):
                energy[place] += removal.energy.cpu()
                whole[place] += removal.squared.double().sum().cpu()
                for reader in readers.values():
                    reader.update(place, removal, batch.labels)
    energy, whole = all_reduce_sum(energy), all_reduce_sum(whole)
    removed = energy / whole[:, None]
    return {name: reader.result(removed, draws, seed, null_space) for name, reader in readers.items()}


def _cycle(classes: int, *, seed: int | Sequence[int]) -> Tensor:
    """A random order of all classes in which each is followed by another: (C,) int64 without a fixed point."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(classes))
    followed = torch.empty_like(order)
    followed[order] = order.roll(1)
    return followed


class _Removal:
    """One batch under one kind of removal: g = f - origin, its null part, and its coefficients in every random basis."""

    def __init__(
        self, features: Tensor, origin: Tensor, null: Tensor, coefficients: list[Tensor], subspaces: list[RandomSubspace]
    ) -> None:
        self.features, self.origin, self.null = features, origin, null
        self.coefficients, self.subspaces = coefficients, subspaces
        self.whole = features - origin
        self.squared = self.whole.square().sum(1)
        inside = [c.square().sum(1) for c in self.coefficients]
        random = [self.squared - i if s.complement else i for s, i in zip(subspaces, inside, strict=True)]
        safe = self.squared.clamp_min(torch.finfo(self.squared.dtype).tiny)
        share = (self.null.square().sum(1) / safe).clamp(0, 1)
        self.matched = [matched_coefficients(share, (r / safe).clamp(0, 1)) for r in random]
        removed = [share * self.squared, *random, *(self._matched_energy(r, m) for r, m in zip(random, self.matched, strict=True))]
        self.energy = torch.stack([r.double().sum() for r in removed])

    @classmethod
    def of(cls, features: Tensor, space: NullSpace, subspaces: list[RandomSubspace]) -> _Removal:
        """The paper's removal, g = f."""
        coefficients = [features @ subspace.basis.to(features) for subspace in subspaces]
        return cls(features, torch.zeros_like(features[0]), space.component(features), coefficients, subspaces)

    def centred(self, mean: Tensor, space: NullSpace) -> _Removal:
        """The same batch with g = f - mean: every projection of it follows from the mean's, without another product."""
        mean = mean.to(self.features)
        shifted = [c - mean @ s.basis.to(mean) for c, s in zip(self.coefficients, self.subspaces, strict=True)]
        return _Removal(self.features, mean, self.null - space.component(mean), shifted, self.subspaces)

    def _matched_energy(self, random: Tensor, matched: tuple[Tensor, Tensor]) -> Tensor:
        """|α g + β P g|², (B,): measured, not assumed."""
        alpha, beta = matched
        return alpha**2 * self.squared + (2 * alpha * beta + beta**2) * random


class _Reader:
    """One translator's running sums: table (2 removals, 1 + 3 draws, 10 columns, C classes), float64."""

    def __init__(self, translator: AnyTranslator, texts: Tensor, subspaces: list[RandomSubspace], orders: list[Tensor]) -> None:
        self.translator, self.texts, self.subspaces, self.orders = translator, texts, subspaces, orders
        self.linear = translator if isinstance(translator, LinearTranslator) else None
        self.images = [] if self.linear is None else [self.linear.matrix.double() @ s.basis.to(texts.device) for s in subspaces]
        slots = 1 + len(KINDS) * len(subspaces)
        self.table = torch.zeros(2, slots, len(COLUMNS), len(texts), dtype=torch.float64, device=texts.device)

    def update(self, place: int, removal: _Removal, labels: Tensor) -> None:
        """Add a batch's ten columns for the real removal, then draw by draw for each kind of chance; labels (B,)."""
        z = self.translator(removal.features)
        real = self.translator(removal.features - removal.null)
        texts, draws = self.texts.to(z), len(self.subspaces)
        self._add(place, 0, score_columns(z, real, texts[labels]), labels)
        for draw in range(draws):
            whole, matched = self._random(removal, z, draw)
            shuffled = texts[self.orders[draw].to(labels.device)[labels]]
            columns = (score_columns(z, whole, texts[labels]), score_columns(z, matched, texts[labels]), score_columns(z, real, shuffled))
            for kind, found in enumerate(columns):
                self._add(place, 1 + kind * draws + draw, found, labels)

    def _add(self, place: int, slot: int, columns: Tensor, labels: Tensor) -> None:
        self.table[place, slot].index_add_(1, labels, columns)

    def _random(self, removal: _Removal, z: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """(T(f - P g), T(f - α g - β P g)), each (B, n)."""
        subspace, coefficients = self.subspaces[draw], removal.coefficients[draw]
        alpha, beta = (value[:, None] for value in removal.matched[draw])
        if self.linear is None:
            part = subspace.to(removal.features).component(removal.whole)
            return self.translator(removal.features - part), self.translator(removal.features - alpha * removal.whole - beta * part)
        # A P g = A B Bᵀ g through thin products: the displaced features themselves are never formed.
        moved = coefficients @ self.images[draw].to(coefficients).T
        along = z - self.linear(removal.origin)
        moved = along - moved if subspace.complement else moved
        return z - moved, z - alpha * along - beta * moved

    def result(self, removed: Tensor, draws: int, seed: int, space: NullSpace) -> ChanceReport:
        """Figures over all processes; removed (2, 1 + 2 draws) energy shares."""
        table = all_reduce_sum(self.table)
        images = int(table[0, 0, 0].sum())
        if not images:
            raise ValueError("no process had a picture to measure chance levels on")
        paper, centred = (_scores(table[place], removed[place], draws) for place in (0, 1))
        return ChanceReport(images, draws, seed, space.basis.shape[0], space.nullity, paper, centred)


def _scores(table: Tensor, removed: Tensor, draws: int) -> ChanceScores:
    """From one removal's sums (1 + 3 draws, 10, C) and energy shares (1 + 2 draws,)."""
    overall = summarize_columns(table.sum(2).T)
    by_class = summarize_columns(table.transpose(0, 1))
    levels = {}
    for place, kind in enumerate(KINDS):
        rows = slice(1 + place * draws, 1 + (place + 1) * draws)
        energy = removed[:1] if kind == "texts" else removed[rows]
        levels[kind] = ChanceLevel(
            mean={name: float(overall[name][rows].mean()) for name in FIGURES},
            spread={name: float(overall[name][rows].std()) for name in FIGURES},
            per_class={name: _plain(by_class[name][rows].mean(0)) for name in FIGURES},
            energy=float(energy.mean()),
        )
    return ChanceScores({name: float(overall[name][0]) for name in FIGURES}, float(removed[0]), levels)


def _plain(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
