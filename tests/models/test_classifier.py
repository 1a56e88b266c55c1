"""Classifier: head modes, picture transforms, train mode, and what wrong arguments are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from singreg.models.classifier import Classifier, _label_names
from tests.models.fakes import CLASSES, WIDTH, Net, batch_norm_head, images, shake

NAMES = ["owl", "apple", "goldfish", "drum", "kite", "snail", "tractor"]


def write_model(folder: Path, name: str = "test_resnet", *, classes: int = 7, size: int = 32, labels: object = None) -> str:
    """An untrained timm model as a folder with weights, as a download would be; its name."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, **({"img_size": size} if "vit" in name else {}))
    shake(model)
    data = {"input_size": (3, size, size)}
    config = {"label_names": labels} if labels else {}
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True, data_config=data)
    return f"local-dir:{folder}"


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("stored") / "model", labels=NAMES)


def test_keep_is_the_model_itself(stored: str) -> None:
    classifier = Classifier.from_timm(stored)
    assert torch.equal(logits_of(classifier, images()), logits_of(timm.create_model(stored, pretrained=True), images()))
    assert classifier.num_classes == 7
    assert classifier.tag == "test_resnet.r160_in1k"
    assert Classifier.from_timm(stored, num_classes=7).head_hash() == classifier.head_hash()


# A Linear, a 1x1 convolution, and an MLP head that timm's reset_classifier draws anew as a whole.
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnetv2_18", "mobilenetv3_small_050", "caformer_s18"])
def test_slice_takes_the_rows_in_order(tmp_path: Path, name: str) -> None:
    stored, rows = write_model(tmp_path / "model", name, labels=NAMES), [5, 0, 3]
    whole, sliced = Classifier.from_timm(stored), Classifier.from_timm(stored, head_mode="slice", class_indices=rows)
    assert torch.equal(sliced.weight, whole.weight[rows])
    assert torch.equal(sliced.bias, whole.bias[rows])
    torch.testing.assert_close(logits_of(sliced, images()), logits_of(whole, images())[:, rows])
    assert sliced.class_names == ("snail", "owl", "drum")
    assert (sliced.num_classes, sliced.feature_dim, sliced.model.num_classes) == (3, whole.feature_dim, 3)
    assert not any(module.training for module in sliced.modules())
    named = Classifier.from_timm(stored, head_mode="slice", class_names=["snail", "owl", "drum"])
    assert named.head_hash() == sliced.head_hash() != whole.head_hash()
    assert named.class_names == sliced.class_names


def test_slice_of_a_folded_head_keeps_the_batch_norm() -> None:
    net = Net(batch_norm_head())
    classifier = Classifier(net, "head", tag="net")
    expected = logits_of(classifier, images())[:, [4, 1]]
    classifier._slice_head([4, 1])
    torch.testing.assert_close(logits_of(classifier, images()), expected)
    assert classifier.weight.shape == (2, WIDTH)


def test_new_is_fresh_rows_on_the_same_features(stored: str) -> None:
    torch.manual_seed(1)
    fresh = Classifier.from_timm(stored, head_mode="new", num_classes=4, class_names=list("abcd"))
    whole = Classifier.from_timm(stored)
    assert fresh.weight.shape == (4, 96)
    assert fresh.class_names == ("a", "b", "c", "d")
    assert not torch.isclose(fresh.weight[0], whole.weight[0]).any()
    with torch.no_grad():
        assert torch.equal(fresh.features(images()), whole.features(images()))


def test_label_names_follow_the_rows_of_the_head(tmp_path: Path, stored: str) -> None:
    """As many rows as before in another order, or as many new ones: the old names would be wrong."""
    Classifier.from_timm(stored, head_mode="slice", class_indices=[6, 5, 4, 3, 2, 1, 0]).save(tmp_path / "turned")
    again = Classifier.from_timm(f"local-dir:{tmp_path}/turned", head_mode="slice", class_names=["owl"])
    assert torch.equal(again.weight, Classifier.from_timm(stored).weight[:1])
    Classifier.from_timm(stored, head_mode="new", num_classes=7).save(tmp_path / "new")
    with pytest.raises(ValueError, match="no label names are stored"):
        Classifier.from_timm(f"local-dir:{tmp_path}/new", head_mode="slice", class_names=["owl"])
    Classifier.from_timm(stored).save(tmp_path / "kept")
    kept = Classifier.from_timm(f"local-dir:{tmp_path}/kept", head_mode="slice", class_names=["tractor"])
    assert torch.equal(kept.weight, Classifier.from_timm(stored).weight[6:])


