"""The terms of SingLoss, presets and placebos: theorems with controls, invariances, and a user's own term."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from singreg.terms import (
    DEFAULT_TERMS,
    HEAD_TERMS,
    PRESETS,
    TERMS,
    LossInputs,
    contrast_directions,
    placebo_texts,
    resolve_terms,
    term,
)
from tests.reference import formulas
from tests.test_losses import B, C, M, N, flatten, put, setup, value


def test_a_new_term_is_one_function() -> None:
    @term("length", head_only=False)
    def length(inputs: LossInputs) -> Tensor:
        return inputs.centred.square().sum(1).mean()

    try:
        assert resolve_terms("leakage", {"length": 2.0})["length"] == 2.0
        sing, _, features, labels = setup(terms={"length": 2.0})
        expected = 2 * (features - features.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(sing(features, labels), expected)
    finally:
        TERMS.pop("length")


@pytest.mark.parametrize("name", sorted(TERMS))
def test_a_scale_of_features_or_weight_changes_no_term(name: str) -> None:
    """f, μ and class means times 7, A over 7 (z is what it was), W times 0.01; then A and a times 7."""
    sing, head, features, labels = setup(terms={name: 1.0})
    if name == "head":
        flatten(head)
    before = value(sing, features, labels)
    assert abs(before) > 1e-3
    for buffer, factor in ((sing.mean, 7.0), (sing.class_means, 7.0), (sing.matrix, 1 / 7)):
        buffer.mul_(factor)
    put(head, 0.01 * head.weight)
    assert value(sing, 7 * features, labels) == pytest.approx(before, rel=1e-5)
    moved = value(sing, 7 * features + 3 * torch.randn(M).double(), labels)
    assert moved != pytest.approx(before, rel=1e-5) or name in HEAD_TERMS
    sing.matrix.mul_(7.0), sing.offset.mul_(7.0)
    assert value(sing, 7 * features, labels) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("name", sorted(TERMS))
def test_the_order_of_classes_and_prompts_changes_no_term(name: str) -> None:
    sing, head, features, labels = setup(terms={name: 1.0})
    if name == "head":
        flatten(head)
    before = value(sing, features, labels)
    order = torch.tensor([3, 0, 4, 1, 2])
    for buffer in ("texts", "contrast", "class_means", "image_score_ref"):
        setattr(sing, buffer, getattr(sing, buffer)[order])
    if len(sing.targets):
        sing.targets[:C] = sing.texts
    put(head, head.weight[order])
    assert value(sing, features, order.argsort()[labels]) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_class_share_is_the_between_class_share_with_its_whole_gradient(share: float) -> None:
    """Its running class means carry no gradient, yet descent must lower the true share, large or small."""
    sing, head, _, _ = setup(calibrated=False, terms={"class_share": 1.0})  # so that the batch's means are taken
    labels = torch.arange(20) % C
    noise = torch.randn(20, M, dtype=torch.float64)
    # Classes of equal size whose noise has mean 0, so that `share` is what it says.
    noise -= torch.stack([noise[labels == y].mean(0) for y in labels.tolist()])
    anchors = torch.randn(C, M, dtype=torch.float64)[labels]
    features = (anchors * math.sqrt(share) + noise * math.sqrt(1 - share)).requires_grad_()
    loss = sing.train()(features, labels)
    true = formulas.between_class_share(features, labels, head.weight.detach())
    torch.testing.assert_close(loss, true, atol=1e-6, rtol=1e-6)
    (got,), (expected,) = torch.autograd.grad(loss, features), torch.autograd.grad(true, features)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-4)
    with torch.no_grad():
        assert formulas.between_class_share(features - 1e-2 * got / got.norm(), labels, head.weight) < true


@pytest.mark.parametrize("scale", [0.0, 1e-13, 1e-7])
def test_shares_of_an_empty_null_space_are_finite_with_finite_gradients(scale: float) -> None:
    names = ("class_share", "null_share", "leak", "null_energy")
    sing, head, _, labels = setup(terms=dict.fromkeys(names, 1.0))
    inside = torch.randn(B, C, dtype=torch.float64) @ head.weight.detach()
    features = (inside + scale * torch.randn(B, M)).float().requires_grad_()
    sing.calibrate(features.mean(0), features.mean(0).expand(C, M), torch.ones(C))
    loss = sing.float()(features, labels)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, features)[0]).all()


def test_a_null_without_class_semantics_has_no_leak() -> None:
    """The definition's zero: when A maps the null space to nothing, leak and hinge are 0; the control is not."""
    sing, head, features, labels = setup(terms={"leak": 1.0, "hinge": 1.0, "attribute": 1.0})
    assert value(sing, features, labels) > 0.01
    sing.matrix = sing.matrix @ (torch.linalg.pinv(head.weight.detach()) @ head.weight.detach())
    assert abs(value(sing, features, labels)) < 1e-6


