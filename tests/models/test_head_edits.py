"""Dropping the null space keeps every logit and leaves none to steer in; averaged weights end in the two models they come from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from singreg.models.classifier import Classifier
from singreg.models.edits import drop_null, interpolate_weights
from singreg.nullspace import NullSpace
from tests.models.fakes import CLASSES, WIDTH, Net, batch_norm_head, images, shake


def deficient() -> nn.Linear:
    """Five rows of rank 2, exactly: rows 3 to 5 are twice or four times the others."""
    head = nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        head.weight[2:] = head.weight[[0, 1, 0]] * torch.tensor([2.0, 4.0, -2.0])[:, None]
    return head


HEADS: dict[str, tuple[Any, int]] = {
    "linear": (lambda: nn.Linear(WIDTH, CLASSES), CLASSES),
    "no bias": (lambda: nn.Linear(WIDTH, CLASSES, bias=False), CLASSES),
    "convolution": (lambda: nn.Conv2d(WIDTH, CLASSES, 1), CLASSES),
    "batch norm": (batch_norm_head, CLASSES),
    "rank 2": (deficient, 2),
}


class MapNet(Net):
    """Gives its head a map of one place, whatever the head is, as timm's models with `use_conv` do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.pool(self.body(x)))
        return logits.flatten(1)


def small(head: nn.Module) -> Classifier:
    torch.manual_seed(0)
    net = MapNet(head) if isinstance(head, nn.Conv2d) else Net(head)
    return Classifier.from_module(net.double(), head="head", tag="small")


@pytest.mark.parametrize("kind", HEADS)
def test_dropping_the_null_keeps_every_logit(kind: str) -> None:
    make, rank = HEADS[kind]
    classifier, x = small(make()), images(20).double()
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    dropped = drop_null(classifier)
    f, logits = dropped.features_and_logits(x)
    torch.testing.assert_close(logits, classifier(x), atol=1e-12, rtol=0)
    assert (classifier.feature_dim, dropped.feature_dim, dropped.head_name) == (WIDTH, rank, "head.1")
    # The new features are the row-space part in its own axes, lengths kept, so nothing is left to steer in.
    old = classifier.features(x)
    space = NullSpace.from_weight(classifier.weight)
    torch.testing.assert_close(f.norm(dim=1), space.remove(old).norm(dim=1))
    assert (old.norm(dim=1) - f.norm(dim=1)).min() > 1e-3  # the control: something was dropped
    assert NullSpace.from_weight(dropped.weight, allow_empty=True).nullity == 0
    with pytest.raises(ValueError, match="no null space"):
        drop_null(dropped) if rank == CLASSES else NullSpace.from_weight(dropped.weight)
    assert not dropped.training
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())


