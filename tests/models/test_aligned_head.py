"""The aligned head: its null space holds no translated prompt, and no other such head changes the logits less."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from singreg.models.classifier import Classifier
from singreg.models.edits import (
    align_head_,
    aligned_weight,
    constrain_to_rows,
    head_agreement,
    prompt_directions,
    release_rows,
)
from singreg.models.heads import HeadError, find_head
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator
from tests.models.fakes import CLASSES, WIDTH, Net, batch_norm_head, images, shake

M, N = 24, 9


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(count: int = 400, width: int = M, seed: int = 5) -> Tensor:
    """Correlated and off-centre, as a network's are."""
    return normal(count, width, seed=seed) @ (normal(width, width, seed=seed + 1) / 3) + 2 * normal(width, seed=seed + 2).abs()


def translator(seed: int = 2, width: int = M, targets: int = N) -> LinearTranslator:
    return LinearTranslator(normal(targets, width, seed=seed), normal(targets, seed=seed + 1))


def seen(f: Tensor) -> RidgeStatistics:
    return RidgeStatistics(f.shape[1], 1).update(f, f[:, :1])


def left_out(weight: Tensor, directions: Tensor) -> float:
    """max_k ‖Π_n d_k‖ / ‖d_k‖ for the null space of W."""
    null = NullSpace.from_weight(weight, allow_empty=True).component(directions)
    return float((null.norm(dim=1) / directions.norm(dim=1)).max())


