"""Flipped bits and cut files in a run's folder: the same numbers or an error that names the file, never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.damage import names
from tests.faults.flip import Folders, flip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("flip"))


def test_a_dozen_damaged_folders(folders: Folders) -> None:
    outcomes = flip(12, folders.scratch, folders=folders)
    print(f"\n{outcomes.line('damaged folders')}")
    assert outcomes.count == 12
    assert not outcomes.wrong, "\n".join(outcomes.wrong)


@pytest.mark.slow
def test_two_hundred_damaged_folders(folders: Folders) -> None:
    outcomes = flip(200, folders.scratch, seed=1, folders=folders)
    print(f"\n{outcomes.line('damaged folders')}")
    assert outcomes.count == 200
    assert not outcomes.wrong, "\n".join(outcomes.wrong)


@pytest.mark.parametrize(
    ("text", "file", "named"),
    [
        ("/runs/run/config.yaml was changed.", "config.yaml", True),
        ("The run stopped. Try again.", "config.yaml", False),
        ("/runs/run/arms/plain cannot be read", "arms/plain/rows.npz", True),
        ("something in arms/plain. Try again", "arms/plain/rows.npz", False),
    ],
)
def test_a_full_stop_does_not_count_as_a_files_name(text: str, file: str, named: bool) -> None:
    assert names(text, Path("/runs/run"), Path(file)) is named