def test_it_trains_as_any_classifier_and_shares_nothing() -> None:
    classifier = small(nn.Linear(WIDTH, CLASSES))
    dropped, before = drop_null(classifier), classifier.weight.detach().clone()
    dropped.tune("head")
    assert [name for name, p in dropped.model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    dropped.tune("all").train()
    dropped(images().double()).square().sum().backward()
    assert all(p.grad is not None for p in dropped.parameters())
    with torch.no_grad():
        dropped.head.weight.zero_()  # type: ignore[union-attr, operator]
    assert torch.equal(classifier.weight, before)


def timm_model(seed: int = 0, **arguments: Any) -> Classifier:
    torch.manual_seed(seed)
    classifier = Classifier.from_timm("test_resnet", image_size=32, **{"pretrained": False, "num_classes": 7, **arguments})
    shake(classifier.model, seed=seed, strength=0.1)
    return classifier


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnetv2_18"])
def test_timm_models_keep_their_transform_and_names(name: str) -> None:
    torch.manual_seed(0)
    classifier = Classifier.from_timm(
        name, pretrained=False, head_mode="new", num_classes=3, class_names=["a", "b", "c"], image_size=32
    )
    shake(classifier.model)
    dropped = drop_null(classifier)
    with torch.no_grad():
        torch.testing.assert_close(dropped(images()), classifier(images()), atol=1e-5, rtol=1e-5)
    assert dropped.class_names == ("a", "b", "c")
    assert dropped.preprocessing == classifier.preprocessing
    assert dropped.tag != classifier.tag


def test_saving_says_what_a_timm_folder_cannot_hold_and_weights_are_read_back(tmp_path: Path) -> None:
    classifier = timm_model()
    dropped = drop_null(classifier)
    with pytest.raises(ValueError, match=r"one layer more .* drop_null on that again .* save_weights\(path\)"):
        dropped.save(tmp_path / "model")
    assert not any(tmp_path.iterdir())
    with torch.no_grad():
        dropped.head.weight.add_(0.1)  # type: ignore[union-attr, operator]  # trained since
    dropped.save_weights(tmp_path / "dropped.safetensors")
    with safe_open(str(tmp_path / "dropped.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "singreg-null-dropped-1", "tag": dropped.tag, "head": "fc.1"}
    again = drop_null(classifier)
    with torch.no_grad():
        assert not torch.equal(again(images()), dropped(images()))
        again.model.load_state_dict(load_file(tmp_path / "dropped.safetensors"))
        assert torch.equal(again(images()), dropped(images()))


def pair() -> tuple[Classifier, Classifier]:
    before, after = timm_model(1), timm_model(2)
    after.model.bn1.num_batches_tracked.fill_(9)
    return before, after


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_the_two_models_bit_for_bit(alpha: float) -> None:
    before, after = pair()
    with torch.no_grad():
        before.head.bias[0], after.head.bias[0] = -0.0, 1e-40  # type: ignore[union-attr, index, operator]
    end, mixed = (before, after)[int(alpha)], interpolate_weights(before, after, alpha)
    state = end.state_dict()
    assert state.keys() == mixed.state_dict().keys()
    for name, value in mixed.state_dict().items():
        assert value.numpy().tobytes() == state[name].numpy().tobytes()
        assert value.data_ptr() != state[name].data_ptr()


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_between_them_every_float_is_the_weighted_mean(alpha: float) -> None:
    before, after = pair()
    after.train()
    kept = copy.deepcopy(after.state_dict())
    mixed = interpolate_weights(before, after, alpha)
    for name, value in mixed.model.state_dict().items():
        old, new = before.model.state_dict()[name], after.model.state_dict()[name]
        if value.is_floating_point():
            torch.testing.assert_close(value, (1 - alpha) * old + alpha * new)
        else:
            assert torch.equal(value, new)
    assert int(mixed.model.bn1.num_batches_tracked) == 9
    running = mixed.model.bn1.running_mean
    assert not torch.equal(running, before.model.bn1.running_mean)
    assert not torch.equal(running, after.model.bn1.running_mean)
    assert torch.equal(interpolate_weights(after, before, 1 - alpha).weight, mixed.weight)
    assert not mixed.training
    assert all(torch.equal(value, kept[name]) for name, value in after.state_dict().items())


def test_heads_of_other_shapes_or_classes_are_refused() -> None:
    before, other = timm_model(), timm_model(num_classes=5)
    with pytest.raises(ValueError, match=r"fc\.weight is \(7, 96\) before and \(5, 96\) after; fc\.bias .* \(2 differences\)"):
        interpolate_weights(before, other, 0.5)
    with pytest.raises(ValueError, match=r"fc\.0\.weight is only in after.*fc\.weight is only in before"):
        interpolate_weights(before, drop_null(before), 0.0)
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            interpolate_weights(before, before, alpha)
    names = [timm_model(head_mode="new", num_classes=2, class_names=list(pair)) for pair in ("ab", "ba")]
    with pytest.raises(ValueError, match=r"the classes are a, b, \.\.\. before and b, a, \.\.\. after"):
        interpolate_weights(*names, 0.5)
