"""The terms of W, the baselines, presets, placebos and several translators: theorems, gradients, invariances, processes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from singreg.loss_terms import (
    DEFAULT_TERMS,
    PRESETS,
    TERMS,
    contrast_directions,
    placebo_texts,
    random_directions,
    resolve_terms,
)
from singreg.losses import SingLoss
from singreg.translator import LinearTranslator
from tests.processes import run_processes
from tests.reference import formulas
from tests.test_losses import OF_WEIGHT, B, C, M, N, _Task, flatten, setup


def value(sing: SingLoss, features: torch.Tensor, labels: torch.Tensor) -> float:
    return float(sing(features, labels).detach())


def put(head: nn.Linear, weight: torch.Tensor) -> None:
    with torch.no_grad():
        head.weight.copy_(weight)


def with_weight(sing: SingLoss, weight: torch.Tensor) -> SingLoss:
    """The loss reading this very tensor as the head's weight, so that gradcheck can follow it."""
    stand_in = nn.Linear(M, C).double()
    del stand_in.weight
    stand_in.weight = weight
    object.__setattr__(sing, "_head", (stand_in,))
    return sing


@pytest.mark.parametrize("term", ["steer", "head", "orthogonal", "null_share", "null_energy"])
def test_gradcheck_to_weight_and_features(term: str) -> None:
    sing, head, features, labels = setup(terms={term: 1.0})
    if term == "head":
        flatten(head)
    weight = head.weight.detach().clone().requires_grad_()
    mean = sing.mean.double()

    def loss(w: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        fixed = (f - mean).square().sum(1).mean().detach() if term == "null_energy" else 1.0  # undo the scale that is held fixed
        return with_weight(sing, w)(f, labels) * fixed

    if term in OF_WEIGHT:
        assert torch.autograd.gradcheck(lambda w: loss(w, features.detach()), (weight,), atol=1e-6)
        assert torch.autograd.grad(loss(weight, features), features, allow_unused=True, materialize_grads=True)[0].abs().max() == 0
    else:
        assert torch.autograd.gradcheck(loss, (weight, features), atol=1e-6)
    assert torch.autograd.grad(loss(weight, features), weight)[0].abs().max() > 1e-6


@pytest.mark.parametrize("term", sorted(TERMS))
def test_a_scale_of_features_or_weight_changes_no_term(term: str) -> None:
    """f, μ and class means times 7, A over 7 (z is what it was), W times 0.01."""
    sing, head, features, labels = setup(terms={term: 1.0})
    if term == "head":
        flatten(head)
    before = value(sing, features, labels)
    assert abs(before) > 1e-3
    for buffer, factor in ((sing.mean, 7.0), (sing.class_means, 7.0), (sing.matrix, 1 / 7)):
        buffer.mul_(factor)
    put(head, 0.01 * head.weight)
    assert value(sing, 7 * features, labels) == pytest.approx(before, rel=1e-5)
    assert value(sing, 7 * features + 3 * torch.randn(M).double(), labels) != pytest.approx(before, rel=1e-5) or term in OF_WEIGHT


@pytest.mark.parametrize("term", sorted(TERMS))
def test_the_order_of_classes_and_prompts_changes_no_term(term: str) -> None:
    sing, head, features, labels = setup(terms={term: 1.0})
    if term == "head":
        flatten(head)
    before = value(sing, features, labels)
    order = torch.tensor([3, 0, 4, 1, 2])
    for name in ("texts", "contrast", "class_means", "image_score_ref"):
        setattr(sing, name, getattr(sing, name)[order])
    put(head, head.weight[order])
    assert value(sing, features, order.argsort()[labels]) == pytest.approx(before, rel=1e-6)


def test_steer_is_0_for_prompts_and_targets_in_the_row_space_and_grows_towards_1_outside() -> None:
    """Nothing to move along when Aᵀ t is all row space; straight to t when A Π_n Aᵀ is the identity."""
    sing, head, features, labels = setup(terms={"steer": 1.0})
    sing.targets = sing.targets[:0]  # 5 classes span 5 directions: room for the prompts only
    assert 0.05 < value(sing, features, labels) < 0.95
    put(head, torch.randn(C, C).double() @ (sing.texts.double() @ sing.matrix.double()))
    assert value(sing, features, labels) < 1e-12
    sing.matrix = torch.linalg.qr(sing.matrix.T).Q.T.contiguous()  # A Aᵀ = 1
    put(head, torch.linalg.qr(sing.matrix.T, mode="complete").Q[:, N : N + C].T)  # and the head sees none of it
    assert value(sing, features, labels) == pytest.approx(1.0, abs=1e-9)
    sing(features, labels).backward()
    assert torch.isfinite(head.weight.grad).all()


def test_steer_has_finite_gradients_where_a_translator_sees_nothing_of_a_target() -> None:
    sing, head, features, labels = setup(terms={"steer": 1.0})
    sing.matrix = torch.zeros_like(sing.matrix)
    result = sing(features, labels)
    assert float(result.detach()) == 0
    assert torch.isfinite(torch.autograd.grad(result, head.weight)[0]).all()


def test_random_targets_are_the_same_every_time_and_are_there_only_for_steer() -> None:
    first, second = (setup(seed, terms={"steer": 1.0})[0].targets for seed in (0, 1))
    assert torch.equal(first, second)
    assert first.shape == (C, N)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(C).double())
    assert len(setup()[0].targets) == 0
    assert not torch.equal(first, placebo_texts(first, "random"))  # a placebo's prompts are not the targets again


