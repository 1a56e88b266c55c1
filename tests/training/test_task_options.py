"""L2-SP and head first (LP-FT): what each adds to a step, and what a resumed arm finds again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from singreg.training.task import FinetuneTask, train_head_only, trained_backbone
from tests.training.small_arm import CLASSES, SIDE, Arm, Stop, small_classifier
from tests.training.test_arm import ARMS, largest_difference, same_bits


def test_l2_sp_is_the_squared_distance_of_the_trained_backbone_from_its_start() -> None:
    classifier = small_classifier(dropout=0.0)
    classifier.model.norm.weight.requires_grad_(False)
    start = {name: value.detach().clone() for name, value in classifier.model.named_parameters()}
    task = FinetuneTask(classifier, l2_sp=3.0).train()
    images, labels = torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64), torch.arange(4) % CLASSES
    assert float(task(images, labels)["l2_sp"].detach()) == 0
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    outputs = task(images, labels)
    moved = ["first.weight", "first.bias", "norm.bias"]  # neither the head nor what is frozen
    expected = sum(0.5 * 3.0 * float((classifier.model.get_parameter(name).detach() - start[name]).square().sum()) for name in moved)
    assert float(outputs["l2_sp"]) == pytest.approx(expected)
    assert float((outputs["loss"] - outputs["ce"]).detach()) == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(outputs["loss"] - FinetuneTask(classifier)(images, labels)["loss"], classifier.model.norm.bias)
    torch.testing.assert_close(gradient, 3.0 * (classifier.model.norm.bias.detach() - start["norm.bias"]))
    assert not [name for name in task.state_dict() if name.startswith("start_")], "checkpoints need not hold it"


def test_l2_sp_has_nothing_to_hold_where_the_head_alone_trains() -> None:
    classifier = small_classifier().tune("head")
    images, labels = torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64), torch.arange(4) % CLASSES
    assert float(FinetuneTask(classifier, l2_sp=3.0)(images, labels)["l2_sp"]) == 0


def test_l2_sp_keeps_the_backbone_near_and_resumes_from_the_same_start(tmp_path: Path) -> None:
    begun = small_classifier().state_dict()

    def distance(weights: dict[str, torch.Tensor]) -> float:
        return sum(float((weights[name] - begun[name]).square().sum()) for name in begun if ".first." in name)

    training = {"l2_sp": 30.0}
    held = Arm(tmp_path / "held", training=training).run()
    assert 0 < distance(held) < 0.7 * distance(Arm(tmp_path / "free").run())
    with pytest.raises(Stop):
        Arm(tmp_path / "stopped", training=training).run(stop_after=7)
    assert same_bits(Arm(tmp_path / "stopped", training=training).run(resume=True), held)


@ARMS
def test_head_first_all_the_way_is_training_the_head_alone(regularised: bool, tmp_path: Path) -> None:
    """Weight decay, momentum, clipping, batch norm and dropout: to the bit as if the backbone were frozen."""
    training = {"weight_decay": 0.5, "clip": 0.1}
    first = Arm(tmp_path / "first", regularised, training={**training, "head_first": 1.0}).run()
    head = Arm(tmp_path / "head", regularised, tuning="head", training=training).run()
    assert same_bits(first, head)
    begun = small_classifier().state_dict()
    changed = {name for name in begun if not torch.equal(begun[name], first[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"fc"}


def test_the_backbone_joins_after_its_share_of_the_steps(tmp_path: Path) -> None:
    """Ten steps, four of the head alone: checkpoints every step show when the backbone begins to move."""
    training = {"head_first": 0.4, "checkpoint_every": 1, "keep": 99}
    arm = Arm(tmp_path / "whole", training=training)
    expected = arm.run()
    from safetensors.torch import load_file

    folders = sorted((tmp_path / "whole").glob("step-*"))
    stored = [load_file(folder / "model.safetensors")["classifier.model.first.weight"] for folder in folders]
    begun = small_classifier().model.first.weight.detach()
    assert [torch.equal(value, begun) for value in stored] == [True] * 4 + [False] * 6
    for stop_after in (3, 5):
        folder = tmp_path / f"stopped-{stop_after}"
        with pytest.raises(Stop):
            Arm(folder, training=training).run(stop_after=stop_after)
        assert same_bits(Arm(folder, training=training).run(resume=True), expected)
    assert largest_difference(expected, Arm(tmp_path / "without").run()) > 1e-3


def test_training_the_head_only_leaves_what_trains_as_it_was() -> None:
    classifier = small_classifier()
    backbone = trained_backbone(classifier)
    train_head_only(classifier)
    assert trained_backbone(classifier) == backbone != []
    assert not classifier.model.norm.training
    assert classifier.train().model.norm.training