def test_capacity_is_0_for_a_head_that_spans_the_prompts_and_1_for_one_orthogonal_to_them() -> None:
    """METHOD section 7: then no null direction can raise any class's prompt for this translator."""
    sing, head, features, labels = setup(terms={"capacity": 1.0})
    assert 0.05 < value(sing, features, labels) < 0.95
    prompts = sing.texts @ sing.matrix
    put(head, torch.randn(C, C).double() @ prompts)
    assert value(sing, features, labels) < 1e-12
    put(head, torch.linalg.qr(prompts.T, mode="complete").Q[:, C : 2 * C].T)
    assert value(sing, features, labels) > 1 - 1e-6


def test_steer_is_0_for_targets_in_the_row_space_and_1_where_the_step_goes_straight_there() -> None:
    sing, head, features, labels = setup(terms={"steer": 1.0})
    sing.targets = sing.targets[:C]  # 5 classes span 5 directions: room for the prompts only
    assert 0.05 < value(sing, features, labels) < 0.95
    put(head, torch.randn(C, C).double() @ (sing.texts @ sing.matrix))
    assert value(sing, features, labels) < 1e-12
    sing.matrix = torch.linalg.qr(sing.matrix.T).Q.T.contiguous()  # A Aᵀ = 1
    put(head, torch.linalg.qr(sing.matrix.T, mode="complete").Q[:, N : N + C].T)  # and the head sees none of it
    assert value(sing, features, labels) == pytest.approx(1.0, abs=1e-9)
    assert torch.isfinite(torch.autograd.grad(sing(features, labels), head.weight)[0]).all()
    sing.matrix = torch.zeros_like(sing.matrix)  # a translator that sees nothing of any target
    result = sing(features, labels)
    assert float(result.detach()) == 0
    assert torch.isfinite(torch.autograd.grad(result, head.weight)[0]).all()


def test_random_targets_are_the_same_every_time_and_are_there_only_for_steer() -> None:
    first, second = (setup(seed, terms={"steer": 1.0})[0].targets[C:] for seed in (0, 1))
    assert torch.equal(first, second)
    assert first.shape == (C, N)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(C).double(), atol=1e-6, rtol=0)
    assert len(setup(terms={"capacity": 1.0})[0].targets) == C
    assert len(setup(terms={"leak": 1.0})[0].targets) == 0
    assert not torch.allclose(first, placebo_texts(first, "random"))  # a placebo's prompts are not the targets again


def test_head_is_0_above_its_floor_and_the_softmax_view_of_w_counts() -> None:
    sing, head, features, labels = setup(terms={"head": 1.0})
    rows = torch.linalg.qr(torch.randn(M, C).double()).Q.T  # all singular values of the centred head are 1
    put(head, rows + 100 * torch.randn(M).double())  # a common row does not reach the probabilities
    assert value(sing, features, labels) == 0
    assert torch.autograd.grad(sing(features, labels), head.weight)[0].abs().max() == 0  # repeated values, no NaN
    flatten(head)
    assert 0.1 < value(sing, features, labels) < 1
    put(head, torch.cat([rows[:-1], rows[:1]]))  # two equal rows
    assert value(sing, features, labels) == pytest.approx(1.0)
    assert torch.isfinite(torch.autograd.grad(sing(features, labels), head.weight)[0]).all()


def test_orthogonal_is_0_for_orthogonal_rows_of_any_length_and_1_for_equal_ones() -> None:
    sing, head, features, labels = setup(terms={"orthogonal": 1.0})
    assert value(sing, features, labels) > 0.01
    put(head, torch.linspace(0.1, 9, C)[:, None].double() * torch.linalg.qr(torch.randn(M, C).double()).Q.T)
    assert value(sing, features, labels) < 1e-28
    put(head, head.weight[:1].expand(C, M))
    assert value(sing, features, labels) == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "grows"), [("null_energy", False), ("null_share", True)])
