"""Folders and Parquet files to splits: exact counts, disjoint, the same draw every time, files are named."""

import hashlib
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from singreg.classes import imagenet_names
from singreg.config import DataConfig
from singreg.data.datasets import load_splits
from singreg.data.splits import TableSplit
from tests.images import check_disjoint, file_split, load, names, per_class, write_image, write_parquet, write_tree
from tests.processes import run_processes

WANTED = ["goldfish", "lion"]
GOLDFISH, CATS = ("n01443537/3", "n01443537/6"), ("n02123394/0", "n02123394/1")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = {"n01443537": 7, "n02123394": 5, "my_thing": 9}
    test = {"n01443537": 3, "n02123394": 2, "my_thing": 4}
    root = write_tree(tmp_path_factory.mktemp("tree") / "data", {"train": train, "validation": test})
    for index in range(11):
        write_image(root.parent / "pool" / "deep" / f"{index}.png", 9000 + index)
    return root


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setenv("SINGREG_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("changes", "train", "audit", "test"),
    [
        ({}, [5, 4, 3], [4, 3, 2], [4, 3, 2]),
        ({"per_class": {"train": 2}}, [2, 2, 2], [7, 5, 3], [4, 3, 2]),
        ({"per_class": {"audit": 1, "bank": 2, "test": 2}}, [6, 4, 2], [1, 1, 1], [2, 2, 2]),
        ({"per_class": {"audit": 0}}, [9, 7, 5], [0, 0, 0], [4, 3, 2]),
        ({"classes": ["Persian cat", "goldfish"]}, [3, 4], [2, 3], [2, 3]),
    ],
)
def test_counts_follow_the_rule(tree: Path, changes: Any, train: list[int], audit: list[int], test: list[int]) -> None:
    splits = load(tree, **changes)
    assert [per_class(split) for split in (splits.train, splits.audit, splits.test)] == [train, audit, test]
    assert list(names(splits.bank))[: len(splits.train)] == list(names(splits.train))
    assert len(splits.bank) == len(splits.train) + 3 * changes.get("per_class", {}).get("bank", 0)
    assert [split.name for split in splits] == ["train", "bank", "audit", "test"]
    check_disjoint(splits)


def test_labels_names_and_images_belong_together(tree: Path) -> None:
    splits = load(tree)
    assert splits.class_names == ("my thing", "goldfish", "Persian cat")
    assert splits.classes.indices is None
    for split in splits:
        for index, name in enumerate(names(split)):
            assert ["my_thing", "n01443537", "n02123394"][split.labels[index]] == Path(name).parent.name
            assert np.array_equal(split.image(index), Image.open(name))
    subset = load(tree, classes=["n02123394", "goldfish"])
    assert subset.classes.indices == (283, 1)
    assert subset.classes.order == ("my_thing", "n01443537", "n02123394")
    among = subset.among([283, 1], imagenet_names())
    assert set(among.test.labels.tolist()) == {1, 283}
    assert among.test.class_names[283] == "Persian cat"
    assert np.array_equal(among.test.image(0), subset.test.image(0))


def test_unlabelled_images_go_to_bank_and_auditor(tree: Path) -> None:
    splits = load(tree, unlabeled=str(tree.parent / "pool"), unlabeled_to_audit=0.3)
    assert [len(split) for split in splits] == [12, 12 + 8, 9 + 3, 9]
    assert names(splits.bank)[:12] == names(splits.train)
    assert splits.bank.labels[12:].tolist() == [-1] * 8
    for place, name in enumerate(names(splits.bank)):
        assert hashlib.sha256(Path(name).read_bytes()).digest() == bytes(splits.bank.digests[place])
        assert np.array_equal(splits.bank.image(place), Image.open(name))
    assert (splits.audit.labels == -1).sum() == 3
    check_disjoint(splits)
    assert len(load(tree, unlabeled=str(tree.parent / "pool"), unlabeled_to_audit=1.0).bank) == 12