def test_head_is_0_above_its_floor_and_the_softmax_view_of_w_counts() -> None:
    sing, head, features, labels = setup(terms={"head": 1.0})
    contrasts = torch.linalg.qr(torch.randn(M, C).double()).Q.T  # orthonormal rows: all singular values of the centred head are 1
    put(head, contrasts + 100 * torch.randn(M).double())  # a common row does not reach the probabilities
    assert value(sing, features, labels) == 0
    assert torch.autograd.grad(sing(features, labels), head.weight)[0].abs().max() == 0  # repeated values, no NaN
    flatten(head)
    assert 0.1 < value(sing, features, labels) < 1
    put(head, torch.cat([contrasts[:-1], contrasts[:1]]))  # two equal rows
    result = sing(features, labels)
    assert float(result.detach()) == pytest.approx(1.0)
    assert torch.isfinite(torch.autograd.grad(result, head.weight)[0]).all()


def test_orthogonal_is_0_for_orthogonal_rows_of_any_length_and_1_for_equal_ones() -> None:
    sing, head, features, labels = setup(terms={"orthogonal": 1.0})
    assert value(sing, features, labels) > 0.01
    put(head, torch.linspace(0.1, 9, C)[:, None].double() * torch.linalg.qr(torch.randn(M, C).double()).Q.T)
    assert value(sing, features, labels) < 1e-28
    put(head, head.weight[:1].expand(C, M))
    assert value(sing, features, labels) == pytest.approx(1.0)


@pytest.mark.parametrize("term", ["null_energy", "null_share"])
def test_null_terms_are_0_in_the_row_space_and_1_in_the_null_space(term: str) -> None:
    sing, head, features, labels = setup(terms={term: 1.0})
    assert 0.1 < value(sing, features, labels) < 0.9
    inside = torch.randn(B, C).double() @ head.weight.detach()
    assert value(sing, sing.mean + inside, labels) < 1e-20
    null = torch.randn(B, M).double() @ formulas.null_projector(head.weight)
    assert value(sing, sing.mean + null, labels) == pytest.approx(1.0)


def test_growing_the_row_space_part_lowers_the_null_share_alone() -> None:
    """Where the two baselines differ: descent on the share also grows what the head reads."""
    for term, grows in (("null_share", True), ("null_energy", False)):
        sing, head, features, labels = setup(terms={term: 1.0})
        (gradient,) = torch.autograd.grad(sing(features, labels), features)
        project = torch.linalg.pinv(head.weight.detach()) @ head.weight.detach()
        inside = (features.detach() - sing.mean) @ project
        assert (float((gradient * inside).sum()) < -1e-3) == grows


