"""Checkpoints: whole or not there, the newest whole one is used, and looking at a damaged one changes nothing."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from singreg.training import checkpoint
from singreg.training.checkpoint import Checkpoints, Position
from singreg.utils import seed_process
from singreg.workbench.run import make_accelerator
from tests.processes import run_processes


class Trained:
    """A linear layer, its optimiser and a store; `step` moves the weights and Adam's moments."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.accelerator = make_accelerator(seed=0)
        layer = nn.Linear(3, 2)
        self.layer, self.optimizer = self.accelerator.prepare(layer, torch.optim.AdamW(layer.parameters(), lr=0.1))
        self.store = Checkpoints(folder, keep=keep)

    def step(self, number: int) -> None:
        self.layer(torch.full((1, 3), float(number))).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.rand(1)

    def save(self, number: int) -> None:
        self.step(number)
        self.store.save(self.accelerator, Position(number, 0, number))

    def state(self) -> list[Tensor]:
        moments = [value for moment in self.optimizer.state_dict()["state"].values() for value in moment.values()]
        return [*self.layer.state_dict().values(), *moments, torch.get_rng_state()]

    def copy(self) -> list[Tensor]:
        return [value.clone() for value in self.state()]


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[Trained]:
    AcceleratorState._reset_state(True)
    yield Trained(tmp_path)
    AcceleratorState._reset_state(True)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_comes_back_whole_and_only_the_last_stay(trained: Trained, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        trained.save(number)
    saved = trained.copy()
    trained.step(9)
    assert not same(saved, trained.state())
    assert trained.store.load_latest(trained.accelerator) == Position(3, 0, 3)
    assert same(saved, trained.state())
    assert files_of(tmp_path) == ["step-00000002", "step-00000003"]
    assert Checkpoints(tmp_path / "none", keep=1).load_latest(trained.accelerator) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "position.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_any_damaged_file_is_named_and_the_one_before_is_used(
    name: str, damage: str, trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Random states too: accelerate passes over those it cannot read, and the resumed run would be another one."""
    trained.save(1)
    first = trained.copy()
    trained.save(2)
    file = tmp_path / "step-00000002" / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content.replace(content[-20:-10], b"0123456789"))
    with caplog.at_level("WARNING"):
        assert trained.store.load_latest(trained.accelerator) == Position(1, 0, 1)
    assert same(first, trained.state())
    assert f"{tmp_path / 'step-00000002'} cannot be read" in caplog.text
    assert name in caplog.text
    assert files_of(tmp_path) == ["damaged-step-00000002", "step-00000001"]


def test_damaged_checkpoints_are_set_aside_and_do_not_crowd_out_new_ones(trained: Trained, tmp_path: Path) -> None:
    """They sort last by name: counted among the last two, they would have every new one deleted as soon as it was written."""
    for number in (100, 200):
        trained.save(number)
        (tmp_path / f"step-{number:08d}" / "optimizer.bin").write_bytes(b"nothing")
    (tmp_path / "damaged-step-00000100").mkdir()
    (tmp_path / "damaged-step-00000100" / "kept").write_text("from an earlier time")
    assert trained.store.load_latest(trained.accelerator) is None
    aside = ["damaged-step-00000100", "damaged-step-00000100-2", "damaged-step-00000200"]
    assert files_of(tmp_path) == aside
    assert files_of(tmp_path / "damaged-step-00000100") == ["kept"]
    for number in (20, 40, 60):
        trained.save(number)
    assert files_of(tmp_path) == [*aside, "step-00000040", "step-00000060"]
    assert trained.store.load_latest(trained.accelerator) == Position(60, 0, 60)


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_saved_is_never_deleted(keep: int, trained: Trained, tmp_path: Path) -> None:
    for number in (100, 200):
        trained.save(number)
    store = Checkpoints(tmp_path, keep=keep)
    for number in (20, 40, 60):
        store.save(trained.accelerator, Position(number, 0, number))
        assert f"step-{number:08d}" in files_of(tmp_path)
        assert len(files_of(tmp_path)) == keep


def test_a_position_comes_back_with_what_is_still_due(trained: Trained) -> None:
    position = Position(3, 1, 2, refresh_due=True)
    trained.store.save(trained.accelerator, position)
    assert trained.store.load_latest(trained.accelerator) == position


def _elsewhere(rank: int, world: int, folder: str) -> tuple[Position | None, list[float], list[str]]:
    """Go on from what one process saved; rank 1 sees every checkpoint as damaged, which must not matter."""
    AcceleratorState._reset_state(True)
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    trained = Trained(Path(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.logger.logger, "handlers", [handler])
        if rank:
            patch.setattr(checkpoint, "_whole", None)
        position = trained.store.load_latest(trained.accelerator, seed=5)
    drawn = torch.rand(3).tolist()
    AcceleratorState._reset_state(True)
    return position, drawn, heard


def test_the_main_process_chooses_and_processes_without_a_random_state_get_one_of_their_own(trained: Trained, tmp_path: Path) -> None:
    trained.save(1)
    trained.save(2)
    stored = torch.rand(3).tolist()
    first, second = run_processes(2, _elsewhere, str(tmp_path))
    assert first[0] == second[0] == Position(2, 0, 2)
    assert first[1] == stored
    seed_process(5, 1, 2)
    assert second[1] == torch.rand(3).tolist()
    assert any("was written by 1 process(es), this run has 2" in text for text in first[2])


def test_checkpoints_that_are_all_damaged_leave_the_start_as_it_was(trained: Trained, tmp_path: Path) -> None:
    """Loading what is whole of a damaged one would train "from the start" with weights from its middle."""
    trained.save(1)
    trained.step(2)
    (tmp_path / "step-00000001" / "optimizer.bin").write_bytes(b"nothing")
    before = trained.copy()
    assert trained.store.load_latest(trained.accelerator) is None
    assert same(before, trained.state())


@pytest.mark.parametrize("where", ["save_state", "replace", "position"])
def test_a_full_disk_keeps_the_one_before_and_the_next_save_clears_up(
    where: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.save(1)
    first = trained.copy()

    def full(*paths: object, **_: object) -> None:
        if where == "save_state":
            (Path(str(paths[1])) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "save_state":
            patch.setattr(Accelerator, "save_state", full)
        elif where == "replace":
            patch.setattr(checkpoint.os, "replace", full)
        else:
            patch.setattr(checkpoint, "write_sealed", full)
        with pytest.raises(OSError, match="No space left"):
            trained.save(2)
    assert [path.name for path in trained.store.all()] == ["step-00000001"]
    assert trained.store.load_latest(trained.accelerator) == Position(1, 0, 1)
    assert same(first, trained.state())
    trained.save(3)
    assert files_of(tmp_path) == ["step-00000001", "step-00000003"]
