"""Heads: every kind of them, what has none of its own, and which parts of a classifier train (METHOD section 5)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singreg.models.classifier import Classifier
from tests import fakes
from tests.fakes import CLASSES, HEADS, WIDTH, Net, check_contract, images, net, on_meta, used
from tests.reference import formulas

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_of_head_keeps_contract_and_null_space(kind: str) -> None:
    """What heads are looked up for (eq. 9), with the projector of the slow formula."""
    classifier, x = Classifier.from_module(net(kind), head="head"), images(4).double()
    check_contract(classifier, x)
    assert (classifier.bias is None) == (kind == "no bias")
    features, upstream = torch.randn(4, WIDTH, dtype=torch.float64), torch.randn(4, CLASSES).double()
    removed = features - features @ formulas.null_projector(classifier.weight)
    assert (removed - features).abs().max() > 0.1
    torch.testing.assert_close(classifier.logits(removed), classifier.logits(features), atol=1e-11, rtol=0)
    folded = features @ classifier.weight.T + (0 if classifier.bias is None else classifier.bias)
    leaves = list(classifier.head.parameters())
    mine = torch.autograd.grad((folded * upstream).sum(), leaves)
    torch.testing.assert_close(mine, torch.autograd.grad((classifier.logits(features) * upstream).sum(), leaves))


class Wrapped(nn.Module):
    """A linear layer `fc`, a second one, and what is made of their logits."""

    def __init__(self, after: Any) -> None:
        super().__init__()
        self.fc, self.second, self.after = nn.Linear(48, CLASSES), nn.Linear(48, CLASSES), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.fc(x.flatten(1)), self.second(x.flatten(1)))


TIED = nn.Linear(48, 48)


@pytest.mark.parametrize(
    ("model", "head", "words"),
    [
        (Net(fakes.batch_norm_head()), "fc", r"Net has no module 'fc'; its last linear layers are \['head.2'\]"),
        (Net(fakes.batch_norm_head()), "body", "the head 'body' of Net is Sequential and holds no linear layer"),
        (Net(fakes.batch_norm_head()), None, r"Net names no classifier.*from_module\(model, head="),
        (Net(nn.BatchNorm1d(WIDTH, track_running_stats=False)), "head", "holds no linear layer"),
        (nn.Sequential(nn.Flatten(), fakes.CosineLinear(48, CLASSES)), "1", r"\(CosineLinear\) does not compute f W"),
        (Wrapped(lambda a, b: (a + b) / 2), "fc", r"\(3, 5\) is not that of its head 'fc'.*Wrap the model"),
        (Wrapped(lambda a, b: a.softmax(1)), "fc", r"\(3, 5\) is not that of its head 'fc'"),
        (Wrapped(lambda a, b: {"logits": a}), "fc", "expected logits .* got dict"),
        (nn.Sequential(nn.Flatten(), nn.Conv2d(4, 2, 1, groups=2)), "1", "holds no linear layer"),
        (nn.Sequential(nn.Flatten(2), nn.Linear(16, CLASSES), nn.Flatten()), "1", r"\(3, 3, 16\).*pools before"),
        (nn.Sequential(nn.Flatten(), TIED, TIED), "1", "'1' was applied 2 times"),
    ],
)
def test_what_has_no_head_of_its_own_is_explained(model: nn.Module, head: Any, words: str) -> None:
    """The silent way to a wrong report: features and weight of one head, logits of another map."""
    with pytest.raises(ValueError, match=words):
        Classifier.from_module(model, head=head).features(images(size=4))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_large_patch14_dinov2", r"head 'head' of VisionTransformer is Identity.*num_classes=0.*pass num_classes"),
        ("deit_tiny_distilled_patch16_224", r"2 heads \(head, head_dist\).*without distillation.*wrap"),
        ("levit_128s", r"2 heads \(head\.linear, .*from_module\(wrapper, head=\"model\.head\.linear\"\)"),
        ("resnet5O", "timm has no model 'resnet5O'; near are: resnet50"),
    ],
)
def test_timm_models_without_one_head_are_explained(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        on_meta(name)


@pytest.mark.parametrize("fill", [0.5, float("nan")])
def test_logits_in_another_dtype_or_copied_are_the_heads(fill: float) -> None:
    for after in (torch.Tensor.double, torch.Tensor.clone):
        classifier = Classifier.from_module(Wrapped(lambda a, b, after=after: after(a)), head="fc")
        nn.init.constant_(classifier.head.get_parameter("bias"), fill)  # NaN is for the loss to report
        features, logits = classifier.features_and_logits(images(size=4))
        torch.testing.assert_close(after(classifier.logits(features)), logits, equal_nan=True)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        wide = nn.Sequential(nn.Flatten(), nn.Linear(3000, 40)).to(dtype)
        assert Classifier.from_module(wide, head="1").feature_dim == 3000


def moved_by_a_step(classifier: nn.Module, model: nn.Module) -> tuple[set[str], set[str]]:
    """Parameters and batch-norm statistics that one AdamW step moves; the decay moves every trained parameter."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    nn.functional.cross_entropy(classifier(images(4)), torch.arange(4) % CLASSES).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name in moved if name.endswith(STATISTICS)}
    return moved - statistics, statistics


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnetv2_18", "test_vit", "test_convnext"])
@pytest.mark.parametrize("mode", ["head", "last_stage", "all"])
def test_exactly_the_trained_parameters_move(name: str, mode: Any) -> None:
    """Trap 10: and no batch-norm statistics."""
    classifier = used(name).train().tune(mode)
    parameters, statistics = moved_by_a_step(classifier, classifier.model)
    assert parameters == {n for n, p in classifier.model.named_parameters() if p.requires_grad}
    assert not statistics
    head = {n for n in parameters if n.startswith(classifier.head_name + ".")}
    assert len(head) == 2
    assert (parameters == head) == (mode == "head")
    assert (parameters == {n for n, _ in classifier.model.named_parameters()}) == (mode == "all")