def test_presets_are_known_terms_and_overrides_change_add_and_remove() -> None:
    assert PRESETS["sing"] == DEFAULT_TERMS == {"leak": 0.3, "hinge": 1.0, "band": 0.3, "class_share": 0.1, "capacity": 100.0}
    for name, terms in PRESETS.items():
        assert resolve_terms(name) == terms
        assert set(terms) <= set(TERMS)
    assert "capacity" not in PRESETS["leakage"]
    assert set(PRESETS["steering"]) == {*DEFAULT_TERMS, "steer"}
    assert resolve_terms("sing", {"capacity": 0, "hinge": 2.0, "head": 0.5}) == {
        "leak": 0.3, "hinge": 2.0, "band": 0.3, "class_share": 0.1, "head": 0.5,
    }  # fmt: skip
    resolve_terms("sing")["leak"] = 9.0
    assert PRESETS["sing"]["leak"] == 0.3
    with pytest.raises(ValueError, match=r"unknown preset 'song'.*unknown loss terms \['leek'\].*at least 0.*-1"):
        resolve_terms("song", {"leek": 1.0, "leak": -1.0})
    with pytest.raises(ValueError, match=r"no term is left.*label_only"):
        resolve_terms("label_only", {"class_share": 0.0})


@pytest.mark.parametrize("classes", [2, 3, 16, 100])
def test_shuffled_prompts_are_a_derangement_and_the_same_every_time(classes: int) -> None:
    texts = nn.functional.normalize(torch.randn(classes, 9))
    shuffled = placebo_texts(texts, "shuffled")
    match = (texts[:, None] == shuffled[None]).all(-1)
    assert (match.sum(0) == 1).all()
    assert (match.sum(1) == 1).all()
    assert not match.diagonal().any()
    assert torch.equal(shuffled, placebo_texts(texts, "shuffled"))


def test_placebos_reach_the_contrasts_and_the_image_terms() -> None:
    values = {}
    for placebo in ("none", "shuffled", "random"):
        sing, head, features, labels = setup(placebo=placebo, terms=dict.fromkeys(TERMS, 1.0))
        sing(features, labels)
        values[placebo] = {name: float(term) for name, term in sing.last_terms.items()}
        torch.testing.assert_close(sing.contrast, contrast_directions(sing.texts, 3).double(), atol=1e-6, rtol=1e-6)
        slow = formulas.weight_terms(head.weight, [sing.matrix], torch.cat([sing.texts, sing.targets]))
        assert values[placebo]["steer"] == pytest.approx(float(slow["steer"].detach()), rel=1e-4)
    for first, second in itertools.combinations(values, 2):
        changed = {name for name in TERMS if values[first][name] != pytest.approx(values[second][name], rel=1e-6)}
        of_the_set = set() if "random" not in (first, second) else {"capacity", "steer"}
        assert changed == {"leak", "hinge", "attribute", *of_the_set}  # what uses no text, or the set of texts, cannot notice
    with pytest.raises(ValueError, match=r"placebo must be.*'shufled'"):
        setup(placebo="shufled")
    with pytest.raises(ValueError, match="at least 2 classes"):
        placebo_texts(torch.ones(1, 3), "shuffled")
    torch.testing.assert_close(random_directions(3, 4, 5).norm(dim=1), torch.ones(3))


def translators(count: int) -> list[LinearTranslator]:
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randn(N, M + 1, generator=generator) for _ in range(count)]
    return [LinearTranslator(both[:, :M], both[:, M]) for both in draw]


def test_several_translators_take_turns_and_an_accumulated_step_keeps_its_own() -> None:
    options = {"terms": {"leak": 1.0, "hinge": 1.0}, "accumulation": 2}
    single = []
    for translator in translators(3):
        sing, _, features, labels = setup(**options)
        sing.set_translator(translator)
        single.append(value(sing, features, labels))
    sing, _, features, labels = setup(**options, momentum=1.0)
    sing.set_translators(translators(3))
    sing.train()
    got = [value(sing, features, labels) for _ in range(8)]
    assert got == pytest.approx([single[i] for i in (0, 0, 1, 1, 2, 2, 0, 0)])
    assert len({round(v, 6) for v in single}) == 3


