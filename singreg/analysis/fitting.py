"""Fit translators on a split (METHOD sections 2 and 8.6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import gathered, iterate_features
from singreg.data.embeddings import PassSettings
from singreg.data.splits import ImageSplit
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.ridge import DEFAULT_RIDGES, RidgeStatistics
from singreg.translator import LinearTranslator, TranslatorInfo, fit_on_halves, update_halves

IMAGES_PER_FEATURE = 6.0
"""With fewer images a feature an auditor is not identified well, AS⁻ reads too high, and a report makes no claim."""
AGREEMENT = 0.75
"""Below this two translators place the classes too differently (METHOD section 8.6)."""
ZERO_SHOT = 0.5
"""Share of the VLM's own zero-shot accuracy that must survive translation for AS to mean the class."""


@dataclass(frozen=True)
class FittedTranslator:
    """A translator, with the mean feature (m,) and the sums of the images behind it.

    `halves` are those over two disjoint halves of them, whose agreement chose the ridge.
    """

    translator: LinearTranslator
    mean: Tensor
    halves: tuple[RidgeStatistics, RidgeStatistics]

    @property
    def statistics(self) -> RidgeStatistics:
        """The sums over all images."""
        return self.halves[0] + self.halves[1]

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors by name, to be kept in a file."""
        linear = {"matrix": self.translator.matrix, "offset": self.translator.offset}
        halves = {f"{half}.{key}": each for half in (0, 1) for key, each in self.halves[half].state_dict().items()}
        return {**linear, "mean": self.mean, **halves}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], info: TranslatorInfo) -> "FittedTranslator":
        """Return what `state_dict` was taken of."""
        translator = LinearTranslator(state["matrix"], state["offset"], info)
        halves = [RidgeStatistics(*state["0.fz"].shape, device=state["matrix"].device) for _ in range(2)]
        for half, sums in enumerate(halves):
            sums.load_state_dict({key: state[f"{half}.{key}"] for key in sums.state_dict()})
        return cls(translator, state["mean"], (halves[0], halves[1]))


def fit_on_split(
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    *,
    ridges: Sequence[float] = DEFAULT_RIDGES,
    invariance: Invariance = "logits",
    info: TranslatorInfo | None = None,
    settings: PassSettings | None = None,
) -> "FittedTranslator":
    """Fit T on all images of a split in one pass, λ by the agreement of two halves. Exact over processes.

    The row-space and the null block of the head are brought to unit scale first, so that neither turning nor shrinking
    the null block moves the fit (METHOD section 8.6).

    Shape: embeddings (N, n).
    """
    basis = NullSpace.from_weight(classifier.weight, invariance=invariance, allow_empty=True).basis
    device = classifier.weight.device
    sizes = classifier.feature_dim, embeddings.shape[1]
    first, second = halves = RidgeStatistics(*sizes, device=device), RidgeStatistics(*sizes, device=device)
    for batch in gathered(iterate_features(classifier, split, embeddings, settings or PassSettings(), "fitting")):
        update_halves(halves, batch.features, batch.embeddings, batch.indices)  # the same on any number of processes
    translator = fit_on_halves(halves, ridges, basis, info)
    mean = (first.f + second.f) / (first.count + second.count)
    return FittedTranslator(translator.to(device), mean.float(), halves)


def translator_agreement(first: LinearTranslator, second: LinearTranslator, texts: Tensor) -> float:
    """Return the mean cosine over classes of the directions Aᵀ(t_k - t̄) of two translators; 1 is full agreement.

    The test of whether there were images enough (METHOD 8.6). Shape: texts (C, n); both A (n, m).
    """
    contrasts = (texts - texts.mean(0)).double()
    one, other = (contrasts @ translator.matrix.to(contrasts) for translator in (first, second))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=1).mean())
