"""The maximiser: against brute force, a general climb and the single step; budgets, logits, tolerances, networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from singreg import maximiser
from singreg.maximiser import Directions, Maximised, Maximiser, NearNull
from singreg.nullspace import NullSpace
from singreg.steering import ConditionalGaussian, similarity_gradient, unit_in_null
from singreg.translator import LinearTranslator

C, M, N, ROWS = 5, 12, 8, 30


class World:
    """A head of 5 rows, an affine translator to 8 dimensions, features and targets."""

    def __init__(self, width: int = M, small: tuple[float, ...] = (), invariance: Any = "logits") -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight, self.matrix, self.offset = draw(C, width), draw(N, width), draw(N)
        self.features, self.text = draw(ROWS, width) + 0.3, normalize(draw(ROWS, N), dim=1)
        if small:  # the last singular values, as shares of the first
            u, sigma, vh = torch.linalg.svd(self.weight, full_matrices=False)
            sigma[-len(small) :] = sigma[0] * torch.tensor(small, dtype=torch.float64)
            self.weight = u @ torch.diag(sigma) @ vh
        self.space = NullSpace.from_weight(self.weight, invariance=invariance)

    def linear(self) -> LinearTranslator:
        return LinearTranslator(self.matrix, self.offset)

    def translate(self, f: Tensor) -> Tensor:
        return f @ self.matrix.T + self.offset

    def cosine(self, d: Tensor) -> Tensor:
        return cosine_similarity(self.translate(self.features + d), self.text, dim=-1)

    def near(self, tolerance: float, ratio: float = 0.05) -> NearNull:
        return NearNull.below(self.weight, self.space, ratio=ratio, tolerance=tolerance)

    def run(
        self, budget: float | Tensor, directions: Directions | None = None, translator: Any = None, **limits: int
    ) -> Maximised:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in limits.items():
                patch.setattr(maximiser, name.upper(), value)
            climber = Maximiser(directions or Directions(self.space), translator or self.linear())
            return climber.maximise(self.features, self.text, budget)

    def single(self, budget: float, translator: Any = None) -> Tensor:
        """The cosine that the paper's one gradient step of the whole budget reaches."""
        gradient = similarity_gradient(self.features, self.text, translator or self.translate)
        d = budget * unit_in_null(self.space.component(gradient), gradient)
        return cosine_similarity((translator or self.translate)(self.features + d), self.text, dim=-1).detach()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(M, 24), nn.GELU(), nn.Linear(24, N)).double().eval()


@pytest.mark.parametrize("budget", [0.3, 2.0, 8.0])
def test_brute_force_in_a_null_space_of_three_dimensions(budget: float) -> None:
    w = World(C + 3)
    found = w.run(budget)
    k = torch.arange(4000, dtype=torch.float64) + 0.5  # points spread evenly over the sphere
    height, turn = 1 - 2 * k / 4000, math.pi * (1 + math.sqrt(5)) * k
    around = (1 - height**2).sqrt()
    sphere = torch.stack([around * turn.cos(), around * turn.sin(), height], dim=1)
    everywhere = torch.cat([budget * r * sphere for r in torch.linspace(0, 1, 60)]) @ w.space.null_basis().T
    for row in range(10):
        z = w.translate(w.features[row] + everywhere)
        best = float(cosine_similarity(z, w.text[row][None], dim=-1).max())
        assert best - 1e-12 <= found.similarity[row] <= best + 2e-3  # the grid is never better, and comes close


@pytest.mark.parametrize("budget", [0.2, 1.0, 4.0, 30.0])
def test_never_below_the_single_step_and_logits_stay(budget: float) -> None:
    w = World()
    found, single = w.run(budget), w.single(budget)
    assert (found.similarity >= single - 1e-12).all()
    assert (found.similarity > single + 1e-4).any()  # the comparison says something
    torch.testing.assert_close(found.similarity, w.cosine(found.displacement), atol=1e-10, rtol=0)
    assert (found.displacement.norm(dim=1) <= budget * (1 + 1e-12)).all()
    assert (found.displacement @ w.weight.T).abs().max() < 1e-10


@pytest.mark.parametrize("budget", [0.5, 3.0])
def test_the_closed_form_is_where_a_general_climb_ends(budget: float) -> None:
    """Behind a plain function hundreds of gradient steps must end at the cosine of the closed form alone."""
    w = World()
    exact, climbed = w.run(budget, steps=1, restarts=0), w.run(budget, None, w.translate, steps=800, restarts=1)
    positive = exact.similarity > 0
    assert positive.sum() > 15
    torch.testing.assert_close(exact.similarity[positive], climbed.similarity[positive], atol=1e-10, rtol=0)
    torch.testing.assert_close(w.run(budget, steps=200).similarity, climbed.similarity, atol=1e-6, rtol=0)
    assert (climbed.displacement @ w.weight.T).abs().max() < 1e-10


def test_a_larger_budget_is_never_worse_and_none_gives_nothing() -> None:
    w = World()
    last = w.cosine(torch.zeros_like(w.features))
    assert not w.run(0.0).displacement.any()
    for budget in (0.0, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0):
        found = w.run(budget).similarity
        assert (found >= last - 1e-9).all()
        last = found
    unbounded = Maximiser(Directions(w.space), w.linear())
    reach, u = unbounded.reach, unbounded.unbounded(w.features, w.text)
    assert reach is not None
    assert u is not None
    assert (w.cosine(reach.to_features(u)) >= last - 1e-4).all()
    per_row = torch.linspace(0, 3, ROWS).double()
    torch.testing.assert_close(w.run(per_row).similarity[7], w.run(float(per_row[7])).similarity[7])
    w.features, w.text, both = w.features[4:5].float(), w.text[4], w.run(1.5)  # one row, and one text for all
    torch.testing.assert_close(w.run(1.5).similarity, both.similarity[4:5], atol=1e-6, rtol=0)


