"""Steering at a fixed image score, read by a judge: plain loops, targets, unreachable angles, processes. Pairs: see the curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.analysis.steering import measure_steering, steering_targets
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator
from tests.analysis import toy
from tests.reference import formulas

COUNT = 37
WANTED = 30.0


def inputs() -> tuple[Tensor, Tensor, Tensor, NullSpace]:
    part, model = toy.ToyPart(COUNT), toy.classifier()
    return toy.features(model, part), torch.from_numpy(part.labels), torch.arange(COUNT), NullSpace.from_weight(model.weight)


def wide(translator: LinearTranslator) -> LinearTranslator:
    return translator.double()


def slow_steer(f: Tensor, text: Tensor, attacker: LinearTranslator, wanted: float) -> Tensor | None:
    """One gradient step along the null part, its length by bisection on the angle; None where the angle is never reached."""
    matrix, offset = attacker.matrix, attacker.offset
    leaf = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.cosine_similarity(matrix @ leaf + offset, text, dim=0), leaf)
    direction = formulas.null_projector(toy.classifier().weight) @ gradient
    direction = direction / direction.norm()

    def image_score(step: float) -> float:
        return float(formulas.angle_degrees(matrix @ f + offset, matrix @ (f + step * direction) + offset))

    low, high = 0.0, 1e5
    if image_score(high) < wanted:
        return None
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if image_score(middle) < wanted else (low, middle)
    return f + high * direction


@pytest.mark.parametrize("own_judge", [True, False])
@pytest.mark.parametrize("wanted", [WANTED, 88.0], ids=["reachable", "some out of reach"])
def test_the_summary_is_that_of_plain_loops(own_judge: bool, wanted: float) -> None:
    f, labels, indices, space = inputs()
    attacker, judge = wide(toy.translator()), wide(toy.translator(0 if own_judge else 1))
    texts = toy.texts().double()
    targets = steering_targets(labels, indices, toy.CLASSES)
    moved, steps, won = [], [], 0
    for feature, target in zip(f, targets.tolist(), strict=True):
        steered = slow_steer(feature, texts[target], attacker, wanted)
        if steered is None:
            continue
        before, after = (judge.matrix @ g + judge.offset for g in (feature, steered))
        angles = [float(formulas.angle_degrees(after, text)) for text in texts]
        moved.append(float(formulas.angle_degrees(before, texts[target])) - angles[target])
        steps.append(float((steered - feature).norm() / feature.norm()))
        won += int(np.argmin(angles) == target)
    got = measure_steering(
        f, labels, indices, texts=texts, null_space=space, attacker=attacker, judge=None if own_judge else judge, image_score=wanted
    )
    assert got["image_score"] == wanted
    assert got["images"] == COUNT
    assert (0 < len(moved) < COUNT) == (wanted > 80)
    assert got["reachable"] == pytest.approx(len(moved) / COUNT)
    assert got["success"] == pytest.approx(won / COUNT)  # of all pictures: out of reach is no success
    assert got["attribute_score"] == pytest.approx(np.mean(moved), abs=1e-4)
    assert got["attribute_score_std"] == pytest.approx(np.std(moved), abs=1e-4)
    assert got["step"] == pytest.approx(np.mean(steps), rel=1e-4)


def test_float32_features_give_the_same_to_rounding() -> None:
    f, labels, indices, space = inputs()
    exact = measure_steering(f, labels, indices, texts=toy.texts().double(), null_space=space, attacker=wide(toy.translator()))
    rounded = measure_steering(f.float(), labels, indices, texts=toy.texts(), null_space=space, attacker=toy.translator())
    assert rounded["attribute_score"] == pytest.approx(exact["attribute_score"], abs=1e-3)
    assert rounded["step"] == pytest.approx(exact["step"], rel=1e-4)
    assert (rounded["reachable"], rounded["success"]) == (pytest.approx(exact["reachable"]), pytest.approx(exact["success"]))


def test_another_judge_sees_less_than_the_attackers_own() -> None:
    f, labels, indices, space = inputs()
    options = {"texts": toy.texts(), "null_space": space, "attacker": toy.translator(), "image_score": WANTED}
    own = measure_steering(f.float(), labels, indices, **options)  # type: ignore[arg-type]
    other = measure_steering(f.float(), labels, indices, judge=toy.translator(9), **options)  # type: ignore[arg-type]
    assert own["attribute_score"] > abs(other["attribute_score"]) + 10
    assert own["step"] == other["step"]  # the attack is the same


def test_targets_are_other_classes_all_of_them_and_hang_on_picture_and_seed_alone() -> None:
    labels, indices = torch.arange(4000) % 7, torch.arange(4000)
    targets = steering_targets(labels, indices, 7)
    assert (targets != labels).all()
    offsets = torch.bincount((targets - labels) % 7, minlength=7)[1:]
    assert offsets.min() > 0.7 * 4000 / 6
    some = torch.tensor([3999, 5, 17])
    torch.testing.assert_close(steering_targets(labels[some], indices[some], 7), targets[some])
    other = steering_targets(labels, indices, 7, seed=1)
    assert (other == targets).double().mean() < 0.4  # chance is one in six
    assert (other != labels).all()
    assert steering_targets(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]), 2).tolist() == [1, 0, 1]


def test_a_translator_blind_to_the_null_space_reaches_nothing_and_gives_no_figure() -> None:
    f, labels, indices, space = inputs()
    seeing = wide(toy.translator())
    kept = torch.eye(toy.WIDTH).double() - formulas.null_projector(toy.classifier().weight)
    blind = LinearTranslator(seeing.matrix @ kept, seeing.offset)
    got = measure_steering(f, labels, indices, texts=toy.texts().double(), null_space=space, attacker=blind)
    assert (got["reachable"], got["success"], got["images"]) == (0.0, 0.0, COUNT)
    assert all(math.isnan(value) for value in (got["attribute_score"], got["attribute_score_std"], got["step"]))


def test_one_class_has_no_target() -> None:
    f, labels, indices, space = inputs()
    with pytest.raises(ValueError, match=r"at least 2 classes.*\(1, 7\)"):
        measure_steering(f, 0 * labels, indices, texts=toy.texts(1), null_space=space, attacker=toy.translator())
