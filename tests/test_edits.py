"""Edited heads: aligned ones leave the null no prompt, dropping it keeps every logit."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singreg.models import edits
from singreg.models.classifier import Classifier
from singreg.models.edits import align_head_, aligned_weight, drop_null, interpolate_weights
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.translator import LinearTranslator
from tests.fakes import CLASSES, HEADS, WIDTH, images, net, used
from tests.toy import normal

M, N = 24, 9
PLAIN = ("linear", "no bias", "convolution")


def features(count: int = 400, width: int = M) -> Tensor:
    """Correlated and off-centre, as a network's are."""
    return normal(count, width, seed=5) @ (normal(width, width, seed=6) / 3) + 2 * normal(width, seed=7).abs()


def moments(f: Tensor) -> dict[str, Any]:
    return {"covariance": f.T.cov(correction=0), "mean": f.mean(0)}


def translator(seed: int = 2, width: int = M) -> LinearTranslator:
    return LinearTranslator(normal(N, width, seed=seed), normal(N, seed=seed + 1))


def directions(prompts: int, width: int = M) -> Tensor:
    return edits.prompt_directions(translator(width=width), normal(prompts, N, seed=4))


def align(weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return aligned_weight(weight, d, **moments(features()))


def left_out(weight: Tensor, rows: Tensor) -> float:
    """max_k ‖Π_n d_k‖ / ‖d_k‖ for the null space of W."""
    null = NullSpace.from_weight(weight, allow_empty=True).component(rows)
    return float((null.norm(dim=1) / rows.norm(dim=1)).max())


def rank_of(weight: Tensor) -> int:
    return NullSpace.from_weight(weight, allow_empty=True).rank


def rms(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().mean().sqrt()


def small(kind: str = "linear") -> Classifier:
    return Classifier.from_module(net(kind), head="head", tag="small")


# (classes, prompts): no room for R, some room, a head with as many rows as features
@pytest.mark.parametrize(("classes", "prompts"), [(4, 4), (5, 3), (12, 3), (24, 6)])
def test_no_null_direction_raises_a_prompt(classes: int, prompts: int) -> None:
    weight, f = normal(classes, M, seed=1), features()
    translated = normal(prompts, N, seed=4) @ translator().matrix
    aligned, bias = align(weight, directions(prompts))
    assert classes == M or left_out(weight, translated) > 0.5  # the control
    assert left_out(aligned, translated) <= 1e-8
    assert rank_of(aligned) == classes
    shift = (f @ aligned.T + bias) - f @ weight.T
    torch.testing.assert_close(shift.mean(0), torch.zeros(classes, dtype=torch.float64), atol=1e-9, rtol=0)
    assert rms(shift) > 0.01 * rms(f @ weight.T) or classes == M


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
def test_without_room_it_is_least_squares_on_the_features(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow formula: numpy's least squares on the centred features, with λ as √(N λ) I among the samples."""
    monkeypatch.setattr(edits, "RIDGE", ridge)
    monkeypatch.setattr(edits, "FLOOR", 0.0)
    weight, f, d = normal(4, M, seed=1), features(), directions(4)
    x = f - f.mean(0)
    penalty = ridge * x.square().sum() / (len(f) * M)
    x = torch.cat([x, (len(f) * penalty).sqrt() * torch.eye(M, dtype=torch.float64)])
    expected = np.linalg.lstsq((x @ d.T).numpy(), (x @ weight.T).numpy(), rcond=None)[0].T @ d.numpy()
    np.testing.assert_allclose(align(weight, d)[0].numpy(), expected, atol=1e-9)


def test_free_rows_are_the_best_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """No head of rank 5 that holds three prompts, found by descent, keeps the logits better."""
    monkeypatch.setattr(edits, "RIDGE", 0.0)
    monkeypatch.setattr(edits, "FLOOR", 0.0)
    weight, d, x = normal(7, 5, seed=0) @ normal(5, M, seed=1), directions(3), features() - features().mean(0)
    aligned, found = align(weight, d)[0], []
    for seed in range(5):
        free = normal(2, M, seed=seed)
        for _ in range(300):  # alternating least squares: B given the rows, the free rows given B
            rows = torch.cat([d, free])
            coefficients = torch.linalg.lstsq(x @ rows.T, x @ weight.T).solution.T
            rest = x @ (weight - coefficients[:, :3] @ d).T
            free = torch.linalg.lstsq(x, torch.linalg.lstsq(coefficients[:, 3:], rest.T).solution.T).solution.T
        found.append(float((x @ (weight - coefficients @ torch.cat([d, free])).T).square().mean()))
    error = float((x @ (weight - aligned).T).square().mean())
    assert rank_of(aligned) == 5
    assert min(found) == pytest.approx(error, rel=1e-3)
    assert min(found) > error * (1 - 1e-9)


@pytest.mark.parametrize(("rank", "prompts"), [(6, 6), (6, 2), (4, 4)])
def test_a_head_that_is_aligned_already_stays(rank: int, prompts: int) -> None:
    d = directions(prompts)
    weight = normal(6, rank, seed=1) @ torch.cat([d, normal(rank - prompts, M, seed=2)])
    aligned, bias = align(weight, d)
    torch.testing.assert_close(aligned, weight, atol=1e-9, rtol=0)
    assert bias.abs().max() < 1e-8
    assert rank_of(aligned) == rank


def test_a_head_whose_rows_sum_to_zero_still_holds_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fit has rank C - 1, so one of C directions would be left out; lifting it moves all logits alike."""
    weight, d = normal(5, M, seed=1), directions(5)
    lifted, _ = align(weight - weight.mean(0), d)
    monkeypatch.setattr(edits, "FLOOR", 0.0)
    bare, _ = align(weight - weight.mean(0), d)
    assert left_out(bare, d) > 0.1
    assert left_out(lifted, d) <= 1e-8
    assert (rank_of(bare), rank_of(lifted)) == (4, 5)
    added = (lifted - bare) @ features().T
    torch.testing.assert_close(added, added.mean(0).expand_as(added), atol=1e-9, rtol=0)
    assert added.abs().max() > 1e-6


@pytest.mark.parametrize("kind", PLAIN)
def test_the_edit_is_written_into_the_classifier(kind: str) -> None:
    classifier, x = small(kind).requires_grad_(False), images(40).double()
    parameters, before = dict(classifier.named_parameters()), copy.deepcopy(classifier)
    f, logits = classifier.features_and_logits(x)
    T, texts = translator(width=WIDTH), normal(3, N, seed=4)
    align_head_(classifier, T, texts, RidgeStatistics(WIDTH, N).update(f, T(f)))
    assert left_out(classifier.weight, texts @ T.matrix) <= 1e-8 < 0.1 < left_out(before.weight, texts @ T.matrix)
    assert all(parameter is parameters[name] for name, parameter in classifier.named_parameters())
    assert torch.equal(classifier.features(x), f)
    after = classifier(x)
    mean = 0 * f[0] if kind == "no bias" else f.mean(0)  # there the whole logits are kept as well as they can
    d, covariance = edits.prompt_directions(T, texts), (f - mean).T @ (f - mean) / len(f)
    weight, shift = aligned_weight(before.weight, d, covariance, mean)
    torch.testing.assert_close(after - logits, f @ (weight - before.weight).T + shift, atol=1e-9, rtol=0)
    assert kind == "no bias" or (after - logits).mean(0).abs().max() < 1e-9


def test_refusals() -> None:
    T, texts, d = translator(width=WIDTH), normal(3, N, seed=4), directions(3, WIDTH)
    f, weight = features(width=WIDTH), normal(3, WIDTH, seed=1)
    statistics, normalised = RidgeStatistics(WIDTH, N).update(f, T(f)), small()
    nn.utils.parametrizations.weight_norm(normalised.head)
    for call, words in (
        (lambda: align_head_(small("batch norm"), T, texts, statistics), "a batch norm and a linear layer"),
        (lambda: align_head_(normalised, T, texts, statistics), "parametrised"),
        (lambda: aligned_weight(weight[:2], d, **moments(f)), r"a head of 2 rows cannot hold 3 independent"),
        (lambda: align_head_(small(), T, texts, RidgeStatistics(WIDTH, N)), "at least 2 images"),
        (lambda: edits.prompt_directions(LinearTranslator(0 * T.matrix, T.offset), texts), "prompt .* zero"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_dropping_the_null_keeps_every_logit_and_leaves_none_to_steer_in(kind: str) -> None:
    rank = 2 if kind == "rank 2" else CLASSES
    classifier, x = small(kind), images(20).double()
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    dropped = drop_null(classifier)
    f, logits = dropped.features_and_logits(x)
    torch.testing.assert_close(logits, classifier(x), atol=1e-12, rtol=0)
    assert (classifier.feature_dim, dropped.feature_dim, dropped.head_name) == (WIDTH, rank, "head.1")
    # The new features are the row-space part in its own axes, lengths kept.
    old = classifier.features(x)
    torch.testing.assert_close(f.norm(dim=1), NullSpace.from_weight(classifier.weight).remove(old).norm(dim=1))
    assert (old.norm(dim=1) - f.norm(dim=1)).min() > 1e-3  # the control: something was dropped
    assert NullSpace.from_weight(dropped.weight, allow_empty=True).nullity == 0
    dropped.tune("all").train()
    dropped(x).square().sum().backward()
    assert all(p.grad is not None for p in dropped.parameters())
    with torch.no_grad():
        dropped.head.get_parameter("weight").zero_()
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())  # nothing is shared


@pytest.mark.parametrize("kind", ["linear", "convolution", "batch norm"])
def test_what_the_softmax_ignores_is_dropped_too_where_asked(kind: str) -> None:
    classifier, x = small(kind), images(20).double()
    dropped = drop_null(classifier, spare=1, invariance="softmax")
    f, logits = dropped.features_and_logits(x)
    torch.testing.assert_close(logits.softmax(1), classifier(x).softmax(1), atol=1e-12, rtol=0)
    space = NullSpace.from_weight(dropped.weight, invariance="softmax")
    assert (dropped.feature_dim, space.nullity) == (CLASSES, 1)
    torch.testing.assert_close(space.remove(f), f, atol=1e-12, rtol=0)
    kept = drop_null(classifier, spare=1)  # the control: the logits' null space alone
    assert NullSpace.from_weight(kept.weight, invariance="softmax").nullity == 2


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnetv2_18"])
def test_dropped_timm_models_keep_transform_and_names_and_refuse_a_folder(name: str, tmp_path: Path) -> None:
    classifier = used(name, strength=0.1, head_mode="new", num_classes=3, class_names=["a", "b", "c"])
    dropped = drop_null(classifier)
    with torch.no_grad():
        torch.testing.assert_close(dropped(images()), classifier(images()), atol=1e-5, rtol=1e-5)
    assert (dropped.class_names, dropped.preprocessing) == (("a", "b", "c"), classifier.preprocessing)
    assert dropped.tag != classifier.tag
    with pytest.raises(ValueError, match="one layer more than timm builds"):
        dropped.save(tmp_path / "model")
    assert not any(tmp_path.iterdir())


def pair() -> tuple[Classifier, Classifier]:
    before, after = used(seed=1, strength=0.1), used(seed=2, strength=0.1)
    after.model.bn1.num_batches_tracked.fill_(9)  # type: ignore[union-attr, operator]
    return before, after


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_the_two_models_bit_for_bit(alpha: float) -> None:
    before, after = pair()
    with torch.no_grad():
        before.head.get_parameter("bias")[0], after.head.get_parameter("bias")[0] = -0.0, 1e-40
    state, mixed = (before, after)[int(alpha)].state_dict(), interpolate_weights(before, after, alpha)
    assert state.keys() == mixed.state_dict().keys()
    for name, value in mixed.state_dict().items():
        assert value.numpy().tobytes() == state[name].numpy().tobytes()
        assert value.data_ptr() != state[name].data_ptr()


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_between_them_every_float_is_the_weighted_mean(alpha: float) -> None:
    before, after = pair()
    after.train()
    states = [copy.deepcopy(each.model.state_dict()) for each in (before, after)]
    mixed = interpolate_weights(before, after, alpha)
    for name, value in mixed.model.state_dict().items():
        old, new = states[0][name], states[1][name]
        expected = (1 - alpha) * old + alpha * new if value.is_floating_point() else new
        torch.testing.assert_close(value, expected)
        assert not name.endswith("running_mean") or not torch.equal(value, old)
    assert torch.equal(interpolate_weights(after, before, 1 - alpha).weight, mixed.weight)
    assert not mixed.training
    assert all(torch.equal(value, states[1][name]) for name, value in after.model.state_dict().items())
