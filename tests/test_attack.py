"""The ascent against closed forms, and its parts: budgets on the 8-bit grid, the tangent, passes measured alone."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import normalize

from singreg.analysis import attack
from singreg.analysis.attack import Budget, Reading, Tangent, ascend
from singreg.analysis.attack_images import RANDOM, away_from_label, towards_prompt
from tests import attack_toy as toy


@pytest.mark.parametrize("size", [1.0, 4.0])
def test_free_ascent_finds_the_closed_form_of_a_linear_model(size: float) -> None:
    """Largest margin within L-infinity ε is at x + ε sign(w_j - w_y), on the 8-bit grid too; in L2 at x + ε w / |w|."""
    model, x = toy.linear_model(), toy.grid_images(5, 4)
    labels = model(x)[1].argmin(1)
    weight = model.classifier.weight
    gradient = (weight[1 - labels] - weight[labels]).reshape(x.shape)
    found = ascend(away_from_label(model, labels), x, Budget("linf", size), steps=12, generator=toy.seeded())
    torch.testing.assert_close(255 * found.images, 255 * x + size * gradient.sign(), atol=1e-3, rtol=0)
    radius = 0.1 * size
    found = ascend(away_from_label(model, labels), x, Budget("l2", radius), steps=25, generator=toy.seeded())
    assert bool((found.after - found.before > 0.97 * radius * gradient.flatten(1).norm(dim=1)).all())
    assert bool((Budget("l2", radius).lengths(found.images - x) <= radius * (1 + 1e-6)).all())


def test_held_ascent_reaches_what_linear_algebra_allows() -> None:
    """Against projected gradient steps in the null space of W, exactly in the budget, without any rounding."""
    model, translator, texts, x, chosen = toy.parts()
    target = texts[chosen["target"].tolist()]
    features, logits = model(x)
    judged, budget = towards_prompt(model, translator, logits, target, toy.TAU), Budget("l2", 0.3)
    found = ascend(judged, x, budget, steps=60, restarts=2, generator=toy.seeded())
    with patch.object(attack, "MOST_HELD", 0):
        lagrangian = ascend(judged, x, budget, steps=60, restarts=2, generator=toy.seeded())
    basis = torch.linalg.svd(model.classifier.weight.double()).Vh[3:]
    moved = torch.zeros(4, 48, dtype=torch.float64)
    for _ in range(400):
        free = moved.clone().requires_grad_()
        read = normalize((features.double() + free) @ translator.matrix.double().T, dim=-1)
        (gradient,) = torch.autograd.grad((read * target.double()).sum(), free)
        moved = moved + 0.01 * normalize(gradient @ basis.T @ basis, dim=-1)
        moved = moved * (0.3 / moved.norm(dim=1, keepdim=True)).clamp_max(1)
    read = normalize((features.double() + moved) @ translator.matrix.double().T, dim=-1)
    most = (read * target.double()).sum(1) - found.before
    gain = found.after - found.before
    assert bool((most > 0).all())
    assert bool((gain > 0.97 * most).all()), (gain, most)
    assert bool((gain < 1.03 * most).all())  # the tolerance itself leaves a little
    assert bool((lagrangian.after - lagrangian.before > 0.5 * most).all())


def test_without_any_limit_every_target_is_reached_and_without_budget_nothing_moves() -> None:
    model, translator, texts, x, chosen = toy.parts()
    wanted = torch.tensor(chosen["target"].tolist())[:, None]

    def judged(images: torch.Tensor) -> Reading:
        cosines = normalize(translator(model(images)[0]), dim=-1) @ texts.T
        return Reading.free(cosines.gather(1, wanted)[:, 0] - cosines.scatter(1, wanted, -torch.inf).amax(1))

    assert bool((ascend(judged, x, Budget("linf", 255), steps=40, generator=toy.seeded()).after > 0).all())
    assert torch.equal(ascend(judged, x, Budget("linf", 0), steps=2, generator=toy.seeded()).images, x)


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
    target = texts[chosen["target"].tolist()]
    judged = towards_prompt(model, translator, model(x)[1], target, 1e-7)  # no 8-bit step can keep this tolerance
    for found in (ascend(judged, x, toy.LARGE, steps=8, generator=toy.seeded()), attack.one_step(judged, x, toy.LARGE)):
        assert torch.equal(found.images, x)
        assert torch.equal(found.after, found.before)


@pytest.mark.parametrize(
    "budget", [Budget("linf", 0), Budget("linf", 1), Budget("linf", 2.5), Budget("l2", 0.05), Budget("l2", 0.5)]
)
def test_the_grid_never_outgrows_the_budget(budget: Budget) -> None:
    x = toy.grid_images(6, 8)
    for seed in range(5):
        image = attack.random_images(x, budget, toy.seeded(seed))
        assert bool(((255 * image - (255 * image).round()).abs() < 1e-3).all())
        assert bool((budget.lengths((255 * (image - x)).round() / 255) <= budget.radius * (1 + 1e-6)).all())


def test_images_off_the_grid_and_no_steps_are_refused() -> None:
    def total(images: torch.Tensor) -> Reading:
        return Reading.free(images.sum((1, 2, 3)))

    with pytest.raises(ValueError, match="8-bit grid"):
        ascend(total, torch.full((1, 3, 2, 2), 0.3), toy.SMALL, steps=1, generator=toy.seeded())
    with pytest.raises(ValueError, match="at least 1 step"):
        ascend(total, toy.grid_images(1, 2), toy.SMALL, steps=0, generator=toy.seeded())


def test_what_is_recorded_is_each_pass_without_help() -> None:
    """Single step and start are no part of `alone`."""
    climbs = toy.sound_climbs().set_index(["budget", "kind"]).sort_index()
    assert {*climbs.index} == {
        (b.label, k) for b in (toy.SMALL, toy.LARGE) for k in (attack.TANGENT, attack.LAGRANGIAN)
    }
    small, large = climbs.loc[toy.SMALL.label], climbs.loc[toy.LARGE.label, attack.TANGENT]
    assert small["began"].to_numpy() == pytest.approx(small["one_step"].to_numpy())  # no smaller budget to begin from
    assert (large["began"] >= large["one_step"] - 1e-9).all()
    assert (large["began"] > 0).all()


def test_a_batch_made_again_is_the_same() -> None:
    (one, climbs), (two, again) = toy.attacked(), toy.attacked()
    assert climbs.equals(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    other, _ = toy.attacked(replace(toy.SETTINGS, seed=1))
    assert not torch.equal(other[toy.SMALL.label, RANDOM], one[toy.SMALL.label, RANDOM])
