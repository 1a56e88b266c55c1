"""Folders to parts: exact counts, disjointness, the same draw every time, and errors that name the files."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from singreg.data import ConcatSplit, DataConfig, FolderSplit, UnreadableImageError, load_splits
from singreg.data.pictures import PictureChecker, open_rgb
from tests.data.pictures_for_tests import (
    check_disjoint,
    config,
    names,
    per_class,
    write_parquet,
    write_picture,
    write_tree,
)


@pytest.mark.parametrize(
    ("changes", "train", "audit", "test"),
    [
        ({}, [5, 4, 3], [4, 3, 2], [4, 3, 2]),
        ({"train_per_class": 2}, [2, 2, 2], [7, 5, 3], [4, 3, 2]),
        ({"audit_per_class": 1, "test_per_class": 2}, [8, 6, 4], [1, 1, 1], [2, 2, 2]),
        ({"train_per_class": 3, "audit_per_class": 2, "test_per_class": 1}, [3, 3, 3], [2, 2, 2], [1, 1, 1]),
        ({"audit_per_class": 0}, [9, 7, 5], [0, 0, 0], [4, 3, 2]),
        ({"classes": ["Persian cat", "goldfish"]}, [3, 4], [2, 3], [2, 3]),
    ],
)
def test_counts_follow_the_rule(
    tree: Path, changes: dict[str, Any], train: list[int], audit: list[int], test: list[int]
) -> None:
    parts = load_splits(config(tree, **changes))
    assert [per_class(parts.train), per_class(parts.audit), per_class(parts.test)] == [train, audit, test]
    assert names(parts.bank) == names(parts.train)
    check_disjoint(parts)


def test_labels_names_and_pictures_belong_together(tree: Path) -> None:
    parts = load_splits(config(tree))
    assert parts.class_names == ("my thing", "goldfish", "Persian cat")
    assert parts.class_indices is None
    for part in (parts.train, parts.audit, parts.test):
        for index in range(len(part)):
            path = Path(part.identifier(index))
            assert ["my_thing", "n01443537", "n02123394"][part.labels[index]] == path.parent.name
            assert np.array_equal(np.asarray(part.image(index)), np.asarray(Image.open(path)))
    subset = load_splits(config(tree, classes=["n02123394", "goldfish"]))
    assert subset.class_indices == (283, 1)
    assert subset.class_names == ("Persian cat", "goldfish")


def test_unlabelled_pictures_go_to_bank_and_auditor(tree: Path) -> None:
    parts = load_splits(config(tree, unlabeled=str(tree.parent / "pool"), unlabeled_to_audit=0.3))
    assert len(parts.train) == 12
    assert len(parts.bank) == 12 + 8
    assert len(parts.audit) == 9 + 3
    assert names(parts.bank)[:12] == names(parts.train)
    assert parts.bank.labels[12:].tolist() == [-1] * 8
    assert (parts.audit.labels == -1).sum() == 3
    check_disjoint(parts)
    fewer = load_splits(config(tree, unlabeled=str(tree.parent / "pool"), unlabeled_count=5, unlabeled_to_audit=1.0))
    assert len(fewer.bank) == 12
    assert len(fewer.audit) == 9 + 5
    with pytest.raises(ValueError, match="11 unlabelled pictures, asked for 12"):
        load_splits(config(tree, unlabeled=str(tree.parent / "pool"), unlabeled_count=12))


def test_the_draw_hangs_on_the_seed_and_on_the_class_alone(tree: Path) -> None:
    first, again, other = (load_splits(config(tree, train_per_class=2, seed=seed)) for seed in (1, 1, 2))
    assert names(first.train) == names(again.train)
    assert first.train.fingerprint == again.train.fingerprint
    assert names(first.train) != names(other.train)
    alone = load_splits(config(tree, train_per_class=2, seed=1, classes=["goldfish"]))
    assert names(alone.train) == [name for name in names(first.train) if "n01443537" in name]


def test_the_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    paths = [write_picture(tmp_path / place / "x.png", seed) for place, seed in (("a", 1), ("b", 1), ("c", 2))]
    parts = [FolderSplit("train", [str(path)], ["x"], [0]) for path in paths]
    assert parts[0].fingerprint == parts[1].fingerprint != parts[2].fingerprint
    relabelled = FolderSplit("train", [str(paths[0])], ["x"], [-1])
    assert relabelled.fingerprint != parts[0].fingerprint
    two = FolderSplit("train", [str(paths[0]), str(paths[2])], ["x"], [0, 0])
    assert two.fingerprint != two.subset([1, 0]).fingerprint
    assert two.subset([1]).fingerprint == parts[2].fingerprint


def test_subset_and_concatenation_keep_rows_together(tree: Path) -> None:
    train = load_splits(config(tree)).train
    both = ConcatSplit("both", [train.subset([3, 1]), train.subset([]), train.subset([7])])
    assert names(both) == [train.identifier(i) for i in (3, 1, 7)]
    assert both.labels.tolist() == train.labels[[3, 1, 7]].tolist()
    assert np.array_equal(np.asarray(both.image(2)), np.asarray(train.image(7)))
    with pytest.raises(ValueError, match="outside part 'train' of 12"):
        train.subset([12])
    with pytest.raises(IndexError, match="part 'both' of 3"):
        both.image(3)


def test_too_few_pictures_names_every_class_and_count(tree: Path) -> None:
    with pytest.raises(ValueError, match="too few pictures") as caught:
        load_splits(config(tree, train_per_class=4, audit_per_class=3, test_per_class=3))
    text = str(caught.value)
    assert "n02123394 has 5 for train 4 + audit 3" in text
    assert "n02123394 has 2 for test 3" in text
    assert "my_thing" not in text
    assert "n01443537" not in text
    with pytest.raises(ValueError, match=r"n02123394 has 5 for train 5 \+ audit \(the rest, at least 1\)"):
        load_splits(config(tree, train_per_class=5))


def test_classes_without_pictures_or_missing_in_a_split(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"train": {"a": 3, "b": 0, "c": 3}, "validation": {"a": 1, "b": 1, "d": 1}})
    with pytest.raises(ValueError, match=r"split 'validation'.*1 of the classes are not among the 3 there: 'c'"):
        load_splits(config(root))
    with pytest.raises(ValueError, match="b has 0 for train"):
        load_splits(config(root, classes=["a", "b"]))
    with pytest.raises(ValueError, match=r"2 of the classes.*'e'.*'f'"):
        load_splits(config(root, classes=["a", "e", "f"]))


def test_missing_folders_and_splits(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no split 'val'.*folders there: train, validation; set data.test_split to one of them"):
        load_splits(config(tree, test_split="val"))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        load_splits(config(tmp_path / "nowhere"))
    write_picture(tmp_path / "train" / "flat.png")
    with pytest.raises(ValueError, match="holds no class folder"):
        load_splits(config(tmp_path))


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_tree(tmp_path / "data", {"train": {"a": 4}, "validation": {"a": 2}})
    outside = write_picture(tmp_path / "elsewhere" / "x.png")
    (root / "train" / "a" / "out.png").symlink_to(outside)
    (root / "train" / "linked").symlink_to(outside.parent)
    (root / "train" / "a" / "sub").symlink_to(outside.parent)
    (root / "train" / "a" / "notes.txt").write_text("no picture")
    (root / "train" / "a" / "._0.png").write_text("left by another system")
    told = rf"1 class folders in {root}/train are links that lead out of {root} or nowhere \(linked\) .* data\.classes"
    with pytest.raises(ValueError, match=told):
        load_splits(config(root, audit_per_class=1))
    (root / "train" / "linked").unlink()
    with pytest.raises(UnreadableImageError, match=r"2 links lead out .* data\.unreadable: skip(?s:.)*/sub(?s:.)*/out\.png"):
        load_splits(config(root, audit_per_class=1))
    with pytest.raises(ValueError, match=r"\(2 links out of the folder not counted\): a has 4 for train 5"):
        load_splits(config(root, train_per_class=5, audit_per_class=1))
    with caplog.at_level(logging.WARNING):
        parts = load_splits(config(root, audit_per_class=1, unreadable="skip"))
    assert len(parts.train) == 3
    assert parts.class_names == ("a",)
    assert "2 links lead out" in caplog.text


def test_links_to_nowhere_and_split_folders_that_lead_out_are_told_and_links_within_are_followed(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "data", {"train": {"a": 4}, "validation": {"a": 2, "c": 2}, "store": {"b": 4}})
    (root / "train" / "c").symlink_to(root / "store" / "b")
    assert per_class(load_splits(config(root)).train) == [2, 2]
    (root / "train" / "lost").symlink_to(tmp_path / "not mounted")
    with pytest.raises(ValueError, match=r"or nowhere \(lost\)"):
        load_splits(config(root))
    (root / "train").rename(tmp_path / "outside")
    (root / "train").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{root}/train leads to {tmp_path}/outside, out of {root}, and is not followed"):
        load_splits(config(root))


def test_checked_pictures_are_remembered_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path / "data", {"train": {"a": 4}, "validation": {"a": 2}})
    settings = config(root, cache_dir=str(tmp_path / "cache"))
    first = load_splits(settings)
    read: list[str] = []
    monkeypatch.setattr("singreg.data.pictures.read_file", lambda path: (read.append(path), Path(path).read_bytes())[1])
    assert load_splits(settings).train.fingerprint == first.train.fingerprint
    assert read == []
    changed = write_picture(Path(first.train.identifier(0)), 4711)
    os.utime(changed, (1, 1))
    assert load_splits(settings).train.fingerprint != first.train.fingerprint
    assert read == [str(changed)]
    next((tmp_path / "cache").iterdir()).write_text("{damaged")
    assert load_splits(settings).test.fingerprint == first.test.fingerprint


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (5, 4), (200, 200, 200)).convert(mode).save(path)
    assert open_rgb(path, "x").mode == "RGB"
    assert open_rgb(path.read_bytes(), "x").size == (5, 4)
    assert not PictureChecker().check_files([str(path)]).bad


def test_parquet_folder_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    for split, count in (("train", 9), ("validation", 5)):
        paths = [write_picture(tmp_path / "raw" / split / f"{i}.png") for i in range(count)]
        kind = datasets.ClassLabel(names=["lion", "goldfish"])
        write_parquet(tmp_path / "set" / f"{split}-00000.parquet", paths, [i % 2 for i in range(count)], kind)
    parts = load_splits(config(tmp_path / "set", classes=["goldfish", "lion"], cache_dir=str(tmp_path / "cache")))
    assert parts.class_names == ("goldfish", "lion")
    assert parts.class_indices == (1, 291)
    assert per_class(parts.train) == [2, 3]
    assert per_class(parts.audit) == [2, 2]
    assert per_class(parts.test) == [2, 3]
    row = int(parts.test.identifier(0).split("#")[1])
    assert row % 2 == 1
    assert np.array_equal(np.asarray(parts.test.image(0)), np.asarray(Image.open(tmp_path / f"raw/validation/{row}.png")))
    check_disjoint(parts)


def test_an_unknown_hub_name_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"'someone/things', split 'train' \(data\.train_split\), is neither .*couldn't reach the hub"):
        load_splits(DataConfig(source="someone/things"))


def test_scenes_need_nothing_and_repeat() -> None:
    settings = DataConfig(scenes_train=30, scenes_audit=20, scenes_test=10, scenes_bank=7, seed=3)
    parts, again = load_splits(settings), load_splits(settings)
    assert [len(part) for part in parts] == [30, 37, 20, 10]
    assert [part.fingerprint for part in parts] == [part.fingerprint for part in again]
    check_disjoint(parts)
    assert parts.train.table.codes["shape"].tolist() == parts.train.labels.tolist()  # type: ignore[attr-defined]
    assert np.array_equal(np.asarray(parts.train.image(4)), np.asarray(again.bank.image(4)))
    assert len({part.identifier(0) for part in (parts.train, parts.audit, parts.test)}) == 3
    assert parts.train.image(0).size == (64, 64)
    assert parts.test.identifier(2).startswith("scene-")
    other = load_splits(dataclasses.replace(settings, seed=4))
    assert other.train.fingerprint != parts.train.fingerprint
    with pytest.raises(ValueError, match="own classes"):
        load_splits(DataConfig(classes="imagenet16"))


def test_a_configuration_is_refused_with_everything_wrong_in_it() -> None:
    with pytest.raises(ValueError, match=r"train_per_class.*got 0; .*workers.*got -1; unlabeled_to_audit.*1\.5; unreadable"):
        DataConfig(train_per_class=0, workers=-1, unlabeled_to_audit=1.5, unreadable="ignore")  # type: ignore[arg-type]
