"""SingLoss against the slow formulas, its gradients, invariances, schedule, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from singreg.losses import TERMS, SingLoss, contrast_directions
from singreg.translator import LinearTranslator
from tests.processes import run_processes
from tests.reference import formulas

C, M, N, B = 5, 14, 7, 12
OF_WEIGHT = {"capacity", "steer", "head", "orthogonal"}  # terms that move the head alone


def setup(seed: int = 0, **kwargs: object) -> tuple[SingLoss, nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    head = nn.Linear(M, C).double()
    translator = LinearTranslator(torch.randn(N, M).double(), torch.randn(N).double())
    options = {"weight": 1.0, "confusable": 3, **kwargs}
    sing = SingLoss(head, translator, nn.functional.normalize(torch.randn(C, N).double()), **options)  # type: ignore[arg-type]
    sing = sing.double()
    features = torch.randn(B, M, dtype=torch.float64) + 1
    sing.calibrate(features.mean(0), torch.randn(C, M).double(), torch.linspace(20, 60, C).double())
    return sing.eval(), head, features.requires_grad_(), torch.arange(B) % C


def flatten(head: nn.Linear) -> None:
    """Two classes almost alike: σ_min/σ_max falls below the floor of `head`."""
    with torch.no_grad():
        head.weight[0] = head.weight[1] + 0.1 * head.weight[0]


def oracle(sing: SingLoss, head: nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return formulas.sing_terms(
        features, labels, head.weight, sing.matrix.double(), sing.offset.double(), sing.texts.double(), sing.mean.double(),
        sing.class_means.double(), sing.image_score_ref.double(), 3, sing.targets.double(),
    )  # fmt: skip


@pytest.mark.parametrize("term", sorted(TERMS))
def test_value_and_gradients_are_those_of_the_slow_formula(term: str) -> None:
    sing, head, features, labels = setup(terms={term: 1.0})
    if term == "head":
        flatten(head)
    fast = sing(features, labels)
    slow = oracle(sing, head, features, labels)[term]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)  # buffers are float32
    wanted = (head.weight,) if term in OF_WEIGHT else (head.weight, features)
    got = torch.autograd.grad(fast, wanted)
    expected = torch.autograd.grad(slow, wanted)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        assert theirs.abs().max() > 1e-6


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_class_share_is_the_between_class_share_with_its_whole_gradient(share: float) -> None:
    """Its running class means carry no gradient, yet descent must lower the true share, also where class is most of the null."""
    sing, head, _, _ = setup(terms={"class_share": 1.0}, momentum=0.0, class_momentum=0.0)
    labels = torch.arange(20) % C
    noise = torch.randn(20, M, dtype=torch.float64)
    for _ in range(20):  # classes of equal size whose noise has mean 0, so that `share` is what it says
        noise -= torch.stack([noise[labels == y].mean(0) for y in labels.tolist()])
    anchors = torch.randn(C, M, dtype=torch.float64)[labels]
    features = (anchors * math.sqrt(share) + noise * math.sqrt(1 - share)).requires_grad_()
    value = sing.train()(features, labels)
    true = formulas.between_class_share(features, labels, head.weight.detach())
    torch.testing.assert_close(value, true, atol=1e-6, rtol=1e-6)
    (got,), (expected,) = torch.autograd.grad(value, features), torch.autograd.grad(true, features)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-4)
    with torch.no_grad():
        stepped = formulas.between_class_share(features - 1e-2 * got / got.norm(), labels, head.weight)
    assert stepped < true


@pytest.mark.parametrize("width", [C, C - 2])
def test_a_head_without_a_null_space_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="no null space"):
        SingLoss(nn.Linear(width, C), LinearTranslator(torch.randn(N, width), torch.zeros(N)), torch.randn(C, N))


def test_shares_of_an_empty_null_space_are_zero_and_have_finite_gradients() -> None:
    sing, head, _, labels = setup(terms={"class_share": 1.0, "null_share": 1.0, "leak": 1.0, "null_energy": 1.0})
    for scale in (0.0, 1e-13, 1e-7):
        features = (torch.randn(B, C, dtype=torch.float64) @ head.weight.detach() + scale * torch.randn(B, M)).float()
        sing.calibrate(features.mean(0), features.mean(0).expand(C, M), torch.ones(C))
        features.requires_grad_()
        loss = sing.float()(features, labels)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(features.grad).all()


def test_references_are_kept_only_from_training_batches_in_which_something_moves() -> None:
    sing, _, features, labels = setup(terms={"band": 1.0, "hinge": 1.0})
    sing.image_score_ref.fill_(math.nan), sing.mean.zero_(), sing.seen.zero_()
    assert torch.isfinite(sing.eval()(features, labels))
    assert torch.isnan(sing.image_score_ref).all()  # looking does not set a reference
    single = sing.train()(features[:1], labels[:1])  # its own mean: nothing moves
    assert torch.isfinite(single)
    assert torch.isnan(sing.image_score_ref).all()
    assert float(sing(features, labels)) < 100
    assert (sing.image_score_ref > 0.1).all()


def test_a_class_without_a_mean_begins_with_its_first_batch() -> None:
    sing, _, features, labels = setup(terms={"class_share": 1.0})
    means = torch.randn(C, M)
    means[2] = math.nan
    sing.calibrate(features.detach().mean(0), means, torch.ones(C))
    assert torch.isfinite(sing(features, labels))
    sing.train()(features, labels)
    torch.testing.assert_close(sing.class_means[2].double(), features.detach()[labels == 2].mean(0), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="mean feature holds NaN"):
        sing.calibrate(torch.full((M,), math.nan), means, torch.ones(C))


def test_two_classes_with_one_prompt_add_no_direction_of_their_own() -> None:
    texts = nn.functional.normalize(torch.randn(4, 9, dtype=torch.float64), dim=1)
    texts[1] = texts[0]
    for count in (1, 2, 3):
        found = contrast_directions(texts, count)[0]
        contrasts = torch.stack([texts[0] - texts[j] for j in (2, 3)], dim=1)
        basis = torch.linalg.qr(contrasts).Q
        torch.testing.assert_close(basis @ (basis.T @ found), found, atol=1e-9, rtol=0)  # nothing outside the contrasts' span
        assert int((found.norm(dim=0) > 0.5).sum()) == min(count - 1, 2)


@pytest.mark.parametrize("term", ["leak", "hinge", "attribute", "band", "class_share", "capacity"])
def test_gradcheck_to_weight_and_features(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numerical and analytic derivatives agree in float64; the scale that leak holds fixed is a constant for both."""
    sing, head, features, labels = setup(terms={term: 1.0})
    if term == "leak":
        monkeypatch.setattr("singreg.loss_terms.all_reduce_mean", lambda value: value.new_tensor(0.7))

    def loss(weight: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        stand_in = nn.Linear(M, C).double()
        del stand_in.weight
        stand_in.weight = weight
        object.__setattr__(sing, "_head", (stand_in,))
        return sing(f, labels)

    if term == "class_share":  # its class means are projected with the current W but held fixed: check to f only
        assert torch.autograd.gradcheck(lambda f: loss(head.weight.detach(), f), (features,), atol=1e-6)
    else:
        assert torch.autograd.gradcheck(loss, (head.weight.detach().clone().requires_grad_(), features), atol=1e-6)


def test_capacity_is_0_for_a_head_that_spans_the_prompts_and_1_for_one_orthogonal_to_them() -> None:
    """METHOD section 7: then no null direction can raise any class's prompt for this translator."""
    sing, head, features, labels = setup(terms={"capacity": 1.0})
    assert 0.05 < float(sing(features, labels).detach()) < 0.95
    prompts = sing.texts.double() @ sing.matrix.double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(C, C).double() @ prompts)
    assert float(sing(features, labels).detach()) < 1e-12
    outside = torch.linalg.qr(prompts.T, mode="complete").Q[:, C : 2 * C].T
    with torch.no_grad():
        head.weight.copy_(outside)
    assert float(sing(features, labels).detach()) > 1 - 1e-6


