"""Keeping the translator that the loss reads current while the classifier trains (METHOD section 6)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.features import PassSettings, gathered, iterate_features
from singreg.config import LoopTranslatorConfig
from singreg.data.datasets import ImageSplit
from singreg.data.embeddings import take_rows
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator

FORGETTING = 0.99  # a step of streaming multiplies the sums by this, so that features of an older backbone fade


class LoopTranslator:
    """Keeps the loss's translator current, at the ridge of the `first`: refits on the bank, and streaming sums.

    With `stream_every` > 0 the bank's sums go on with the features of the training batches and the stored embeddings
    (N, n) of the same images, the bank's first; older ones fade at every step, and a refresh begins them anew.
    """

    def __init__(
        self,
        first: LinearTranslator,
        bank: ImageSplit,
        embeddings: np.ndarray,
        config: LoopTranslatorConfig,
        accelerator: Accelerator,
        invariance: Invariance = "logits",
        passes: PassSettings | None = None,
    ) -> None:
        self.info, self.bank, self.embeddings, self.config = first.info, bank, embeddings, config
        self.accelerator, self.invariance, self.passes = accelerator, invariance, passes or PassSettings()
        self.statistics = RidgeStatistics(first.feature_dim, first.target_dim, device=first.matrix.device)
        self.streams = config.stream_every > 0

    def current(self, sing: SingLoss | None) -> dict[str, LinearTranslator]:
        """Return the translator the loss reads now, as "loop"; nothing for the control."""
        return {} if sing is None else {"loop": LinearTranslator(sing.matrix, sing.offset, self.info)}

    def refresh(self, classifier: Classifier, sing: SingLoss) -> None:
        """Encode the bank with today's classifier and give the loss the translator fitted on it."""
        self.statistics = RidgeStatistics(*self.statistics.fz.shape, device=self.statistics.fz.device)
        batches = iterate_features(classifier, self.bank, self.embeddings, self.passes, "refreshing the translator")
        for batch in gathered(batches):
            self.statistics.update(batch.features, batch.embeddings)
        self.statistics.reduce()
        self._solve(classifier, sing)

    def observe(self, features: Tensor, indices: Tensor) -> None:
        """Add one forward's features (B, m) of the training images at indices (B,), of all processes, to the sums."""
        features = self.accelerator.gather(features.detach())  # rows, not sums: a batch is smaller than (m, m)
        rows = self.accelerator.gather(indices.to(features.device)).cpu().numpy()
        self.statistics.update(features, take_rows(self.embeddings, rows).to(features.device))

    def step_ended(self, step: int, classifier: Classifier, sing: SingLoss) -> None:
        """Solve again where the step says so, then let everything seen so far fade."""
        if step % self.config.stream_every == 0:
            self._solve(classifier, sing)
        self.statistics.decay(FORGETTING)

    def _solve(self, classifier: Classifier, sing: SingLoss) -> None:
        self.info = replace(self.info, head_hash=classifier.head_hash())
        basis = NullSpace.from_weight(classifier.weight, invariance=self.invariance, allow_empty=True).basis
        solution = self.statistics.solve(self.info.ridge, standardize=basis)
        sing.set_translator(LinearTranslator.from_solution(solution, self.info))