def test_label_names_with_gaps() -> None:
    assert _label_names({"label_names": {"3": "owl", "10": "drum"}}) == {3: "owl", 10: "drum"}
    assert _label_names({"label_names": ["owl", "drum"]}) == {0: "owl", 1: "drum"}
    assert _label_names({"label_names": None}) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"head_mode": "slices"}, '"keep", "slice" or "new", got \'slices\''),
        ({"head_mode": "new"}, "needs num_classes"),
        ({"head_mode": "slice"}, "needs class_indices or class_names"),
        ({"head_mode": "slice", "class_indices": [0], "num_classes": 1}, "not num_classes"),
        ({"head_mode": "slice", "class_indices": [0], "class_names": ["a", "b"]}, "2 class_names for 1 rows"),
        ({"head_mode": "new", "num_classes": 3, "class_names": ["a", "b"]}, "2 class_names for 3 rows"),
        ({"class_indices": [0]}, "class_indices go with head_mode=\"slice\", not 'keep'"),
        ({"head_mode": "new", "class_indices": [0]}, r"needs num_classes.*class_indices go with"),  # both at once
        ({"head_mode": "slice", "class_indices": [0, 7]}, r"0\.\.6 of the head of test_resnet.r160_in1k, got 2 with \[7\]"),
        ({"head_mode": "slice", "class_indices": [-1]}, r"0\.\.6.*\[-1\]"),
        ({"head_mode": "slice", "class_indices": []}, r"0\.\.6.*got 0"),
        ({"head_mode": "slice", "class_indices": [2, 3, 2]}, r"different rows.*\[2\] repeated"),
        ({"head_mode": "slice", "class_names": ["owl", "cup"]}, r"no head row for cup \(1 of 2 classes; its label names are owl, apple"),
        ({"num_classes": 5}, r"trained with 7 classes.*head of 5 cannot be kept"),
    ],
)
def test_wrong_arguments(stored: str, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Classifier.from_timm(stored, **arguments)  # type: ignore[arg-type]


def test_a_name_of_two_rows_is_ambiguous(tmp_path: Path) -> None:
    stored = write_model(tmp_path / "model", classes=3, labels=["crane", "owl", "crane"])
    with pytest.raises(ValueError, match=r"several head rows of the same name: crane \(rows \[0, 2\]\)"):
        Classifier.from_timm(stored, head_mode="slice", class_names=["owl", "crane"])


def test_it_comes_in_eval_mode(stored: str) -> None:
    """A first look at the features must not move the batch norms; timm's own models come in train mode (the control)."""
    assert timm.create_model("test_resnet").training
    for classifier in (Classifier.from_timm(stored), Classifier.from_module(Net(nn.Linear(WIDTH, CLASSES)), head="head")):
        before = {name: value.clone() for name, value in classifier.state_dict().items()}
        with torch.no_grad():
            assert torch.equal(classifier.features(images()), classifier.features(images()))
        assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050", "test_vit", "test_convnext"])
def test_one_dropout_mask_for_features_and_logits(name: str) -> None:
    torch.manual_seed(0)
    classifier = Classifier.from_timm(name, pretrained=False, num_classes=5, image_size=32, drop_rate=0.5)
    shake(classifier.model)
    classifier.train()
    x = images(4)
    features, logits = classifier.features_and_logits(x)
    torch.testing.assert_close(classifier.logits(features), logits)
    torch.testing.assert_close(features @ classifier.weight.T + classifier.bias, logits)
    other, _ = classifier.features_and_logits(x)
    dropped = (features == 0) & (other != 0)
    assert 0.15 < dropped.float().mean() < 0.35  # the control: dropout is on, and the second pass draws another mask
    assert not torch.equal(classifier.features_and_logits(x)[1], logits)


def test_gradients_reach_features_and_every_layer() -> None:
    classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=5).train()
    features, logits = classifier.features_and_logits(images())
    assert len(torch.autograd.grad(logits.sum(), features, retain_graph=True)[0].unique()) > 1
    (features.square().mean() + classifier.weight.square().mean() + logits.mean()).backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())
    assert not classifier.head._forward_hooks


