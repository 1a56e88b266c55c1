"""The maximiser: against brute force, a general solver, the single step; budgets, logits, tolerances, non-linear translators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singreg.maximiser import Directions, Maximiser, NearNull, maximise_similarity
from singreg.nullspace import NullSpace
from singreg.steering import ConditionalGaussian, steering_direction

C, M, N, ROWS = 5, 12, 8, 30


def planted(width: int = M, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """A head with 5 rows on `width` features, an affine translator to 8 dimensions, features and targets; one seed, one world."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    weight = draw(C, width)
    return {
        "weight": weight, "space": NullSpace.from_weight(weight), "matrix": draw(N, width), "offset": draw(N),
        "features": draw(ROWS, width) + 0.3, "text": nn.functional.normalize(draw(ROWS, N), dim=1),
    }  # fmt: skip


def run(w: dict[str, Any], budget: float | Tensor, **options: Any) -> Any:
    return maximise_similarity(
        w["features"], w["text"], budget=budget, **{"null_space": w["space"], "matrix": w["matrix"], "offset": w["offset"], **options}
    )


def cosine(w: dict[str, Any], d: Tensor) -> Tensor:
    return nn.functional.cosine_similarity((w["features"] + d) @ w["matrix"].T + w["offset"], w["text"], dim=-1)


def fibonacci_sphere(count: int) -> Tensor:
    """Points spread evenly over the unit sphere in three dimensions."""
    k = torch.arange(count, dtype=torch.float64) + 0.5
    height, turn = 1 - 2 * k / count, math.pi * (1 + math.sqrt(5)) * k
    around = (1 - height**2).sqrt()
    return torch.stack([around * turn.cos(), around * turn.sin(), height], dim=1)


@pytest.mark.parametrize("constraint", ["sphere", "ball"])
@pytest.mark.parametrize("budget", [0.3, 2.0, 8.0])
def test_brute_force_in_a_null_space_of_three_dimensions(budget: float, constraint: str) -> None:
    w = planted(C + 3)
    found = run(w, budget, constraint=constraint)
    radii = [1.0] if constraint == "sphere" else np.linspace(0, 1, 60).tolist()
    grid = torch.cat([budget * r * fibonacci_sphere(20_000 if constraint == "sphere" else 4_000) for r in radii])
    everywhere = grid @ w["space"].null_basis().T
    for row in range(10):
        z = (w["features"][row] + everywhere) @ w["matrix"].T + w["offset"]
        best = float(nn.functional.cosine_similarity(z, w["text"][row][None], dim=-1).max())
        assert found.similarity[row] >= best - 1e-12  # the grid is never better
        assert found.similarity[row] <= best + 2e-3  # and comes close
    if constraint == "sphere":
        torch.testing.assert_close(found.length, torch.full((ROWS,), budget).double())


@pytest.mark.parametrize("budget", [0.2, 1.0, 4.0, 30.0])
def test_never_below_the_single_step_and_logits_stay(budget: float) -> None:
    w = planted()
    found = run(w, budget)
    direction = steering_direction(w["features"], w["text"], null_space=w["space"], matrix=w["matrix"], offset=w["offset"])
    torch.testing.assert_close(found.single, cosine(w, budget * direction))
    assert (found.similarity >= found.single).all()
    assert (found.similarity > found.single + 1e-4).any()  # the comparison says something
    torch.testing.assert_close(found.similarity, cosine(w, found.displacement), atol=1e-10, rtol=0)
    assert (torch.linalg.vector_norm(found.displacement, dim=1) <= budget * (1 + 1e-12)).all()
    assert ((found.features - w["features"]) @ w["weight"].T).abs().max() < 1e-10


def test_the_closed_form_is_where_a_general_climb_ends() -> None:
    """The same problem behind a plain function has no closed form: hundreds of gradient steps must end at the same cosine.

    The closed form alone (one step) where a positive cosine is within reach; with steps of its own everywhere.
    """
    w = planted()
    opaque = {"matrix": None, "offset": None, "translator": lambda f: f @ w["matrix"].T + w["offset"]}
    for budget in (0.5, 3.0):
        exact, climbed = run(w, budget, steps=1, restarts=0), run(w, budget, steps=800, restarts=1, **opaque)
        positive = exact.similarity > 0
        assert positive.sum() > 15
        torch.testing.assert_close(exact.similarity[positive], climbed.similarity[positive], atol=1e-10, rtol=0)
        torch.testing.assert_close(run(w, budget, steps=200).similarity, climbed.similarity, atol=1e-6, rtol=0)
        assert (climbed.displacement @ w["weight"].T).abs().max() < 1e-10


