"""Which rows of a head are the data's classes, and what is found out before any image is embedded."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch

from singreg.classes import ClassSubset, NoRows, head_rows, subset_of
from singreg.config import DataConfig, FinetuneConfig, ModelConfig, overridden
from singreg.data.datasets import class_folders, load_splits
from singreg.data.splits import ImageSplit, Splits
from singreg.models.classifier import Classifier
from singreg.setup import build_classifier, fit_batch, labels_for_head, try_one_batch

NAMES, INDICES = ("goldfish", "Persian cat", "lion"), (1, 283, 291)
WNIDS = ("n01443537", "n02123394", "n02129165")


def splits_of(names: tuple[str, ...], keys: tuple[str, ...] | None = None) -> Splits:
    split = ImageSplit("test", names, np.arange(len(names)), np.zeros((len(names), 32), np.uint8))
    return Splits(split, split, split, split, names, subset_of(keys or names))


def splits(*order: int) -> Splits:
    return splits_of(tuple(NAMES[place] for place in order))


def many(count: int) -> Splits:
    return splits_of(tuple(f"class {n}" for n in range(count)))


def stored(name: str, folder: Path, **options: Any) -> str:
    timm.models.save_for_hf(timm.create_model(name, **options), str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture
def finetuned(tmp_path: Path) -> tuple[str, torch.Tensor]:
    """A folder as a run writes it: three rows, sliced from a head of a thousand, with their names."""
    classifier = Classifier.from_timm("test_efficientnet", pretrained=False, head_mode="slice", class_names=NAMES)
    classifier.save(tmp_path / "model")
    return f"local-dir:{tmp_path / 'model'}", classifier.weight.detach().clone()


@pytest.fixture
def nameless(tmp_path: Path) -> str:
    """Somebody's own checkpoint: three rows, and nothing that says of what."""
    return stored("test_efficientnet", tmp_path / "own", num_classes=3)


@pytest.mark.parametrize(
    ("keys", "labels", "rows"),
    [
        (("Circle", "RED_Ring"), ("red-ring", "circle"), [1, 0]),
        (("e\u0301t\u00e9", "b"), ("b", "\u00e9t\u00e9", "c"), [1, 0]),
        (WNIDS, NAMES[::-1], [2, 1, 0]),
        (NAMES, WNIDS[::-1], [2, 1, 0]),
        (("Carassius auratus", "king_of_beasts"), ("lion, king of beasts, Panthera leo", "goldfish"), [1, 0]),
        (WNIDS[:2], ("", *["x"] * 5, "goldfish", "Persian_cat"), [6, 7]),
    ],
)
def test_stored_names_say_the_rows_in_any_spelling(keys: Any, labels: Any, rows: list[int]) -> None:
    assert head_rows(subset_of(keys), dict(enumerate(labels)), len(labels)) == rows


def test_rows_without_names_are_imagenets_or_timms_numbers(tmp_path: Path) -> None:
    assert head_rows(subset_of(WNIDS), {}, 1000) == list(INDICES)
    keys = tuple(sorted(str(n) for n in range(1, 13)))
    for name in keys:
        (tmp_path / "train" / name).mkdir(parents=True)
    order = class_folders(tmp_path / "train")
    assert head_rows(ClassSubset(keys, keys, None, order), {}, 12) == [int(key) - 1 for key in keys]
    two = ClassSubset(("10", "9"), ("ten", "nine"), None, order)
    assert head_rows(two, {}, 12) == [9, 8]
    assert head_rows(ClassSubset(("9", "10"), ("nine", "ten"), None, order), {}, 2) == [0, 1]
    with pytest.raises(ValueError, match="in the listed order or the folders'"):
        head_rows(two, {}, 2)


@pytest.mark.parametrize(
    ("labels", "count", "error", "words"),
    [
        ((), 7, NoRows, "has 7 rows without names, the data 3 classes"),
        (("a", "b", "c"), 3, NoRows, r"no row for goldfish, Persian cat, lion .3 of 3.*rows are a, b, c"),
        (("goldfish", "b", "lion"), 3, ValueError, "no row for Persian cat .1 of 3"),
        (("goldfish", *NAMES), 4, ValueError, r"several rows or classes of one name: goldfish \(\[0, 1\]\)"),
        (("a", *NAMES), 3, ValueError, "names for 4 rows of a head that has 3"),
    ],
)
def test_what_is_not_sure_is_refused(labels: Any, count: int, error: type[Exception], words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}.*model.label_names: FILE") as refused:
        head_rows(subset_of(NAMES), dict(enumerate(labels)), count)
    assert type(refused.value) is error


def test_a_folder_is_sliced_by_the_names_it_keeps(finetuned: tuple[str, torch.Tensor]) -> None:
    name, weight = finetuned
    assert torch.equal(build_classifier(ModelConfig(name=name), splits(0, 1, 2)).weight, weight)
    turned = build_classifier(ModelConfig(name=name), splits_of(("King", "my fish"), WNIDS[::-2]))
    assert torch.equal(turned.weight, weight[[2, 0]])
    assert turned.class_names == ("King", "my fish")


