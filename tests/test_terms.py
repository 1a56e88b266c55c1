"""The terms of SingLoss: theorems with controls, invariances, and a user's own term."""

import pytest
import torch
from torch import Tensor, nn

from singreg.ridge import RidgeStatistics
from singreg.terms import TERMS, LossInputs, contrast_basis, resolve_terms, term
from singreg.translator import LinearTranslator
from tests.reference import formulas
from tests.test_losses import B, C, M, N, put, setup, value


def test_a_new_term_is_one_function() -> None:
    @term("length")
    def length(inputs: LossInputs) -> Tensor:
        return (inputs.inside + inputs.null).square().sum(1).mean()

    try:
        assert resolve_terms({"length": 2.0})["length"] == 2.0
        sing, _, features, labels = setup(terms={"length": 2.0})
        expected = 2 * (features - sing.bank.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(sing(features, labels), expected)
    finally:
        TERMS.pop("length")


@pytest.mark.parametrize("name", sorted(TERMS))
def test_a_scale_of_features_or_weight_changes_no_term(name: str) -> None:
    """All features times 7, A over 7 (z is what it was), W times 0.01, and statistics anew; then A and a times 7."""
    sing, head, features, labels = setup(terms={name: 1.0})
    before = value(sing, features, labels)
    assert abs(before) > 1e-3
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
    sing, head, features, labels = setup(terms={name: 1.0}, floor=0.0)  # which is of all features' scale
    before, basis = value(sing, features, labels), torch.linalg.qr(head.weight.T.detach(), mode="complete").Q
    turn = torch.eye(M).double()
    turn[C:, C:] = factor * torch.linalg.qr(torch.randn(M - C, M - C).double()).Q
    turn = basis @ turn @ basis.T
    statistics = RidgeStatistics(M, N).update(sing.bank @ turn.T, sing.bank_z)
    sing.set_translator(LinearTranslator(sing.matrix @ torch.linalg.inv(turn), sing.offset), statistics)
    assert value(sing, features @ turn.T, labels) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("name", sorted(TERMS))
def test_the_order_of_classes_and_prompts_changes_no_term(name: str) -> None:
    sing, head, features, labels = setup(terms={name: 1.0})
    before = value(sing, features, labels)
    order = torch.tensor([3, 0, 4, 1, 2])
    sing.texts = sing.texts[order]
    put(head, head.weight[order])
    sing.span = contrast_basis(sing.texts)
    statistics = RidgeStatistics(M, N).update(sing.bank, sing.bank_z)
    sing.set_translator(LinearTranslator(sing.matrix, sing.offset), statistics)
    assert value(sing, features, order.argsort()[labels]) == pytest.approx(before, rel=1e-6)


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
    for block, everywhere, expected in (("row", False, 0.0), ("null", False, 1.0), ("null", True, 0.0)):
        sing, head, _, labels = setup(terms={"readout": 1.0}, everywhere=everywhere)
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


@pytest.mark.parametrize("same", [False, True])
def test_two_classes_with_one_prompt_add_no_contrast(same: bool) -> None:
    texts = nn.functional.normalize(torch.randn(4, 9, dtype=torch.float64), dim=1)
    texts[1] = texts[0] if same else texts[1]
    basis, contrasts = contrast_basis(texts), texts - texts.mean(0)
    assert basis.shape == (9, 2 if same else 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double())
    torch.testing.assert_close(contrasts @ basis @ basis.T, contrasts)