def test_draws_stay_those_of_earlier_versions_and_each_class(tree: Path) -> None:
    both, alone = load(tree, per_class={"train": 2}), load(tree, per_class={"train": 2}, classes=["goldfish"])
    drawn = [name.removeprefix(f"{tree}/train/").removesuffix(".png") for name in names(both.bank)]
    assert drawn == ["my_thing/1", "my_thing/2", *GOLDFISH, *CATS]
    assert names(alone.train) == names(both.train)[2:4]


def test_the_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    one, moved, fewer = (file_split(tmp_path / name, count) for name, count in (("a", 3), ("b", 3), ("c", 2)))
    assert one.fingerprint == moved.fingerprint != fewer.fingerprint
    assert one.subset([1, 0]).fingerprint != fewer.fingerprint == one.subset([0, 1]).fingerprint
    relabelled = TableSplit("audit", one.table, ["x"], [-1, 0, 0])
    relabelled.examine(range(3))
    assert relabelled.fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"per_class": {"train": 4, "audit": 3, "test": 3}}, "per_class.*5 for train 4 . audit 3.*2 for test 3"),
        ({"test_split": "val"}, r"no split 'val'.*set data\.test_split to .*: train, validation"),
        ({"source": "train"}, r"set data\.source to .*/data$"),
        ({"source": ".."}, r"set data\.source to .*/data$"),
        ({"source": "train/my_thing/0.png"}, "is a file"),
        ({"source": "/nowhere"}, r"nowhere .data\.source"),
        ({"unlabeled": "/nowhere"}, r"no image below .*data\.unlabeled"),
        ({"test_split": "../odd/train"}, "1 of the classes are not among the 2 there: 'my_thing'"),
        ({"source": "../odd", "test_split": "train", "classes": ["c", "n01443537"]}, "'c' .near: none"),
        ({"source": "../odd/train", "train_split": "c"}, "holds no class folder"),
    ],
)
def test_errors_name_every_class_and_what_to_do(tree: Path, changes: dict[str, Any], words: str) -> None:
    write_tree(tree.parent / "odd", {"train": {"n01443537": 3, "n02123394": 1, "c": 0}})
    source = tree / changes.pop("source", ".")
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){words}"):
        load(source, **changes)


def test_a_file_gives_classes_their_names(tmp_path: Path) -> None:
    keys = [str(n) for n in range(1, 11)]
    root = write_tree(tmp_path, {"train": dict.fromkeys(keys, 2), "validation": dict.fromkeys(keys, 1)})
    file = tmp_path / "names.txt"
    file.write_text("\n".join(f"name {key}" for key in keys))
    given: dict[str, Any] = {"class_names": str(file)}
    assert load(root, **given).class_names[:3] == ("name 1", "name 10", "name 2")
    assert load(root, classes=["10", "3"], **given).class_names == ("name 10", "name 3")
    file.write_text("10\tcat\n3,dog\n")
    assert load(root, classes=["10", "3"], **given).class_names == ("cat", "dog")
    file.write_text("1: tench\n2: goldfish\n4: great white shark\n")
    assert load(root, classes=["4", "1", "2"], **given).classes.indices == (2, 0, 1)
    file.write_text("# some\n3: red kite\n10 : owl\n")
    named = load(root, classes=["10", "3", "4"], **given)
    assert (named.class_names, named.classes.keys) == (("owl", "red kite", "4"), ("10", "3", "4"))
    some = "".join(f"{key}: owl {key}\n" for key in keys[:9])
    wrong = {"owl\nkite\n": "got 2 like 'owl'", "3: owl\n4: Owl\n": "several", "3: owl\n3: kite": "names '3' twice"}
    wrong |= {f"{some}11: kite": "got 10 like '11: kite'", f"{some}10:": "got 10 like '10:'"}
    for text, words in wrong.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=f"data.class_names: .*{words}"):
            load(root, **given)


def test_a_folder_goes_before_the_built_in_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "scenes", {"train": {"empty": 0, "a": 2, "b": 2}, "validation": {"a": 1, "b": 1}})
    assert load_splits(DataConfig(per_class={"train": 1})).class_names == ("a", "b")


