"""Steering at 40° is that of the slow formulas to 1e-4 degrees, on random timm models with both kinds of head."""

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from singreg.analysis.steering import steering_targets
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


def slow_steering(T: LinearTranslator, null: Tensor, f: Tensor, text: Tensor) -> tuple[float, Tensor] | None:
    """(step, steered feature) of one image by autograd, the projector and bisection; None when out of reach."""
    leaf = f.clone().requires_grad_()
    torch.cosine_similarity(T(leaf), text, dim=0).backward()  # type: ignore[no-untyped-call]
    direction = null @ leaf.grad
    direction = direction / direction.norm()

    def turned(step: float) -> float:
        return float(formulas.angle_degrees(T(f), T(f + step * direction)))

    low, high = 0.0, 1e6 * float(f.norm())
    if turned(high) < DEGREES:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if turned(middle) < DEGREES else (low, middle)
    return low, f + low * direction


@pytest.mark.parametrize("name", HEADS)
def test_steering_at_forty_degrees_is_the_slow_search(name: str) -> None:
    """Every image's step, steered feature and angle to the target; the translator reads all directions alike."""
    torch.manual_seed(0)
    model, split = Classifier.from_timm(name, pretrained=False, num_classes=toy.CLASSES).eval(), toy.ToySplit(IMAGES)
    assert isinstance(model.head, HEADS[name])
    with torch.no_grad():
        features = model.features(torch.stack([large_and_varied(split.image(i)) for i in range(IMAGES)])).double()
    g = torch.Generator().manual_seed(1)
    matrix = torch.randn(toy.DIM, model.feature_dim, generator=g) / features.norm(dim=1).mean().float()
    T = LinearTranslator(matrix, torch.randn(toy.DIM, generator=g)).double()
    null, space = formulas.null_projector(model.weight), NullSpace.from_weight(model.weight)
    targets = steering_targets(torch.from_numpy(split.labels), torch.arange(IMAGES), toy.CLASSES)
    text = toy.texts().double()[targets]
    fast = steer(features, text, null_space=space, translator=T, image_score=DEGREES)
    for index, f in enumerate(features):
        found = slow_steering(T, null, f, text[index])
        assert bool(fast.reachable[index]) == (found is not None)
        if found is None:
            continue
        step, steered = found
        after, mine = (formulas.angle_degrees(T(x), text[index]) for x in (steered, fast.features[index]))
        reached = formulas.angle_degrees(T(f), T(fast.features[index]))
        assert (float(mine), float(reached)) == pytest.approx((float(after), DEGREES), abs=TOLERANCE)
        assert float(fast.step[index]) == pytest.approx(step, rel=1e-6)
    assert int(fast.reachable.sum()) > IMAGES / 4
