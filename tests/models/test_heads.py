"""Which layer is the head, what affine map it is, and what a model without one, or with two, is told."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from singreg.models.classifier import Classifier
from singreg.models.heads import batch_norm_and_linear, effective_weight, find_head, is_linear
from singreg.nullspace import NullSpace
from tests.models.fakes import CLASSES, WIDTH, CosineLinear, Net, Scaled, TwoHeads, batch_norm_head, images, shake
from tests.reference import formulas

# METHOD section 5: the sweep's 13 architectures, and the B4 of the paper's main text, with m and the head's name.
PAPER = {
    "resnet50": (2048, "fc"),
    "tf_efficientnet_b0": (1280, "classifier"),
    "tf_efficientnet_b4": (1792, "classifier"),
    "resnetv2_50x1_bit": (2048, "head.fc"),
    "vit_large_patch16_224": (1024, "head"),
    "resnext101_32x8d": (2048, "fc"),
    "vgg16": (4096, "head.fc"),
    "vgg19": (4096, "head.fc"),
    "densenet121": (1024, "classifier"),
    "convnext_base": (1024, "head.fc"),
    "swin_large_patch4_window7_224": (1536, "head.fc"),
    "vit_large_patch14_dinov2": (1024, "head"),
    "deit3_large_patch16_224": (1024, "head"),
    "eva02_large_patch14_448": (1024, "head"),
}


def on_meta(name: str, **kwargs: object) -> Classifier:
    """Shapes without memory: a 300 M parameter model in milliseconds."""
    with torch.device("meta"):
        return Classifier.from_timm(name, pretrained=False, **kwargs)  # type: ignore[arg-type]


@functools.cache
def drawn_head(classes: int, width: int) -> Tensor:
    return 0.02 * torch.randn(classes, width, generator=torch.Generator().manual_seed(0))


@functools.cache
def drawn_null_space(classes: int, width: int) -> NullSpace:
    return NullSpace.from_weight(drawn_head(classes, width))


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_architectures(name: str) -> None:
    width, head = PAPER[name]
    classifier = on_meta(name, num_classes=1000)
    assert (classifier.head_name, classifier.feature_dim, classifier.num_classes) == (head, width, 1000)
    assert isinstance(classifier.head, nn.Conv2d) == (name == "resnetv2_50x1_bit")
    assert classifier.bias is not None
    assert classifier.bias.shape == (1000,)
    space = drawn_null_space(*classifier.weight.shape)
    assert (space.rank, space.nullity) == (1000, width - 1000)
    side = classifier.preprocessing["input_size"][-1]
    features, logits = classifier.features_and_logits(torch.empty(2, 3, side, side, device="meta"))
    assert (features.shape, logits.shape) == ((2, width), (2, 1000))


def test_dinov2_has_no_head_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"head 'head' of VisionTransformer is Identity.*num_classes=0.*pass num_classes"):
        on_meta("vit_large_patch14_dinov2")
    assert on_meta("vit_large_patch14_dinov2", head_mode="new", num_classes=16).weight.shape == (16, 1024)


@pytest.mark.parametrize(
    ("classes", "logits_nullity", "softmax_nullity"), [(1000, None, None), (65, None, None), (64, None, 1), (63, 1, 2)]
)
def test_a_head_with_no_more_features_than_classes(
    classes: int, logits_nullity: int | None, softmax_nullity: int | None
) -> None:
    """At m = C the softmax, which takes no notice of a shift of all logits, still leaves one dimension."""
    weight = drawn_head(*on_meta("test_vit", num_classes=classes).weight.shape)
    assert weight.shape == (classes, 64)
    for invariance, nullity in (("logits", logits_nullity), ("softmax", softmax_nullity)):
        if nullity is None:
            with pytest.raises(ValueError, match=rf"\({classes} classes, 64 features\).*no null space"):
                NullSpace.from_weight(weight, invariance=invariance)  # type: ignore[arg-type]
        else:
            assert NullSpace.from_weight(weight, invariance=invariance).nullity == nullity  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "yes"),
    [
        (nn.Linear(4, 2), True),
        (nn.Conv2d(4, 2, 1), True),
        (nn.Conv2d(4, 2, 3), False),
        (nn.Conv2d(4, 2, 1, stride=2), False),
        (nn.Conv2d(4, 2, 1, padding=1), False),
        (nn.Conv2d(4, 2, 1, groups=2), False),
        (nn.Identity(), False),
    ],
)
def test_what_counts_as_linear(layer: nn.Module, yes: bool) -> None:
    assert is_linear(layer) == yes


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_folded_in_value_and_gradient(affine: bool, bias: bool) -> None:
    classifier = Classifier.from_module(Net(batch_norm_head(affine=affine, bias=bias)), head="head").double()
    head, parameters = classifier.head, list(classifier.head.parameters())
    assert classifier.head_name == "head"
    assert batch_norm_and_linear(head) is not None
    features, upstream = torch.randn(7, WIDTH, dtype=torch.float64), torch.randn(7, CLASSES, dtype=torch.float64)
    assert classifier.bias is not None
    folded, real = features @ classifier.weight.T + classifier.bias, head(features)
    torch.testing.assert_close(folded, real)
    unfolded = features @ parameters[-2 if bias else -1].T
    assert (unfolded - real).abs().max() > 0.1  # the control
    gradients = torch.autograd.grad((folded * upstream).sum(), parameters)
    for gradient, expected in zip(gradients, torch.autograd.grad((real * upstream).sum(), parameters), strict=True):
        torch.testing.assert_close(gradient, expected)
        assert expected.abs().max() > 1e-3
    x = images().double()
    torch.testing.assert_close(classifier.logits(classifier.features(x)), classifier(x))
    torch.testing.assert_close(classifier.features(x), classifier.model.pool(classifier.model.body(x)).flatten(1))


def test_batch_norm_without_statistics_cannot_be_folded() -> None:
    head = nn.Sequential(nn.BatchNorm1d(WIDTH, track_running_stats=False), nn.Linear(WIDTH, CLASSES))
    with pytest.raises(ValueError, match="no running statistics"):
        Classifier.from_module(Net(head), head="head")


@pytest.mark.parametrize("bias", [True, False])
def test_one_by_one_convolution(bias: bool) -> None:
    net = Net(nn.Conv2d(WIDTH, CLASSES, 1, bias=bias))
    shake(net)
    classifier = Classifier.from_module(net, head="head")
    features = classifier.features(images())
    assert (features.shape, classifier.weight.shape) == ((3, WIDTH), (CLASSES, WIDTH))
    assert (classifier.bias is not None) == bias
    offset = classifier.bias if classifier.bias is not None else 0
    torch.testing.assert_close(features @ classifier.weight.T + offset, net(images()))
    torch.testing.assert_close(classifier.logits(features), net(images()))
    classifier.weight.square().sum().backward()
    torch.testing.assert_close(net.head.weight.grad, 2 * net.head.weight)


def test_the_last_layer_of_an_mlp() -> None:
    net = Net(nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Dropout(0.3), nn.Linear(9, CLASSES)))
    classifier = Classifier.from_module(net, head="head")
    assert (classifier.head_name, classifier.feature_dim) == ("head.3", 9)
    torch.testing.assert_close(classifier.logits(classifier.features(images())), net(images()))


def test_equivalent_features_give_equal_logits() -> None:
    """What heads are looked up for (eq. 9), with the projector of the slow formula, for a folded batch norm and a convolution."""
    for head in (batch_norm_head(), nn.Conv2d(WIDTH, CLASSES, 1)):
        classifier = Classifier.from_module(Net(head), head="head").double()
        features = torch.randn(4, WIDTH, dtype=torch.float64)
        removed = features - features @ formulas.null_projector(classifier.weight)
        assert (removed - features).abs().max() > 0.1
        torch.testing.assert_close(classifier.logits(removed), classifier.logits(features), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deit_tiny_distilled_patch16_224", r"VisionTransformerDistilled has 2 heads \(head, head_dist\).*without distillation.*wrap"),
        ("levit_128s", r"2 heads \(head\.linear, head_dist\.linear\).*from_module\(wrapper, head=\"model\.head\.linear\"\)"),
        ("crossvit_tiny_240", r"CrossVit has 2 heads \(head\.0, head\.1\)"),
        ("efficientvim_m1", r"has 4 heads"),
    ],
)
def test_several_heads_are_named(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        on_meta(name)


def test_the_advice_for_two_heads_works() -> None:
    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TwoHeads()

        def forward(self, x: Tensor) -> Tensor:
            return self.model.head(x.flatten(1))

    classifier, x = Classifier.from_module(OneHead(), head="model.head"), images(size=4)
    torch.testing.assert_close(classifier.logits(classifier.features(x)), classifier(x))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, r"Net names no classifier.*from_module\(model, head=\"NAME\"\)"),
        ("fc", r"Net has no module 'fc'; its last linear layers are \['head.2'\]"),
        ("pool", "the head 'pool' of Net is AdaptiveAvgPool2d and holds no linear layer"),
    ],
)
def test_no_head_is_explained(name: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_head(Net(batch_norm_head()), name)


def test_a_normalised_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'1' \(CosineLinear\) does not compute f W\^T \+ b.*differs by"):
        Classifier.from_module(nn.Sequential(nn.Flatten(), CosineLinear(48, CLASSES)), head="1")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_low_precision_is_no_reason_to_refuse_a_head(dtype: torch.dtype) -> None:
    assert Classifier.from_module(nn.Sequential(nn.Flatten(), nn.Linear(3000, 40)).to(dtype), head="1").feature_dim == 3000


def test_logits_that_are_not_the_heads_are_refused() -> None:
    """The silent way to a wrong report: features and weight of one head, logits of another map."""
    for model, head in ((TwoHeads(), "head"), (Scaled(lambda y: 3 * y), "fc"), (Scaled(lambda y: y.softmax(1)), "fc")):
        with pytest.raises(ValueError, match=rf"output \(3, 5\) is not that of its head '{head}'.*Wrap the model"):
            Classifier.from_module(model, head=head).features(images(size=4))
    with pytest.raises(ValueError, match="returned dict, not its logits"):
        Classifier.from_module(Scaled(lambda y: {"logits": y}), head="fc").features(images(size=4))


@pytest.mark.parametrize("fill", [0.5, float("nan")])
def test_logits_in_another_dtype_or_copied_are_the_heads(fill: float) -> None:
    for after in (torch.Tensor.double, torch.Tensor.clone):
        classifier = Classifier.from_module(Scaled(after), head="fc")
        nn.init.constant_(classifier.head.bias, fill)  # NaN is for the loss to report, and no second head
        features, logits = classifier.features_and_logits(images(size=4))
        torch.testing.assert_close(after(classifier.logits(features)), logits, equal_nan=True)


def test_a_declared_head_that_is_one_of_two_is_caught() -> None:
    """timm's levit_384_s8 names one head, and averages two."""
    classifier = Classifier.from_timm("levit_384_s8", pretrained=False, num_classes=5, image_size=32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"not that of its head 'head\.linear'"):
        classifier.features(images())


def test_a_head_per_token_or_used_twice_is_refused() -> None:
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(16, CLASSES), nn.Flatten())
    with pytest.raises(ValueError, match=r"'1' gets an input of shape \(3, 3, 16\).*pools before"):
        Classifier.from_module(tokens, head="1").features(images(size=4))
    layer = nn.Linear(48, 48)
    with pytest.raises(ValueError, match="'1' was applied 2 times"):
        Classifier.from_module(nn.Sequential(nn.Flatten(), layer, layer), head="1").features(images(size=4))


def test_effective_weight_of_a_linear_is_its_own() -> None:
    layer = nn.Linear(3, 2, bias=False)
    weight, bias = effective_weight(layer)
    assert weight.data_ptr() == layer.weight.data_ptr()
    assert bias is None
