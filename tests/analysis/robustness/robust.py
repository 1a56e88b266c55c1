"""A small world to attack: the toy classifier with two nearly null directions, two alike translators, and the measurement of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from singreg.analysis.old_robustness.attacks import Effort
from singreg.analysis.old_robustness.measure import RobustnessSettings, measure_robustness
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.models.classifier import Classifier
from singreg.translator import LinearTranslator
from tests.analysis import toy

COUNT = 12
STEPS = (0.0, 0.1, 0.3, 0.6)
OPTIONS = RobustnessSettings(
    attacker="one", steps=STEPS, limit=300.0, matrix_at=0.3, near_ratios=(0.05,), tolerances=(0.01, 0.1),
    effort=Effort(steps=40, restarts=1),
)


@cache
def classifier() -> Classifier:
    """Its head's two smallest singular values are 3 % and 0.5 % of the largest."""
    model = toy.classifier()
    with torch.no_grad():
        u, sigma, vh = torch.linalg.svd(model.weight.double(), full_matrices=False)
        sigma[-2:] = sigma[0] * torch.tensor([0.03, 0.005], dtype=torch.float64)
        model.head.get_parameter("weight").copy_(20 * (u * sigma) @ vh)  # so that the tolerances bind
    return model


@cache
def translators() -> dict[str, LinearTranslator]:
    one, noise = toy.translator(0), toy.translator(1)
    return {"one": one, "two": LinearTranslator(one.matrix + 0.5 * noise.matrix, one.offset + 0.5 * noise.offset)}


def features() -> Tensor:
    """f (N, m) float64, as a pass over the part reads them."""
    return toy.features(classifier(), toy.ToyPart(COUNT)).float().double()


def measure(rank: int = 0, world: int = 1, **changes: Any) -> RobustnessFigures:
    options = replace(OPTIONS, **{key: changes.pop(key) for key in list(changes) if hasattr(OPTIONS, key)})
    found = measure_robustness(
        changes.pop("classifier", None) or classifier(), toy.ToyPart(COUNT), toy.embeddings(COUNT), toy.texts(),
        changes.pop("translators", None) or translators(), options=options, settings=replace(toy.QUIET, batch_size=COUNT), **changes,
    )  # fmt: skip
    return replace(found, seconds=0.0)


@cache
def usual() -> RobustnessFigures:
    return measure()