def test_a_target_within_reach_is_reached() -> None:
    w = World()
    d = w.space.component(torch.randn(ROWS, M, generator=torch.Generator().manual_seed(1)).double())
    w.text = normalize(w.translate(w.features + 2 * normalize(d, dim=1)), dim=1)
    torch.testing.assert_close(w.run(2.0).similarity, torch.ones(ROWS).double(), atol=1e-9, rtol=0)
    assert w.run(0.2).similarity.mean() < 0.99


@pytest.mark.parametrize("kind", ["blind translator", "full head", "full head, network"])
def test_where_there_is_nothing_to_climb_nothing_moves(kind: str) -> None:
    w = World()
    if kind == "blind translator":
        w.matrix = w.matrix - w.space.component(w.matrix)
    else:
        w.space = NullSpace.from_weight(torch.eye(M), allow_empty=True)
    assert w.run(3.0, translator=network() if "network" in kind else None).displacement.abs().max() < 1e-9


def test_a_network_is_climbed_better_with_steps_and_restarts() -> None:
    w, net = World(), network()
    few, many = w.run(3.0, None, net, steps=2, restarts=0), w.run(3.0, None, net, steps=80, restarts=0)
    several, again = (w.run(3.0, None, net, steps=80, restarts=4) for _ in range(2))
    assert (few.similarity >= w.single(3.0, net) - 1e-12).all()
    assert (many.similarity >= few.similarity).all()
    assert many.similarity.mean() > few.similarity.mean() + 0.01
    assert (several.similarity >= many.similarity).all()
    z = net(w.features + several.displacement)
    torch.testing.assert_close(cosine_similarity(z, w.text, dim=-1), several.similarity)
    assert (several.displacement @ w.weight.T).abs().max() < 1e-10
    assert (several.displacement.norm(dim=1) <= 3 + 1e-12).all()
    assert torch.equal(several.displacement, again.displacement)  # seeded


def test_a_basis_and_the_null_space_it_spans_are_one() -> None:
    w = World()
    basis = Directions(basis=w.space.null_basis())
    torch.testing.assert_close(w.run(1.0).similarity, w.run(1.0, basis).similarity, atol=1e-9, rtol=0)
    space, spanned = (w.run(1.0, kind, network(), steps=300).similarity for kind in (None, basis))
    torch.testing.assert_close(space, spanned, atol=1e-5, rtol=0)


def test_a_natural_radius_is_a_ball_in_the_colouring_of_the_conditional_gaussian() -> None:
    w = World()
    root = torch.randn(M, M, generator=torch.Generator().manual_seed(3)).double()
    gaussian = ConditionalGaussian.from_moments(w.features.mean(0), root @ root.T / M, w.space)
    w.features = w.features - gaussian.whiten(w.features) @ gaussian.colouring.T
    assert gaussian.radius(w.features).max() < 1e-9  # the middle of the distribution, the same logits
    found = w.run(1.7, Directions(basis=gaussian.colouring))
    length = found.coordinates.norm(dim=1)
    torch.testing.assert_close(gaussian.radius(w.features + found.displacement), length, atol=1e-8, rtol=0)
    assert length.max() <= 1.7 + 1e-9
    direction = normalize(gaussian.on_manifold(found.displacement + 0.1), dim=1)
    step = gaussian.step_for_radius(w.features, direction, torch.tensor([1.7]))
    assert (found.similarity >= w.cosine(step * direction) - 1e-12).all()


def test_nearly_null_directions_are_those_below_the_share() -> None:
    w = World(small=(0.03, 0.004))
    assert [w.near(0.1, ratio).basis.shape[1] for ratio in (0.001, 0.01, 0.05, 1.0)] == [0, 1, 2, C]
    basis = w.near(0.1).basis
    shares = torch.linalg.svdvals(w.weight @ basis) / torch.linalg.svdvals(w.weight)[0]
    torch.testing.assert_close(shares, torch.tensor([0.03, 0.004]).double(), atol=1e-9, rtol=0)
    assert w.space.component(basis.T).abs().max() < 1e-12


@pytest.mark.parametrize("free", [False, True])
def test_nearly_null_directions_gain_and_keep_logits_within_the_tolerance(free: bool) -> None:
    w = World(small=(0.03, 0.004))
    translator = w.translate if free else None
    strict, gained = w.run(2.0, translator=translator).similarity, []
    for tolerance in (1e-3, 1e-2, 0.1):
        found = w.run(2.0, Directions(w.space, near=w.near(tolerance)), translator)
        assert 0.5 * tolerance < (found.displacement @ w.weight.T).abs().max() <= tolerance
        assert (found.displacement.norm(dim=1) <= 2 * (1 + 1e-9)).all()
        torch.testing.assert_close(w.cosine(found.displacement), found.similarity, atol=1e-9, rtol=0)
        assert (found.similarity >= strict - 1e-5).all()
        gained.append(float((found.similarity - strict).mean()))
    assert gained == sorted(gained)
    assert gained[-1] > 0.01


def test_softmax_invariance_measures_logits_up_to_a_shift() -> None:
    w = World(small=(0.03,), invariance="softmax")
    moved = w.run(2.0, Directions(w.space, near=w.near(0.05, 0.2))).displacement @ w.weight.T
    assert (moved - moved.mean(1, keepdim=True)).abs().max() <= 0.05
