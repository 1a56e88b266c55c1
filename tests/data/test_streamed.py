"""Streaming data sets: the same parts as the map-style set, no more read than wanted, and any interruption survived."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from singreg.data import UnreadableImageError, load_splits, streamed, verified
from singreg.data.config import DataConfig
from singreg.data.datasets import Splits
from tests.data.pictures_for_tests import check_disjoint, config, per_class, write_parquet, write_picture
from tests.processes import run_processes

CLASSES = ["lion", "goldfish", "teapot"]
WANTED = ["goldfish", "lion"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 15 validation pictures of three classes in Parquet files, of which one is not wanted."""
    base = tmp_path_factory.mktemp("streamed")
    for split, count in (("train", 60), ("validation", 15)):
        paths = [write_picture(base / "raw" / split / f"{i}.png") for i in range(count)]
        for half in range(2):
            rows = range(half * count // 2, (half + 1) * count // 2)
            file, kind = base / "set" / f"{split}-0000{half}.parquet", datasets.ClassLabel(names=CLASSES)
            write_parquet(file, [paths[i] for i in rows], [i % 3 for i in rows], kind)
    return base / "set"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(streamed, "SHARD_ROWS", 7)


def load(folder: Path, cache: Path, *, streaming: bool = True, **options: Any) -> Splits:
    return load_splits(config(folder, classes=WANTED, cache_dir=str(cache), streaming=streaming, **options))


def content(parts: Splits) -> list[tuple[list[bytes], list[int]]]:
    return [([bytes(digest) for digest in part.digests], part.labels.tolist()) for part in parts]


@pytest.fixture
def read_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a row that is taken from a stream; stops at the tenth entry when `read_rows` begins with -1."""
    seen: list[int] = []
    real = streamed.progress

    def counted(items: Iterator[Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        for item in real(items, *args, **kwargs):
            seen.append(1)
            if seen[0] == -1 and len(seen) == 41:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(streamed, "progress", counted)
    return seen


def test_a_stream_gives_the_parts_that_the_whole_set_gives(folder: Path, tmp_path: Path, read_rows: list[int]) -> None:
    whole = load(folder, tmp_path / "a", streaming=False)
    parts = load(folder, tmp_path / "b")
    assert content(parts) == content(whole)
    assert [part.fingerprint for part in parts] == [part.fingerprint for part in whole]
    assert per_class(parts.train) == [10, 10]
    assert np.array_equal(np.asarray(parts.test.image(3)), np.asarray(whole.test.image(3)))
    assert parts.class_names == tuple(WANTED)
    check_disjoint(parts)
    assert len(read_rows) == 75


def test_a_second_start_reads_and_decodes_nothing(
    folder: Path, tmp_path: Path, read_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(folder, tmp_path)
    del read_rows[:]
    monkeypatch.setattr("singreg.data.pictures._examine", lambda *_: pytest.fail("it was looked at before"))
    assert content(load(folder, tmp_path)) == content(first)
    assert not read_rows


def test_the_stream_is_left_where_there_is_enough(folder: Path, tmp_path: Path, read_rows: list[int]) -> None:
    parts = load(folder, tmp_path, train_per_class=4, audit_per_class=3, test_per_class=2)
    assert (per_class(parts.train), per_class(parts.audit), per_class(parts.test)) == ([4, 4], [3, 3], [2, 2])
    assert len(read_rows) == 20 + 5  # rows 0 to 19 hold seven of both classes
    too_many = load(folder, tmp_path, train_per_class=4, test_per_class=2)
    assert per_class(too_many.audit) == [16, 16], "without a count the rest is wanted, so all is read"


def test_an_interrupted_pass_goes_on_behind_its_last_whole_file(
    folder: Path, tmp_path: Path, read_rows: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    expected = content(load(folder, tmp_path / "straight"))
    read_rows[:] = [-1]
    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "stopped")
    read_rows[:] = [0]
    with caplog.at_level(logging.WARNING, "singreg"):
        assert content(load(folder, tmp_path / "stopped")) == expected
    assert "an interrupted run kept 21 pictures of 31 read; going on from there" in caplog.text
    assert len(read_rows) - 1 == 60 - 31 + 15


def test_a_damaged_file_is_named_and_read_anew(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = content(load(folder, tmp_path))
    victim = sorted(tmp_path.glob("stream-*/rows-00001.arrow"))[0]
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    with caplog.at_level(logging.WARNING, "singreg"):
        assert content(load(folder, tmp_path)) == expected
    assert f"{victim} is damaged" in caplog.text


def test_another_content_is_another_stream(folder: Path, tmp_path: Path) -> None:
    load(folder, tmp_path / "cache")
    copy = tmp_path / "set"
    copy.mkdir()
    for file in folder.glob("*.parquet"):
        (copy / file.name).write_bytes(file.read_bytes())
    first = load(copy, tmp_path / "cache")
    (copy / "train-00001.parquet").unlink()
    assert len(load(copy, tmp_path / "cache").train) < len(first.train)


def test_labels_of_text_and_folders_of_files(tmp_path: Path) -> None:
    paths = [write_picture(tmp_path / f"{i}.png") for i in range(24)]
    for split, half in (("train", paths[:12]), ("validation", paths[12:])):
        write_parquet(tmp_path / "set" / f"{split}.parquet", half, WANTED * 6)
    parts = load(tmp_path / "set", tmp_path / "cache")
    assert [per_class(part) for part in (parts.train, parts.audit, parts.test)] == [[3, 3], [3, 3], [6, 6]]
    for split in ("train", "validation"):
        for number in range(8):
            write_picture(tmp_path / "tree" / split / WANTED[number % 2] / f"{number}.png")
    assert content(load(tmp_path / "tree", tmp_path / "cache")) == content(load(tmp_path / "tree", tmp_path / "other", streaming=False))


def _in_a_group(rank: int, world: int, folder: str, cache: str) -> tuple[int, list[tuple[list[bytes], list[int]]]]:
    seen: list[int] = []
    real = streamed.progress
    streamed.progress = lambda items, *args, **kwargs: (seen.append(1) or item for item in real(items, *args, **kwargs))
    try:
        found = content(load(Path(folder), Path(cache)))
    finally:
        streamed.progress = real
    return len(seen), found


def test_two_processes_read_one_stream_once(folder: Path, tmp_path: Path) -> None:
    (rows, one), (more, two) = run_processes(2, _in_a_group, str(folder), str(tmp_path / "both"))
    assert rows + more == 75
    assert one == two == content(load(folder, tmp_path / "alone"))


def _hashes(rank: int, world: int, folder: str, cache: str) -> tuple[int, Any]:
    real, read = verified.sha256_of_file, []
    verified.sha256_of_file = lambda path: (read.append(path), real(path))[1]  # type: ignore[assignment]
    verified.SETTLED_NS = 0
    try:
        found = content(load(Path(folder), Path(cache)))
    finally:
        verified.sha256_of_file, verified.SETTLED_NS = real, 2_000_000_000
    return len(read), found


def test_at_a_second_start_one_process_verifies_for_all(folder: Path, tmp_path: Path) -> None:
    expected = content(load(folder, tmp_path / "cache"))
    files = len(list((tmp_path / "cache").rglob("*.arrow")))
    found = run_processes(2, _hashes, str(folder), str(tmp_path / "cache"))
    assert files > 2
    assert found == [(files, expected), (0, expected)]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_a_picture_or_a_label_are_counted_and_named(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write_picture(tmp_path / f"{i}.png") for i in range(24)]
    broken: list[Any] = [None, {"bytes": None, "path": None}, {"bytes": b"no picture", "path": "x"}]
    labels = [*WANTED * 6, None, None, *WANTED, WANTED[0]]
    write_parquet(tmp_path / "set" / "train.parquet", [*paths[:14], *broken], labels)
    write_parquet(tmp_path / "set" / "validation.parquet", paths[14:], WANTED * 5)
    options = {"streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UnreadableImageError, match="3 unreadable pictures") as stop:
        load_splits(config(tmp_path / "set", **options))
    assert str(stop.value).count("the row holds no picture (null)") == 2
    caplog.clear()
    with caplog.at_level(logging.WARNING, "singreg"):
        fresh = {**options, "cache_dir": str(tmp_path / "other"), "unreadable": "skip"}
        parts = load_splits(config(tmp_path / "set", **fresh))
    assert parts.class_names == tuple(sorted(WANTED))
    assert len(parts.train) + len(parts.audit) == 12
    assert "set/train: 2 rows are unlabelled (no value in the column 'class') and are left out" in caplog.text


def test_a_column_of_nulls_is_no_column_of_labels(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_parquet(tmp_path / "set" / f"{split}.parquet", [write_picture(tmp_path / f"{split}.png")], [None])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="the column 'class' holds no label, only nulls"):
            load_splits(config(tmp_path / "set", streaming=streaming, cache_dir=str(tmp_path / "cache")))


def test_what_cannot_be_streamed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="streaming needs a Hugging Face data set as source, got scenes"):
        DataConfig(streaming=True)
    with pytest.raises(ValueError, match=r"data\.streaming needs data\.cache_dir"):
        load_splits(DataConfig(source="someone/things", streaming=True))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: (_ for _ in ()).throw(ConnectionError("couldn't reach the hub")))
    with pytest.raises(ValueError, match=r"split 'train' \(data\.train_split\), cannot be streamed; .*couldn't reach the hub"):
        load_splits(DataConfig(source="someone/things", streaming=True, cache_dir=str(tmp_path)))
