"""The null space: theorems against the full SVD, ranks, invariances, and the projector's gradient."""

import copy
import math

import pytest
import torch
from torch import Tensor

from singreg import nullspace
from singreg.nullspace import NullSpace, helmert_contrasts, null_share, row_space_projection
from tests.reference import formulas
from tests.toy import normal


def head(classes: int, width: int, condition: float = 3.0) -> Tensor:
    """A head of full rank with singular values from 1 down to 1 / condition."""
    left, right = torch.linalg.qr(normal(classes, classes)).Q, torch.linalg.qr(normal(width, classes, seed=1)).Q
    return left @ torch.diag(torch.logspace(0, -math.log10(condition), classes, dtype=torch.float64)) @ right.T


def of_rank(classes: int, width: int, rank: int) -> Tensor:
    return normal(classes, rank, seed=2) @ normal(rank, width)


@pytest.mark.parametrize("weight", [normal(5, 12), of_rank(12, 20, 7), of_rank(30, 12, 8), normal(1, 4), head(70, 90)])
def test_component_is_the_full_svd_projector(weight: Tensor) -> None:
    given, features = weight.clone(), torch.randn(9, weight.shape[1], dtype=torch.float64)
    space, projector = NullSpace.from_weight(weight), formulas.null_projector(weight)
    assert torch.equal(weight, given)  # a float64 head is not worked on in place
    null = space.component(features)
    torch.testing.assert_close(null, features @ projector, atol=1e-10, rtol=0)
    torch.testing.assert_close(space.component(null), null)  # idempotent
    assert (features @ weight.T).abs().max() > 0.1  # the control: W does see f ...
    assert (null @ weight.T).abs().max() < 1e-9  # ... and nothing of its null part
    torch.testing.assert_close(space.remove(features) + null, features)
    mean = features.mean(0)
    torch.testing.assert_close(space.remove(features, mean=mean), features - (features - mean) @ projector)
    basis = space.null_basis()
    assert basis.shape == (weight.shape[1], space.nullity)
    torch.testing.assert_close(basis @ basis.T, projector, atol=1e-10, rtol=0)


def test_rank_is_relative() -> None:
    """Trap 2: scaling W must not change its rank, and an absolute tolerance calls this rank-60 matrix rank 100."""
    weight = of_rank(100, 300, 60)
    for scale in (1e-12, 1.0, 1e12):
        assert NullSpace.from_weight(scale * weight).rank == 60
    assert int((torch.linalg.svdvals(1e12 * weight) > 1e-5).sum()) == 100


def test_softmax_null_has_one_dimension_more_and_keeps_probabilities() -> None:
    weight, features = normal(6, 15), torch.randn(4, 15, dtype=torch.float64)
    logits, softmax = NullSpace.from_weight(weight), NullSpace.from_weight(weight, invariance="softmax")
    assert softmax.nullity == logits.nullity + 1
    before, after = features @ weight.T, softmax.remove(features) @ weight.T
    torch.testing.assert_close(before.softmax(1), after.softmax(1))
    assert (before - after).abs().max() > 1e-3
    contrasts, centred = helmert_contrasts(weight), weight - weight.mean(0)
    torch.testing.assert_close(contrasts.T @ contrasts, centred.T @ centred)


