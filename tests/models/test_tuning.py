"""What trains in each tuning mode, by a real step: frozen parameters and batch-norm statistics do not move."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from singreg.models.classifier import Classifier
from singreg.models.heads import find_head
from singreg.models.tuning import set_trainable
from tests.models.fakes import CLASSES, WIDTH, Net, batch_norm_head, images, shake

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def shaken(name: str, **kwargs: object) -> Classifier:
    classifier = Classifier.from_timm(name, pretrained=False, num_classes=CLASSES, image_size=32, **kwargs)  # type: ignore[arg-type]
    shake(classifier.model)
    return classifier


def moved_by_a_step(classifier: nn.Module, model: nn.Module) -> set[str]:
    """Names of parameters and buffers that one AdamW step moves; the decay moves every trained parameter, whatever its gradient."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    nn.functional.cross_entropy(classifier(images(4)), torch.arange(4) % CLASSES).backward()
    optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def split(names: set[str]) -> tuple[set[str], set[str]]:
    """Parameters, and batch-norm statistics."""
    statistics = {name for name in names if name.endswith(STATISTICS)}
    return names - statistics, statistics


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnetv2_18", "test_vit", "test_convnext"])
@pytest.mark.parametrize("mode", ["head", "last_stage", "all"])
def test_exactly_the_trained_parameters_move(name: str, mode: str) -> None:
    classifier = shaken(name).tune(mode).train()  # type: ignore[arg-type]
    parameters, statistics = split(moved_by_a_step(classifier, classifier.model))
    assert parameters == {n for n, p in classifier.model.named_parameters() if p.requires_grad}
    assert not statistics
    head = {n for n in parameters if n.startswith(classifier.head_name + ".")}
    assert len(head) == 2
    everything = {n for n, _ in classifier.model.named_parameters()}
    assert (parameters == head) == (mode == "head")
    assert (parameters == everything) == (mode == "all")


def test_plain_train_mode_moves_a_frozen_backbones_batch_norms() -> None:
    """The control of trap 10: the same freezing without Classifier.train."""
    model = shaken("test_resnet").model
    set_trainable(model, "fc", "head")
    parameters, statistics = split(moved_by_a_step(model.train(), model))
    assert parameters == {"fc.weight", "fc.bias"}
    assert len(statistics) == sum(name.endswith(STATISTICS) for name in model.state_dict()) > 20


@pytest.mark.parametrize("mode", ["head", "last_stage", "all"])
def test_batch_norm_train_moves_statistics_of_trained_parts_only(mode: str) -> None:
    classifier = shaken("test_resnet").tune(mode, batch_norm="train").train()  # type: ignore[arg-type]
    _, statistics = split(moved_by_a_step(classifier, classifier.model))
    beginnings = {"head": (), "last_stage": ("layer4.",), "all": ("",)}[mode]
    assert statistics == {n for n in classifier.model.state_dict() if n.endswith(STATISTICS) and n.startswith(beginnings)}
    assert bool(statistics) == (mode != "head")


def test_modes_hold_through_train_and_eval_of_a_parent() -> None:
    classifier = shaken("test_resnet").tune("last_stage", batch_norm="train")
    parent = nn.ModuleList([classifier]).train()
    training = {name for name, module in classifier.model.named_modules() if module.training and "." not in name}
    assert {"layer4", "fc"} < training
    assert not training & {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert not any(module.training for module in parent.eval().modules())
    assert not any(module.training for module in classifier.tune("all").modules())


def test_tuning_a_model_in_train_mode_takes_effect_at_once() -> None:
    classifier = shaken("test_resnet").train()
    _, statistics = split(moved_by_a_step(classifier.tune("head"), classifier.model))
    assert not statistics
    classifier.tune("all", batch_norm="train")
    assert classifier.model.bn1.training


def test_without_tune_everything_trains_and_batch_norm_rests() -> None:
    classifier = shaken("test_resnet").train()
    parameters, statistics = split(moved_by_a_step(classifier, classifier.model))
    assert parameters == {n for n, _ in classifier.model.named_parameters()}
    assert not statistics


def test_frozen_parts_have_no_dropout_and_no_random_depth() -> None:
    classifier = shaken("test_vit", drop_path_rate=0.5, proj_drop_rate=0.5)
    x = images()
    with torch.no_grad():
        assert torch.equal(classifier.tune("head").train().features(x), classifier.features(x))
        assert not torch.equal(classifier.tune("all").train().features(x), classifier.features(x))  # the control


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(WIDTH, affine=False), nn.InstanceNorm2d(WIDTH, track_running_stats=True)])
def test_statistics_without_parameters_follow_their_surroundings(norm: nn.Module) -> None:
    """Such a norm has nothing that could be frozen, and its statistics moved with batch_norm="train" in a frozen backbone."""
    net = Net(nn.Linear(WIDTH, CLASSES))
    net.body[1] = norm
    flat = nn.Sequential(*net.body, net.pool, nn.Flatten(), net.head)
    for mode, moves in (("head", False), ("all", True)):
        classifier = Classifier.from_module(flat, head="5").tune(mode, batch_norm="train").train()  # type: ignore[arg-type]
        _, statistics = split(moved_by_a_step(classifier, flat))
        assert bool(statistics) == moves


