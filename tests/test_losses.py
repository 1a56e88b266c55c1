"""SingLoss and its terms: gradients, schedule, state, processes, bad input; theorems with controls and invariances."""

import copy
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from singreg.losses import TERMS, LossInputs, SingLoss, contrast_basis, resolve_terms, term
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator
from tests.fakes import CosineLinear
from tests.processes import run_processes
from tests.reference import formulas

C, M, N, B = 5, 14, 7, 12
Setup = tuple[SingLoss, nn.Linear, Tensor, Tensor]


def setup(seed: int = 0, **options: Any) -> Setup:
    """A loss in eval mode and float64, its head, features that take a gradient, and labels.

    `sing.bank` and `sing.bank_z` are the images behind its statistics, `sing.batch_z` the batch's embeddings.
    """
    torch.manual_seed(seed)
    head = nn.Linear(M, C).double()
    translator = LinearTranslator(torch.randn(N, M).double(), torch.randn(N).double())
    texts = nn.functional.normalize(torch.randn(C, N).double())
    bank = torch.randn(60, M).double() @ torch.diag(torch.linspace(0.2, 2, M).double()) + 1
    bank_z = bank @ torch.randn(M, N).double() + torch.randn(60, N).double()
    statistics = RidgeStatistics(M, N).update(bank, bank_z)
    sing = SingLoss(head, translator, texts, statistics, **{"weight": 1.0, **options}).double()
    sing.set_translator(translator, statistics)  # again, in float64
    sing.bank, sing.bank_z, sing.batch_z = bank, bank_z, bank_z[:B].clone()
    features = torch.randn(B, M, dtype=torch.float64) + 1
    return sing.eval(), head, features.requires_grad_(), torch.arange(B) % C


def value(sing: SingLoss, features: Tensor, labels: Tensor) -> float:
    return float(sing(features, labels, sing.batch_z).detach())


def put(head: nn.Linear, weight: Tensor) -> None:
    with torch.no_grad():
        head.weight.copy_(weight)


def other_translator(width: int = M) -> LinearTranslator:
    both = torch.randn(N, width + 1, generator=torch.Generator().manual_seed(7))
    return LinearTranslator(both[:, :-1], both[:, -1])