def picture(width: int = 90, height: int = 70) -> Image.Image:
    """Brighter to the right, so that its mirror image is another."""
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.repeat(np.tile(ramp, (height, 1))[..., None], 3, axis=2))


def test_the_transform_is_the_models_own_at_the_size_asked_for(stored: str) -> None:
    for size, classifier in ((32, Classifier.from_timm(stored)), (48, Classifier.from_timm(stored, image_size=48))):
        flat = classifier.transform(Image.new("RGB", (90, 70), (255, 0, 51)))
        assert flat.shape == (3, size, size)
        config = classifier.preprocessing
        expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(config["mean"])) / torch.tensor(config["std"])
        torch.testing.assert_close(flat, expected[:, None, None].expand_as(flat))
        assert config["input_size"] == [3, size, size]
        assert json.loads(json.dumps(config)) == config


def test_augmentations(stored: str) -> None:
    classifier = Classifier.from_timm(stored)
    plain = classifier.transform(picture())
    torch.manual_seed(0)
    assert torch.equal(classifier.train_transform("none")(picture()), plain)
    flips = [classifier.train_transform("flip")(picture()) for _ in range(20)]
    mirrored = [not torch.equal(flip, plain) for flip in flips]
    assert all(torch.allclose(flip, plain.flip(-1), atol=1e-5) for flip, mirror in zip(flips, mirrored, strict=True) if mirror)
    assert 4 <= sum(mirrored) <= 16
    timms = [classifier.train_transform("timm")(picture()) for _ in range(4)]
    assert all(drawn.shape == plain.shape and not torch.equal(drawn, plain) for drawn in timms)
    assert not torch.equal(timms[0], timms[1])


def test_a_plain_module_has_the_transform_it_is_given() -> None:
    net = Net(nn.Linear(WIDTH, CLASSES))
    bare = Classifier.from_module(net, head="head")
    with pytest.raises(ValueError, match="Net was made from a plain module without a transform; pass transform="):
        bare.transform  # noqa: B018
    with pytest.raises(ValueError, match="needs a timm model"):
        bare.train_transform("timm")
    classifier = Classifier.from_module(net, head="head", transform=lambda image: torch.ones(3, 8, 8), tag="mine")
    assert classifier.tag == "mine"
    assert torch.equal(classifier.train_transform("none")(picture()), torch.ones(3, 8, 8))
    assert torch.equal(classifier.train_transform("flip")(picture()), torch.ones(3, 8, 8))
    assert json.loads(json.dumps(classifier.preprocessing)) == classifier.preprocessing


def test_a_fixed_size_vision_transformer_is_rebuilt_for_another_size(tmp_path: Path) -> None:
    stored = write_model(tmp_path / "vit", "vit_tiny_patch16_224", size=64)
    whole, small = Classifier.from_timm(stored), Classifier.from_timm(stored, image_size=32)
    assert whole.model.pos_embed.shape[1] == 4 * 4 + 1
    assert small.model.pos_embed.shape[1] == 2 * 2 + 1
    assert small.head_hash() == whole.head_hash()
    assert torch.equal(small.model.blocks[0].attn.qkv.weight, whole.model.blocks[0].attn.qkv.weight)
    assert small.features(small.transform(picture())[None]).shape == (1, 192)
    with pytest.raises(AssertionError, match="doesn't match model"):
        whole(images(size=32))
    with pytest.raises(AssertionError, match="doesn't match model"):
        small(images(size=64))


def test_head_hash_is_of_the_weight_alone(stored: str) -> None:
    classifier, other = Classifier.from_timm(stored), Classifier.from_timm(stored)
    with torch.no_grad():
        other.bias.add_(1)
    assert other.to(memory_format=torch.channels_last).head_hash() == classifier.head_hash()
    with torch.no_grad():
        other.weight[0, 0] += 1e-3
    assert other.head_hash() != classifier.head_hash()
