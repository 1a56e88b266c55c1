"""Which rows of a head are the data's classes: by ImageNet's places, or by the names a fine-tuned folder keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from singreg.data.datasets import ImageSplit, Splits
from singreg.models.classifier import Classifier
from singreg.workbench.build import build_classifier, labels_for_head, model_name
from singreg.workbench.config import ModelConfig

NAMES, INDICES = ("goldfish", "Persian cat", "lion"), (1, 283, 291)


def parts(order: tuple[int, ...]) -> Splits:
    names = tuple(NAMES[place] for place in order)
    part = ImageSplit("test", names, np.zeros(1), np.zeros((1, 32), np.uint8))
    return Splits(part, part, part, part, names, tuple(INDICES[place] for place in order))


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


@pytest.fixture
def nameless(tmp_path: Path) -> str:
    """Somebody's own checkpoint: three rows, and nothing that says of what."""
    timm.models.save_for_hf(timm.create_model("test_efficientnet", num_classes=3), str(tmp_path / "own"), safe_serialization=True)
    return f"local-dir:{tmp_path / 'own'}"


def test_imagenets_rows_are_not_taken_from_a_small_head_without_names(nameless: str) -> None:
    """Rows 0 and 1 exist in a head of three, so that only its size tells that they are not the tench and the goldfish."""
    part = ImageSplit("test", ("tench", "goldfish"), np.zeros(1), np.zeros((1, 32), np.uint8))
    first_two = Splits(part, part, part, part, ("tench", "goldfish"), (0, 1))
    for wanted in (first_two, parts((0, 1, 2))):
        with pytest.raises(ValueError, match=r"has 3 rows and no class names, so ImageNet rows .*model.head: keep .*label_names"):
            build_classifier(ModelConfig(name=nameless), wanted)


def test_other_names_than_the_datas_are_shown_when_imagenets_rows_are_asked_of_them(finetuned: tuple[str, torch.Tensor]) -> None:
    other = parts((0, 1, 2))
    other = Splits(other.train, other.bank, other.audit, other.test, ("goldfish", "tench"), (1, 0))
    with pytest.raises(ValueError, match=r"has 3 rows and other class names \(goldfish, Persian cat, lion, \.\.\.\)"):
        build_classifier(ModelConfig(name=finetuned[0]), other)


def test_a_kept_head_without_names_is_trusted_with_a_warning(
    nameless: str, finetuned: tuple[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    kept = ModelConfig(name=finetuned[0], head="keep")
    labels_for_head(parts((0, 1, 2)), build_classifier(kept, parts((0, 1, 2))), kept)
    assert not caplog.records, "the control: a head with names"
    own = ModelConfig(name=nameless, head="keep")
    labels_for_head(parts((0, 1, 2)), build_classifier(own, parts((0, 1, 2))), own)
    assert "its 3 rows are taken in the data's order (goldfish, Persian cat, lion, ...)" in caplog.text


def many(count: int) -> Splits:
    names = tuple(f"class {n}" for n in range(count))
    part = ImageSplit("test", names, np.zeros(1), np.zeros((1, 32), np.uint8))
    return Splits(part, part, part, part, names, None)


def test_a_head_without_a_null_space_is_refused_before_any_work() -> None:
    """test_efficientnet has 256 features: 255 classes leave one direction, 256 none."""
    model = ModelConfig(name="test_efficientnet", pretrained=False, head="new")
    assert build_classifier(model, many(255)).num_classes == 255
    with pytest.raises(ValueError, match=r"256 classes, 256 features\) has full rank 256: it has no null space"):
        build_classifier(model, many(256))
    # Softmax does not see a common shift of all logits, so one direction is left there.
    softmax = ModelConfig(name="test_efficientnet", pretrained=False, head="new", invariance="softmax")
    assert build_classifier(softmax, many(256)).num_classes == 256


def test_a_head_whose_rows_are_not_known_cannot_be_kept_or_sliced(finetuned: tuple[str, torch.Tensor]) -> None:
    kept = ModelConfig(name=finetuned[0], head="keep")
    with pytest.raises(ValueError, match=r"model.head: keep needs to know what the 3 rows .*neither the data's 2 classes nor ImageNet"):
        labels_for_head(parts((0, 1)), build_classifier(kept, parts((0, 1))), kept)
    with pytest.raises(ValueError, match=r"these 2 classes are not all ImageNet-1k's \(class 0, class 1, ...\).*model.head: new"):
        labels_for_head(many(2), build_classifier(kept, many(2)), kept)
    with pytest.raises(ValueError, match=r"no head row for class 0, class 1, class 2"):
        build_classifier(ModelConfig(name="test_efficientnet", pretrained=False, head="slice"), many(3))


def test_names_of_the_packaged_models() -> None:
    assert Path(model_name("demo", "vlm").removeprefix("local-dir:")).is_dir()
    assert Path(model_name("demo", "classifier").removeprefix("local-dir:")).is_dir()
    assert model_name("resnet50.tv_in1k", "classifier") == "resnet50.tv_in1k"


def test_gradient_checkpointing_changes_no_gradient_and_is_refused_where_it_cannot_be() -> None:
    plain, checkpointed = (
        build_classifier(ModelConfig(name="test_vit", pretrained=False, head="new", gradient_checkpointing=on), parts((0, 1, 2)))
        for on in (False, True)
    )
    checkpointed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    saved: dict[Classifier, int] = {}
    for classifier in (plain, checkpointed):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            features, logits = classifier.train().features_and_logits(images)
        saved[classifier] = sum(kept)
        (features.square().sum() + logits.square().sum()).backward()
    assert saved[checkpointed] < 0.7 * saved[plain]
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    with pytest.raises(ValueError, match=r"timm's coat_lite_tiny cannot \(gradient checkpointing not supported"):
        build_classifier(ModelConfig(name="coat_lite_tiny", pretrained=False, head="new", gradient_checkpointing=True), parts((0, 1, 2)))
    with pytest.raises(ValueError, match="batch-norm statistics twice"):
        build_classifier(
            ModelConfig(name="test_efficientnet", pretrained=False, head="new", gradient_checkpointing=True, batch_norm="train"),
            parts((0, 1, 2)),
        )