def rms(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().mean().sqrt()


# (classes, prompts): no room for R, some room, a head with as many rows as features
@pytest.mark.parametrize(("classes", "prompts"), [(4, 4), (5, 3), (12, 3), (24, 6)])
def test_no_null_direction_raises_a_prompt(classes: int, prompts: int) -> None:
    weight, T, texts, f = normal(classes, M, seed=1), translator(), normal(prompts, N, seed=4), features()
    translated = texts @ T.matrix
    aligned = aligned_weight(weight, prompt_directions(T, texts), second_moment=seen(f))
    assert classes == M or left_out(weight, translated) > 0.5  # the control
    assert left_out(aligned.weight, translated) <= 1e-8
    assert NullSpace.from_weight(aligned.weight, allow_empty=True).rank == aligned.rank == aligned.rank_before == classes
    assert (aligned.free_rows, aligned.raised) == (classes - prompts, 0)
    torch.testing.assert_close(aligned.rows @ aligned.rows.T, torch.eye(classes, dtype=torch.float64))
    assert left_out(aligned.rows, aligned.weight) < 1e-8
    # What it says of the logits is what happens to them.
    shift = (f @ aligned.weight.T + aligned.bias_shift) - f @ weight.T
    torch.testing.assert_close(shift.mean(0), torch.zeros(classes, dtype=torch.float64), atol=1e-9, rtol=0)
    assert aligned.logit_change == pytest.approx(float(rms(shift) / rms(f @ weight.T)), rel=1e-6, abs=1e-9)
    assert aligned.logit_change > 0.01 or classes == M


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
def test_without_room_it_is_least_squares_on_the_features(ridge: float) -> None:
    """The slow formula: numpy's least squares on the centred features, with λ as √(N λ) I among the samples."""
    weight, f = normal(4, M, seed=1), features()
    d = prompt_directions(translator(), normal(4, N, seed=4))
    x = f - f.mean(0)
    penalty = ridge * x.square().sum() / (len(f) * M)
    x = torch.cat([x, (len(f) * penalty).sqrt() * torch.eye(M, dtype=torch.float64)])
    expected = np.linalg.lstsq((x @ d.T).numpy(), (x @ weight.T).numpy(), rcond=None)[0].T @ d.numpy()
    aligned = aligned_weight(weight, d, second_moment=f.T @ f / len(f), mean=f.mean(0), ridge=ridge, floor=0.0)
    np.testing.assert_allclose(aligned.weight.numpy(), expected, atol=1e-9)


def test_free_rows_are_the_best_there_are() -> None:
    """No head with the same budget found by descent from many starts keeps the logits better; one free row less is worse."""
    weight, f = normal(7, M, seed=1), features()
    d, x = prompt_directions(translator(), normal(3, N, seed=4)), features() - features().mean(0)
    exact = [aligned_weight(weight, d, second_moment=seen(f), free_rows=r, ridge=0.0, floor=0.0) for r in (2, 1)]
    errors = [float((x @ (weight - a.weight).T).square().mean()) for a in exact]
    assert errors[1] > 1.05 * errors[0]
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        coefficients, free = torch.randn(7, 5, dtype=torch.float64), torch.randn(2, M, dtype=torch.float64)
        for _ in range(300):  # alternating least squares: B given the rows, the free rows given B
            rows = torch.cat([d, free])
            coefficients = torch.linalg.lstsq(x @ rows.T, x @ weight.T).solution.T
            rest = x @ (weight - coefficients[:, :3] @ d).T
            free = torch.linalg.lstsq(x, torch.linalg.lstsq(coefficients[:, 3:], rest.T).solution.T).solution.T
        found.append(float((x @ (weight - coefficients @ torch.cat([d, free])).T).square().mean()))
    assert min(found) == pytest.approx(errors[0], rel=1e-3)
    assert min(found) > errors[0] * (1 - 1e-9)


@pytest.mark.parametrize(("rank", "prompts"), [(6, 6), (6, 2), (4, 4)])
def test_a_head_that_is_aligned_already_stays(rank: int, prompts: int) -> None:
    d = prompt_directions(translator(), normal(prompts, N, seed=4))
    weight = normal(6, rank, seed=1) @ torch.cat([d, normal(rank - prompts, M, seed=2)])
    aligned = aligned_weight(weight, d, second_moment=seen(features()))
    torch.testing.assert_close(aligned.weight, weight, atol=1e-9, rtol=0)
    assert aligned.bias_shift.abs().max() < 1e-8
    assert aligned.logit_change < 1e-9
    assert (aligned.rank, aligned.rank_before, aligned.free_rows) == (rank, rank, rank - prompts)


@pytest.mark.parametrize(("prompts", "rank"), [(2, 4), (6, 6)])
def test_the_rank_grows_only_where_prompts_need_it(prompts: int, rank: int) -> None:
    weight, d = normal(8, 4, seed=1) @ normal(4, M, seed=2), prompt_directions(translator(), normal(prompts, N, seed=4))
    aligned = aligned_weight(weight, d, second_moment=seen(features()))
    assert (aligned.rank_before, aligned.rank, aligned.free_rows) == (4, rank, rank - prompts)
    assert NullSpace.from_weight(aligned.weight).rank == rank
    assert left_out(aligned.weight, d) <= 1e-8
    more = aligned_weight(weight, d, second_moment=seen(features()), free_rows=8 - prompts)
    assert more.rank <= 4 + prompts
    assert more.logit_change < aligned.logit_change


def test_a_head_whose_rows_sum_to_zero_still_holds_every_prompt() -> None:
    """Its fit has rank C - 1, so one direction of C prompts would be left in the null space; lifting it moves all logits alike."""
    weight, f, d = normal(5, M, seed=1), features(), prompt_directions(translator(), normal(5, N, seed=4))
    weight = weight - weight.mean(0)
    bare, lifted = (aligned_weight(weight, d, second_moment=seen(f), floor=floor) for floor in (0.0, 1e-3))
    assert left_out(bare.weight, d) > 0.1
    assert left_out(lifted.weight, d) <= 1e-8
    assert (bare.raised, lifted.raised, lifted.rank, lifted.rank_before) == (0, 1, 5, 4)
    added = (lifted.weight - bare.weight) @ f.T
    torch.testing.assert_close(added, added.mean(0).expand_as(added), atol=1e-9, rtol=0)
    assert added.abs().max() > 1e-6


def test_an_ensemble_gives_its_leading_directions() -> None:
    ensemble, texts = [translator(seed) for seed in (2, 20, 40)], normal(2, N, seed=4)
    each = [(texts @ T.matrix) / (texts @ T.matrix).norm(dim=1, keepdim=True) for T in ensemble]
    slow = torch.linalg.svd(torch.cat(each)).Vh
    for leading, wanted in ((None, 2), (1, 1), (6, 6)):
        d = prompt_directions(ensemble, texts, leading)
        assert d.shape == (wanted, M)
        torch.testing.assert_close(d.T @ d, slow[:wanted].T @ slow[:wanted])
    whole = prompt_directions(ensemble, texts, 6)
    assert max(left_out(whole, rows) for rows in each) < 1e-8 < 0.1 < left_out(prompt_directions(ensemble, texts), each[2])
    # The length of a translator's matrix does not weigh; different models have their own texts.
    louder = LinearTranslator(100 * ensemble[0].matrix, ensemble[0].offset)
    torch.testing.assert_close(prompt_directions([louder, *ensemble[1:]], [texts] * 3, 6).abs(), whole.abs())
    assert prompt_directions([ensemble[0], translator(7, targets=4)], [texts, normal(3, 4, seed=8)], 5).shape == (5, M)
    assert len(prompt_directions(ensemble[0], torch.cat([texts, texts]))) == 2  # a prompt given twice is one direction


def small(head: nn.Module, *, double: bool = True) -> Classifier:
    torch.manual_seed(0)
    net = Net(head)
    shake(net, strength=0.3)
    return Classifier.from_module(net.double() if double else net, head="head")


HEADS = {
    "linear": lambda: nn.Linear(WIDTH, CLASSES),
    "no bias": lambda: nn.Linear(WIDTH, CLASSES, bias=False),
    "convolution": lambda: nn.Conv2d(WIDTH, CLASSES, 1),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_edit_is_written_into_the_classifier(kind: str) -> None:
    classifier, x = small(HEADS[kind]()).requires_grad_(False), images(40).double()
    parameters = dict(classifier.named_parameters())
    before, (f, logits) = copy.deepcopy(classifier), classifier.features_and_logits(x)
    T, texts = translator(width=WIDTH), normal(3, N, seed=4)
    statistics = RidgeStatistics(WIDTH, N).update(f, T(f))
    aligned = align_head_(classifier, T, texts, statistics)
    assert all(dict(classifier.named_parameters())[name] is value for name, value in parameters.items())
    assert left_out(before.weight.detach(), texts @ T.matrix) > 0.3
    assert left_out(classifier.weight.detach(), texts @ T.matrix) <= 1e-8
    after_f, after = classifier.features_and_logits(x)
    assert torch.equal(after_f, f)
    agreement = head_agreement(f, before.weight, before.bias, classifier.weight, classifier.bias)
    assert agreement.top1 == float((after.argmax(1) == logits.argmax(1)).double().mean())
    if kind == "no bias":  # nothing is centred then: the whole logits are fitted
        assert not aligned.bias_shift.any()
        assert aligned.logit_change == pytest.approx(float((after - logits).norm() / logits.norm()), rel=1e-6)
    else:
        torch.testing.assert_close(after.mean(0), logits.mean(0))
        assert agreement.logit_change == pytest.approx(aligned.logit_change, rel=1e-6)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in classifier.state_dict().items() if "body" in name)


def test_refusals() -> None:
    T, f = translator(width=WIDTH), features(width=WIDTH)
    statistics, texts = RidgeStatistics(WIDTH, N).update(f, T(f)), normal(3, N, seed=4)
    with pytest.raises(HeadError, match="a batch norm and a linear layer"):
        align_head_(small(batch_norm_head(), double=False), T, texts, statistics)
    with pytest.raises(HeadError, match="a batch norm and a linear layer"):
        constrain_to_rows(small(batch_norm_head(), double=False), texts)
    weight, d = normal(3, WIDTH, seed=1), prompt_directions(T, texts)
    with pytest.raises(ValueError, match=r"a head of 2 rows .* got 3 independent directions"):
        aligned_weight(weight[:2], d, second_moment=statistics)
    with pytest.raises(ValueError, match=r"free_rows must be in 0\.\.1 for 3 rows and 2 directions, got 2"):
        aligned_weight(weight, d[:2], second_moment=statistics, free_rows=2)
    with pytest.raises(ValueError, match=r"moments of features \(12, 12\) for this head, got \(24, 24\)"):
        aligned_weight(weight, d, second_moment=seen(features()))
    with pytest.raises(ValueError, match="statistics hold their own mean"):
        aligned_weight(weight, d, second_moment=statistics, mean=f.mean(0))
    with pytest.raises(ValueError, match="at least 2 images"):
        aligned_weight(weight, d, second_moment=RidgeStatistics(WIDTH, N))
    with pytest.raises(ValueError, match=r"leading must be in 1\.\.3.* got 4"):
        prompt_directions(T, texts, 4)
    with pytest.raises(ValueError, match=r"expected texts \(k, 9\) .* got \(3, 8\)"):
        prompt_directions(T, texts[:, :8])
    with pytest.raises(ValueError, match=r"translated prompt .* zero"):
        prompt_directions(LinearTranslator(0 * T.matrix, T.offset), texts)
    with pytest.raises(ValueError, match=r"\d+\.\d% of the head's norm lies outside the given 3 rows"):
        constrain_to_rows(small(nn.Linear(WIDTH, CLASSES)), d)
    with pytest.raises(ValueError, match="'head' is not constrained"):
        release_rows(small(nn.Linear(WIDTH, CLASSES)))


def constrained(kind: str = "linear") -> tuple[Classifier, Tensor]:
    """A classifier with an aligned head, constrained to its whole row space, and the translated prompts."""
    classifier, x = small(HEADS[kind]()), images(40).double()
    T, texts = translator(width=WIDTH), normal(3, N, seed=4)
    f = classifier.features(x)
    aligned = align_head_(classifier, T, texts, RidgeStatistics(WIDTH, N).update(f, T(f)))
    return constrain_to_rows(classifier, aligned.rows), texts @ T.matrix


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", HEADS)
def test_training_keeps_the_row_space_and_releasing_keeps_the_logits(kind: str, decay: float) -> None:
    classifier, translated = constrained(kind)
    free, x = release_rows(copy.deepcopy(classifier)), images(16).double()
    torch.testing.assert_close(classifier(x), free(x))
    labels, before = torch.arange(16) % CLASSES, free.weight.detach().clone()
    for model in (classifier, free):
        model.tune("head")
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == (1 if kind == "no bias" else 2)
        optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=decay)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    assert left_out(free.weight.detach(), translated) > 1e-3  # the control: without the constraint it is lost at once
    assert left_out(classifier.weight.detach(), translated) <= 1e-8
    assert (classifier.weight - before).norm() > 0.1
    logits, shape, parameter = classifier(x), classifier.weight.shape, trained_weight(classifier)
    twin = copy.deepcopy(classifier)
    release_rows(classifier)
    assert torch.equal(twin(x), logits)  # a copy keeps its own constraint
    assert torch.equal(classifier(x), logits)
    assert classifier.weight.shape == shape
    assert classifier.head.weight is parameter  # an optimiser that holds it goes on
    assert type(classifier.head) in (nn.Linear, nn.Conv2d)


