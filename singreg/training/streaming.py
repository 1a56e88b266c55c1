"""Keeping the loop's translator current: refits on the bank, an ensemble over its folds, streaming sums (METHOD section 6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from singreg.analysis.features import PassSettings
from singreg.analysis.old_fitting import fold_statistics, standardization
from singreg.data.datasets import ImageSplit
from singreg.data.embeddings import take_rows
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance
from singreg.ridge import RidgeStatistics
from singreg.training.config import LoopTranslatorConfig
from singreg.translator import LinearTranslator


class LoopTranslator:
    """What the loss reads: one translator or several, refitted in closed form at the ridge chosen in the beginning.

    With `folds` > 1 the loss gets one of each disjoint share of the bank, and `whole`, of all of it, is what reports call the
    loop's. With `stream_every` > 0 the bank's sums go on with the features of the training batches and the stored embeddings of
    the same pictures, the older ones fading by `forgetting` a step. A refresh begins both anew from the bank.

    Shapes: embeddings (N, n) of the bank, whose first pictures are the training part in its order.
    """

    def __init__(
        self,
        first: LinearTranslator,
        bank: ImageSplit,
        embeddings: np.ndarray,
        config: LoopTranslatorConfig,
        accelerator: Accelerator,
        *,
        invariance: Invariance = "logits",
        settings: PassSettings | None = None,
        seed: int = 0,
    ) -> None:
        self.whole, self.bank, self.embeddings, self.config = first, bank, embeddings, config
        self.accelerator, self.invariance, self.settings, self.seed = accelerator, invariance, settings or PassSettings(), seed
        self.statistics = RidgeStatistics(first.feature_dim, first.target_dim, device=first.matrix.device)

    @property
    def stateful(self) -> bool:
        """True where checkpoints need what is held here, and where the first refit comes before the first step (no shapes)."""
        return self.config.folds > 1 or self.config.stream_every > 0

    def current(self, sing: SingLoss) -> LinearTranslator:
        """The loop's translator as reports read it, matrix (n, m): the loss's own one, or with folds the whole bank's."""
        return self.whole if self.stateful else LinearTranslator(sing.matrix, sing.offset, self.whole.info)

    def refresh(self, classifier: Classifier, sing: SingLoss) -> None:
        """Encode the bank with today's classifier, in one pass, and give the loss what that gives (m features)."""
        parts = fold_statistics(
            classifier, self.bank, self.embeddings, self.config.folds, seed=self.seed, settings=self.settings,
            normalize_targets=self.whole.info.normalized_targets, description="refreshing the translator",
        )  # fmt: skip
        self.statistics = RidgeStatistics(*self.statistics.fz.shape, device=self.statistics.ff.device)
        for part in parts:
            self.statistics.merge(part)
        self.whole = self._solve(self.statistics, classifier)
        sing.set_translators([self.whole] if len(parts) == 1 else [self._solve(part, classifier) for part in parts])

    def observe(self, features: Tensor, indices: Tensor) -> None:
        """Add one forward's features (B, m) of the training pictures at indices (B,), each process its own, all processes' to all.

        The rows are gathered, not the sums: a batch is smaller than (m, m), and every process then holds the same at any moment.
        """
        if self.config.stream_every:
            features = self.accelerator.gather(features.detach())
            rows = self.accelerator.gather(indices.to(features.device)).cpu().numpy()
            targets = take_rows(self.embeddings, rows).to(features.device)
            if self.whole.info.normalized_targets:
                targets = torch.nn.functional.normalize(targets, dim=-1)
            self.statistics.update(features, targets)

    def step_ended(self, step: int, classifier: Classifier, sing: SingLoss) -> None:
        """Solve again where the step says so, then let everything seen so far fade (no shapes)."""
        if self.config.stream_every:
            if step % self.config.stream_every == 0:
                self.whole = self._solve(self.statistics, classifier)
                sing.set_translator(self.whole)
            self.statistics.decay(self.config.forgetting)

    def _solve(self, statistics: RidgeStatistics, classifier: Classifier) -> LinearTranslator:
        info = replace(self.whole.info, head_hash=classifier.head_hash())
        scale = standardization(classifier, "blocks" if info.by_block else info.standardized, self.invariance)
        solution = statistics.solve(info.ridge, standardize=scale)
        return LinearTranslator.from_solution(solution, info).to(self.whole.matrix.device)

    def state_dict(self) -> dict[str, Any]:
        """The whole bank's translator (n, m), (n,) and the sums, on the CPU: the same on every process."""
        tensors = {"matrix": self.whole.matrix, "offset": self.whole.offset, **self.statistics.state_dict()}
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, shapes (n, m), (n,) and the sums."""
        device = self.whole.matrix.device
        self.whole = LinearTranslator(state["matrix"], state["offset"], self.whole.info).to(device)
        self.statistics.load_state_dict(state)
