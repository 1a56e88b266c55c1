"""The slow formulas and the fast path agree to 1e-4 degrees: scores of every image, and steering at 40°.

On small random timm models with a linear and a 1x1-convolution head.
"""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from singreg.analysis.scores import CENTRED, analyze_model
from singreg.analysis.steering import steering_targets
from singreg.data.embeddings import PassSettings
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.steering import steer
from singreg.translator import LinearTranslator
from tests import toy
from tests.reference import formulas

HEADS = {"test_resnet": nn.Linear, "resnetv2_18": nn.Conv2d}
IMAGES, DEGREES, TOLERANCE = 40, 40.0, 1e-4


def large_and_varied(image: Image.Image) -> Tensor:
    """(3, 32, 32); with the contrast drawn out, as a random network tells plain noise hardly apart."""
    return 20 * nn.functional.interpolate(toy.to_tensor(image)[None], size=(32, 32))[0] - 10


class Measured:
    """A model, its features as a plain loop takes them, a translator, and what `analyze_model` says."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = Classifier.from_timm(name, pretrained=False, num_classes=toy.CLASSES)
        self.model._transform = large_and_varied
        split, self.texts = toy.ToySplit(IMAGES), toy.texts()
        images = torch.stack([self.model.transform(split.image(index)) for index in range(len(split))])
        with torch.no_grad():
            self.model.eval()
            self.features, self.labels = self.model.features(images).double(), torch.from_numpy(split.labels)
        # One that reads all directions alike, so that steering reaches the wanted angle.
        g, self.mean = torch.Generator().manual_seed(1), self.features.mean(0).float()
        matrix = torch.randn(toy.DIM, self.model.feature_dim, generator=g) / self.features.norm(dim=1).mean().float()
        self.translator = LinearTranslator(matrix, torch.randn(toy.DIM, generator=g))
        where, readers = (self.model, split, toy.embeddings(IMAGES), self.texts), {"T": self.translator}
        settings = PassSettings(batch_size=37, progress=False)
        self.rows, self.found = analyze_model(*where, readers, mean=self.mean, settings=settings)

    def translate(self, features: Tensor) -> Tensor:
        return features @ self.translator.matrix.double().T + self.translator.offset.double()


measured = cache(Measured)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", ["", CENTRED])
def test_scores_of_every_image_are_the_slow_formulas(name: str, kind: str) -> None:
    m = measured(name)
    assert isinstance(m.model.head, HEADS[name])
    null = formulas.null_projector(m.model.head.weight.flatten(1))  # type: ignore[operator, union-attr]
    origin = m.mean.double() if kind else torch.zeros_like(m.mean.double())
    z, text = m.translate(m.features), m.texts.double()[m.labels]
    z_eq = m.translate(m.features - (m.features - origin) @ null.T)
    attribute = formulas.angle_degrees(z, text) - formulas.angle_degrees(z_eq, text)
    image = formulas.angle_degrees(z, z_eq)
    assert float(image.mean()) > (0.01 if kind else 0.5)  # something moved, or agreement would mean little
    np.testing.assert_allclose(m.rows[f"{kind}AS/T"], attribute.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(m.rows[f"{kind}IS/T"], image.numpy(), atol=TOLERANCE)
    overall = m.found["translators"]["T"]["centred" if kind else "overall"]
    assert overall["AS_neg"] == pytest.approx(float(torch.relu(-attribute).mean()), abs=TOLERANCE)


def slow_steering(m: Measured, null: Tensor, f: Tensor, text: Tensor) -> tuple[float, Tensor] | None:
    """(step, steered feature) of one image by autograd, the projector and bisection; None when out of reach."""
    leaf = f.clone().requires_grad_()
    torch.cosine_similarity(m.translate(leaf), text, dim=0).backward()  # type: ignore[no-untyped-call]
    direction = null @ leaf.grad
    direction = direction / direction.norm()

    def turned(step: float) -> float:
        return float(formulas.angle_degrees(m.translate(f), m.translate(f + step * direction)))

    low, high = 0.0, 1e6 * float(f.norm())
    if turned(high) < DEGREES:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if turned(middle) < DEGREES else (low, middle)
    return low, f + low * direction


@pytest.mark.parametrize("name", HEADS)
def test_steering_at_forty_degrees_is_the_slow_search(name: str) -> None:
    """Every image's step, steered feature and angle to the target."""
    m = measured(name)
    null, space = formulas.null_projector(m.model.weight), NullSpace.from_weight(m.model.weight)
    text = m.texts.double()[steering_targets(m.labels, torch.arange(IMAGES), toy.CLASSES)]
    fast = steer(m.features, text, null_space=space, translator=m.translator, image_score=DEGREES)
    for index, f in enumerate(m.features):
        found = slow_steering(m, null, f, text[index])
        assert bool(fast.reachable[index]) == (found is not None)
        if found is None:
            continue
        step, steered = found
        after, mine = (formulas.angle_degrees(m.translate(x), text[index]) for x in (steered, fast.features[index]))
        reached = formulas.angle_degrees(m.translate(f), m.translate(fast.features[index]))
        assert (float(mine), float(reached)) == pytest.approx((float(after), DEGREES), abs=TOLERANCE)
        assert float(fast.step[index]) == pytest.approx(step, rel=1e-6)
    assert int(fast.reachable.sum()) > IMAGES / 4