def test_scenes_need_nothing_and_repeat() -> None:
    sizes = {"train": 30, "audit": 20, "test": 10, "bank": 7}
    splits, again, other = (load_splits(DataConfig(scenes={**sizes, "seed": seed})) for seed in (3, 3, 4))
    assert [len(split) for split in splits] == [30, 37, 20, 10]
    assert [split.fingerprint for split in splits] == [split.fingerprint for split in again]
    assert other.train.fingerprint != splits.train.fingerprint
    check_disjoint(splits)
    assert splits.train.table.codes["shape"].tolist() == splits.train.labels.tolist()
    assert np.array_equal(splits.train.image(4), again.bank.image(4))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 15 validation images of three classes in Parquet files, of which one is not wanted."""
    base = tmp_path_factory.mktemp("parquet")
    kind = datasets.ClassLabel(names=["lion", "goldfish", "teapot"])
    for split, count in (("train", 60), ("validation", 15)):
        paths = [write_image(base / "raw" / split / f"{i}.png") for i in range(count)]
        for half in range(2):
            rows = range(half * count // 2, (half + 1) * count // 2)
            file = base / "set" / f"{split}-0000{half}.parquet"
            write_parquet(file, [paths[i] for i in rows], [i % 3 for i in rows], kind)
    return base / "set"


def test_parquet_files_are_read(parquet: Path) -> None:
    splits = load(parquet, classes=WANTED)
    assert (splits.class_names, splits.classes.indices) == (tuple(WANTED), (1, 291))
    assert [per_class(split) for split in (splits.train, splits.audit, splits.test)] == [[10, 10], [10, 10], [5, 5]]
    check_disjoint(splits)
    raw = {hashlib.sha256(path.read_bytes()).digest(): path for path in (parquet.parent / "raw").rglob("*.png")}
    for split in splits:
        for index, digest in enumerate(split.digests):
            path = raw[bytes(digest)]
            assert ["goldfish", "lion"][split.labels[index]] == ["lion", "goldfish", "teapot"][int(path.stem) % 3]
            assert np.array_equal(split.image(index), Image.open(path))
    assert splits.test.identifier(0).startswith(f"{parquet}/validation#")


def test_rows_without_image_or_label(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write_image(tmp_path / f"{i}.png") for i in range(24)]
    broken: list[Any] = [None, {"bytes": None, "path": None}, {"bytes": b"no image", "path": "x"}]
    write_parquet(tmp_path / "set/train.parquet", [*paths[:14], *broken], [*WANTED * 6, None, None, *WANTED, WANTED[0]])
    write_parquet(tmp_path / "set/validation.parquet", paths[14:], WANTED * 5)
    with pytest.raises(ValueError, match="3 images cannot be read") as stop:
        load(tmp_path / "set")
    assert str(stop.value).count("the row holds no image (null)") == 2
    splits = load(tmp_path / "set", bad_images="drop")
    assert splits.class_names == tuple(WANTED)
    assert len(splits.train) + len(splits.audit) == 12
    assert "set/train: 2 rows are unlabelled" in caplog.text
    write_parquet(tmp_path / "none/train.parquet", paths[:1], [None])
    with pytest.raises(ValueError, match="'class' has no class name, only nulls"):
        load(tmp_path / "none")


def test_columns_are_chosen_by_name_or_refused(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{i}.png") for i in range(12)]
    columns = {"fine": [0, 1] * 6, "coarse": [1, 0] * 6, "large": ["b", "a"] * 6, "number": ["10", "9"] * 6}
    kinds = {name: datasets.ClassLabel(names=[f"{name} {n}" for n in "xy"]) for name in ("fine", "coarse")}
    kinds |= {"large": datasets.Value("large_string"), "number": datasets.Value("string"), "image": datasets.Image()}
    table = datasets.Dataset.from_dict({"image": [str(path) for path in paths], **columns}, datasets.Features(kinds))
    for split, rows in (("train", range(8)), ("validation", range(8, 12))):
        table.select(rows).to_parquet(tmp_path / "set" / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"one column of labels \(data.label_column.*got fine, coarse among"):
        load(tmp_path / "set")
    with pytest.raises(ValueError, match="got none among"):
        load(tmp_path / "set", label_column="colour")
    assert load(tmp_path / "set", label_column="coarse").classes.order == ("coarse x", "coarse y")
    assert load(tmp_path / "set", label_column="large").class_names == ("a", "b")
    assert load(tmp_path / "set", label_column="number").classes.order == ("9", "10")
    for split in ("train", "validation"):
        table.rename_column("large", "label").to_parquet(tmp_path / f"named/{split}.parquet")
    assert load(tmp_path / "named", bad_images="drop", per_class={"test": 1}).class_names == ("a", "b")


def test_webdataset_tars_take_their_names_from_a_file(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("validation", 4)):
        (tmp_path / "set").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "set" / f"{split}-0000.tar", "w") as archive:
            for i in range(count):
                (tmp_path / "x.cls").write_text(str(i % 2))
                archive.add(write_image(tmp_path / f"{split}{i}.png"), f"{i:03d}.png")
                archive.add(tmp_path / "x.cls", f"{i:03d}.cls")
    with pytest.raises(ValueError, match=r"cls holds numbers; set data\.class_names"):
        load(tmp_path / "set")
    given: dict[str, Any] = {"class_names": str(tmp_path / "names.txt")}
    (tmp_path / "names.txt").write_text("owl\n")
    with pytest.raises(ValueError, match="label 1, but there are 1 names of classes"):
        load(tmp_path / "set", **given)
    (tmp_path / "names.txt").write_text("red kite\nowl\n")
    splits = load(tmp_path / "set", **given)
    assert splits.classes.order == ("red kite", "owl")
    assert [per_class(split) for split in (splits.train, splits.audit, splits.test)] == [[3, 3], [3, 3], [2, 2]]
    row = next(i for i in range(2) if splits.class_names[splits.test.labels[0]] == ("red kite", "owl")[i])
    raw = {hashlib.sha256((tmp_path / f"validation{i}.png").read_bytes()).digest() for i in range(row, 4, 2)}
    assert bytes(splits.test.digests[0]) in raw


def test_what_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("couldn't reach the hub")

    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.tar").write_bytes(b"cut")
    with pytest.raises(ValueError, match="set', split 'train'"):
        load(tmp_path / "set")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"'someone/things' .*data\.train_split.*couldn't reach the hub"):
        load_splits(DataConfig(source="someone/things"))


def _load_in_a_group(rank: int, world: int, source: str, changes: dict[str, Any]) -> tuple[int, Any]:
    looked: list[int] = []
    real = TableSplit.examine
    TableSplit.examine = lambda self, rows: (looked.extend(rows), real(self, rows))[1]  # type: ignore[method-assign]
    try:
        splits = load(Path(source), **changes)
        return len(looked), [(split.fingerprint, np.asarray(split.image(1)).tobytes()) for split in splits]
    except (ValueError, RuntimeError) as error:
        return len(looked), f"{type(error).__name__}: {error}"
    finally:
        TableSplit.examine = real  # type: ignore[method-assign]


def test_one_process_looks_at_the_images_for_all(tree: Path, parquet: Path) -> None:
    for source in (str(tree), str(parquet)):
        expected = _load_in_a_group(0, 1, source, {})
        first, second, third = run_processes(3, _load_in_a_group, source, {})
        assert first == expected
        assert second == third == (0, expected[1])


def test_what_fails_in_the_first_process_reaches_the_others(tree: Path) -> None:
    first, second = run_processes(2, _load_in_a_group, str(tree), {"per_class": {"train": 100}})
    assert first[1].startswith("ValueError: ")
    assert "too few images" in first[1]
    assert second[1].startswith("ValueError: reading the data failed elsewhere: process 0: ValueError: ")
