"""Which rows of a head are the data's classes: by ImageNet's places, or by the names that a folder keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from singreg.config import ModelConfig
from singreg.data.datasets import ImageSplit, Splits
from singreg.models.classifier import Classifier
from singreg.setup import build_classifier, labels_for_head

NAMES, INDICES = ("goldfish", "Persian cat", "lion"), (1, 283, 291)


def splits_of(names: tuple[str, ...], indices: tuple[int, ...] | None) -> Splits:
    split = ImageSplit("test", names, np.zeros(1), np.zeros((1, 32), np.uint8))
    return Splits(split, split, split, split, names, indices)


def splits(*order: int) -> Splits:
    return splits_of(tuple(NAMES[place] for place in order), tuple(INDICES[place] for place in order))


def many(count: int) -> Splits:
    return splits_of(tuple(f"class {n}" for n in range(count)), None)


@pytest.fixture
def finetuned(tmp_path: Path) -> tuple[str, torch.Tensor]:
    """A folder as a run writes it: three rows, sliced from a head of a thousand, with their names."""
    classifier = Classifier.from_timm(
        "test_efficientnet", pretrained=False, head_mode="slice", class_indices=INDICES, class_names=NAMES
    )
    classifier.save(tmp_path / "model")
    return f"local-dir:{tmp_path / 'model'}", classifier.weight.detach().clone()


@pytest.fixture
def nameless(tmp_path: Path) -> str:
    """Somebody's own checkpoint: three rows, and nothing that says of what."""
    model = timm.create_model("test_efficientnet", num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path / "own"), safe_serialization=True)
    return f"local-dir:{tmp_path / 'own'}"


def test_a_folder_is_sliced_by_the_names_it_keeps(finetuned: tuple[str, torch.Tensor]) -> None:
    name, weight = finetuned
    assert torch.equal(build_classifier(ModelConfig(name=name), splits(0, 1, 2)).weight, weight)
    turned = build_classifier(ModelConfig(name=name), splits(2, 0))
    assert torch.equal(turned.weight, weight[[2, 0]])
    assert turned.class_names == ("lion", "goldfish")


def test_a_thousand_rows_are_sliced_by_imagenets_places() -> None:
    torch.manual_seed(0)
    sliced = build_classifier(ModelConfig(name="test_efficientnet", pretrained=False), splits(1, 0))
    torch.manual_seed(0)
    whole = Classifier.from_timm("test_efficientnet", pretrained=False)
    assert torch.equal(sliced.weight, whole.weight[[283, 1]])


def test_a_kept_head_in_another_order_is_refused(finetuned: tuple[str, torch.Tensor]) -> None:
    model = ModelConfig(name=finetuned[0], head="keep")
    kept = build_classifier(model, splits(0, 1, 2))
    assert labels_for_head(splits(0, 1, 2), kept, model).class_names == NAMES
    with pytest.raises(ValueError, match="in another order"):
        labels_for_head(splits(1, 0, 2), kept, model)
    with pytest.raises(ValueError, match="neither the data's 2 classes nor ImageNet"):
        labels_for_head(splits(0, 1), kept, model)
    with pytest.raises(ValueError, match="not all ImageNet-1k's"):
        labels_for_head(many(2), kept, model)


def test_imagenets_rows_are_not_taken_from_a_small_head(nameless: str) -> None:
    """Rows 0 and 1 exist in a head of three too: only its size tells that they are not the tench and the goldfish."""
    for wanted in (splits_of(("tench", "goldfish"), (0, 1)), splits(0, 1, 2)):
        with pytest.raises(ValueError, match="has 3 rows and no class names"):
            build_classifier(ModelConfig(name=nameless), wanted)
    with pytest.raises(ValueError, match="no head row for class 0"):
        build_classifier(ModelConfig(name="test_efficientnet", pretrained=False), many(3))


def test_a_kept_head_without_names_is_trusted_with_a_warning(
    nameless: str, finetuned: tuple[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    for name, warnings in ((finetuned[0], 0), (nameless, 1)):
        model = ModelConfig(name=name, head="keep")
        labels_for_head(splits(0, 1, 2), build_classifier(model, splits(0, 1, 2)), model)
        assert len(caplog.records) == warnings


def test_a_head_without_a_null_space_is_refused() -> None:
    """test_efficientnet has 256 features: 255 classes leave one direction, 256 none but the softmax's."""
    model = ModelConfig(name="test_efficientnet", pretrained=False, head="new")
    assert build_classifier(model, many(255)).num_classes == 255
    with pytest.raises(ValueError, match="has no null space"):
        build_classifier(model, many(256))
    softmax = ModelConfig(name="test_efficientnet", pretrained=False, head="new", invariance="softmax")
    assert build_classifier(softmax, many(256)).num_classes == 256


def test_gradient_checkpointing_saves_memory_and_changes_nothing() -> None:
    plain, checkpointed = (
        build_classifier(
            ModelConfig(name="test_vit", pretrained=False, head="new", gradient_checkpointing=on), splits(0, 1, 2)
        )
        for on in (False, True)
    )
    checkpointed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    saved: list[int] = []
    for classifier in (plain, checkpointed):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            features, logits = classifier.train().features_and_logits(images)
        saved.append(sum(kept))
        (features.square().sum() + logits.square().sum()).backward()
    assert saved[1] < 0.7 * saved[0]
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    wrong = ModelConfig(name="coat_lite_tiny", pretrained=False, head="new", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient checkpointing not supported"):
        build_classifier(wrong, splits(0, 1, 2))
    wrong = ModelConfig(
        name="test_efficientnet", pretrained=False, head="new", gradient_checkpointing=True, batch_norm="train"
    )
    with pytest.raises(ValueError, match="batch-norm statistics twice"):
        build_classifier(wrong, splits(0, 1, 2))
