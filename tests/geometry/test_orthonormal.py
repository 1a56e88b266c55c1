"""Orthonormal rows by halving: against QR and SVD, at every conditioning, and refused where it would not be exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from singreg import nullspace
from singreg import nullspace as orthonormal
from singreg.nullspace import NullSpace, orthonormal_rows
from tests.reference import formulas


def head(classes: int, width: int, condition: float = 3.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(classes, classes, dtype=torch.float64, generator=g)).Q
    right = torch.linalg.qr(torch.randn(width, classes, dtype=torch.float64, generator=g)).Q
    sigma = torch.logspace(0, -float(torch.log10(torch.tensor(condition))), classes, dtype=torch.float64)
    return left @ torch.diag(sigma) @ right.T


def departure(q: Tensor) -> float:
    return float(torch.linalg.matrix_norm(q @ q.T - torch.eye(len(q))))


@pytest.mark.parametrize(("classes", "width"), [(1, 3), (5, 12), (64, 100), (65, 65), (130, 200)])
def test_the_product_is_the_head(classes: int, width: int) -> None:
    weight = head(classes, width)
    found = orthonormal_rows(weight.clone())
    assert found is not None
    q, factor = found
    torch.testing.assert_close(factor @ q, weight, atol=1e-14, rtol=0)
    assert departure(q) < 1e-13
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(torch.linalg.svdvals(factor), torch.linalg.svdvals(weight), atol=1e-13, rtol=0)


@pytest.mark.parametrize("condition", [10.0, 1e3, 300.0])
def test_a_second_pass_mends_what_conditioning_costs(monkeypatch: pytest.MonkeyPatch, condition: float) -> None:
    weight = head(100, 150, condition)
    found = orthonormal_rows(weight.clone())
    assert found is not None
    assert departure(found[0]) < 2e-12
    torch.testing.assert_close(found[1] @ found[0], weight, atol=1e-13, rtol=0)
    sigma = torch.linalg.svdvals(weight)
    assert ((torch.linalg.svdvals(found[1]) - sigma) / sigma).abs().max() < 1e-10
    monkeypatch.setattr(orthonormal, "LARGEST_DEPARTURE", 1.0)
    once = orthonormal_rows(weight.clone())
    assert once is not None
    assert condition < 1e3 or departure(once[0]) > 2e-12  # the control: one pass is not enough there


def repeated_row() -> Tensor:
    weight = head(100, 150)
    weight[90] = weight[3]
    return weight


@pytest.mark.parametrize(
    "weight",
    [repeated_row(), head(100, 150, 1e7), torch.diag(torch.tensor([1.0, 1e-14]).double()), *(torch.zeros(c, 5).double() for c in (3, 0))],
    ids=["repeated", "ill-conditioned", "exactly representable", "zero", "empty"],
)
def test_what_is_not_safely_of_full_rank_is_left_to_others(weight: Tensor) -> None:
    assert orthonormal_rows(weight.clone()) is None


@pytest.mark.parametrize("rows", [torch.ones(2, 3), torch.ones(3, 2).double(), torch.ones(3).double()])
def test_other_rows_are_refused(rows: Tensor) -> None:
    with pytest.raises(ValueError, match="expected float64 rows"):
        orthonormal_rows(rows)


@pytest.mark.parametrize("invariance", ["logits", "softmax"])
def test_both_ways_give_the_same_null_space(monkeypatch: pytest.MonkeyPatch, invariance: str) -> None:
    weight = head(70, 90, 50.0)
    given = weight.clone()
    fast = NullSpace.from_weight(weight, invariance=invariance)
    assert torch.equal(weight, given)  # a float64 head is not worked on in place
    monkeypatch.setattr(nullspace, "orthonormal_rows", lambda *_, **__: None)
    slow = NullSpace.from_weight(weight, invariance=invariance)
    assert fast._factor is not None
    assert slow._factor is None
    assert fast.rank == slow.rank == (70 if invariance == "logits" else 69)
    torch.testing.assert_close(fast.basis @ fast.basis.T, slow.basis @ slow.basis.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(fast.singular_values, slow.singular_values, atol=1e-13, rtol=0)
    if invariance == "logits":
        torch.testing.assert_close(torch.eye(90) - fast.basis @ fast.basis.T, formulas.null_projector(weight), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank", [40, 25])
def test_singular_directions_are_the_right_singular_vectors(rank: int) -> None:
    weight = head(40, 60, 20.0)
    weight[rank:] = 0
    space = NullSpace.from_weight(weight)
    directions, sigma = space.singular_directions()
    assert directions.shape == (60, rank)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(weight)[:rank], atol=1e-13, rtol=0)
    moved = weight @ directions
    torch.testing.assert_close(moved.T @ moved, torch.diag(sigma**2), atol=1e-13, rtol=0)
    torch.testing.assert_close(directions @ directions.T, space.basis @ space.basis.T, atol=1e-12, rtol=0)


def test_a_looser_tolerance_counts_singular_values() -> None:
    weight = head(30, 50, 1e3)
    sigma = torch.linalg.svdvals(weight)
    for rtol in (0.0, 1e-9, 1e-2, 0.3, 2.0):
        assert NullSpace.from_weight(weight, rtol=rtol).rank == int((sigma > rtol * sigma[0]).sum())


def test_the_factor_keeps_its_precision_and_survives_a_copy() -> None:
    space = NullSpace.from_weight(head(8, 20))
    moved = copy.deepcopy(space).half()
    assert moved._factor is not None
    assert moved._factor.dtype == moved.basis.dtype == torch.float64
    torch.testing.assert_close(moved.singular_values, space.singular_values, atol=0, rtol=0)
    assert moved.float().singular_values.dtype == torch.float64
    assert space.state_dict() == {}
