"""Keeping the translator that the loss reads current while the classifier trains (METHOD section 6)."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import gathered, iterate_features
from singreg.analysis.fitting import FittedTranslator
from singreg.data.embeddings import take_rows
from singreg.data.splits import ImageSplit, Splits
from singreg.losses import SingLoss
from singreg.ridge import RidgeStatistics
from singreg.setup import Setup
from singreg.translator import LinearTranslator


class LoopTranslator:
    """Refits the loss's translator, metric and readout for the setup's classifier, at the ridge of the first, `fitted`.

    `embeddings` (N, n) are those of the bank, or a placebo's in their place.
    """

    def __init__(self, fitted: FittedTranslator, setup: Setup, embeddings: np.ndarray) -> None:
        self.first, self.info, self.statistics = fitted.translator, fitted.translator.info, fitted.statistics
        self.setup, self.bank, self.embeddings = setup, loop_bank(setup.splits, embeddings), embeddings

    def current(self, sing: SingLoss | None) -> LinearTranslator:
        """Return the translator the loss reads now; without a loss, the first."""
        return self.first if sing is None else LinearTranslator(sing.matrix, sing.offset, self.info)

    def seen(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the embeddings (B, n) of the training images at indices (B,): they are the bank's first."""
        return take_rows(self.embeddings, indices.cpu().numpy()).to(device)

    def refresh(self, sing: SingLoss) -> None:
        """Encode the bank with today's classifier and refit on it."""
        setup, said = self.setup, "refreshing the translator"
        fresh = RidgeStatistics(*self.statistics.fz.shape, device=setup.texts.device)
        for batch in gathered(iterate_features(setup.classifier, *self.bank, setup.passes, said)):
            fresh.update(batch.features, batch.embeddings)
        self.statistics = fresh.reduce()
        self.refit(sing)

    def refit(self, sing: SingLoss) -> None:
        """Solve again for today's head, without encoding an image."""
        self.info = replace(self.info, head_hash=self.setup.classifier.head_hash())
        solution = self.statistics.solve(self.info.ridge, standardize=self.setup.space.basis)
        sing.set_translator(LinearTranslator.from_solution(solution, self.info), self.statistics)


def loop_bank(splits: Splits, embeddings: np.ndarray) -> tuple[ImageSplit, np.ndarray]:
    """Return the images that the loop's translator is fitted on, with their rows of the bank's embeddings (N, n).

    They are the bank's without the training images, whose features are overfitted, if as many others are there.
    """
    bank, training = splits.bank, len(splits.train)
    start = training if len(bank) >= 2 * training else 0
    return bank.subset(np.arange(start, len(bank))), embeddings[start:]
