"""The one reader of pictures: what it refuses, that its bound holds, and which paths of a data set it follows."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from singreg.data import reading
from singreg.data.datasets import HubSplit
from singreg.data.pictures import PictureChecker, UnreadableImageError, open_rgb
from singreg.data.reading import Origin, RefusedPictureError, cell_bytes, read_file
from tests.data.pictures_for_tests import write_picture


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = write_picture(tmp_path / "x.png")
    assert read_file(picture) == picture.read_bytes()
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(RefusedPictureError, match="not a regular file"):
            read_file(other)
    size = picture.stat().st_size
    monkeypatch.setattr(reading, "MAX_BYTES", size)
    assert len(read_file(picture)) == size
    assert cell_bytes({"bytes": picture.read_bytes(), "path": None}, None) == picture.read_bytes()
    monkeypatch.setattr(reading, "MAX_BYTES", size - 1)
    with pytest.raises(RefusedPictureError, match=f"{size} bytes; at most"):
        read_file(picture)
    with pytest.raises(RefusedPictureError, match="the most that is read of one picture"):
        cell_bytes({"bytes": picture.read_bytes(), "path": None}, None)
    with pytest.raises(UnreadableImageError, match=r"cannot read the picture NAME: RefusedPictureError"):
        open_rgb(picture, "NAME")


def test_a_file_that_says_it_is_shorter_than_it_is(tmp_path: Path) -> None:
    with pytest.raises(RefusedPictureError, match="more than the 0 bytes it is said to have"):
        read_file("/proc/self/status")


@pytest.mark.parametrize("failure", [MemoryError, OverflowError, NotImplementedError, struct.error])
def test_whatever_a_broken_picture_raises_it_is_named(
    failure: Callable[[], Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = write_picture(tmp_path / "x.png")

    def broken(*_: object, **__: object) -> None:
        raise failure()

    monkeypatch.setattr("PIL.Image.open", broken)
    assert list(PictureChecker().check_files([str(picture)]).bad) == [0]
    with pytest.raises(UnreadableImageError, match="NAME"):
        open_rgb(picture.read_bytes(), "NAME")


def test_an_archive_among_the_listed_files_may_be_read_into_and_nothing_beside_it(tmp_path: Path) -> None:
    origin = Origin("ours", [tmp_path / "set"], frozenset({"hf://datasets/a/b@1/x.zip"}))
    for path in ("zip://in.png::hf://datasets/a/b@1/x.zip", "hf://datasets/a/b@1/x.zip", str(tmp_path / "set" / "x.png")):
        origin.check(path)
    for path in ("hf://datasets/a/b@1/y.zip", "http://x::hf://datasets/a/b@1/x.zip", "zip://in.png::http://x/y.zip", "x.png",
                 str(tmp_path / "set2" / "x.png"), str(tmp_path / "set" / ".." / "x.png"), "", "a\0b"):  # fmt: skip
        with pytest.raises(RefusedPictureError, match="not in ours"):
            origin.check(path)


def test_a_part_of_a_data_set_follows_no_path_by_itself(tmp_path: Path) -> None:
    import datasets
    import numpy as np

    picture = write_picture(tmp_path / "x.png")
    table = datasets.Dataset.from_dict({"image": [str(picture)]}).cast_column("image", datasets.Image(decode=False))
    part = HubSplit("train", table, ["a"], [0], np.zeros((1, 32), np.uint8), column="image", where="somewhere", rows=np.arange(1))
    with pytest.raises(UnreadableImageError, match=r"somewhere#0: .*which is not in somewhere"):
        part.image(0)