def test_a_thousand_rows_are_sliced_by_imagenets_places() -> None:
    torch.manual_seed(0)
    sliced = build_classifier(ModelConfig(name="test_efficientnet", pretrained=False), splits(1, 0))
    torch.manual_seed(0)
    whole = Classifier.from_timm("test_efficientnet", pretrained=False)
    assert torch.equal(sliced.weight, whole.weight[[283, 1]])


def test_labels_become_rows_of_a_kept_head(finetuned: tuple[str, torch.Tensor]) -> None:
    model = ModelConfig(name=finetuned[0], head="keep")
    kept = build_classifier(model, splits(0, 1, 2))
    same, turned, fewer = (labels_for_head(splits(*order), kept, model) for order in ((0, 1, 2), (1, 0, 2), (2,)))
    assert same.train.labels.tolist() == [0, 1, 2]
    assert (turned.class_names, turned.test.labels.tolist()) == (NAMES, [1, 0, 2])
    assert (fewer.class_names, fewer.test.labels.tolist()) == (NAMES, [2])
    with pytest.raises(NoRows):
        labels_for_head(many(2), kept, model)
    whole = ModelConfig(name="test_efficientnet", pretrained=False, head="keep")
    among = labels_for_head(splits(1, 0), build_classifier(whole, splits(1, 0), allow_empty=True), whole)
    assert (len(among.class_names), among.class_names[283]) == (1000, "Persian cat")
    assert among.test.labels.tolist() == [283, 1]


def test_a_file_names_the_rows(nameless: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConfig(name=nameless, label_names=str(tmp_path / "rows.txt"))
    (tmp_path / "rows.txt").write_text("lion\ngoldfish\nn02123394\n")
    weight = Classifier.from_timm(nameless).weight
    assert torch.equal(build_classifier(model, splits(0, 1)).weight, weight[[1, 2]])
    assert "no names are stored" not in caplog.text
    (tmp_path / "rows.txt").write_text("lion\n")
    with pytest.raises(ValueError, match="has 1 lines, the head 3 rows"):
        build_classifier(model, splits(0, 1))
    build_classifier(ModelConfig(name=nameless), splits(0, 1, 2))
    assert "no names are stored of the head's 3 rows" in caplog.text


def test_auto_trains_a_new_head_where_no_row_is_known(nameless: str, caplog: pytest.LogCaptureFixture) -> None:
    assert build_classifier(ModelConfig(name=nameless), many(2), trained=True).num_classes == 2
    assert "model.head: auto takes new" in caplog.text
    for head, trained in (("slice", True), ("auto", False)):
        with pytest.raises(NoRows):
            build_classifier(ModelConfig(name=nameless, head=head), many(2), trained=trained)
    with pytest.raises(ValueError, match="has no row for class 0"):
        build_classifier(ModelConfig(name="demo"), splits_of(("circle", "class 0")))
    for head in ("auto", "new"):
        with pytest.raises(ValueError, match=r"one class \(star\)"):
            build_classifier(ModelConfig(head=head), splits_of(("star",)))


def test_one_batch_is_tried_and_chance_is_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    scenes, model = load_splits(DataConfig(scenes={"train": 4, "audit": 4, "test": 150})), ModelConfig()
    classifier = build_classifier(model, scenes)
    assert "top-1 before training" in try_one_batch(scenes, classifier, model)
    assert "are the head's rows those classes" not in caplog.text
    classifier.slice_head([1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    try_one_batch(scenes, classifier, model)
    assert "are the head's rows those classes" in caplog.text
    grey = ModelConfig(name=stored("test_resnet", tmp_path / "grey", num_classes=10, in_chans=1))
    for model, size in ((grey, None), (ModelConfig(name="test_vit", pretrained=False, head="new"), 100)):
        with pytest.raises(ValueError, match=r"cannot take images \(3, .*data\.image_size"):
            try_one_batch(scenes, build_classifier(model, scenes, image_size=size), model)


def test_a_batch_larger_than_the_data_is_lowered(caplog: pytest.LogCaptureFixture) -> None:
    accelerator: Any = SimpleNamespace(gradient_accumulation_steps=2, num_processes=2)
    for images, expected in ((50, 32), (31, 28), (3, 32)):
        config = overridden(FinetuneConfig(), {"training.batch_size": 32})
        fit_batch(config, images, accelerator)
        assert config.training.batch_size == expected
    assert caplog.text.count("training.batch_size is lowered") == 1


def test_a_head_without_a_null_space_is_refused() -> None:
    """test_efficientnet has 256 features: 255 classes leave one direction, 256 none but the softmax's."""
    model = ModelConfig(name="test_efficientnet", pretrained=False, head="new")
    assert build_classifier(model, many(255)).num_classes == 255
    with pytest.raises(ValueError, match="has no null space"):
        build_classifier(model, many(256))
    assert build_classifier(replace(model, invariance="softmax"), many(256)).num_classes == 256
