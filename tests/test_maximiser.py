"""The maximiser: against brute force, a general climb and the single step; budgets, logits, tolerances."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from singreg import steering
from singreg.nullspace import NullSpace
from singreg.steering import Maximiser, NearNull, similarity_gradient, unit_in_null
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

    def translate(self, f: Tensor) -> Tensor:
        return f @ self.matrix.T + self.offset

    def cosine(self, d: Tensor) -> Tensor:
        return cosine_similarity(self.translate(self.features + d), self.text, dim=-1)

    def near(self, tolerance: float, ratio: float = 0.05) -> NearNull:
        return NearNull.below(self.weight, self.space, ratio=ratio, tolerance=tolerance)

    def run(self, budget: float | Tensor, near: NearNull | None = None, **limits: int) -> SimpleNamespace:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in limits.items():
                patch.setattr(steering, name.upper(), value)
            climber = Maximiser(LinearTranslator(self.matrix, self.offset), self.space, near)
            limit = torch.as_tensor(budget, dtype=torch.float64).expand(len(self.features))
            displacement, _ = climber.maximise(self.features, self.text, limit)
        return SimpleNamespace(displacement=displacement, similarity=self.cosine(displacement))

    def single(self, budget: float) -> Tensor:
        """The cosine that the paper's one gradient step of the whole budget reaches."""
        gradient = similarity_gradient(self.features, self.text, self.translate)
        return self.cosine(budget * unit_in_null(gradient, self.space))

    def climb(self, budget: float, steps: int = 3000) -> Tensor:
        """The cosine that thousands of small gradient steps reach, each brought back to the budget."""
        d = torch.zeros_like(self.features)
        for _ in range(steps):
            leaf = d.requires_grad_()
            (gradient,) = torch.autograd.grad(self.cosine(leaf).sum(), leaf)
            d = d.detach() + 0.05 * budget * normalize(self.space.component(gradient), dim=1)
            d = d * (budget / d.norm(dim=1, keepdim=True)).clamp_max(1)
        return self.cosine(d)


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
    assert (found.displacement.norm(dim=1) <= budget * (1 + 1e-12)).all()
    assert (found.displacement @ w.weight.T).abs().max() < 1e-10


@pytest.mark.parametrize("budget", [0.5, 3.0])
def test_the_closed_form_is_where_a_general_climb_ends(budget: float) -> None:
    w = World()
    exact, climbed = w.run(budget, steps=1, restarts=0), w.climb(budget)
    positive = exact.similarity > 0
    assert positive.sum() > 15
    assert (exact.similarity[positive] >= climbed[positive] - 1e-12).all()
    torch.testing.assert_close(exact.similarity[positive], climbed[positive], atol=2e-3, rtol=0)
    torch.testing.assert_close(w.run(budget, steps=200).similarity[positive], exact.similarity[positive])


def test_a_larger_budget_is_never_worse_and_none_gives_nothing() -> None:
    w = World()
    last = w.cosine(torch.zeros_like(w.features))
    assert not w.run(0.0).displacement.any()
    for budget in (0.0, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0):
        found = w.run(budget).similarity
        assert (found >= last - 1e-9).all()
        last = found
    per_row = torch.linspace(0, 3, ROWS).double()
    torch.testing.assert_close(w.run(per_row).similarity[7], w.run(float(per_row[7])).similarity[7])
    w.features, w.text, both = w.features[4:5], w.text[4:5], w.run(1.5)
    torch.testing.assert_close(w.run(1.5).similarity, both.similarity[4:5], atol=1e-12, rtol=0)


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_of_many_that_reach_the_target_the_shortest_is_taken(tolerance: float | None) -> None:
    w = World(C + N + 3, small=(0.03,))
    near = None if tolerance is None else w.near(tolerance)
    found = w.run(1e4, near)
    torch.testing.assert_close(found.similarity, torch.ones(ROWS).double(), atol=1e-12, rtol=0)
    # By least squares: min |d| over q with N d = q t - T f, N the null part of A; q <= 0 would turn it to -t.
    inverse = torch.linalg.pinv(w.space.component(w.matrix))
    toward, back = w.text @ inverse.T, w.translate(w.features) @ inverse.T
    q = (toward * back).sum(1, keepdim=True) / toward.square().sum(1, keepdim=True)
    wanted, ahead = q * toward - back, q[:, 0] > 0.1
    assert 10 < ahead.sum() < ROWS
    torch.testing.assert_close(found.displacement[ahead], wanted[ahead], atol=1e-8, rtol=0)
    w.features = w.features + 1e-12 * torch.randn(w.features.shape, generator=torch.Generator().manual_seed(1))
    again = w.run(2e4, near).displacement  # neither rounding nor a larger budget chooses another
    torch.testing.assert_close(again, found.displacement, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["blind translator", "full head"])
def test_where_there_is_nothing_to_climb_nothing_moves(kind: str) -> None:
    w = World()
    if kind == "blind translator":
        w.matrix = w.matrix - w.space.component(w.matrix)
    else:
        w.space = NullSpace.from_weight(torch.eye(M), allow_empty=True)
    assert w.run(3.0).displacement.abs().max() < 1e-9


def test_nearly_null_directions_are_those_below_the_share() -> None:
    w = World(small=(0.03, 0.004))
    assert [w.near(0.1, ratio).basis.shape[1] for ratio in (0.001, 0.01, 0.05, 1.0)] == [0, 1, 2, C]
    basis = w.near(0.1).basis
    shares = torch.linalg.svdvals(w.weight @ basis) / torch.linalg.svdvals(w.weight)[0]
    torch.testing.assert_close(shares, torch.tensor([0.03, 0.004]).double(), atol=1e-9, rtol=0)
    assert w.space.component(basis.T).abs().max() < 1e-12


def test_nearly_null_directions_gain_and_keep_logits_within_the_tolerance() -> None:
    w = World(small=(0.03, 0.004))
    strict, gained = w.run(2.0).similarity, []
    for tolerance in (1e-3, 1e-2, 0.1):
        found = w.run(2.0, w.near(tolerance))
        assert 0.5 * tolerance < (found.displacement @ w.weight.T).abs().max() <= tolerance
        assert (found.displacement.norm(dim=1) <= 2 * (1 + 1e-9)).all()
        assert (found.similarity >= strict - 1e-5).all()
        gained.append(float((found.similarity - strict).mean()))
    assert gained == sorted(gained)
    assert gained[-1] > 0.01


def test_softmax_invariance_measures_logits_up_to_a_shift() -> None:
    w = World(small=(0.03,), invariance="softmax")
    moved = w.run(2.0, w.near(0.05, 0.2)).displacement @ w.weight.T
    assert (moved - moved.mean(1, keepdim=True)).abs().max() <= 0.05
