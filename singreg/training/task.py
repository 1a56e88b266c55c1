"""The trainable step as one module: classifier, cross-entropy and SingLoss inside a single forward, so that DDP sees all of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from singreg.losses import SingLoss
from singreg.models.classifier import Classifier


class FinetuneTask(nn.Module):
    """Cross-entropy, plus SingLoss when one is given (METHOD section 6).

    Everything trainable goes through this one `forward` (trap 4). With `clean` views the SING terms read those, the very
    pictures the vision-language model embedded, and cross-entropy the augmented ones.

    Shapes: images and clean (B, 3, H, W), labels (B,); returns {"loss": (), "ce": (), "correct": (), ...terms}.
    """

    def __init__(self, classifier: Classifier, sing: SingLoss | None = None, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.sing = sing
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
        """One step's loss and its named parts; all but "loss" detached."""
        features, logits = self.classifier.features_and_logits(images)
        ce = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        correct = (logits.detach().argmax(1) == labels).float().mean()
        if self.sing is None:
            return {"loss": ce, "ce": ce.detach(), "correct": correct}
        if clean is not None:
            features = self._clean_features(clean)
        loss = ce + self.sing(features, labels)
        return {"loss": loss, "ce": ce.detach(), "correct": correct, **self.sing.last_terms}

    def _clean_features(self, clean: Tensor) -> Tensor:
        """Features of the un-augmented view with dropout and batch norm in eval, as the translator was fitted."""
        was_training = self.classifier.training
        self.classifier.eval()
        try:
            return self.classifier.features(clean)
        finally:
            self.classifier.train(was_training)


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