def test_a_larger_budget_is_never_worse_and_none_gives_nothing() -> None:
    w = planted()
    before = cosine(w, torch.zeros_like(w["features"]))
    last = before - 1e-12
    for budget in (0.0, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0):
        found = run(w, budget)
        assert (found.similarity >= last - 1e-9).all()
        last = found.similarity
        if budget == 0:
            assert torch.equal(found.features, w["features"])
            torch.testing.assert_close(found.similarity, before)
    per_row = torch.linspace(0, 3, ROWS).double()
    torch.testing.assert_close(run(w, per_row).similarity[7], run(w, float(per_row[7])).similarity[7])


def test_a_target_within_reach_is_reached() -> None:
    """A displacement of length 2 leads exactly to the text: cosine 1 at that budget, less below it."""
    w = planted()
    d = w["space"].component(torch.randn(ROWS, M, generator=torch.Generator().manual_seed(1)).double())
    d = 2 * nn.functional.normalize(d, dim=1)
    w["text"] = nn.functional.normalize((w["features"] + d) @ w["matrix"].T + w["offset"], dim=1)
    torch.testing.assert_close(run(w, 2.0).similarity, torch.ones(ROWS).double(), atol=1e-9, rtol=0)
    assert (run(w, 2.0, constraint="sphere").similarity > 1 - 1e-6).all()
    assert run(w, 0.2).similarity.mean() < 0.99


def test_a_blind_translator_and_a_full_head_leave_nothing_to_climb() -> None:
    w = planted()
    blind = {**w, "matrix": w["matrix"] - w["space"].component(w["matrix"])}
    for found in (run(blind, 3.0), run(w, 3.0, null_space=NullSpace.from_weight(torch.eye(M).double(), allow_empty=True))):
        assert found.displacement.abs().max() < 1e-9
        torch.testing.assert_close(found.similarity, found.single, atol=1e-9, rtol=0)


def test_targets_at_once_are_those_one_by_one_and_of_any_precision() -> None:
    w = planted()
    both = run(w, 1.5)
    alone = maximise_similarity(
        w["features"][4:5].float(), w["text"][4], budget=1.5, null_space=w["space"], matrix=w["matrix"], offset=w["offset"]
    )
    torch.testing.assert_close(alone.similarity, both.similarity[4:5], atol=1e-6, rtol=0)
    assert alone.features.dtype == torch.float64


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(M, 24), nn.GELU(), nn.Linear(24, N)).double().eval()


def test_a_network_is_climbed_better_with_steps_and_restarts() -> None:
    w, net = planted(), network()
    free = {"matrix": None, "offset": None, "translator": net}
    few, many = run(w, 3.0, steps=2, restarts=0, **free), run(w, 3.0, steps=80, restarts=0, **free)
    several = run(w, 3.0, steps=80, restarts=4, **free)
    assert (few.similarity >= few.single).all()
    assert (many.similarity >= few.similarity).all()
    assert many.similarity.mean() > few.similarity.mean() + 0.01
    assert (several.similarity >= many.similarity).all()
    z = net(several.features)
    torch.testing.assert_close(nn.functional.cosine_similarity(z, w["text"], dim=-1), several.similarity)
    assert (several.displacement @ w["weight"].T).abs().max() < 1e-10
    assert (several.length <= 3 + 1e-12).all()
    assert torch.equal(several.features, run(w, 3.0, steps=80, restarts=4, **free).features)  # seeded


def test_a_basis_and_the_null_space_it_spans_are_one() -> None:
    w = planted()
    basis = w["space"].null_basis()
    torch.testing.assert_close(run(w, 1.0).similarity, run(w, 1.0, null_space=None, basis=basis).similarity, atol=1e-9, rtol=0)
    free = {"matrix": None, "offset": None, "translator": network(), "steps": 300}
    torch.testing.assert_close(
        run(w, 1.0, **free).similarity, run(w, 1.0, null_space=None, basis=basis, **free).similarity, atol=1e-5, rtol=0
    )


