"""Pictures of the shift: the gallery's pictures nearest to T(f), to T(f~) and to a steered feature (METHOD section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.levels.image_results import Neighbour, PictureShift
from singreg.analysis.levels.pairs import EquivalentPairs
from singreg.data.datasets import ImageSplit
from singreg.functional import pairwise_angles, unit_rows

CHUNK = 4096  # gallery pictures at a time


@dataclass(frozen=True)
class Gallery:
    """Pictures to look at: a part and its VLM embeddings (G, n), which may be memory-mapped; they are read in chunks.

    Raises:
        ValueError: part and embeddings differ in length.
    """

    part: ImageSplit
    embeddings: np.ndarray

    def __post_init__(self) -> None:
        """Raise a ValueError unless embeddings are (G, n)."""
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.part):
            raise ValueError(f"the gallery {self.part.name!r} has {len(self.part)} pictures and embeddings {self.embeddings.shape}")

    @torch.no_grad()
    def nearest(self, queries: Tensor, k: int, exclude: np.ndarray) -> list[tuple[Neighbour, ...]]:
        """The k pictures at the smallest angle to every query, nearest first; none that is the query's own picture.

        Shapes: queries (Q, n) in the VLM's space; exclude (Q, 32) uint8, the SHA-256 of the picture each query came from (all
        copies of it are left out). Angles in degrees, in float64; equal ones go by the gallery's order.

        Raises:
            ValueError: k is below 1 or more than the pictures left for a query, or widths that differ.
        """
        self._check(queries, k, exclude)
        unit = unit_rows(queries.double().cpu())
        best, places = torch.full((len(unit), 0), torch.inf, dtype=torch.float64), torch.zeros(len(unit), 0, dtype=torch.int64)
        for start in range(0, len(self.part), CHUNK):
            stop = min(start + CHUNK, len(self.part))
            rows = unit_rows(torch.from_numpy(np.asarray(self.embeddings[start:stop], dtype=np.float64)))
            angles, _ = pairwise_angles(unit, rows)
            angles[torch.from_numpy(self._same(exclude, start, stop))] = torch.inf
            joined = torch.cat([best, angles], dim=1)
            seen = torch.cat([places, torch.arange(start, stop).expand(len(unit), -1)], dim=1)
            best, order = (part[:, :k] for part in joined.sort(dim=1, stable=True))
            places = seen.gather(1, order)
        return [
            tuple(Neighbour(place, self.part.identifier(place), angle) for place, angle in zip(row, degrees, strict=True))
            for row, degrees in zip(places.tolist(), best.tolist(), strict=True)
        ]

    def _same(self, exclude: np.ndarray, start: int, stop: int) -> np.ndarray:
        """(Q, chunk) bool: which pictures of the chunk are the query's own."""
        same: np.ndarray = (self.part.digests[None, start:stop] == exclude[:, None]).all(-1)
        return same

    def _check(self, queries: Tensor, k: int, exclude: np.ndarray) -> None:
        width = self.embeddings.shape[1]
        if queries.ndim != 2 or queries.shape[1] != width or exclude.shape != (len(queries), 32):
            raise ValueError(f"expected queries (Q, {width}) and digests (Q, 32), got {tuple(queries.shape)} and {exclude.shape}")
        own = max((int(self._same(row[None], 0, len(self.part)).sum()) for row in exclude), default=0)
        if not 1 <= k <= len(self.part) - own:
            without = f", {own} of them the picture itself" if own else ""
            raise ValueError(
                f"{k} nearest pictures were asked of the gallery {self.part.name!r}, which has {len(self.part)}{without}: "
                "ask for fewer (at least 1), or give a larger gallery"
            )


def nearest_pictures(
    features: Tensor,
    indices: Sequence[int],
    part: ImageSplit,
    gallery: Gallery,
    *,
    pairs: EquivalentPairs,
    k: int = 4,
    steered: Tensor | None = None,
) -> list[PictureShift]:
    """For every picture the k gallery pictures nearest to T(f), to T(f~) and, when given, to T of its steered feature.

    Shapes: features (Q, m) of the pictures `indices` of `part`, steered (Q, m); angles in degrees. A picture that is in the
    gallery itself is left out of its own neighbours, by content.

    Raises:
        ValueError: the gallery has fewer than k other pictures, or shapes that do not fit.
    """
    if len(features) != len(indices) or (steered is not None and steered.shape != features.shape):
        raise ValueError(
            f"{len(indices)} pictures need features ({len(indices)}, m) and steered ones of the same shape, got {tuple(features.shape)}"
            f"{'' if steered is None else f' and {tuple(steered.shape)}'}"
        )
    places = np.asarray(indices, dtype=np.int64)
    digests = part.digests[places]
    before, after = (gallery.nearest(z, k, digests) for z in pairs(features.double()))
    moved: Sequence[tuple[Neighbour, ...] | None] = [None] * len(places)
    if steered is not None:
        moved = gallery.nearest(pairs(steered.double())[0], k, digests)
    return [
        PictureShift(int(index), part.identifier(int(index)), first, last, further)
        for index, first, last, further in zip(places, before, after, moved, strict=True)
    ]
