"""One folder tree for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.pictures_for_tests import write_picture, write_tree

COUNTS = {
    "train": {"n01443537": 7, "n02123394": 5, "my_thing": 9},
    "validation": {"n01443537": 3, "n02123394": 2, "my_thing": 4},
}


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_tree(tmp_path_factory.mktemp("tree"), COUNTS)
    for index in range(11):
        write_picture(root.parent / "pool" / "deep" / f"{index}.png", 9000 + index)
    return root