def test_a_natural_radius_is_a_ball_in_the_colouring_of_the_conditional_gaussian() -> None:
    w = planted()
    root = torch.randn(M, M, generator=torch.Generator().manual_seed(3)).double()
    gaussian = ConditionalGaussian.from_moments(w["features"].mean(0), root @ root.T / M, w["space"])
    inner = w["features"] - gaussian.whiten(w["features"]) @ gaussian.colouring.T
    assert gaussian.radius(inner).max() < 1e-9  # the middle of the distribution, the same logits
    maximiser = Maximiser(Directions(basis=gaussian.colouring), matrix=w["matrix"], offset=w["offset"])
    found = maximiser.maximise(inner, w["text"], 1.7)
    torch.testing.assert_close(gaussian.radius(found.features), found.length, atol=1e-8, rtol=0)
    assert found.length.max() <= 1.7 + 1e-9
    direction = nn.functional.normalize(gaussian.on_manifold(found.displacement + 0.1), dim=1)
    step = gaussian.step_for_radius(inner, direction, torch.tensor([1.7]))
    along = nn.functional.cosine_similarity((inner + step * direction) @ w["matrix"].T + w["offset"], w["text"], dim=-1)
    assert (found.similarity >= along - 1e-12).all()


def nearly(w: dict[str, Any], tolerance: float, ratio: float = 0.05) -> NearNull:
    return NearNull.below(w["weight"], w["space"], ratio=ratio, tolerance=tolerance)


def with_small_values(*small: float) -> dict[str, Any]:
    w = planted()
    u, sigma, vh = torch.linalg.svd(w["weight"], full_matrices=False)
    sigma[-len(small) :] = sigma[0] * torch.tensor(small, dtype=torch.float64)
    w["weight"] = u @ torch.diag(sigma) @ vh
    w["space"] = NullSpace.from_weight(w["weight"])
    return w


def test_nearly_null_directions_are_those_below_the_share() -> None:
    w = with_small_values(0.03, 0.004)
    assert [nearly(w, 0.1, ratio).basis.shape[1] for ratio in (0.001, 0.01, 0.05, 1.0)] == [0, 1, 2, C]
    near = nearly(w, 0.1)
    sigma = torch.linalg.svdvals(w["weight"] @ near.basis)
    torch.testing.assert_close(sigma / torch.linalg.svdvals(w["weight"])[0], torch.tensor([0.03, 0.004]).double(), atol=1e-9, rtol=0)
    assert w["space"].component(near.basis.T).abs().max() < 1e-12


@pytest.mark.parametrize("constraint", ["ball", "sphere"])
@pytest.mark.parametrize("free", [False, True])
def test_nearly_null_directions_gain_and_keep_logits_within_the_tolerance(free: bool, constraint: str) -> None:
    w = with_small_values(0.03, 0.004)
    kind = {"matrix": None, "offset": None, "translator": lambda f: f @ w["matrix"].T + w["offset"]} if free else {}
    strict = run(w, 2.0, **kind).similarity
    gained = []
    for tolerance in (1e-3, 1e-2, 0.1):
        found = run(w, 2.0, near_null=nearly(w, tolerance), constraint=constraint, **kind)
        moved = (found.displacement @ w["weight"].T).abs().max()
        assert 0.5 * tolerance < moved <= tolerance
        assert (torch.linalg.vector_norm(found.displacement, dim=1) <= 2 * (1 + 1e-9)).all()
        torch.testing.assert_close(cosine(w, found.displacement), found.similarity, atol=1e-9, rtol=0)
        if constraint == "ball":
            assert (found.similarity >= strict - 1e-5).all()
        gained.append(float((found.similarity - strict).mean()))
    assert gained[-1] > 0.01
    if constraint == "ball":
        assert gained[0] < gained[1] < gained[2]


def test_softmax_invariance_measures_logits_up_to_a_shift() -> None:
    w = with_small_values(0.03)
    w["space"] = NullSpace.from_weight(w["weight"], invariance="softmax")
    found = run(w, 2.0, near_null=nearly(w, 0.05, 0.2))
    moved = found.displacement @ w["weight"].T
    assert (moved - moved.mean(1, keepdim=True)).abs().max() <= 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": -1.0}, "budget must be finite and not negative"),
        ({"budget": math.nan}, "budget must be finite"),
        ({"basis": torch.eye(M)}, "either as null_space= or as basis="),
        ({"null_space": None}, "either as null_space= or as basis="),
        ({"translator": network()}, "either as matrix= and offset="),
        ({"constraint": "cube"}, 'must be "ball"'),
        ({"steps": 0}, "at least one step"),
    ],
)
def test_what_cannot_be_asked(changes: dict[str, Any], message: str) -> None:
    w = planted()
    options = {"budget": 1.0, **changes}
    with pytest.raises(ValueError, match=message):
        run(w, **options)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        nearly(w, 0.0)
    with pytest.raises(ValueError, match="share of the largest"):
        nearly(w, 0.1, 2.0)
