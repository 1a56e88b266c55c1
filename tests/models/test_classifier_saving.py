"""A saved classifier is a plain timm folder with bit-identical logits, and a failed save leaves the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from singreg.models.classifier import Classifier
from tests.models.fakes import CLASSES, WIDTH, Net, images, shake


def used(name: str, size: int, **arguments: Any) -> Classifier:
    """A classifier with weights and statistics far from their initial values."""
    torch.manual_seed(0)
    classifier = Classifier.from_timm(name, image_size=size, **{"pretrained": False, **arguments})
    shake(classifier.model)
    return classifier


def check_reload(classifier: Classifier, folder: Path, size: int, *, channels_last: bool = False) -> nn.Module:
    """timm.create_model of the folder, after checking that nothing differs from the classifier in use."""
    torch.manual_seed(1)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    state = classifier.model.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    x = images(size=size)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(model(x), classifier(x))
    again = Classifier.from_timm(f"local-dir:{folder}")
    assert again.preprocessing == classifier.preprocessing
    assert again.head_hash() == classifier.head_hash()
    assert resolve_model_data_config(model)["input_size"] == (3, size, size)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    return model


FAMILIES = ["test_resnet", "test_efficientnet", "test_vit", "vit_tiny_patch16_224", "resnetv2_18", "coat_tiny", "inception_next_atto"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [32, 64])
def test_reloads_with_plain_timm(tmp_path: Path, name: str, size: int) -> None:
    """coat_tiny ties modules, which safetensors refuses; vit_tiny must be rebuilt at the other size."""
    classifier = used(name, size, num_classes=7)
    classifier.save(tmp_path / "model")
    check_reload(classifier, tmp_path / "model", size)


@pytest.mark.parametrize("name", ["test_resnet", "resnetv2_18"])
def test_channels_last_is_saved_and_stays(tmp_path: Path, name: str) -> None:
    classifier = used(name, 32, num_classes=7).to(memory_format=torch.channels_last)
    layers = [m.weight for m in classifier.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    classifier.save(tmp_path / "model")
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in layers)
    assert not any(weight.is_contiguous() for weight in layers if weight.shape[1] > 1)
    assert "state_dict" not in vars(classifier.model)
    check_reload(classifier, tmp_path / "model", 32, channels_last=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnetv2_18"])
def test_sliced_and_new_heads_are_saved_with_their_names(tmp_path: Path, name: str) -> None:
    used(name, 32, num_classes=7).save(tmp_path / "whole")
    whole = f"local-dir:{tmp_path / 'whole'}"
    heads = {
        "slice": {"class_indices": [5, 0, 3], "class_names": ["snail", "owl", "drum"]},
        "new": {"num_classes": 4, "class_names": ["a", "b", "c", "d"]},
    }
    for mode, arguments in heads.items():
        classifier = Classifier.from_timm(whole, head_mode=mode, **arguments)  # type: ignore[arg-type]
        shake(classifier.model, seed=2)
        folder = tmp_path / "runs" / mode / "model"
        classifier.save(folder)
        model = check_reload(classifier, folder, 32)
        assert model.num_classes == classifier.num_classes == len(classifier.class_names or ())
        assert list(model.pretrained_cfg["label_names"]) == arguments["class_names"]


def test_saving_again_replaces_and_a_second_generation_is_the_same(tmp_path: Path) -> None:
    folder, first = tmp_path / "model", used("test_resnet", 32, num_classes=7)
    first.save(folder)
    second = Classifier.from_timm(f"local-dir:{folder}")
    shake(second.model, seed=3)
    second.save(str(folder))
    check_reload(second, folder, 32)
    Classifier.from_timm(f"local-dir:{folder}").save(folder)
    check_reload(second, folder, 32)
    assert first.head_hash() != second.head_hash()


def break_writing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    real = timm.models.save_for_hf

    def half(model: nn.Module, folder: str, **arguments: Any) -> None:
        real(model, folder, **arguments)
        next(Path(folder).glob("*.safetensors")).write_bytes(b"half")
        raise error

    monkeypatch.setattr(timm.models, "save_for_hf", half)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_old_folder_stays_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder, first = tmp_path / "model", used("test_resnet", 32, num_classes=7)
    first.save(folder)
    second = used("test_resnet", 32, num_classes=5)
    with monkeypatch.context() as patch:
        break_writing(patch, error)
        with pytest.raises(type(error)):
            second.save(folder)
        with pytest.raises(type(error)):
            second.save(tmp_path / "other")
    check_reload(first, folder, 32)
    second.save(folder)
    check_reload(second, folder, 32)


def test_a_run_killed_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first = tmp_path / "model", used("test_resnet", 32, num_classes=7)
    first.save(folder)
    folder.rename(tmp_path / ".model-old")
    (tmp_path / ".model-writing").mkdir()
    break_writing(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        used("test_resnet", 32, num_classes=5).save(folder)
    monkeypatch.undo()
    check_reload(first, folder, 32)


def test_a_plain_module_says_how_to_save_it(tmp_path: Path) -> None:
    classifier = Classifier.from_module(Net(nn.Linear(WIDTH, CLASSES)), head="head")
    with pytest.raises(ValueError, match=r"Net is not a timm model; save `classifier\.model\.state_dict\(\)` with safetensors"):
        classifier.save(tmp_path / "model")
    assert not any(tmp_path.iterdir())