# The first name that trains, and the share of the backbone's parameters that does.
LAST_STAGES = {
    "resnet50": ("layer4.", 0.637),
    "tf_efficientnet_b0": ("blocks.6.", 0.282),
    "mobilenetv3_large_100": ("blocks.6.", 0.330),
    "test_vit": ("blocks.5.", 0.137),
    "vit_large_patch16_224": ("blocks.23.", 0.042),
    "convnext_base": ("stages.3.", 0.313),
    "swin_large_patch4_window7_224": ("layers.3.", 0.315),
    "densenet121": ("features.denseblock4.", 0.311),
    "resnetv2_50x1_bit": ("stages.3.", 0.637),
    "vgg16": ("pre_logits.", 0.890),
    "fastvit_t8": ("stages.3.", 0.640),
    "inception_next_atto": ("stages.3.", 0.549),
}


@pytest.mark.parametrize("name", LAST_STAGES)
def test_last_stage_is_the_last_stage_and_all_that_follows(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    head_name, _ = find_head(model, model.pretrained_cfg["classifier"])
    set_trainable(model, head_name, "last_stage")
    beginning, share = LAST_STAGES[name]
    backbone = {n: p for n, p in model.named_parameters() if not n.startswith(f"{head_name}.")}
    trained = [n for n, p in backbone.items() if p.requires_grad]
    assert trained[0].startswith(beginning)
    assert all(p.requires_grad for n, p in model.named_parameters() if n.startswith((beginning, f"{head_name}.")))
    assert sum(backbone[n].numel() for n in trained) / sum(p.numel() for p in backbone.values()) == pytest.approx(share, abs=0.01)
    # Nothing after the first trained layer is frozen: the gradient flows through a closed end of the network.
    order = list(backbone)
    assert order[order.index(trained[0]) :] == trained


@pytest.mark.parametrize(("name", "kind"), [("pit_ti_224", "PoolingVisionTransformer"), ("rdnet_tiny", "RDNet")])
def test_a_model_that_does_not_say_its_stages(name: str, kind: str) -> None:
    with torch.device("meta"):
        classifier = Classifier.from_timm(name, pretrained=False)
    with pytest.raises(ValueError, match=rf"{kind} does not say what its stages are.*use tuning head or all"):
        classifier.tune("last_stage")
    assert all(p.requires_grad for p in classifier.tune("all").parameters())


def test_plain_modules_and_unknown_modes() -> None:
    classifier = Classifier.from_module(Net(nn.Linear(WIDTH, CLASSES)), head="head")
    with pytest.raises(ValueError, match="Net does not say what its stages are"):
        classifier.tune("last_stage")
    with pytest.raises(ValueError, match='"head", "last_stage" or "all", got \'stage\''):
        classifier.tune("stage")  # type: ignore[arg-type]
    assert {n for n, p in classifier.tune("head").named_parameters() if p.requires_grad} == {"model.head.weight", "model.head.bias"}


def test_a_folded_head_trains_as_a_whole_and_keeps_its_statistics() -> None:
    classifier = Classifier.from_module(Net(batch_norm_head()), head="head").tune("head").train()
    parameters, statistics = split(moved_by_a_step(classifier, classifier.model))
    assert parameters == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    assert not statistics