def test_capacity_and_steer_take_the_prompts_of_all_translators() -> None:
    sing, head, features, labels = setup(terms={"capacity": 1.0, "steer": 1.0})
    folds = translators(3)
    sing.set_translators(folds)
    sing(features, labels)
    matrices = [fold.matrix.double() for fold in folds]
    slow = formulas.weight_terms(head.weight, matrices, torch.cat([sing.texts, sing.targets]))
    assert float(sing.last_terms["steer"]) == pytest.approx(float(slow["steer"].detach()), rel=1e-5)
    prompts = torch.cat([sing.texts @ matrix for matrix in matrices])
    null = prompts @ formulas.null_projector(head.weight)
    assert float(sing.last_terms["capacity"]) == pytest.approx(float(null.square().sum() / prompts.square().sum()), rel=1e-5)


def test_one_translator_in_a_list_is_that_translator_bit_for_bit() -> None:
    sing, _, features, labels = setup(terms=dict.fromkeys(TERMS, 1.0))
    (translator,) = translators(1)
    sing.set_translator(translator)
    expected = sing(features, labels)
    sing.set_translators(translators(3))
    assert not torch.equal(sing(features, labels), expected)
    sing.set_translators([translator])
    assert torch.equal(sing(features, labels), expected)
    assert "more_matrices" not in sing.state_dict()
    with pytest.raises(ValueError, match="at least one translator"):
        sing.set_translators([])
    with pytest.raises(ValueError, match=r"\(7, 14\), got \(7, 3\)"):
        sing.set_translators([translator, LinearTranslator(torch.ones(N, 3), torch.ones(N))])


@pytest.mark.parametrize(("stored", "there"), [(1, 3), (3, 1), (3, 2)])
def test_a_state_brings_its_translators_and_its_scale(stored: int, there: int) -> None:
    saved, _, features, labels = setup()
    saved.set_translators(translators(stored))
    saved.scale.fill_(0.25)
    other, _, _, _ = setup()
    other.set_translators(translators(there)[::-1])
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert len(other.translators) == stored
    assert torch.equal(other(features, labels), saved(features, labels))


def test_a_state_from_before_scale_existed_is_read_as_scale_1_and_an_unrelated_one_changes_nothing() -> None:
    saved, _, _, _ = setup()
    state = saved.state_dict()
    assert {"matrix", "offset", "scale"} <= set(state)
    del state["scale"]
    other, _, _, _ = setup(1)
    other.scale.fill_(3.0)
    other.load_state_dict(state)
    assert float(other.scale) == 1.0
    torch.testing.assert_close(other.matrix, saved.matrix)
    nested = nn.ModuleDict({"sing": other})
    other.set_translators(translators(2))
    other.scale.fill_(3.0)
    nested.load_state_dict({}, strict=False)
    assert (len(other.translators), float(other.scale)) == (2, 3.0)
    state["wrong"] = state["matrix"]
    with pytest.raises(RuntimeError, match="wrong"):
        other.load_state_dict(state)


def test_scale_multiplies_the_weight() -> None:
    sing, _, features, labels = setup(weight=2.0)
    full = value(sing, features, labels)
    sing.scale.fill_(0.5)
    assert sing.current_weight == 1.0
    assert value(sing, features, labels) == pytest.approx(full / 2)
    assert float(sing.last_terms["sing_weight"]) == 1.0


def _gradient(rank: int, world: int, terms: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two training steps with two translators on this rank's share of the images: gradients to W and to the features' factor."""
    sing, head, features, labels = setup(terms=terms, placebo="shuffled")
    sing.set_translators(translators(2))
    sing.double().train()
    model: nn.Module = _Factor(_Task(head, sing))
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    for _ in range(2):
        model(features.detach()[mine], labels[mine]).backward()
    factor = next(p for name, p in model.named_parameters() if name.endswith("factor"))
    return head.weight.grad, factor.grad


class _Factor(nn.Module):
    """A backbone of one parameter a feature, so that gradients to features are compared too."""

    def __init__(self, task: _Task) -> None:
        super().__init__()
        self.task, self.factor = task, nn.Parameter(torch.ones(M).double())

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.task(features * self.factor, labels)


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_over_processes_are_those_of_one(world: int) -> None:
    for terms in ({"null_share": 1.0}, dict.fromkeys(TERMS, 1.0)):
        expected = _gradient(0, 1, terms)
        for got in run_processes(world, _gradient, terms):
            for mine, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-6)
