"""The terms of SingLoss, presets and placebos: theorems with controls, invariances, and a user's own term."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from singreg.ridge import RidgeStatistics
from singreg.terms import PRESETS, TERMS, LossInputs, contrast_basis, contrast_directions, resolve_terms, term
from singreg.translator import LinearTranslator
from tests.reference import formulas
from tests.test_losses import B, C, M, N, put, setup, value


def test_a_new_term_is_one_function() -> None:
    @term("length")
    def length(inputs: LossInputs) -> Tensor:
        return inputs.centred.square().sum(1).mean()

    try:
        assert resolve_terms("sing", {"length": 2.0})["length"] == 2.0
        sing, _, features, labels = setup(terms={"length": 2.0})
        expected = 2 * (features - features.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(sing(features, labels), expected)
    finally:
        TERMS.pop("length")


@pytest.mark.parametrize("name", sorted(TERMS))
def test_a_scale_of_features_or_weight_changes_no_term(name: str) -> None:
    """All features times 7, A over 7 (z is what it was), W times 0.01, and statistics anew; then A and a times 7."""
    sing, head, features, labels = setup(terms={name: 1.0})
    before = value(sing, features, labels)
    assert abs(before) > 1e-3
    for buffer in (sing.mean, sing.class_means):
        buffer.mul_(7.0)
    put(head, 0.01 * head.weight)
    statistics = RidgeStatistics(M, N).update(7 * sing.bank, sing.bank_z)
    sing.set_translator(LinearTranslator(sing.matrix / 7, sing.offset), statistics)
    assert value(sing, 7 * features, labels) == pytest.approx(before, rel=1e-5)
    moved = value(sing, 7 * features + 3 * torch.randn(M).double(), labels)
    assert moved != pytest.approx(before, rel=1e-5) or name == "capacity"
    sing.set_translator(LinearTranslator(sing.matrix * 7, sing.offset * 7), statistics)
    assert value(sing, 7 * features, labels) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("name", ["readout", "capacity"])
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_turning_and_scaling_the_null_block(name: str, factor: float) -> None:
    """No translator stands in `readout`: nothing in the null moves it. `capacity` is the same in any turned basis."""
    sing, head, features, labels = setup(terms={name: 1.0})
    before, basis = value(sing, features, labels), torch.linalg.qr(head.weight.T.detach(), mode="complete").Q
    turn = torch.eye(M).double()
    turn[C:, C:] = factor * torch.linalg.qr(torch.randn(M - C, M - C).double()).Q
    turn = basis @ turn @ basis.T
    statistics = RidgeStatistics(M, N).update(sing.bank @ turn.T, sing.bank_z)
    sing.floor = 0.0  # the floor of the metric is of all features' scale
    if name == "capacity":
        sing.set_translator(
            LinearTranslator(sing.matrix, sing.offset), RidgeStatistics(M, N).update(sing.bank, sing.bank_z)
        )
        before = value(sing, features, labels)
    sing.set_translator(LinearTranslator(sing.matrix @ torch.linalg.inv(turn), sing.offset), statistics)
    assert value(sing, features @ turn.T, labels) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("name", sorted(TERMS))
def test_the_order_of_classes_and_prompts_changes_no_term(name: str) -> None:
    sing, head, features, labels = setup(terms={name: 1.0})
    before = value(sing, features, labels)
    order = torch.tensor([3, 0, 4, 1, 2])
    for buffer in ("texts", "contrast", "class_means", "image_score_ref"):
        setattr(sing, buffer, getattr(sing, buffer)[order])
    put(head, head.weight[order])
    sing.span = contrast_basis(sing.texts)
    statistics = RidgeStatistics(M, N).update(sing.bank, sing.bank_z)
    sing.set_translator(LinearTranslator(sing.matrix, sing.offset), statistics)
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
    names = ("class_share", "leak", "null_energy")
    sing, head, _, labels = setup(terms=dict.fromkeys(names, 1.0))
    inside = torch.randn(B, C, dtype=torch.float64) @ head.weight.detach()
    features = (inside + scale * torch.randn(B, M)).float().requires_grad_()
    sing.calibrate(features.mean(0), features.mean(0).expand(C, M), torch.ones(C))
    loss = sing.float()(features, labels)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, features)[0]).all()


def test_a_null_without_class_semantics_has_no_leak() -> None:
    """The definition's zero: when A maps the null space to nothing, leak and hinge are 0; the control is not."""
    sing, head, features, labels = setup(terms={"leak": 1.0, "hinge": 1.0})
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


def test_readout_is_0_where_the_row_space_tells_all_and_1_where_it_tells_nothing() -> None:
    """Embeddings made of the row space alone, then of the null space alone (METHOD section 10.1)."""
    for block, expected in (("row", 0.0), ("null", 1.0)):
        sing, head, _, labels = setup(terms={"readout": 1.0})
        null = formulas.null_projector(head.weight)
        inside = torch.eye(M).double() - null if block == "row" else null
        bank = torch.randn(4000, M).double()
        z = bank @ inside @ torch.randn(M, N).double()
        translator = LinearTranslator(sing.matrix, sing.offset)
        sing.set_translator(translator, RidgeStatistics(M, N).update(bank, z))
        sing.batch_z = z[:B]
        assert value(sing, bank[:B], labels) == pytest.approx(expected, abs=0.05)


def test_a_large_floor_makes_capacity_euclidean_and_none_ignores_what_no_feature_varies_in() -> None:
    sing, head, features, labels = setup(terms={"capacity": 1.0})
    prompts = sing.texts @ sing.matrix
    outside = prompts @ formulas.null_projector(head.weight)
    sing.floor = 1e9
    assert value(sing, features, labels) == pytest.approx(float(outside.square().sum() / prompts.square().sum()))
    sing.floor, flat = 0.0, sing.bank @ (torch.eye(M).double() - formulas.null_projector(head.weight))
    statistics = RidgeStatistics(M, N).update(flat, sing.bank_z)
    sing.set_translator(LinearTranslator(sing.matrix, sing.offset), statistics)
    assert value(sing, features, labels) < 1e-12  # features that vary in the row space alone
    sing.floor = 1.0
    assert value(sing, features, labels) > 0.01


def test_null_energy_is_0_in_the_row_space_and_1_in_the_null_space() -> None:
    sing, head, features, labels = setup(terms={"null_energy": 1.0})
    assert 0.1 < value(sing, features, labels) < 0.9
    assert value(sing, sing.mean + torch.randn(B, C).double() @ head.weight.detach(), labels) < 1e-20
    null = torch.randn(B, M).double() @ formulas.null_projector(head.weight)
    assert value(sing, sing.mean + null, labels) == pytest.approx(1.0)


def test_presets_are_known_terms_and_overrides_change_add_and_remove() -> None:
    assert PRESETS["sing"] == {name: each.default for name, each in TERMS.items() if each.default}
    assert all(resolve_terms(name, {}) == terms and set(terms) <= set(TERMS) for name, terms in PRESETS.items())
    changed = resolve_terms("sing", {"capacity": 0, "hinge": 2.0, "readout": 0.5})
    assert changed == {"hinge": 2.0, "readout": 0.5}


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
