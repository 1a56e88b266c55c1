"""What every classifier promises, checked on whatever model is given."""

from __future__ import annotations

import timm
import torch
from torch import Tensor

from singreg.models.classifier import Classifier
from tests.models.fakes import images


def check_contract(classifier: Classifier, x: Tensor) -> None:
    """features(x) then logits(features), and W f + b, are what the model itself returns in eval mode.

    The head is drawn anew: some begin at zero, and an untrained network's features may be of size 1e-12, so that its logits
    are little but the bias. The bias gets the scale of W f, and the tolerance is relative to that scale.
    """
    assert not any(module.training for module in classifier.modules())
    with torch.no_grad():
        weight = classifier.head.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        features = classifier.features(x)
        linear = features @ classifier.weight.T
        scale = float(linear.abs().max())
        assert scale > 0
        assert (features[0] - features[1]).abs().max() > 0
        bias = classifier.bias
        if bias is not None:
            bias.copy_(torch.linspace(-scale, scale, len(bias)))
        expected = classifier.model(x)
        both = classifier.features_and_logits(x)
        assert torch.equal(both[0], features)
        assert torch.equal(both[1], expected)
        assert torch.equal(classifier(x), expected)
        for mine in (classifier.logits(features), linear + (0 if bias is None else bias)):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * scale)
    assert features.shape == (len(x), classifier.feature_dim)
    assert classifier.weight.shape == (expected.shape[1], features.shape[1]) == (classifier.num_classes, classifier.feature_dim)


def smallest_that_runs(name: str, classes: int = 7) -> tuple[Classifier, Tensor]:
    """An untrained timm model and pictures of the smallest side that it takes."""
    sizes = sorted({32, 96, 160, timm.get_pretrained_cfg(name).input_size[-1]})  # type: ignore[union-attr]
    for size in sizes:
        torch.manual_seed(0)
        try:
            classifier = Classifier.from_timm(name, pretrained=False, num_classes=classes, image_size=size)
            with torch.no_grad():
                classifier.model(images(2, size))
        except (RuntimeError, AssertionError, ValueError, ZeroDivisionError):
            if size == sizes[-1]:
                raise
        else:
            return classifier, images(2, size)
    raise AssertionError("unreachable: the last size raises or returns")