@pytest.mark.parametrize("weight", [torch.ones(2, 3, 1), torch.tensor([[1.0, float("nan")]]), normal(20, 10)])
def test_a_head_without_a_null_space_is_refused_or_empty(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape|\(2, 3, 1\)|NaN|20 classes, 10 features.*no null space"):
        NullSpace.from_weight(weight)
    if weight.shape == (20, 10):
        space, features = NullSpace.from_weight(weight, allow_empty=True), torch.randn(3, 10)
        assert space.nullity == 0
        assert float(null_share(features, space.component(features)).max()) < 1e-6
        torch.testing.assert_close(row_space_projection(weight, features), features)


def test_a_null_space_keeps_its_precision_survives_a_copy_and_is_not_saved() -> None:
    space = NullSpace.from_weight(head(8, 20))
    moved = copy.deepcopy(torch.nn.Sequential(space)).half().float()[0]
    assert moved.basis.dtype == torch.float64
    torch.testing.assert_close(moved.singular_values, space.singular_values, atol=0, rtol=0)
    assert space.state_dict() == {}
    assert list(space.parameters()) == []


@pytest.mark.parametrize("kind", ["repeated", "ill-conditioned", "exactly representable", "zero", "empty"])
def test_what_is_not_safely_of_full_rank_is_left_to_the_svd(kind: str) -> None:
    repeated = head(100, 150)
    repeated[90] = repeated[3]
    exact = torch.diag(torch.tensor([1.0, 1e-14]).double())
    weights = {"repeated": repeated, "ill-conditioned": head(100, 150, 1e8), "exactly representable": exact}
    weight = weights.get(kind, torch.zeros(3 if kind == "zero" else 0, 5).double())
    space = NullSpace.from_weight(weight, allow_empty=True)
    torch.testing.assert_close(space.singular_values, torch.linalg.svdvals(weight))
    assert space._factor.ndim == 1
    assert space.rank == {"repeated": 99, "ill-conditioned": 100, "exactly representable": 2}.get(kind, 0)


@pytest.mark.parametrize("invariance", ["logits", "softmax"])
def test_both_ways_give_the_same_null_space(monkeypatch: pytest.MonkeyPatch, invariance: nullspace.Invariance) -> None:
    weight = head(70, 90, 50.0)
    fast = NullSpace.from_weight(weight, invariance=invariance)
    monkeypatch.setattr(nullspace, "SAFE", 0)
    slow = NullSpace.from_weight(weight, invariance=invariance)
    rows = helmert_contrasts(weight) if invariance == "softmax" else weight
    torch.testing.assert_close(fast._factor @ fast.basis.T, rows, atol=1e-14, rtol=0)
    assert (fast._factor.ndim, slow._factor.ndim) == (2, 1)
    assert fast.rank == slow.rank == (70 if invariance == "logits" else 69)
    torch.testing.assert_close(fast.basis @ fast.basis.T, slow.basis @ slow.basis.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(fast.singular_values, slow.singular_values, atol=1e-13, rtol=0)


@pytest.mark.parametrize("weight", [normal(4, 9), torch.linalg.qr(normal(9, 4)).Q.T.contiguous()])
def test_projection_gradient_is_that_of_the_pseudo_inverse(weight: Tensor) -> None:
    """Trap 1: also where singular values repeat, where an SVD's derivative is NaN."""
    features, direction = (torch.randn(6, 9, dtype=torch.float64) for _ in range(2))
    gradients = []
    for function in (row_space_projection, formulas.projection):
        leaf = weight.clone().requires_grad_()
        gradients.append(torch.autograd.grad((function(leaf, features) * direction).sum(), leaf)[0])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-9, rtol=1e-9)
    assert gradients[0].abs().max() > 1e-3
    for invariance in ("logits", "softmax"):
        inputs = (weight.clone().requires_grad_(), features.requires_grad_())
        assert torch.autograd.gradcheck(lambda w, f, i=invariance: row_space_projection(w, f, invariance=i), inputs)


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0, 1e3, 3e3, 1e4])
def test_float32_projection_and_gradient_are_right_at_every_condition(condition: float) -> None:
    """The Cholesky path, its correction, and the float64 QR path of an ill-conditioned head."""
    weight, features, target = head(40, 60, condition).float().requires_grad_(), torch.randn(9, 60), torch.randn(9, 60)
    projected = row_space_projection(weight, features)
    wide = weight.detach().double().requires_grad_()
    wanted = row_space_projection(wide, features.double())
    torch.testing.assert_close(wanted, formulas.projection(wide, features.double()), atol=1e-8, rtol=1e-8)
    assert float(((projected - wanted).norm() / wanted.norm()).detach()) < 1e-5 * condition**0.5
    found = torch.autograd.grad((projected * target).sum(), weight)[0]
    expected = torch.autograd.grad((wanted * target).sum(), wide)[0]
    assert float((found - expected).norm() / expected.norm()) < 1e-4 * condition**0.5


def test_rank_deficient_head_keeps_the_gradient_of_every_change_that_keeps_its_rank() -> None:
    left, right = torch.randn(6, 4, dtype=torch.float64), normal(4, 10).requires_grad_()
    features = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    expected = features - features @ formulas.null_projector(right)
    torch.testing.assert_close(row_space_projection(left @ right, features), expected, atol=1e-9, rtol=0)
    assert torch.autograd.gradcheck(lambda r, f: row_space_projection(left @ r, f), (right, features))
    # The full-rank factor has the same row space, so the same derivative.
    wanted = torch.autograd.grad(row_space_projection(right, features).square().sum(), right)
    found = torch.autograd.grad(row_space_projection(left @ right, features).square().sum(), right)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-7)
    assert not row_space_projection(torch.zeros(3, 10, dtype=torch.float64, requires_grad=True), features).any()


def test_a_head_whose_mean_row_is_rounding_noise_has_the_gradient_of_its_contrasts() -> None:
    """Cross-entropy keeps the mean row of a head that began at 0 there, which is most heads trained from scratch."""
    weight = normal(6, 20).float()
    weight = (weight - weight.mean(0) + 1e-8 * torch.randn(6, 20)).requires_grad_()
    features = torch.randn(5, 20)
    lengths = [row_space_projection(weight, features, invariance=kind).square().sum() for kind in ("logits", "softmax")]
    found, wanted = (torch.autograd.grad(length, weight)[0] for length in lengths)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert wanted.abs().max() > 0.1


def test_autocast_does_not_round_the_projection() -> None:
    weight, features = normal(6, 20).float(), torch.randn(5, 20)
    space = NullSpace.from_weight(weight)
    wanted, component = row_space_projection(weight, features), space.component(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(row_space_projection(weight, features), wanted)
        assert torch.equal(space.component(features), component)
