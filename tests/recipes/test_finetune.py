"""recipes/finetune.py from end to end on tiny scenes: files, reloading, resuming, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from singreg.models.classifier import Classifier
from singreg.reporting.report_files import read_report
from singreg.training.checkpoint import Checkpoints
from singreg.training.loop import _Arm
from singreg.translator import load_translator
from tests.tiny_run import arguments, finetune, report_of

STAGES = ["before", "control", "sing"]


def test_the_run_folder_of_the_design(finished: Path) -> None:
    for name in (
        "config.yaml", "report.json", "report.md", "report.html", "scores.parquet", "model/config.json", "model-control/config.json",
        "translator-before.safetensors", "translator-after.safetensors",
    ):  # fmt: skip
        assert (finished / name).is_file(), name
    assert len(list((finished / "plots").glob("*.png"))) == 4
    report = read_report(finished)
    assert list(report.measurements) == STAGES
    assert {m.images for m in report.measurements.values()} == {45}
    assert set(report.measurements["sing"].translators) == {"frozen", "loop", "auditor"}
    assert pq.read_table(finished / "scores.parquet").num_rows == 3 * 45
    for measured in report.measurements.values():
        assert measured.logit_change_float64 < 1e-9
        assert measured.logit_change_float32 < 1e-4
    before = report.measurements["before"].translators["frozen"]
    assert load_translator(finished / "translator-before.safetensors").info.images == before.fit_images == 90
    assert not list(finished.rglob(".*")), "temporary files were left behind"


def test_the_model_reloads_with_plain_timm_to_the_same_logits(finished: Path) -> None:
    plain = timm.create_model(f"local-dir:{finished / 'model'}", pretrained=True).eval()
    classifier = Classifier.from_timm(f"local-dir:{finished / 'model'}").eval()
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        features, logits = classifier.features_and_logits(images)
        assert torch.equal(plain(images), logits)
    assert classifier.head_hash() == read_report(finished).measurements["sing"].head.head_hash
    assert features.shape == (5, 256)


def test_tensorboard_has_scalars_histograms_images_text_and_hparams(finished: Path) -> None:
    read = {arm: EventAccumulator(str(finished / "tensorboard" / arm)).Reload() for arm in ("control", "sing", "summary")}
    found = {arm: accumulator.Tags() for arm, accumulator in read.items()}
    assert {"train/ce", "train/leak", "train/hinge", "train/band", "train/class_share", "train/capacity", "train/sing_weight",
            "watch/AS_neg", "watch/IS"} <= set(found["sing"]["scalars"])  # fmt: skip
    assert "train/leak" not in found["control"]["scalars"]
    assert "head/weight" in found["sing"]["histograms"]
    assert {"plots/summary", "plots/joint"} <= set(found["summary"]["images"])
    assert {"results/text_summary", "verdict/text_summary"} <= set(found["summary"]["tensors"])
    assert "_hparams_/session_start_info" in read["summary"].PluginTagToContent("hparams")
    assert "final/sing/AS_neg" in found["summary"]["scalars"]


def test_the_arms_start_alike_and_differ_by_the_loss_alone(finished: Path, cache: Path, tmp_path: Path) -> None:
    """With a weight of 0 the regularised arm must be the control, bit for bit."""
    finetune(tmp_path, cache, "--name", "zero", "--loss.weight", "0", "--training.epochs", "1")
    control, sing = (load_file(tmp_path / "zero" / name / "model.safetensors") for name in ("model-control", "model"))
    assert all(torch.equal(control[name], sing[name]) for name in control)
    control, sing = (load_file(finished / name / "model.safetensors") for name in ("model-control", "model"))
    assert any(not torch.equal(control[name], sing[name]) for name in control)


def test_a_finished_run_is_not_overwritten_and_resuming_it_gives_the_same(finished: Path, cache: Path) -> None:
    first = report_of(finished)
    with pytest.raises(SystemExit, match="already holds a run; use --resume true"):
        finetune(finished.parent, cache, "--name", "whole")
    with pytest.raises(SystemExit, match="differs from the configuration given"):
        finetune(finished.parent, cache, "--name", "whole", "--resume", "true", "--seed", "5")
    finetune(finished.parent, cache, "--name", "whole", "--resume", "true")
    assert report_of(finished) == first


def test_the_resolved_configuration_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    """A CPU run repeats bit for bit, from nothing but its config.yaml."""
    text = (finished / "config.yaml").read_text()
    assert yaml.safe_load(text)["training"]["batch_size"] == 16
    (tmp_path / "again.yaml").write_text(text)
    finetune(tmp_path, tmp_path / "cache", "--config", str(tmp_path / "again.yaml"), "--runs", str(tmp_path))
    assert report_of(tmp_path / "whole") == report_of(finished)


class Stop(Exception):
    """Stands for whatever ends a run at a moment it did not choose."""


@pytest.mark.parametrize("steps", [4, 14])  # within the control's first epoch; within the regularised arm's
def test_a_run_that_stopped_anywhere_resumes_to_the_same_weights_and_report(
    steps: int, finished: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, original = [0], _Arm._micro_step

    def counted(self: _Arm, *batch: object) -> None:
        taken[0] += 1
        if taken[0] > steps:
            raise Stop
        original(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(_Arm, "_micro_step", counted)
        with pytest.raises(Stop):
            finetune(tmp_path, cache, "--name", "whole")
    said = capsys.readouterr().err
    assert f"kept in {tmp_path / 'whole'}" in said
    assert "--resume true" in said
    assert not (tmp_path / "whole" / "report.json").exists()
    finetune(tmp_path, cache, "--name", "whole", "--resume", "true")
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "whole", finished))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert report_of(tmp_path / "whole") == report_of(finished)


def test_a_full_disk_leaves_what_was_there(finished: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Checkpoints.save
    calls = [0]

    def full(self: Checkpoints, *rest: object) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        real(self, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(SystemExit, match="No space left"):
            finetune(tmp_path, cache, "--name", "whole")
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["name"] == "whole"
    assert json.loads((tmp_path / "whole" / "checkpoints" / "stages" / "before" / "measurement.json").read_text())
    finetune(tmp_path, cache, "--name", "whole", "--resume", "true")
    assert report_of(tmp_path / "whole") == report_of(finished)


def test_measuring_only_and_without_a_control(cache: Path, tmp_path: Path) -> None:
    finetune(tmp_path, cache, "--name", "only", "--training.epochs", "0", "--training.control", "false", "--translator.folds", "2")
    report = read_report(tmp_path / "only")
    assert list(report.measurements) == ["before", "sing"]
    assert any("no control arm was trained" in sentence for sentence in report.warnings)
    assert [sentence.split()[0] for sentence in report.verdict] == ["Before:", "Nothing"], "no effect of a training that was none"
    before, after = (report.measurements[stage].translators["auditor"].overall for stage in ("before", "sing"))
    np.testing.assert_allclose([before[k] for k in ("AS", "IS")], [after[k] for k in ("AS", "IS")], atol=1e-4)
    frozen, loop = (report.measurements["sing"].translators[name].overall for name in ("frozen", "loop"))
    np.testing.assert_allclose([frozen[k] for k in ("AS", "IS")], [loop[k] for k in ("AS", "IS")], atol=1e-3)  # not one fold's


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_from_outside_leaves_a_run_that_resumes(number: int, finished: Path, cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.finetune", *arguments(tmp_path, cache, "--name", "whole")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "whole" / "checkpoints" / "control").glob("step-*/position.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    if number != signal.SIGKILL:
        assert "go on with: accelerate launch recipes/finetune.py" in said
    finetune(tmp_path, cache, "--name", "whole", "--resume", "true")
    assert report_of(tmp_path / "whole") == report_of(finished)