def trained_weight(classifier: Classifier) -> Tensor:
    return classifier.model.get_parameter(f"{classifier.head_name}.parametrizations.weight.original")


def test_the_gradient_is_the_projected_one() -> None:
    classifier, _ = constrained()
    basis, raw = NullSpace.from_weight(classifier.weight).basis, trained_weight(classifier)
    target = normal(CLASSES, WIDTH, seed=9)
    (gradient,) = torch.autograd.grad((classifier.weight * target).sum(), raw)
    torch.testing.assert_close(gradient, target @ basis @ basis.T)
    assert (gradient - target).norm() > 0.1
    layer = classifier.head.parametrizations.weight[0]  # type: ignore[union-attr, index]
    assert torch.autograd.gradcheck(layer, (normal(CLASSES, WIDTH, seed=1).requires_grad_(),))


def test_a_constrained_classifier_is_copied_and_its_state_read_back() -> None:
    classifier, _ = constrained()
    x = images(4).double()
    assert find_head(classifier.model, "head") == ("head", classifier.head)
    assert (classifier.num_classes, classifier.feature_dim) == (CLASSES, WIDTH)
    assert torch.equal(classifier.logits(classifier.features(x)), classifier(x))
    twin, other = copy.deepcopy(classifier), constrained()[0]
    with torch.no_grad():
        trained_weight(twin).add_(1.0)
        assert not torch.equal(twin(x), classifier(x))  # nothing is shared
        assert not torch.equal(twin(x), other(x))
    other.load_state_dict(twin.state_dict())
    assert torch.equal(twin(x), other(x))
    with pytest.raises(HeadError, match="constrained already; call release_rows"):
        constrain_to_rows(classifier, classifier.weight)


def test_autocast_does_not_leave_the_row_space() -> None:
    classifier, translated = constrained()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert left_out(classifier.weight.detach(), translated) <= 1e-8


def test_plain_timm_loads_it_once_released(tmp_path: Path) -> None:
    classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=6, image_size=32)
    shake(classifier.model, strength=0.1)
    f, T = classifier.features(images(200)), translator(width=96)
    align_head_(classifier, T, normal(4, N, seed=4), RidgeStatistics(96, N).update(f, T(f)))
    constrain_to_rows(classifier, classifier.weight.detach())
    with pytest.raises(ValueError, match=r"the head of test_resnet.* is constrained.* release_rows"):
        classifier.save(tmp_path / "model")
    assert not any(tmp_path.iterdir())
    release_rows(classifier).save(tmp_path / "model")
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(images()), classifier(images()))
    assert left_out(model.fc.weight.detach(), normal(4, N, seed=4) @ T.matrix) < 1e-4  # float32 head