def test_plain_train_mode_moves_a_frozen_backbones_batch_norms() -> None:
    """The control of trap 10: the same freezing without Classifier.train."""
    model = used().tune("head").model
    parameters, statistics = moved_by_a_step(model.train(), model)
    assert parameters == {"fc.weight", "fc.bias"}
    assert len(statistics) == sum(name.endswith(STATISTICS) for name in model.state_dict()) > 20


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(WIDTH, affine=False), nn.InstanceNorm2d(WIDTH, track_running_stats=True)]
)
def test_statistics_without_parameters_rest_too(norm: nn.Module) -> None:
    """Such a norm has nothing that could be frozen."""
    model = Net(nn.Linear(WIDTH, CLASSES))
    model.body[1] = norm
    classifier = Classifier.from_module(nn.Sequential(*model.body, nn.Flatten(), model.head), head="5").tune("all")
    nn.ModuleList([classifier]).train()  # through a parent
    assert not moved_by_a_step(classifier, classifier.model)[1]
    assert moved_by_a_step(classifier.model.train(), classifier.model)[1], "the control"
    assert not any(module.training for module in nn.ModuleList([classifier]).eval().modules())


@pytest.mark.parametrize(
    ("name", "beginning", "share"),  # the first name that trains, and the share of the backbone's parameters that does
    [
        *[("resnet50", "layer4.", 0.637), ("tf_efficientnet_b0", "blocks.6.", 0.282)],
        *[("mobilenetv3_large_100", "blocks.6.", 0.330), ("vit_large_patch16_224", "blocks.23.", 0.042)],
        *[("convnext_base", "stages.3.", 0.313), ("swin_large_patch4_window7_224", "layers.3.", 0.315)],
        *[("densenet121", "features.denseblock4.", 0.311), ("vgg16", "pre_logits.", 0.890)],
    ],
)
def test_last_stage_is_the_last_stage_and_all_that_follows(name: str, beginning: str, share: float) -> None:
    classifier = on_meta(name).tune("last_stage")
    head = f"{classifier.head_name}."
    backbone = {n: p for n, p in classifier.model.named_parameters() if not n.startswith(head)}
    trained = [n for n, p in backbone.items() if p.requires_grad]
    assert trained[0].startswith(beginning)
    assert all(p.requires_grad for p in classifier.head.parameters())
    total = sum(p.numel() for p in backbone.values())
    assert sum(backbone[n].numel() for n in trained) / total == pytest.approx(share, abs=0.01)
    order = list(backbone)  # nothing after the first trained layer is frozen
    assert order[order.index(trained[0]) :] == trained


@pytest.mark.parametrize("name", ["pit_ti_224", "rdnet_tiny"])
def test_a_model_that_does_not_say_its_stages(name: str) -> None:
    classifier = on_meta(name)
    with pytest.raises(ValueError, match=r"does not say its stages.*use tuning head or all"):
        classifier.tune("last_stage")
    assert all(p.requires_grad for p in classifier.tune("all").parameters())
    with pytest.raises(ValueError, match="got 'stage'"):
        classifier.tune("stage")  # type: ignore[arg-type]
