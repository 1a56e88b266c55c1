"""The ascent against linear programming, and its parts: the 8-bit grid, the tangent, passes measured alone."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from singreg.analysis import attack
from singreg.analysis.attack import LAGRANGIAN, SIGNED, TANGENT, Reading, Tangent, ascend
from singreg.analysis.attack_images import attack_images, towards_prompt
from tests import attack_toy as toy


@pytest.mark.parametrize("size", [8, 24])
def test_the_ascent_nears_what_a_linear_program_allows(size: int) -> None:
    """Of a linear objective: max g·d with |W d| ≤ τ and |d| ≤ ε, without any rounding."""
    model, _, _, x, _ = toy.parts()
    _, logits = model(x)
    goal = torch.randn(48, generator=toy.seeded(9))

    def judged(images: torch.Tensor) -> Reading:
        features, now = model(images)
        return Reading(features @ goal, (now - logits) / toy.TAU, now.new_zeros(len(now), 0))

    weight = model.classifier.weight.numpy().astype(float)
    rows, tolerances = np.concatenate([weight, -weight]), np.full(6, toy.TAU)
    most = -linprog(-goal.numpy(), rows, tolerances, bounds=(-size / 255, size / 255)).fun
    how: dict[str, Any] = {"steps": 60, "restarts": 2}
    images, found = ascend(judged, x, size, None, generator=toy.seeded(), **how)
    gain = found[TANGENT] - found["before"]
    assert bool((gain > 0.9 * most).all()), (gain, most)
    assert bool((gain < 1.0001 * most).all())
    torch.testing.assert_close(judged(images).value.double(), torch.maximum(found[TANGENT], found[LAGRANGIAN]))
    with patch.object(attack, "MOST_HELD", 0):
        _, found = ascend(judged, x, size, None, generator=toy.seeded(), **how)
    assert [*found] == ["before", "one_step", "began", LAGRANGIAN, SIGNED]
    for kind in (LAGRANGIAN, SIGNED):
        assert bool((found[kind] - found["before"] > 0.4 * most).all()), kind


def test_a_tangent_moves_nothing_that_is_held() -> None:
    """On a linear model: along it no logit moves, back takes any logit change away, and pixels at an edge stay."""
    model, _, _, x, _ = toy.parts()
    leaf = x.clone().requires_grad_()
    logits = model(leaf)[1]
    tangent = Tangent.of(logits, leaf)
    direction = torch.randn(x.shape, generator=toy.seeded(5))
    edge = torch.full_like(x, 0.02)
    moved = torch.where(torch.rand(x.shape, generator=toy.seeded(6)) < 0.3, edge, torch.zeros_like(x))
    inside = tangent.within(moved, direction, -edge, edge)
    still = (moved == edge) & (direction > 0)
    assert 3 < int(still.sum()) < still.numel() / 2

    def change(displacement: torch.Tensor) -> torch.Tensor:
        return (model(x + displacement)[1] - logits).detach()

    assert float(change(direction).abs().max()) > 0.1  # the control
    for kept, rows in ((tangent, torch.zeros_like(still)), (inside, still)):
        held = torch.randn(4, 3, generator=toy.seeded(7))
        along, back = kept.along(direction), kept.back(held, x)
        assert float(change(along).abs().max()) < 1e-4
        torch.testing.assert_close(change(back), -held, atol=1e-3, rtol=0)
        assert not along[rows].any()
        assert not back[rows].any()


def test_nothing_infeasible_is_ever_kept() -> None:
    model, translator, texts, x, chosen = toy.parts()
    judged = towards_prompt(model, translator, x, texts[chosen["target"].tolist()], 1e-7)  # less than any 8-bit step
    images, found = ascend(judged, x, 8, None, steps=8, restarts=2, generator=toy.seeded())
    assert torch.equal(images, x)
    assert all(torch.equal(values, found["before"]) for values in found.values())


@pytest.mark.parametrize("size", [0, 1, 3, 255])
def test_the_grid_never_outgrows_the_budget(size: int) -> None:
    x = torch.randint(0, 256, (6, 3, 8, 8), generator=toy.seeded()) / 255
    for moved in (torch.randn(x.shape, generator=toy.seeded(1)), attack.random_images(x, size, toy.seeded(2)) - x):
        levels = 255 * attack.on_grid(x, moved, size)
        assert float((levels - levels.round()).abs().max()) < 1e-3
        assert float((levels - 255 * x).round().abs().max()) <= size
        assert 0 <= float(levels.min()) <= float(levels.max()) <= 255


def test_what_is_recorded_is_each_pass_without_help() -> None:
    """Single step and start are no part of what a pass reached; and a batch made again is the same."""
    model, translator, texts, x, chosen = toy.parts()
    judged = towards_prompt(model, translator, x, texts[chosen["target"].tolist()], toy.TAU)

    def made(seed: int) -> list[tuple[int, dict[str, torch.Tensor], Any]]:
        return list(attack_images(judged, x, [2, 8], (seed, 0), steps=12, restarts=2))

    (_, first, small), (_, second, large) = made(0)
    assert list(small) == ["one_step", "began", TANGENT, LAGRANGIAN]
    assert (small["began"] == small["one_step"]).all()  # no smaller budget to begin from
    assert (large["began"] > 0).all()
    assert (large["began"] >= large["one_step"]).all()
    torch.testing.assert_close([arms for _, arms, _ in made(0)], [first, second], atol=0, rtol=0)
    assert not torch.equal(made(1)[0][1]["random"], first["random"])
