"""Features, then logits, are the model's logits: over timm's families on small pictures, without any weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest
import timm
import torch

from singreg.models.classifier import Classifier
from singreg.models.heads import find_head
from tests.models.contract import check_contract, smallest_that_runs
from tests.models.fakes import images
from tests.models.test_heads import PAPER

# architecture: (m, head, side of the pictures); a third of them has num_features other than m (trap 8)
SAMPLE = {
    "test_resnet": (96, "fc", 32),
    "resnet10t": (512, "fc", 32),
    "regnetx_002": (368, "head.fc", 32),
    "test_byobnet": (256, "head.fc", 32),
    "densenet121": (1024, "classifier", 32),
    "ese_vovnet19b_slim_dw": (512, "head.fc", 32),
    "hgnetv2_b0": (2048, "head.fc", 32),
    "legacy_seresnet18": (512, "last_linear", 32),
    "test_nfnet": (192, "head.fc", 32),
    "test_efficientnet": (256, "classifier", 32),
    "mobilenetv3_small_050": (1024, "classifier", 32),
    "mobilenetv3_large_100": (1280, "classifier", 32),
    "ghostnet_050": (1280, "classifier", 32),
    "repghostnet_050": (1280, "classifier", 32),
    "rexnet_100": (1280, "head.fc", 32),
    "starnet_s050": (128, "head", 32),
    "edgenext_xx_small": (168, "head.fc", 32),
    "mobilevit_xxs": (320, "head.fc", 32),
    "fastvit_t8": (768, "head.fc", 32),
    "test_convnext": (64, "head.fc", 32),
    "test_mambaout": (256, "head.fc", 32),
    "inception_next_atto": (960, "head.fc2", 32),  # an MLP head
    "caformer_s18": (2048, "head.fc.fc2", 32),  # an MLP head with a norm inside
    "efficientvit_b0": (1280, "head.classifier.4", 32),  # the last of a Sequential
    "efficientvit_m0": (192, "head.linear", 32),  # batch norm + linear
    "levit_256d": (512, "head.linear", 32),
    "shvit_s1": (320, "head.l", 32),
    "resnetv2_18": (512, "head.fc", 32),  # 1x1 convolutions
    "dla46x_c": (256, "fc", 32),
    "dpn48b": (832, "classifier", 32),
    "test_vit": (64, "head", 32),
    "deit_tiny_patch16_224": (192, "head", 32),
    "deit3_small_patch16_224": (384, "head", 32),
    "eva02_tiny_patch14_336": (192, "head", 28),
    "test_vit_relpos": (96, "head", 32),
    "test_coatnet": (128, "head.fc", 32),
    "swin_tiny_patch4_window7_224": (768, "head.fc", 32),
    "cait_xxs24_224": (192, "head", 32),
    "xcit_nano_12_p8_224": (128, "head", 32),
    "pit_ti_224": (256, "head", 32),
    "coat_tiny": (152, "head", 32),
    "gmlp_ti16_224": (128, "head", 32),
    "pvt_v2_b0": (256, "head", 32),
}
SMALL = re.compile("test_|tiny|nano|atto|femto|pico|xxs|xx_small|_s0|_b0|_m0|_ti|_t0|_t8|_small|_050|slim|18|_002")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_familys_small_member(name: str) -> None:
    width, head, size = SAMPLE[name]
    torch.manual_seed(0)
    classifier = Classifier.from_timm(name, pretrained=False, num_classes=7, image_size=size)
    assert (classifier.feature_dim, classifier.num_classes, classifier.head_name) == (width, 7, head)
    check_contract(classifier, images(2, size))


def test_vgg_with_a_narrow_hidden_layer() -> None:
    classifier = Classifier.from_timm("vgg11", pretrained=False, num_classes=7, mlp_ratio=0.02)
    assert (classifier.feature_dim, classifier.head_name) == (4096, "head.fc")
    check_contract(classifier, images(2, 32))


def test_the_feature_is_what_timm_calls_pre_logits() -> None:
    """Another way to the same feature; and the width is head_hidden_size, not num_features (trap 8)."""
    differing = 0
    for name in ("test_resnet", "mobilenetv3_small_050", "resnetv2_18", "test_vit", "test_mambaout", "efficientvit_b0"):
        classifier = Classifier.from_timm(name, pretrained=False, num_classes=7, image_size=32)
        model = classifier.model
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(images(2)), pre_logits=True)
            torch.testing.assert_close(classifier.features(images(2)), expected.flatten(1))
        assert classifier.feature_dim == model.head_hidden_size
        differing += classifier.feature_dim != model.num_features
    assert differing == 3


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_architectures_with_real_tensors(name: str) -> None:
    classifier, x = smallest_that_runs(name, 1000)
    assert classifier.weight.shape == (1000, PAPER[name][0])
    check_contract(classifier, x)


def smallest_members(names: list[str]) -> tuple[dict[tuple[str, str], str], set[str]]:
    """Of some names the smallest model of each class and kind of head, and the errors of those without one head."""
    smallest: dict[tuple[str, str], tuple[int, str]] = {}
    refused = set()
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        try:
            head_name, _ = find_head(model, model.pretrained_cfg.get("classifier"))
        except ValueError as error:
            refused.add(str(error))
            continue
        key = (type(model).__name__, head_name)
        smallest[key] = min(smallest.get(key, (1 << 60, "")), (sum(p.numel() for p in model.parameters()), name))
    return {key: name for key, (size, name) in smallest.items() if size < 100e6}, refused


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_every_module_of_timm() -> None:
    """Of each of timm's model files the smallest members; what cannot be used says so, and why, by one of the known errors."""
    modules = sorted(timm.list_modules())
    covered, covered_modules, refusals = [], set(), set()
    for module in modules:
        names = sorted(timm.list_models(module=module), key=lambda name: (not SMALL.search(name), name))[:6]
        members, refused = smallest_members(names)
        refusals |= refused
        for name in members.values():
            classifier, x = smallest_that_runs(name)
            try:
                check_contract(classifier, x)
            except ValueError as error:
                refusals.add(f"{name}: {error}")
            else:
                model = classifier.model
                # timm's own figure, except for the families whose head_hidden_size leaves out the MLP in their head
                assert classifier.feature_dim == model.head_hidden_size or isinstance(model, timm.models.MetaFormer), name
                covered.append(name)
                covered_modules.add(module)
    assert len(modules) >= 95
    assert len(covered_modules) >= 83, set(modules) - covered_modules
    assert len(covered) >= 84
    known = re.compile(r"heads \(|holds no linear layer|names no classifier|has no module|is not that of its head|several tokens")
    assert [text for text in refusals if not known.search(text)] == []