@pytest.mark.parametrize("term", sorted(TERMS))
def test_value_and_gradients_are_those_of_the_slow_formula(term: str) -> None:
    sing, head, features, labels = setup(terms={term: 1.0}, floor=0.3)
    fitted = head.weight.detach().clone()
    put(head, head.weight + 0.1 * torch.randn(C, M))  # the readout's projection follows W, its fit does not
    fast = sing(features, labels, sing.batch_z)
    if term == "capacity":
        slow = formulas.capacity(head.weight, sing.matrix, sing.texts, sing.bank, 0.3)
    else:
        bank: dict[str, Tensor] = {"texts": sing.texts, "bank": sing.bank, "bank_z": sing.bank_z, "fitted": fitted}
        slow = formulas.readout(features=features, embeddings=sing.batch_z, weight=head.weight, **bank)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    wanted = (head.weight,) if term == "capacity" else (head.weight, features)
    if term == "capacity":
        assert not torch.autograd.grad(fast, features, retain_graph=True, materialize_grads=True)[0].any()
    for mine, theirs in zip(torch.autograd.grad(fast, wanted), torch.autograd.grad(slow, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        assert theirs.abs().max() > 1e-6


def test_a_rank_deficient_head_still_gives_gradients() -> None:
    sing, head, features, labels = setup()
    put(head, head.weight[[0, 1, 2, 0, 1]])
    sing(features, labels, sing.batch_z).backward()
    for gradient in (head.weight.grad, features.grad):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


def test_the_forward_never_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on "meta" have no values, so that whatever reads one back, and would make a GPU wait, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no "meta"
    monkeypatch.setattr("singreg.losses.row_space_projection", lambda w, f, invariance: f @ (w.T @ w))
    sing, head, features, labels = setup()
    sing, _ = sing.to("meta").train(), head.to("meta")
    for _ in range(2):
        loss = sing(features.to("meta"), labels.to("meta"), sing.batch_z.to("meta"))
    assert (loss.shape, sing.step) == ((), 2)
    with pytest.raises(RuntimeError):  # the control
        float(loss.detach())


@pytest.mark.parametrize("forwards", [1, 3])
def test_weight_warms_up_then_ramps_as_a_cosine(forwards: int) -> None:
    """It is the same in all forwards of an accumulated step."""
    sing, _, features, labels = setup(weight=2.0, warmup_steps=3, ramp_steps=4, accumulation=forwards)
    assert list(sing.parameters()) == []  # no gradient reaches the translator, and the head is not registered twice
    weights = []
    for _ in range(9 * forwards):
        loss = value(sing.train(), features, labels)
        weights.append(float(sing.last_terms["sing_weight"]))
        assert loss == pytest.approx(weights[-1] * float(sing.last_terms["sing"]))
    wanted = [0] * 3 + [1 - math.cos(math.pi * i / 5) for i in range(1, 5)] + [2, 2]
    assert weights == pytest.approx(np.repeat(wanted, forwards).tolist())
    value(sing.eval(), features, labels)
    assert sing.step == 9 * forwards


def test_runs_in_float32_outside_autocast() -> None:
    sing, head, features, labels = setup()
    (sing, _), z = (sing.float(), head.float()), sing.batch_z
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sing(features.detach().bfloat16(), labels, z)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sing(features.detach().bfloat16().float(), labels, z))


def test_a_state_brings_translator_metric_readout_and_step() -> None:
    """Through safetensors, as checkpoints keep it, and into a loss that was not given these."""
    saved, _, features, labels = setup(weight=0.3, ramp_steps=5)
    saved.set_translator(other_translator(), RidgeStatistics(M, N).update(saved.bank[:30], saved.bank_z[:30]))
    value(saved.train(), features, labels)
    other, *_ = setup(weight=0.3, ramp_steps=5)
    nested = nn.ModuleDict({"sing": other})
    nested.load_state_dict(load(save(nn.ModuleDict({"sing": saved}).state_dict())))
    assert other.step == 1
    assert value(other.train(), features, labels) == value(saved, features, labels)
    assert value(copy.deepcopy(other), features, labels) == value(saved, features, labels)


def build(head: nn.Module, width: int = M, *, adapted: bool = False) -> SingLoss:
    if adapted:
        head.base_layer = nn.Linear(M, C)
    return SingLoss(head, other_translator(width), torch.randn(C, N), RidgeStatistics(width, N))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, f, y: s(f[:, :3], y), r"features \(B, 14\).*\(12, 3\)"),
        (lambda s, f, y: s(f[:0], y[:0]), "at least one image"),
        (lambda s, f, y: s(f, y + 1), "0..4"),
        (lambda s, f, y: s(f, torch.rand(B)), "whole numbers, none mixed"),
        (lambda s, f, y: s.set_translator(other_translator(3), RidgeStatistics(3, N)), r"\(7, 14\).*\(7, 3\)"),
        (lambda s, f, y: setup(terms={"leek": 1.0}), "leek.*known"),
        (lambda s, f, y: build(nn.Linear(C, C), C), "no null space"),
        (lambda s, f, y: build(nn.Linear(M, C), adapted=True), r"adapter.*merge"),
        (lambda s, f, y: build(CosineLinear(M, C)), r"does not compute f W\^T \+ b"),
        (lambda s, f, y: build(nn.Sequential(nn.Linear(M, C))), r"weight \(C, m\), got Sequential; pass its last"),
        (lambda s, f, y: s(f, y > 0), "whole numbers, none mixed"),
        (lambda s, f, y: s(f, y), r"readout.*embeddings \(12, 7\), got none.*pass"),
        (lambda s, f, y: s(f, y, torch.ones(B, 3)), r"embeddings \(12, 7\), got \(12, 3\)"),
        (lambda s, f, y: s.set_translator(other_translator(), RidgeStatistics(3, N)), r"\(14, 7\).*\(3, 7\)"),
    ],
)
def test_bad_input_is_named(call: Any, words: str) -> None:
    sing, _, features, labels = setup()
    with pytest.raises(ValueError, match=words):
        call(sing, features.detach(), labels)


class Task(nn.Module):
    """A backbone of one factor a feature, cross-entropy and SingLoss in one forward, as DDP needs it."""

    def __init__(self, head: nn.Linear, sing: SingLoss) -> None:
        super().__init__()
        self.head, self.sing, self.factor = head, sing, nn.Parameter(torch.ones(M).double())

    def forward(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        features = features * self.factor
        return nn.functional.cross_entropy(self.head(features), labels) + self.sing(features, labels, embeddings)


def gradients(rank: int, world: int, options: dict[str, Any]) -> list[Tensor]:
    """Two steps on this rank's share of the images: gradients to W and the backbone."""
    sing, head, features, labels = setup(**options)
    task = Task(head, sing.train())
    model = nn.parallel.DistributedDataParallel(task) if world > 1 else task
    mine = slice(rank * B // world, (rank + 1) * B // world)
    for _ in range(2):
        model(features.detach()[mine], labels[mine], sing.batch_z[mine]).backward()
    return [head.weight.grad, task.factor.grad]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", [{}, {"terms": {"readout": 1.0}}])
def test_gradients_over_processes_are_those_of_one(world: int, options: dict[str, Any]) -> None:
    expected = gradients(0, 1, options)
    for got in run_processes(world, gradients, options):
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-6)


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
