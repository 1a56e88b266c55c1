"""The slow formulas and the fast path agree to 1e-4 degrees on a classifier's own features: AS, IS, and steering at 40°.

Linear and 1x1-convolution heads, small random-weight timm models, pictures through the whole path of `analyze_model`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from singreg.analysis.model import analyze_model
from singreg.analysis.old_fitting import fit_on_part
from singreg.analysis.results import CENTRED, ModelMeasurement
from singreg.analysis.steering import steering_targets
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.steering import steer
from singreg.translator import LinearTranslator
from tests.analysis import toy
from tests.images import to_tensor
from tests.reference import formulas

HEADS = {"test_resnet": torch.nn.Linear, "resnetv2_18": torch.nn.Conv2d}
COUNT, DEGREES, TOLERANCE = 40, 40.0, 1e-4


def large_and_varied(image: Image.Image) -> Tensor:
    """(3, 32, 32); with the contrast drawn out, as a random network tells plain noise hardly apart."""
    return 20 * torch.nn.functional.interpolate(to_tensor(image)[None], size=(32, 32))[0] - 10


class Measured:
    """One model, its features as a plain loop takes them, a fitted translator, and what `analyze_model` says."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = Classifier.from_timm(name, pretrained=False, num_classes=toy.CLASSES)
        self.model.own_transform = large_and_varied
        part = toy.ToyPart(COUNT)
        images = torch.stack([self.model.transform(part.image(index)) for index in range(COUNT)])
        with torch.no_grad():
            self.features = self.model.features(images).double()
        self.labels = torch.from_numpy(part.labels)
        self.texts = toy.texts()
        embeddings = (1 + np.random.default_rng(0).normal(size=(COUNT, toy.DIM))).astype(np.float32)
        fitted = fit_on_part(self.model, part, embeddings, ridges=[1.0], standardize="blocks", settings=toy.QUIET)
        self.mean, self.translators = fitted.mean, {"fitted": fitted.translator, "drawn": self.drawn()}
        self.found: ModelMeasurement = analyze_model(
            self.model, part, embeddings, self.texts, self.translators, mean=self.mean, settings=toy.QUIET, steering_image_score=DEGREES
        )

    def drawn(self) -> LinearTranslator:
        """A translator that reads all directions alike, so that steering reaches the wanted angle."""
        g = torch.Generator().manual_seed(1)
        scale = self.features.norm(dim=1).mean()
        matrix = torch.randn(toy.DIM, self.model.feature_dim, generator=g) / scale.float()
        return LinearTranslator(matrix, torch.randn(toy.DIM, generator=g))

    def translate(self, name: str, features: Tensor) -> Tensor:
        translator = self.translators[name]
        return features @ translator.matrix.double().T + translator.offset.double()


@cache
def measured(name: str) -> Measured:
    return Measured(name)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("reader", ["fitted", "drawn"])
@pytest.mark.parametrize("kind", ["", CENTRED])
def test_attribute_and_image_scores_of_every_picture(name: str, reader: str, kind: str) -> None:
    m = measured(name)
    assert isinstance(m.model.head, HEADS[name])
    null = formulas.null_projector(m.model.head.weight.flatten(1))
    origin = m.mean.double() if kind else torch.zeros_like(m.mean.double())
    z, text = m.translate(reader, m.features), m.texts.double()[m.labels]
    z_eq = m.translate(reader, m.features - (m.features - origin) @ null.T)
    attribute = formulas.angle_degrees(z, text) - formulas.angle_degrees(z_eq, text)
    image = formulas.angle_degrees(z, z_eq)
    assert float(image.mean()) > (0.01 if kind else 0.5)  # something moved, or agreement would mean little
    rows = m.found.rows
    np.testing.assert_allclose(rows[f"{kind}AS/{reader}"], attribute.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(rows[f"{kind}IS/{reader}"], image.numpy(), atol=TOLERANCE)
    assert rows["index"].tolist() == list(range(COUNT))


def slow_steering(m: Measured, reader: str, null: Tensor, f: Tensor, text: Tensor) -> tuple[float, Tensor] | None:
    """(step, steered feature) of one picture by autograd, the projector and bisection; None when 40° is out of reach."""
    leaf = f.clone().requires_grad_()
    torch.nn.functional.cosine_similarity(m.translate(reader, leaf), text, dim=0).backward()  # type: ignore[no-untyped-call]
    direction = null @ leaf.grad
    direction = direction / direction.norm()
    z = m.translate(reader, f)

    def turned(step: float) -> float:
        return float(formulas.angle_degrees(z, m.translate(reader, f + step * direction)))

    low, high = 0.0, 1e6 * float(f.norm())
    if turned(high) < DEGREES:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if turned(middle) < DEGREES else (low, middle)
    return low, f + low * direction


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("reader", ["fitted", "drawn"])
def test_steering_at_forty_degrees(name: str, reader: str) -> None:
    """Every picture's step, steered feature and AS towards the target; and the means that `analyze_model` reports."""
    m = measured(name)
    null = formulas.null_projector(m.model.weight)
    targets = steering_targets(m.labels, torch.arange(COUNT), toy.CLASSES)
    text = m.texts.double()[targets]
    translator = m.translators[reader]
    fast = steer(
        m.features, text, null_space=NullSpace.from_weight(m.model.weight), image_score=DEGREES,
        matrix=translator.matrix.double(), offset=translator.offset.double(),
    )  # fmt: skip
    scores, steps = [], []
    for index, f in enumerate(m.features):
        found = slow_steering(m, reader, null, f, text[index])
        assert bool(fast.reachable[index]) == (found is not None)
        if found is None:
            continue
        step, steered = found
        before, after = (formulas.angle_degrees(m.translate(reader, x), text[index]) for x in (f, steered))
        mine = formulas.angle_degrees(m.translate(reader, fast.features[index]), text[index])
        assert float(mine) == pytest.approx(float(after), abs=TOLERANCE)
        assert float(fast.step[index]) == pytest.approx(step, rel=1e-6)
        reached = formulas.angle_degrees(m.translate(reader, f), m.translate(reader, fast.features[index]))
        assert float(reached) == pytest.approx(DEGREES, abs=TOLERANCE)
        scores.append(float(before - after))
        steps.append(step / float(f.norm()))
    summary = m.found.steering[reader]
    assert len(scores) > COUNT / 4
    assert summary.reachable == pytest.approx(len(scores) / COUNT)
    assert summary.attribute_score == pytest.approx(np.mean(scores), abs=TOLERANCE)
    assert summary.attribute_score_std == pytest.approx(np.std(scores), abs=TOLERANCE)
    assert summary.step == pytest.approx(np.mean(steps), rel=1e-4)
