"""Which pictures are steered towards which prompts, and the rows (picture, prompt) that follow, in bounded chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.steering import SAME_PROMPT, in_its_own_dtype
from singreg.steering import AnyTranslator
from singreg.translator import LinearTranslator

CHUNK_ELEMENTS = 2**22  # of the widest array of a chunk of rows: 32 MiB in float64


@dataclass(frozen=True)
class PairPlan:
    """Source classes, target prompts, and which of the S x K pairs are steered.

    source_labels (S,) rows of the head, texts (K, n) unit rows of the target prompts, wanted (S, K) bool, chosen (N,) bool:
    the pictures of the part that are steered. sources, targets: their names.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_labels: Tensor
    texts: Tensor
    wanted: Tensor
    chosen: np.ndarray

    def select(self, batch: FeatureBatch) -> SelectedPictures:
        """The chosen pictures of a batch, b of its B, with the place of their class among the sources."""
        device = batch.features.device
        place = torch.full((int(max(int(self.source_labels.max()), int(batch.labels.max()))) + 1,), -1, device=device)
        place[self.source_labels.to(device)] = torch.arange(len(self.sources), device=device)
        mine = torch.from_numpy(self.chosen[batch.indices.numpy()])
        kept = mine.to(device)
        return SelectedPictures(batch.features[kept].double(), place[batch.labels[kept]], batch.indices[mine])


@dataclass(frozen=True)
class SelectedPictures:
    """Pictures to steer: features (b, m) float64, source (b,) into the plan's sources, indices (b,) into the part."""

    features: Tensor
    source: Tensor
    indices: Tensor

    def rows(self, plan: PairPlan, classes: int) -> Iterator[SteeringRows]:
        """Every (picture, wanted target) once, in chunks whose widest array stays bounded; C classes are ranked in each."""
        image, target = plan.wanted.to(self.source.device)[self.source].nonzero(as_tuple=True)
        limit = max(1, CHUNK_ELEMENTS // (self.features.shape[1] + plan.texts.shape[1] + classes))
        texts = plan.texts.to(self.features)
        for start in range(0, len(image), limit):
            here, there = image[start : start + limit], target[start : start + limit]
            yield SteeringRows(here, self.source[here], there, self.features[here], texts[there])


@dataclass(frozen=True)
class SteeringRows:
    """A chunk of R (picture, target) rows: image (R,) place among the selected, source, target (R,), features (R, m), text (R, n)."""

    image: Tensor
    source: Tensor
    target: Tensor
    features: Tensor
    text: Tensor


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
    """Pair every source class with every target prompt but its own; a smaller number of pairs is drawn evenly over sources.

    Shapes: labels (N,) of the part's pictures, class_texts (C, n) and target_texts (K, n) unit rows.

    Raises:
        ValueError: source classes without pictures, and sources whose every target is their own prompt, all named at once.

    Example:
        >>> plan = plan_pairs(np.array([0, 1, 1]), ["cat", "dog"], torch.eye(3)[:2], [0, 1], ["dog", "a hat"], torch.eye(3)[1:])
        >>> plan.wanted.tolist(), plan.chosen.tolist()
        ([[True, True], [False, True]], [True, True, True])
    """
    own = class_texts[list(source_labels)].double() @ target_texts.double().T >= SAME_PROMPT
    wanted = ~own
    problems = []
    empty = [class_names[label] for label in source_labels if not (labels == label).any()]
    if empty:
        problems.append(f"source classes without test pictures: {', '.join(empty)}")
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
    return PairPlan(names, tuple(targets), torch.tensor(list(source_labels)), target_texts, wanted, chosen)


def _drawn(wanted: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the wanted pairs (S, K), every source's first random target before any source's second."""
    rng = np.random.default_rng(seed)
    draw = np.where(wanted.cpu().numpy(), rng.random(wanted.shape), np.inf)
    turn = np.argsort(np.argsort(draw, axis=1), axis=1) + rng.random((len(wanted), 1))
    order = np.argsort(np.where(np.isfinite(draw), turn, np.inf), axis=None)[: min(count, int(wanted.sum()))]
    kept = np.zeros(wanted.numel(), dtype=bool)
    kept[order] = True
    return torch.from_numpy(kept.reshape(wanted.shape)).to(wanted.device)


class Along:
    """Cosines of T(f + ε d) to the target prompt and to all class prompts, for many ε.

    A linear translator needs two products in all, since then every cosine is a ratio of polynomials in ε; any other is called
    once for each ε. In float64 an arccos of these is good to 1e-6 degrees even at 0.

    Shapes: f and d (R, m), text (R, n), class_texts (C, n), unit rows.
    """

    def __init__(
        self, translator: AnyTranslator, features: Tensor, direction: Tensor, text: Tensor, class_texts: Tensor
    ) -> None:
        self._translate, self._features, self._direction = in_its_own_dtype(translator), features, direction
        self._text, self._class_texts = text, class_texts
        self._linear: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        if isinstance(translator, LinearTranslator):
            z, u = translator(features), direction @ translator.matrix.to(direction).T
            squares = ((z * z).sum(-1), (z * u).sum(-1), (u * u).sum(-1))
            self._linear = (self._products(z), self._products(u), *squares)

    def _products(self, z: Tensor) -> Tensor:
        return torch.cat([(z * self._text).sum(-1, keepdim=True), z @ self._class_texts.T], dim=1)

    @torch.no_grad()
    def cosines(self, step: Tensor) -> Tensor:
        """Target prompt first, then the C classes. Shapes: step (R,) to (R, 1 + C)."""
        if self._linear is None:
            z = self._translate(self._features + step[:, None] * self._direction)
            return self._products(torch.nn.functional.normalize(z, dim=-1))
        start, travel, alpha, beta, gamma = self._linear
        length = (alpha + step * (2 * beta + step * gamma)).clamp_min(torch.finfo(step.dtype).tiny).sqrt()
        return (start + step[:, None] * travel) / length[:, None]
