"""What a run keeps: the newest whole checkpoint is used, finished stages come back, other inputs are refused."""

import errno
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from singreg import runs
from singreg.analysis.comparison import Measured
from singreg.config import FinetuneConfig
from singreg.runs import Checkpoints, Position, Run, refuse_other_inputs, stage, start
from singreg.utils import seed_process
from tests.processes import run_processes


class Trained:
    """A linear layer, its optimiser and a store; `step` moves the weights and Adam's moments."""

    def __init__(self, folder: Path) -> None:
        self.accelerator = start(FinetuneConfig(out=str(folder / "run")))
        layer = nn.Linear(3, 2)
        self.layer, self.optimizer = self.accelerator.prepare(layer, torch.optim.AdamW(layer.parameters(), lr=0.1))
        self.store = Checkpoints(folder, self.accelerator)

    def step(self, number: int) -> None:
        self.layer(torch.full((1, 3), float(number))).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.rand(1)

    def save(self, number: int) -> None:
        self.step(number)
        self.store.save(Position(number, 0, number))

    def state(self) -> list[Tensor]:
        moments = [value for moment in self.optimizer.state_dict()["state"].values() for value in moment.values()]
        return [value.clone() for value in (*self.layer.state_dict().values(), *moments, torch.get_rng_state())]

    def load(self) -> Position:
        return self.store.load_latest(seed=5)


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_comes_back_whole_and_only_the_last_stay(trained: Trained, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        trained.save(number)
    saved = trained.state()
    trained.step(9)
    assert not same(saved, trained.state())
    assert trained.load() == Position(3, 0, 3)
    assert same(saved, trained.state())
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert Checkpoints(tmp_path / "none", trained.accelerator).load_latest(seed=5) == Position()
    due = Position(4, 1, 2, due=True)
    trained.store.save(due)
    assert trained.load() == due


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "position.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_the_checkpoint_before_a_broken_one_is_used(name: str, damage: str, trained: Trained, tmp_path: Path) -> None:
    """Random states too: accelerate passes over those it cannot read, and the resumed run would be another one."""
    trained.save(1)
    first = trained.state()
    trained.save(2)
    file = tmp_path / "step-00000002" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    assert trained.load() == Position(1, 0, 1)
    assert same(first, trained.state())
    broken, whole = names(tmp_path)
    assert broken.startswith("broken-step-00000002-")
    assert whole == "step-00000001"


def test_broken_checkpoints_are_set_aside_and_do_not_crowd_out_new_ones(trained: Trained, tmp_path: Path) -> None:
    """They sort last by name: counted among the last two, they would have every new one deleted once written."""
    for number in (100, 200):
        trained.save(number)
        (tmp_path / f"step-{number:08d}" / "optimizer.bin").write_bytes(b"nothing")
    before = trained.state()
    assert trained.load() == Position()
    assert same(before, trained.state()), "the start stays as it was"
    aside = names(tmp_path)
    assert [name[:20] for name in aside] == ["broken-step-00000100", "broken-step-00000200"]
    for number in (20, 40, 60):
        trained.save(number)
        assert f"step-{number:08d}" in names(tmp_path), "what was just saved is never deleted"
    assert names(tmp_path) == [*aside, "step-00000040", "step-00000060"]
    assert trained.load() == Position(60, 0, 60)


@pytest.mark.parametrize("where", ["save_state", "replace", "write_json"])
def test_a_full_disk_keeps_the_one_before(where: str, trained: Trained, tmp_path: Path) -> None:
    """And the next save clears up."""
    trained.save(1)
    first = trained.state()

    def half(_: Accelerator, folder: str, **options: object) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        full()

    owner: Any = {"save_state": Accelerator, "replace": runs.os, "write_json": runs}[where]
    with patch.object(owner, where, half if where == "save_state" else full), pytest.raises(OSError, match="No space"):
        trained.save(2)
    assert trained.load() == Position(1, 0, 1)
    assert same(first, trained.state())
    trained.save(3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def _elsewhere(rank: int, world: int, folder: str) -> tuple[Position, list[float]]:
    """Go on from what one process saved; rank 1 sees every checkpoint as broken, which must not matter."""
    AcceleratorState._reset_state(True)
    trained = Trained(Path(folder))
    with patch.object(runs, "_whole", None if rank else runs._whole):
        position = trained.load()
    drawn = torch.rand(3).tolist()
    AcceleratorState._reset_state(True)
    return position, drawn


def test_the_main_process_chooses_and_a_new_process_gets_its_own_random_state(trained: Trained, tmp_path: Path) -> None:
    trained.save(1)
    trained.save(2)
    stored = torch.rand(3).tolist()
    first, second = run_processes(2, _elsewhere, str(tmp_path))
    assert first[0] == second[0] == Position(2, 0, 2)
    assert first[1] == stored
    seed_process(5, 1, 2)
    assert second[1] == torch.rand(3).tolist()


ROWS = pd.DataFrame({"index": [0, 1], "AS/auditor": [0.5, np.nan], "image": ["a.png", "ç.jpg"]})


def measured() -> Measured:
    return ROWS, {"top1": np.float64(0.5), "ratio": float("nan")}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = FinetuneConfig(out=str(tmp_path / "one"))
    return Run(config, start(config), "finetune")


def test_a_finished_stage_comes_back_as_it_was_and_is_not_repeated(run: Run) -> None:
    first = stage(run, "before", measured)
    again = Run(run.config, run.accelerator, "finetune")
    second = stage(again, "before", lambda: pytest.fail("it was done again"))
    for rows, figures in (first, second):
        pd.testing.assert_frame_equal(rows, ROWS)
        assert figures == {"top1": 0.5, "ratio": None}
    assert again.seconds["before"] == run.seconds["before"] >= 0
    assert not list(run.folder.rglob(".*")), "temporary files were left behind"


@pytest.mark.parametrize("failing", ["compute", "atomic_write", "write_json"])
def test_a_stage_that_fails_is_computed_again(failing: str, run: Run) -> None:
    broken = patch.object(runs, failing, full) if failing != "compute" else nullcontext()
    with broken, pytest.raises(OSError, match="No space left"):
        stage(run, "sing", full if failing == "compute" else measured)
    assert stage(run, "sing", measured)[1] == {"top1": 0.5, "ratio": None}
    assert (run.folder / "checkpoints" / "stages" / "sing" / "stage.json").is_file()


def test_a_run_goes_on_only_where_images_and_models_are_as_they_were(run: Run) -> None:
    inputs = {"train images": "a" * 64, "test images": "b" * 64, "starting classifier": "c" * 64}
    refuse_other_inputs(run, inputs)
    refuse_other_inputs(run, inputs)
    note = run.folder / "checkpoints" / "inputs.json"
    assert json.loads(note.read_text()) == inputs
    changed = {**inputs, "test images": "d" * 64, "starting classifier": "e" * 64}
    other = r"other test images \(then b+, now d+\), other starting classifier \(then c+, now e+\)"
    with pytest.raises(SystemExit, match=rf"inputs\.json: the run was begun with {other}"):
        refuse_other_inputs(run, changed)
    note.unlink()
    refuse_other_inputs(run, changed)
