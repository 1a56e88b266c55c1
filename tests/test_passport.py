"""Passports: numpy's numbers, heads of every kind, what may not be compared."""

import math

import numpy as np
import pytest
import torch

from singreg.analysis.scores import VISIBLE, chance_angle, compare_passports, head_passport, judge_passport
from singreg.nullspace import NullSpace
from tests.toy import headed, normal


def test_numbers_are_numpys() -> None:
    weight = normal(9, 30)
    weight[7:] = weight[:2] + weight[2:4]  # rank 7
    passport, sigma = head_passport(headed(weight, tag="deficient")), np.linalg.svd(weight.numpy(), compute_uv=False)
    named = [passport[key] for key in ("tag", "classes", "features", "rank", "rank_loose", "nullity")]
    assert named == ["deficient", 9, 30, 7, 7, 23]
    assert passport["null_dimensions"] == 23 / 30
    assert passport["conditioning"] == pytest.approx(sigma[6] / sigma[0], rel=1e-9)
    assert chance_angle(passport) == pytest.approx(math.degrees(math.acos(math.sqrt(7 / 30))))
    assert judge_passport(passport) == "has a null space"


def test_the_chance_angle_is_what_a_random_removal_does_to_a_feature() -> None:
    f = normal(500, 400, seed=1)
    null = NullSpace.from_weight(normal(20, 400, seed=2)).component(f)
    squared = torch.nn.functional.cosine_similarity(f, f - null).square().mean()
    angle = float(torch.rad2deg(squared.sqrt().acos()))
    assert chance_angle(head_passport(headed(normal(20, 400)))) == pytest.approx(angle, abs=0.2)


@pytest.mark.parametrize("shape", [(12, 12), (40, 12)])
def test_a_head_without_a_null_space_says_so(shape: tuple[int, int]) -> None:
    passport = head_passport(headed(normal(*shape), tag="full"))
    assert (passport["nullity"], passport["rank"]) == (0, 12)
    assert judge_passport(passport).startswith("no null space")
    assert len(compare_passports([passport])) == 1
    zero = head_passport(headed(torch.zeros(3, 4)))
    assert (zero["rank"], zero["nullity"], zero["conditioning"]) == (0, 4, 0)


def test_a_null_space_too_small_to_see_is_said_so() -> None:
    limit = math.sin(math.radians(VISIBLE)) ** 2  # 3.0 % of the dimensions
    below, above = int(1000 * limit), int(1000 * limit) + 1
    assert "too small to see" in compare_passports([head_passport(headed(normal(1000 - below, 1000), tag="a"))])[0]
    assert judge_passport(head_passport(headed(normal(1000 - above, 1000)))) == "has a null space"


def test_heads_that_may_and_may_not_be_compared() -> None:
    """The paper's own five (with their C and m): those with 51 % go together, the one with 2 % goes with none."""
    resnet = head_passport(headed(normal(100, 205, seed=1), tag="ResNet50"))
    bit, vit = (head_passport(headed(normal(100, m), tag=t)) for m, t in ((205, "BiTResNet"), (102, "DinoViT")))
    assert compare_passports([resnet, bit]) == []
    found = compare_passports([vit, resnet, bit])
    assert len(found) == 2
    assert "DinoViT" in found[0]
    assert "ResNet50 has 105 of 205 dimensions in its null space (51 %), DinoViT has 2 of 102" in found[1]
    fewer = head_passport(headed(normal(20, 205), tag="sliced"))
    assert "(ResNet50 100, sliced 20)" in compare_passports([resnet, fewer])[-1]


def test_nearly_null_directions_are_named() -> None:
    basis, sigma = torch.linalg.qr(normal(100, 50)).Q.T, torch.ones(50)
    sigma[20:] = 1e-4
    found = compare_passports([head_passport(headed(sigma[:, None] * basis, tag="soft"))])
    assert "soft has 30 more directions" in found[0]
    assert len(found) == 1
    sigma[20:] = 2e-3
    assert compare_passports([head_passport(headed(sigma[:, None] * basis, tag="soft"))]) == []