def test_leak_gradcheck_with_its_scale_held_fixed() -> None:
    sing, _head, features, labels = setup(terms={"leak": 1.0})
    value = sing(features, labels)
    scale = float(formulas_energy(sing, features, labels))
    numeric = torch.zeros_like(features)
    for index in [(0, 0), (3, 5), (11, 13)]:
        step = torch.zeros_like(features)
        step[index] = 1e-5
        up, down = (
            float(sing((features + s * step).detach(), labels).detach()) * float(formulas_energy(sing, features + s * step, labels))
            for s in (1, -1)
        )
        numeric[index] = (up - down) / 2e-5 / scale
    (gradient,) = torch.autograd.grad(value, features)
    for index in [(0, 0), (3, 5), (11, 13)]:
        assert float(gradient[index]) == pytest.approx(float(numeric[index]), rel=1e-4, abs=1e-8)


def formulas_energy(sing: SingLoss, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The denominator of leak: mean class-contrast energy of the whole feature."""
    from singreg.loss_terms import _contrast_energy

    centred = features.detach() - sing.mean.double()
    matrix = sing.matrix.double()
    z = features.detach() @ matrix.T + sing.offset.double()
    return _contrast_energy(centred @ matrix.T, z, sing.contrast.double()[labels]).mean()


@pytest.mark.parametrize("deficient", [False, True])
def test_rank_deficient_head_still_gives_gradients_to_features(deficient: bool) -> None:
    sing, head, features, labels = setup()
    if deficient:
        with torch.no_grad():
            head.weight[3:] = head.weight[:2]
    sing(features, labels).backward()
    assert torch.isfinite(head.weight.grad).all()
    assert head.weight.grad.abs().max() > 0
    assert torch.isfinite(features.grad).all()
    assert features.grad.abs().max() > 0


def test_no_gradient_reaches_the_translator_and_nothing_is_registered_twice() -> None:
    sing, _head, _, _ = setup()
    assert list(sing.parameters()) == []
    assert not any("head" in name for name in sing.state_dict())


def test_a_null_without_class_semantics_has_no_leak() -> None:
    """The definition's zero: when A maps the null space to nothing, leak and hinge are 0; the control is not."""
    sing, head, features, labels = setup(terms={"leak": 1.0, "hinge": 1.0, "attribute": 1.0})
    assert float(sing(features, labels).detach()) > 0.01
    project = torch.linalg.pinv(head.weight.detach()) @ head.weight.detach()
    sing.matrix = sing.matrix @ project
    assert abs(float(sing(features, labels).detach())) < 1e-6


def test_terms_are_scale_free() -> None:
    sing, head, features, labels = setup(terms={"leak": 1.0, "class_share": 1.0, "hinge": 1.0, "band": 1.0})
    before = {name: float(value) for name, value in (sing(features, labels), sing.last_terms)[1].items()}
    with torch.no_grad():
        sing.matrix.mul_(7.0)
        sing.offset.mul_(7.0)
        head.weight.mul_(0.01)
    sing(features, labels)
    assert {name: float(value) for name, value in sing.last_terms.items()} == pytest.approx(before, rel=1e-5)


def test_contrasts_do_not_depend_on_prompt_order() -> None:
    texts = nn.functional.normalize(torch.randn(6, 9, dtype=torch.float64))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    first, second = contrast_directions(texts, 3)[order], contrast_directions(texts[order], 3)
    torch.testing.assert_close(first @ first.mT, second @ second.mT)
    with pytest.raises(ValueError, match="at least 2 classes"):
        contrast_directions(texts[:1])


def test_weight_warms_up_then_ramps_as_a_cosine() -> None:
    sing, _, features, labels = setup(weight=2.0, warmup_steps=3, ramp_steps=4)
    sing.train()
    weights = []
    for _ in range(9):
        value = sing(features, labels)
        weights.append(float(sing.last_terms["sing_weight"]))
        assert float(value.detach()) == pytest.approx(weights[-1] * float(sing.last_terms["sing"]))
    assert weights[:3] == [0, 0, 0]
    expected = [1 - math.cos(math.pi * i / 5) for i in range(1, 5)]
    assert weights[3:7] == pytest.approx(expected)
    assert weights[7:] == [2, 2]
    sing.eval()
    step = int(sing.step)
    sing(features, labels)
    assert int(sing.step) == step


def test_the_weight_is_the_same_in_all_forwards_of_an_accumulated_step() -> None:
    sing, _, features, labels = setup(weight=1.0, warmup_steps=1, ramp_steps=2, accumulation=3)
    sing.train()
    weights = [float((sing(features, labels), sing.last_terms["sing_weight"])[1]) for _ in range(12)]
    assert weights == pytest.approx([0.0] * 3 + [0.25] * 3 + [0.75] * 3 + [1.0] * 3)


def test_runs_in_float32_outside_autocast() -> None:
    sing, _, features, labels = setup()
    sing = sing.float()
    object.__getattribute__(sing, "_head")[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sing(features.detach().bfloat16(), labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, sing(features.detach().bfloat16().float(), labels))


def test_two_lines_without_calibration_take_references_from_the_first_batch() -> None:
    torch.manual_seed(0)
    head = nn.Linear(M, C)
    sing = SingLoss(head, LinearTranslator(torch.randn(N, M), torch.randn(N)), torch.randn(C, N), weight=1.0)
    features, labels = torch.randn(B, M), torch.arange(B) % C
    sing(features, labels)
    assert float(sing.last_terms["band"]) < 0.3
    assert torch.isfinite(sing.image_score_ref).all()
    torch.testing.assert_close(sing.mean, features.mean(0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, f, y: s(f[:, :3], y), r"features \(B, 14\).*\(12, 3\)"),
        (lambda s, f, y: s(f, y + 1), "0..4"),
        (lambda s, f, y: s(f, torch.rand(B)), "mixed labels"),
        (lambda s, f, y: s.set_translator(LinearTranslator(torch.ones(N, 3), torch.ones(N))), r"\(7, 14\).*\(7, 3\)"),
        (lambda s, f, y: s.calibrate(torch.ones(2), torch.ones(C, M), torch.ones(C)), r"mean \(14,\)"),
        (lambda s, f, y: setup(terms={"leek": 1.0}), "leek.*known"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:  # type: ignore[no-untyped-def]
    sing, _, features, labels = setup()
    with pytest.raises(ValueError, match=words):
        call(sing, features.detach(), labels)


def _rank_gradient(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sing, head, features, labels = setup()
    sing.train()
    wrapped = torch.nn.parallel.DistributedDataParallel(_Task(head, sing), broadcast_buffers=False)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    wrapped(features.detach()[mine], labels[mine]).backward()
    return head.weight.grad, sing.mean, sing.class_means


class _Task(nn.Module):
    def __init__(self, head: nn.Linear, sing: SingLoss) -> None:
        super().__init__()
        self.head, self.sing = head, sing

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(features), labels) + self.sing(features, labels)


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_and_buffers_over_processes_are_those_of_one(world: int) -> None:
    sing, head, features, labels = setup()
    sing.train()
    _Task(head, sing)(features.detach(), labels).backward()
    for gradient, mean, class_means in run_processes(world, _rank_gradient):
        torch.testing.assert_close(gradient, head.weight.grad, atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(mean, sing.mean)
        torch.testing.assert_close(class_means, sing.class_means)
