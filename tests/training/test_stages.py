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
from singreg.training import stages
from singreg.training.config import FinetuneConfig
from singreg.training.stages import FinetuneRun, Stage, StageStore
from singreg.workbench.run import make_accelerator
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
