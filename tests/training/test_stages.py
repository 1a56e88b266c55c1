"""Finished stages are stored once, read back the same, and count as finished only when every file is there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from singreg.analysis.results import ModelMeasurement
from singreg.old_seals import DamagedFileError
from singreg.training import stages
from singreg.training.config import FinetuneConfig
from singreg.training.stages import FinetuneRun, Stage, StageStore
from singreg.training.study_config import ArmConfig, StudyConfig
from singreg.training.study_store import ArmStore, arm_hash
from singreg.workbench.run import OtherRunError, make_accelerator
from tests.processes import run_processes
from tests.reporting.small_report import measurement

ROWS = {"index": np.arange(4), "AS/auditor": np.array([0.5, -1.25, np.nan, 2.0]), "image": np.array(["a.png", "b", "ç.jpg", "d"])}


def stage(seed: int = 0) -> Stage:
    torch.manual_seed(seed)
    return measurement("tiny", ["auditor"], seed), {"matrix": torch.randn(3, 4), "empty": torch.zeros(0, 2)}, {"info": {"vlm": "demo"}}


def with_rows(found: ModelMeasurement) -> ModelMeasurement:
    return ModelMeasurement(**{**found.__dict__, "rows": ROWS})


def test_a_stage_comes_back_as_it_was(tmp_path: Path) -> None:
    store, (measured, tensors, extra) = StageStore(tmp_path), stage()
    assert not store.has("before")
    store.save("before", with_rows(measured), tensors, extra)
    assert store.has("before")
    again, loaded, stored = store.load("before")
    assert again == measured
    assert again.rows.keys() == ROWS.keys()
    for name, column in ROWS.items():
        np.testing.assert_array_equal(again.rows[name], column)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert stored == extra
    assert sorted(path.name for path in (tmp_path / "before").iterdir()) == ["measurement.json", "rows.npz", "tensors.safetensors"]


@pytest.mark.parametrize("failing", ["save_file", "savez", "write_sealed"])
def test_a_disk_that_fills_up_leaves_an_unfinished_stage(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store, (measured, tensors, extra) = StageStore(tmp_path), stage()
    with monkeypatch.context() as patch:
        patch.setattr(stages.np if failing == "savez" else stages, failing, full)
        with pytest.raises(OSError, match="No space left"):
            store.save("sing", measured, tensors, extra)
    assert not store.has("sing")
    store.save("sing", measured, tensors, extra)
    assert store.load("sing")[0] == measured
    assert not list(tmp_path.rglob(".*")), "temporary files were left behind"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[FinetuneRun]:
    AcceleratorState._reset_state(True)
    yield FinetuneRun(FinetuneConfig(runs=str(tmp_path), name="one"), make_accelerator(seed=0))
    AcceleratorState._reset_state(True)


def test_a_finished_stage_is_not_computed_again(run: FinetuneRun) -> None:
    calls: list[int] = []

    def compute() -> Stage:
        calls.append(1)
        return stage(len(calls))

    first = run.stage("before", compute)
    seconds = run.seconds["before"]
    again = FinetuneRun(run.config, run.accelerator)
    second = again.stage("before", compute)
    assert calls == [1]
    assert torch.equal(first[1]["matrix"], second[1]["matrix"])
    assert again.seconds["before"] == seconds > 0
    run.stage("control", compute)
    assert calls == [1, 1]


def test_a_stage_that_fails_is_computed_again(run: FinetuneRun) -> None:
    def fails() -> Stage:
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        run.stage("before", fails)
    assert not run.stages.has("before")
    assert run.stage("before", stage)[2]["info"] == {"vlm": "demo"}


INPUTS = {"train pictures": "a" * 64, "test pictures": "b" * 64, "starting classifier": "c" * 64}


def test_a_run_goes_on_where_pictures_and_models_are_as_they_were_only(run: FinetuneRun) -> None:
    run.begin(INPUTS)
    run.begin(INPUTS)
    changed = {**INPUTS, "test pictures": "d" * 64, "starting classifier": "e" * 64}
    names = r"other test pictures \(then bbbbbbbb, now dddddddd\), other starting classifier \(then cccccccc, now eeeeeeee\)"
    with pytest.raises(OtherRunError, match=rf"one/checkpoints/inputs\.json: the run was begun with {names}.*another --name"):
        run.begin(changed)
    note = run.folder / "checkpoints" / "inputs.json"
    note.write_text(note.read_text().replace("aaaa", "abab"))
    with pytest.raises(DamagedFileError, match=r"inputs\.json is damaged.*remove it and resume"):
        run.begin(INPUTS)
    note.unlink()
    run.begin(changed)


def _begin(rank: int, world: int, folder: str, differs: int) -> str:
    AcceleratorState._reset_state(True)
    run = FinetuneRun(FinetuneConfig(runs=folder, name="one"), make_accelerator(seed=0))
    try:
        run.begin(INPUTS)
        if differs:
            run.begin({**INPUTS, "test pictures": "d" * 64})
    except OtherRunError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state(True)
    return "begun"


def test_two_processes_note_it_once_and_refuse_together(tmp_path: Path) -> None:
    assert run_processes(2, _begin, str(tmp_path), 0) == ["begun", "begun"]
    assert all("other test pictures" in said for said in run_processes(2, _begin, str(tmp_path), 1))


@pytest.mark.usefixtures("run")
def test_an_arm_of_a_study_on_other_pictures_is_made_again_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, arm = StudyConfig(), ArmConfig(name="plain")

    def store(inputs: dict[str, str]) -> ArmStore:
        return ArmStore(tmp_path, arm, 0, arm_hash(config, arm, 0, None, inputs), inputs=inputs)

    first = store(INPUTS)
    first.folder.mkdir(parents=True)
    first.weights.write_bytes(b"weights")
    first.save(None, {}, 1.0, {})
    assert store(INPUTS).load() is not None
    with caplog.at_level("INFO"):
        assert store({**INPUTS, "test pictures": "d" * 64}).load() is None
    assert "arm plain, seed 0 was made with other test pictures (then bbbbbbbb, now dddddddd) and is made again" in caplog.text