def test_null_baselines_are_0_in_the_row_space_and_1_in_the_null_space(name: str, grows: bool) -> None:
    """They differ in one thing: descent on the share also grows what the head reads."""
    sing, head, features, labels = setup(terms={name: 1.0})
    assert 0.1 < value(sing, features, labels) < 0.9
    (gradient,) = torch.autograd.grad(sing(features, labels), features)
    centred = features.detach() - sing.mean
    inside = centred - centred @ formulas.null_projector(head.weight)
    assert (float((gradient * inside).sum()) < -1e-3) == grows
    assert value(sing, sing.mean + torch.randn(B, C).double() @ head.weight.detach(), labels) < 1e-20
    null = torch.randn(B, M).double() @ formulas.null_projector(head.weight)
    assert value(sing, sing.mean + null, labels) == pytest.approx(1.0)


def test_presets_are_known_terms_and_overrides_change_add_and_remove() -> None:
    default = {"leak": 0.3, "hinge": 1.0, "band": 0.3, "class_share": 0.1, "capacity": 100.0}
    assert PRESETS["sing"] == DEFAULT_TERMS == default
    assert {"capacity", "steer", "head", "orthogonal"} == HEAD_TERMS
    assert all(resolve_terms(name, {}) == terms and set(terms) <= set(TERMS) for name, terms in PRESETS.items())
    assert PRESETS["leakage"] == {name: weight for name, weight in default.items() if name != "capacity"}
    assert set(PRESETS["steering"]) == {*default, "steer"}
    changed = resolve_terms("sing", {"capacity": 0, "hinge": 2.0, "head": 0.5})
    assert changed == {"leak": 0.3, "hinge": 2.0, "band": 0.3, "class_share": 0.1, "head": 0.5}
    assert PRESETS["sing"] == default


def test_contrasts_do_not_depend_on_prompt_order() -> None:
    texts = nn.functional.normalize(torch.randn(6, 9, dtype=torch.float64), dim=1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    first, second = contrast_directions(texts, 3)[order], contrast_directions(texts[order], 3)
    torch.testing.assert_close(first @ first.mT, second @ second.mT)
    with pytest.raises(ValueError, match="at least 2 classes"):
        contrast_directions(texts[:1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_classes_with_one_prompt_add_no_direction_of_their_own(count: int) -> None:
    texts = nn.functional.normalize(torch.randn(4, 9, dtype=torch.float64), dim=1)
    texts[1] = texts[0]
    found = contrast_directions(texts, count)[0]
    basis = torch.linalg.qr(torch.stack([texts[0] - texts[j] for j in (2, 3)], dim=1)).Q
    torch.testing.assert_close(basis @ (basis.T @ found), found, atol=1e-9, rtol=0)  # nothing outside their span
    assert int((found.norm(dim=0) > 0.5).sum()) == min(count - 1, 2)


@pytest.mark.parametrize("classes", [2, 3, 16, 100])
def test_shuffled_prompts_are_a_derangement_and_the_same_every_time(classes: int) -> None:
    texts = nn.functional.normalize(torch.randn(classes, 9))
    shuffled = placebo_texts(texts, "shuffled")
    match = (texts[:, None] == shuffled[None]).all(-1)
    assert (match.sum(0) == 1).all()
    assert (match.sum(1) == 1).all()
    assert not match.diagonal().any()
    assert torch.equal(shuffled, placebo_texts(texts, "shuffled"))


def test_placebos_change_exactly_the_terms_that_read_texts() -> None:
    values = {}
    for placebo in ("none", "shuffled", "random"):
        sing, _, features, labels = setup(placebo=placebo, terms=dict.fromkeys(TERMS, 1.0))
        sing(features, labels)
        values[placebo] = {name: float(each) for name, each in sing.last_terms.items()}
    for first, second in itertools.combinations(values, 2):
        changed = {name for name in TERMS if values[first][name] != pytest.approx(values[second][name], rel=1e-6)}
        of_the_set = set() if "random" not in (first, second) else {"capacity", "steer"}
        assert changed == {"leak", "hinge", "attribute", *of_the_set}  # what uses no text, or their set, cannot notice
