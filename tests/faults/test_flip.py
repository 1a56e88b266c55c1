"""Flipped bits and cut files in a run's folder: the same numbers or an error that names the file, never anything else."""

from __future__ import annotations

import pytest

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
