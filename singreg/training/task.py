"""The trainable step as one module: classifier, cross-entropy and SingLoss inside a single forward, so that DDP sees all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from singreg.losses import SingLoss
from singreg.models.classifier import Classifier


class FinetuneTask(nn.Module):
    """Cross-entropy, plus SingLoss when one is given (METHOD section 6), plus ½ · l2_sp · |θ - θ0|² over the trained backbone.

    Everything trainable goes through this one `forward`. With `clean` views the SING terms read those, the very
    pictures the vision-language model embedded, and cross-entropy the augmented ones.

    θ0 are the weights at construction. Checkpoints leave them out: every arm begins at the same classifier, so a resumed run
    builds the task before it loads one and finds the same θ0.

    `compile` hands timm's `forward_features` to torch.compile. The head stays as it is: its hook reads f there, and SingLoss
    differentiates its weight. Only `forward` runs compiled; copies of the classifier, measuring passes and files know nothing of it.

    Shapes: images and clean (B, 3, H, W), labels (B,); returns {"loss": (), "ce": (), "correct": (), ...terms}.
    """

    def __init__(
        self, classifier: Classifier, sing: SingLoss | None = None, *, label_smoothing: float = 0.0, l2_sp: float = 0.0,
        compile: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.classifier = classifier
        self.sing = sing
        self.label_smoothing, self.l2_sp = label_smoothing, l2_sp
        self.seen_features: Tensor | None = None  # (B, m), what the SING terms read last
        self._compiled: Callable[[Tensor], Tensor] | None = None
        if compile:
            self._compiled = torch.compile(classifier.model.forward_features)  # type: ignore[arg-type]
        for number, parameter in enumerate(trained_backbone(classifier) if l2_sp else []):
            self.register_buffer(f"start_{number}", parameter.detach().clone(), persistent=False)

    def forward(self, images: Tensor, labels: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
        """One step's loss and its named parts; all but "loss" detached."""
        with self._compiled_features():
            ce, sing, correct = self.losses(images, labels, clean)
        loss, terms = ce if sing is None else ce + sing, {} if self.sing is None else self.sing.last_terms
        if self.l2_sp:
            penalty = self._distance_penalty()
            loss, terms = loss + penalty, {**terms, "l2_sp": penalty.detach()}
        return {"loss": loss, "ce": ce.detach(), "correct": correct, **terms}

    def losses(self, images: Tensor, labels: Tensor, clean: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(cross-entropy (), λ · SING terms () or None, share of correct answers ()), the first two with their graph."""
        features, logits = self.classifier.features_and_logits(images)
        ce = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        correct = (logits.detach().argmax(1) == labels).float().mean()
        if self.sing is None:
            return ce, None, correct
        features = features if clean is None else self._clean_features(clean)
        self.seen_features = features.detach()
        return ce, self.sing(features, labels), correct

    @contextmanager
    def _compiled_features(self) -> Iterator[None]:
        """The model's own `forward` finds the compiled function for as long as this lasts; a copy made later finds the plain one."""
        if self._compiled is None:
            yield
            return
        own = vars(self.classifier.model)
        own["forward_features"] = self._compiled
        try:
            yield
        finally:
            del own["forward_features"]

    def _distance_penalty(self) -> Tensor:
        moved = [
            (parameter - self.get_buffer(f"start_{number}")).square().sum()
            for number, parameter in enumerate(trained_backbone(self.classifier))
        ]
        return 0.5 * self.l2_sp * torch.stack(moved).sum() if moved else next(self.classifier.parameters()).new_zeros(())

    def _clean_features(self, clean: Tensor) -> Tensor:
        """Features of the un-augmented view with dropout and batch norm in eval, as the translator was fitted."""
        was_training = self.classifier.training
        self.classifier.eval()
        try:
            return self.classifier.features(clean)
        finally:
            self.classifier.train(was_training)


def trained_backbone(classifier: Classifier) -> list[nn.Parameter]:
    """Parameters outside the head that train, in the module's order; empty where the head alone does (no shapes)."""
    head = {id(parameter) for parameter in classifier.head.parameters()}
    return [parameter for parameter in classifier.parameters() if parameter.requires_grad and id(parameter) not in head]


def train_head_only(classifier: Classifier) -> None:
    """Training mode as `classifier.tune("head")` has it: batch norms and dropout of the backbone rest (no shapes).

    For the steps of LP-FT in which the backbone stays in the optimiser but its gradients are thrown away.
    """
    backbone = trained_backbone(classifier)
    try:
        for parameter in backbone:
            parameter.requires_grad_(False)
        classifier.train()
    finally:
        for parameter in backbone:
            parameter.requires_grad_(True)


def parameter_groups(classifier: Classifier, *, learning_rate: float, head_factor: float, decay: float) -> list[dict[str, Any]]:
    """AdamW groups: head at `head_factor` times the rate; no decay on norms and biases (anything of shape (k,))."""
    head = {id(parameter) for parameter in classifier.head.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in classifier.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in head, parameter.ndim <= 1), []).append(parameter)
    if not groups:
        raise ValueError("nothing is left to train: every parameter of the classifier is frozen")
    return [
        {
            "params": parameters,
            "lr": learning_rate * (head_factor if is_head else 1.0),
            "weight_decay": 0.0 if is_flat else decay,
        }
        for (is_head, is_flat), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
