"""The null space: theorems against the full SVD, ranks, invariances, and the projector's gradient."""

from __future__ import annotations

import math

import pytest
import torch

from singreg.nullspace import NullSpace, helmert_contrasts, null_share, row_space_projection
from tests.reference import formulas


def random_weight(classes: int, width: int, *, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, width, dtype=torch.float64, generator=generator)
    if rank is not None:
        mix = torch.randn(classes, rank, dtype=torch.float64, generator=generator)
        weight = mix @ weight[:rank]
    return weight


@pytest.mark.parametrize(("classes", "width", "rank"), [(5, 12, None), (12, 20, 7), (30, 12, 8), (1, 4, None)])
def test_component_is_the_full_svd_projector(classes: int, width: int, rank: int | None) -> None:
    weight = random_weight(classes, width, rank=rank)
    space, features = NullSpace.from_weight(weight), torch.randn(9, width, dtype=torch.float64)
    projector = formulas.null_projector(weight)
    torch.testing.assert_close(space.component(features), features @ projector, atol=1e-10, rtol=0)
    null = space.component(features)
    torch.testing.assert_close(space.component(null), null)  # idempotent
    assert (features @ weight.T).abs().max() > 0.1  # the control: W does see f ...
    assert (null @ weight.T).abs().max() < 1e-9  # ... and nothing of its null part
    torch.testing.assert_close(sum(space.split(features)), features)
    basis = space.null_basis()
    assert basis.shape == (width, space.nullity)
    torch.testing.assert_close(basis @ basis.T, projector, atol=1e-10, rtol=0)


def test_equivalent_feature_keeps_every_logit() -> None:
    weight = random_weight(50, 200)
    features = torch.randn(64, 200, dtype=torch.float64)
    change = (features - NullSpace.from_weight(weight).remove(features)) @ weight.T
    assert change.abs().max() <= 1e-9
    other = features - features * (torch.arange(200) < 150)  # the control: removing as many other directions does change them
    assert ((features - other) @ weight.T).abs().max() > 1


def test_rank_is_relative() -> None:
    """Trap 2: scaling W must not change its rank, and an absolute tolerance calls this rank-60 matrix rank 100."""
    weight = random_weight(100, 300, rank=60).float().double()
    weight = weight + 1e-7 * weight.std() * torch.randn_like(weight)
    for scale in (1e-6, 1.0, 1e6):
        assert NullSpace.from_weight(scale * weight, rtol=1e-5).rank == 60
    assert int((torch.linalg.svdvals(1e6 * weight) > 1e-5).sum()) == 100


def test_softmax_null_has_one_dimension_more_and_keeps_probabilities() -> None:
    weight = random_weight(6, 15)
    logits, softmax = NullSpace.from_weight(weight), NullSpace.from_weight(weight, invariance="softmax")
    assert softmax.nullity == logits.nullity + 1
    features = torch.randn(4, 15, dtype=torch.float64)
    before, after = features @ weight.T, softmax.remove(features) @ weight.T
    torch.testing.assert_close(before.softmax(1), after.softmax(1))
    assert (before - after).abs().max() > 1e-3
    contrasts = helmert_contrasts(weight)
    torch.testing.assert_close(contrasts.T @ contrasts, (weight - weight.mean(0)).T @ (weight - weight.mean(0)))


def test_full_rank_head_is_refused_or_empty() -> None:
    weight = random_weight(20, 10)
    with pytest.raises(ValueError, match=r"20 classes, 10 features.*no null space"):
        NullSpace.from_weight(weight)
    space = NullSpace.from_weight(weight, allow_empty=True)
    assert space.nullity == 0
    features = torch.randn(3, 10)
    assert space.component(features).abs().max() < 1e-6
    assert float(null_share(features, space.component(features)).max()) < 1e-6


@pytest.mark.parametrize("weight", [torch.ones(2, 3, 1), torch.tensor([[1.0, float("nan")]])])
def test_bad_weights_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape|NaN"):
        NullSpace.from_weight(weight)


def test_basis_stays_float64_and_is_not_saved() -> None:
    space = torch.nn.Sequential(NullSpace.from_weight(random_weight(3, 8))).half().float()
    assert space[0].basis.dtype == torch.float64
    assert space.state_dict() == {}
    assert list(space.parameters()) == []


@pytest.mark.parametrize("invariance", ["logits", "softmax"])
def test_projection_gradcheck_in_weight_and_features(invariance: str) -> None:
    weight, features = random_weight(4, 9).requires_grad_(), torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, f: row_space_projection(w, f, invariance=invariance), (weight, features))


