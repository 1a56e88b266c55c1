"""Keeping the translator that the loss reads current while the classifier trains (METHOD section 6)."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import gathered, iterate_features
from singreg.analysis.fitting import FittedTranslator
from singreg.data.datasets import ImageSplit, Splits
from singreg.data.embeddings import PassSettings, take_rows
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator


class LoopTranslator:
    """Refits the loss's translator, metric and readout in closed form, at the ridge of the first.

    Args:
        fitted: on the starting classifier.
        embeddings: of the bank (N, n), or a placebo's in their place.
    """

    def __init__(
        self,
        fitted: FittedTranslator,
        splits: Splits,
        embeddings: np.ndarray,
        invariance: Invariance = "logits",
        passes: PassSettings | None = None,
    ) -> None:
        self.first, self.info, self.statistics = fitted.translator, fitted.translator.info, fitted.statistics
        self.bank, self.embeddings = loop_bank(splits, embeddings), embeddings
        self.invariance, self.passes = invariance, passes or PassSettings()

    def current(self, sing: SingLoss | None) -> LinearTranslator:
        """Return the translator the loss reads now; without a loss, the first."""
        return self.first if sing is None else LinearTranslator(sing.matrix, sing.offset, self.info)

    def seen(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the embeddings (B, n) of the training images at indices (B,): they are the bank's first."""
        return take_rows(self.embeddings, indices.cpu().numpy()).to(device)

    def begin(self, classifier: Classifier, sing: SingLoss, *, encode: bool) -> None:
        """Refit for the head that training starts with; `encode` where the embeddings are not those of the first."""
        (self.refresh if encode else self.refit)(classifier, sing)

    def refresh(self, classifier: Classifier, sing: SingLoss) -> None:
        """Encode the bank with today's classifier and refit on it."""
        fresh = RidgeStatistics(*self.statistics.fz.shape, device=classifier.weight.device)
        for batch in gathered(iterate_features(classifier, *self.bank, self.passes, "refreshing the translator")):
            fresh.update(batch.features, batch.embeddings)
        self.statistics = fresh.reduce()
        self.refit(classifier, sing)

    def refit(self, classifier: Classifier, sing: SingLoss) -> None:
        """Solve again for today's head, without encoding an image."""
        self.info = replace(self.info, head_hash=classifier.head_hash())
        basis = NullSpace.from_weight(classifier.weight, invariance=self.invariance, allow_empty=True).basis
        solution = self.statistics.solve(self.info.ridge, standardize=basis)
        sing.set_translator(LinearTranslator.from_solution(solution, self.info), self.statistics)


def loop_bank(splits: Splits, embeddings: np.ndarray) -> tuple[ImageSplit, np.ndarray]:
    """Return the images that the loop's translator is fitted on, with their rows of the bank's embeddings (N, n).

    They are the bank's without the training images, whose features are overfitted, if as many others are there.
    """
    bank, training = splits.bank, len(splits.train)
    start = training if len(bank) >= 2 * training else 0
    return bank.subset(np.arange(start, len(bank))), embeddings[start:]
