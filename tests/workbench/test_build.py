"""Which rows of a head are the data's classes: by ImageNet's places, or by the names a fine-tuned folder keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from singreg.data.parts import ImagePart, Parts
from singreg.models.classifier import Classifier
from singreg.workbench.build import build_classifier, labels_for_head
from singreg.workbench.config import ModelConfig

NAMES, INDICES = ("goldfish", "Persian cat", "lion"), (1, 283, 291)


def parts(order: tuple[int, ...]) -> Parts:
    names = tuple(NAMES[place] for place in order)
    part = ImagePart("test", names, np.zeros(1), np.zeros((1, 32), np.uint8))
    return Parts(part, part, part, part, names, tuple(INDICES[place] for place in order))


@pytest.fixture
def finetuned(tmp_path: Path) -> tuple[str, torch.Tensor]:
    """A folder as a fine-tuning run writes it: three rows, sliced from a head of a thousand, with their names."""
    classifier = Classifier.from_timm(
        "test_efficientnet", pretrained=False, head_mode="slice", class_indices=INDICES, class_names=NAMES
    )
    classifier.save(tmp_path / "model")
    return f"local-dir:{tmp_path / 'model'}", classifier.weight.detach().clone()


def test_a_fine_tuned_folder_is_sliced_by_the_names_it_keeps(finetuned: tuple[str, torch.Tensor]) -> None:
    name, weight = finetuned
    same = build_classifier(ModelConfig(name=name), parts((0, 1, 2)))
    assert torch.equal(same.weight, weight)
    turned = build_classifier(ModelConfig(name=name), parts((2, 0)))
    assert torch.equal(turned.weight, weight[[2, 0]])
    assert turned.class_names == ("lion", "goldfish")


def test_a_thousand_rows_are_sliced_by_imagenets_places() -> None:
    model = ModelConfig(name="test_efficientnet", pretrained=False)
    torch.manual_seed(0)
    sliced = build_classifier(model, parts((1, 0)))
    torch.manual_seed(0)
    whole = Classifier.from_timm("test_efficientnet", pretrained=False)
    assert torch.equal(sliced.weight, whole.weight[[283, 1]])


def test_a_kept_head_in_another_order_is_refused(finetuned: tuple[str, torch.Tensor]) -> None:
    name, _ = finetuned
    model = ModelConfig(name=name, head="keep")
    kept = build_classifier(model, parts((0, 1, 2)))
    assert labels_for_head(parts((0, 1, 2)), kept, model).class_names == NAMES
    with pytest.raises(ValueError, match=r"another order \(goldfish, Persian cat, lion, \.\.\.\).*slice"):
        labels_for_head(parts((1, 0, 2)), kept, model)