def test_projection_gradient_is_the_pseudo_inverse_formula() -> None:
    """Also where singular values repeat, where an SVD's derivative is NaN (trap 1)."""
    orthogonal = torch.linalg.qr(random_weight(9, 4)).Q.T.contiguous()  # all singular values 1
    for start in (random_weight(4, 9), orthogonal):
        gradients = []
        features, direction = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
        for function in (row_space_projection, formulas.projection):
            weight = start.clone().requires_grad_()
            (function(weight, features) * direction).sum().backward()
            gradients.append(weight.grad)
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-9, rtol=1e-9)
        assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_projection_in_float32_is_accurate_at_every_conditioning(spread: float) -> None:
    """The Cholesky path, its correction, and the float64 QR path of an ill-conditioned head."""
    left, right = torch.linalg.qr(random_weight(8, 8)).Q, torch.linalg.qr(random_weight(30, 8)).Q
    weight = left @ torch.diag(torch.logspace(0, float(torch.log10(torch.tensor(spread))), 8, dtype=torch.float64)) @ right.T
    features = torch.randn(20, 30)
    expected = features.double() @ (right @ right.T)
    leaf = weight.float().requires_grad_()
    projected = row_space_projection(leaf, features)
    assert (projected.double() - expected).abs().max() < 3e-3 * (1 if spread < 1e-3 else 1e-2)
    projected.square().sum().backward()
    assert torch.isfinite(leaf.grad).all()


def test_rank_deficient_head_keeps_the_gradient_of_every_change_that_keeps_its_rank() -> None:
    left, right = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    features = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    projected = row_space_projection(left @ right, features)
    torch.testing.assert_close(features - projected, features @ formulas.null_projector((left @ right).detach(), 1e-9), atol=1e-9, rtol=0)
    assert torch.autograd.gradcheck(lambda r, f: row_space_projection(left @ r, f), (right, features))
    # The full-rank factor has the same row space, so the same derivative.
    wanted = torch.autograd.grad(row_space_projection(right, features).square().sum(), right)
    found = torch.autograd.grad(row_space_projection(left @ right, features).square().sum(), right)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-7)
    nothing = torch.zeros(3, 10, dtype=torch.float64, requires_grad=True)
    assert not row_space_projection(nothing, features).any()


def test_a_head_whose_mean_row_is_rounding_noise_has_the_gradient_of_its_contrasts() -> None:
    """Cross-entropy keeps the mean row of a head that began at 0 there, which is most heads trained from scratch."""
    weight = random_weight(6, 20).float()
    weight -= weight.mean(0)
    weight += 1e-8 * torch.randn(6, 20)
    weight.requires_grad_()
    features = torch.randn(5, 20)
    found = torch.autograd.grad(row_space_projection(weight, features).square().sum(), weight)[0]
    wanted = torch.autograd.grad(row_space_projection(weight, features, invariance="softmax").square().sum(), weight)[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("condition", [10.0, 100.0, 1e3, 3e3])
def test_float32_projection_and_gradient_are_right_at_every_condition(condition: float) -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=torch.float64)).Q.T
    exact = (left * torch.logspace(0, -math.log10(condition), 40, dtype=torch.float64)) @ right
    weight = exact.float().requires_grad_()
    features = torch.randn(9, 60, generator=generator)
    projected = row_space_projection(weight, features)
    wide = weight.detach().double().requires_grad_()
    wanted = row_space_projection(wide, features.double())
    assert float(((projected - wanted).norm() / wanted.norm()).detach()) < 1e-5 * condition**0.5
    target = torch.randn(9, 60, generator=generator)
    found = torch.autograd.grad((projected * target).sum(), weight)[0]
    expected = torch.autograd.grad((wanted * target).sum(), wide)[0]
    assert float((found - expected).norm() / expected.norm()) < 1e-4 * condition**0.5


def test_autocast_does_not_round_the_projection() -> None:
    weight, features = random_weight(6, 20).float(), torch.randn(5, 20)
    space = NullSpace.from_weight(weight)
    wanted, component = row_space_projection(weight, features), space.component(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(row_space_projection(weight, features), wanted)
        assert torch.equal(space.component(features), component)


def test_more_classes_than_features_projects_to_everything() -> None:
    weight, features = random_weight(12, 5), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(row_space_projection(weight, features), features)
