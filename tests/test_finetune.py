"""recipes/finetune.py from end to end on tiny scenes: files, reloading, resuming, interruption, refusals."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch import Tensor

import finetune as recipe
from singreg import loop, runs
from singreg.models.classifier import Classifier
from singreg.task import LoopTranslator
from singreg.translator import load_translator
from tests.processes import run_same
from tests.tiny_run import arguments, differences, finetune, run, surroundings  # noqa: F401

STAGES = ["before", "control", "sing", "dropped"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    finetune(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files but TensorBoard's, which grow with every start."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_folder_of_a_run(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert list(report["measurements"]) == STAGES
    assert {measured["images"] for measured in report["measurements"].values()} == {45}
    assert set(report["measurements"]["sing"]["translators"]) == {"loop", "auditor"}
    dropped, control = (report["measurements"][name] for name in ("dropped", "control"))
    assert dropped["top1"] == control["top1"]
    gone = dropped["audit"]["class_variance"], dropped["translators"]["auditor"]["overall"]["IS"]
    assert gone == pytest.approx((0, 0), abs=1e-3)
    assert {"confirmed", "AS_neg", "top1"} <= report["paired"].keys()
    rows = pd.read_parquet(finished / "scores.parquet")
    assert rows.groupby("model").size().to_dict() == dict.fromkeys(STAGES, 45)
    assert {"report.md", "report.html", "config.yaml"} <= {path.name for path in finished.iterdir()}
    assert not (finished / "checkpoints" / "sing").exists(), "the arm's checkpoints have done their work"
    assert not list(finished.rglob(".*")), "temporary files were left behind"


def test_the_translators_say_which_model_they_belong_to(finished: Path) -> None:
    names = ("before", "after", "after-control")
    before, after, control = (load_translator(finished / f"translator-{n}.safetensors").info for n in names)
    assert after.head_hash == Classifier.from_timm(f"local-dir:{finished / 'model'}").head_hash()
    assert len({before.head_hash, after.head_hash, control.head_hash}) == 3
    assert before.images == 90
    with pytest.raises(ValueError, match="head_hash"):
        load_translator(finished / "translator-before.safetensors", expected=after)


def test_the_curves_of_both_arms(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "tensorboard").iterdir()) == ["control", "sing"]
    measured = json.loads((finished / "report.json").read_text())["measurements"]
    found = {arm: EventAccumulator(str(finished / "tensorboard" / arm)).Reload() for arm in ("control", "sing")}
    audited = [f"auditor/{name}" for name in ("AS_neg", "AS_abs", "IS", "class_variance", "steered_4sd")]
    wanted = {tag: [0, 10, 11] for tag in ("test/top1", *audited)}
    wanted |= {tag: [0, 5, 10] for tag in ("val/top1", "watch/AS_neg", "watch/AS_abs", "watch/IS")}
    common = list(wanted)
    wanted |= {f"train/{name}": [10] for name in ("loss", "ce", "top1", "gradient_norm", "learning_rate")}
    terms = {f"train/sing/{name}": [10] for name in ("readout", "capacity", "total", "weight")}
    for arm, events in found.items():
        points = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert points == (wanted if arm == "control" else wanted | terms)
        assert [event.value < 1e-5 for event in events.Scalars("train/learning_rate")] == [True], "cosine's end"
        values = [measured[stage]["audit"]["class_variance"] for stage in ("before", arm, arm)]
        assert [event.value for event in events.Scalars("auditor/class_variance")] == pytest.approx(values)
        started = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
        told = metadata.parse_session_start_info_plugin_data(started)
        assert (told.hparams["run"].string_value, told.hparams["loss.weight"].number_value) == (arm, arm == "sing")
    for tag in common:
        assert found["sing"].Scalars(tag)[0].value == pytest.approx(found["control"].Scalars(tag)[0].value, abs=1e-3)
    assert found["control"].Tags()["images"] == ["watch/histogram"]
    assert sorted(found["sing"].Tags()["images"]) == ["plots/joint", "plots/summary", "watch/histogram"]
    (page,) = found["sing"].Tensors("report/text_summary")
    assert "SingLoss" in page.tensor_proto.string_val[0].decode()


def test_a_finished_run_is_kept_and_resuming_it_does_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="already holds a run; go on with --resume true"):
        finetune(finished)
    with pytest.raises(SystemExit, match="differs from the configuration given"):
        finetune(finished, "--resume", "true", "--seed", "5")
    before = contents(finished)
    monkeypatch.setattr(recipe, "train", lambda *_: pytest.fail("an arm was trained again"))
    monkeypatch.setattr(Classifier, "features_and_logits", lambda *_: pytest.fail("something was measured again"))
    finetune(finished, "--resume", "true")
    after = contents(finished)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"report.json", "report.md", "report.html"}, "which hold the command"


def test_the_resolved_configuration_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    """A CPU run repeats bit for bit, from nothing but its config.yaml."""
    assert yaml.safe_load((finished / "config.yaml").read_text())["training"]["batch_size"] == 16
    finetune(tmp_path / "run", "--config", str(finished / "config.yaml"), "--out", str(tmp_path / "run"))
    assert differences(tmp_path / "run", finished) == []


def in_step(step: int, arm: str, action: Any) -> Any:
    """A patch that does something in the middle of an arm's step."""
    original = loop.micro_step

    def interrupted(this: loop.Arm, batch: Sequence[Tensor], now: int) -> Any:
        if now == step and this.name == arm:
            batch = action(batch) or batch
        return original(this, batch, now)

    return patch.object(loop, "micro_step", interrupted)


def fail(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("arm", "step"), [("control", 4), ("sing", 8)])
def test_a_run_that_stopped_anywhere_resumes_to_the_same_bits(
    arm: str, step: int, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_step(step, arm, fail), pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "run")
    said = capsys.readouterr().err
    assert f"kept in {tmp_path / 'run'}" in said
    assert f"--config {tmp_path / 'run' / 'config.yaml'} --resume true" in said
    assert not (tmp_path / "run" / "report.json").exists()
    finetune(tmp_path / "run", "--resume", "true")
    assert differences(tmp_path / "run", finished) == []


def test_sigterm_saves_the_step_and_leaves_the_refresh_for_later(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refresh comes after step 5 and may take as long as an epoch: the scheduler would have killed it by then."""
    refreshed: list[int] = []
    original = LoopTranslator.refresh

    def counted(self: LoopTranslator) -> None:
        refreshed.extend([int(self.sing.step)] if self.sing else [])
        original(self)

    monkeypatch.setattr(LoopTranslator, "refresh", counted)
    ending = in_step(4, "sing", lambda _: signal.raise_signal(signal.SIGTERM))
    with ending, pytest.raises(SystemExit) as stop:
        finetune(tmp_path / "run")
    assert stop.value.code == 143
    newest = sorted((tmp_path / "run" / "checkpoints" / "sing").glob("step-*"))[-1]
    assert newest.name == "step-00000005", "the step that was under way is in the checkpoint"
    assert json.loads((newest / "position.json").read_text())["due"] is True
    assert refreshed == []
    finetune(tmp_path / "run", "--resume", "true")
    assert refreshed == [5]
    assert differences(tmp_path / "run", finished) == []


@pytest.mark.parametrize("where", ["step-00000006", "report.json", pytest.param("stage.json", marks=pytest.mark.slow)])
def test_a_full_disk_stops_the_run_and_it_goes_on_later(where: str, finished: Path, tmp_path: Path) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == where:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with patch.object(os, "replace", replace), pytest.raises(OSError, match="No space left"):
        finetune(tmp_path / "run")
    assert not [path for path in tmp_path.rglob(".*") if path.name.startswith(".report")]
    finetune(tmp_path / "run", "--resume", "true")
    assert differences(tmp_path / "run", finished) == []


def test_a_run_is_not_resumed_on_other_images_or_models(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration is the same: a folder of images or of weights may have changed behind it."""
    before, now = contents(finished), runs.fingerprints
    for name in ("test images", "starting classifier", "vision-language model"):
        monkeypatch.setattr(recipe, "fingerprints", lambda setup, name=name: {**now(setup), name: "f" * 64})
        with pytest.raises(SystemExit, match=rf"the run was begun with other {name} \(then .*another --out"):
            finetune(finished, "--resume", "true")
    assert contents(finished) == before


def test_precision_and_accumulation_are_accelerates_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(SystemExit, match=r"batch_size = 16 cannot be split evenly into 3 accumulation"):
        finetune(tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    sizes: list[int] = []
    with in_step(0, "sing", lambda batch: sizes.append(len(batch[0]))):
        machine = finetune(tmp_path / "run", "--training.epochs", "1")["machine"]
    assert sizes == [8, 8]
    assert (machine["mixed_precision"], machine["accumulation"]) == ("bf16", 2)


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Counts are equal, and figures but for rounding."""
    for stage, measured in one.items():
        assert measured["images"] == other[stage]["images"]
        assert measured["top1"] == other[stage]["top1"]
        for name, scores in measured["translators"].items():
            assert scores["fit_images"] == other[stage]["translators"][name]["fit_images"]
            for figure in ("AS", "AS_neg", "IS"):
                theirs = other[stage]["translators"][name]["overall"][figure]
                assert scores["overall"][figure] == pytest.approx(theirs, abs=1e-3)


def test_two_processes_give_what_one_gives(finished: Path, tmp_path: Path) -> None:
    two, _ = run_same(2, finetune, tmp_path / "run")
    close(json.loads((finished / "report.json").read_text())["measurements"], two["measurements"])
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", finished))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, atol=2e-5, rtol=1e-3, msg=name)
    assert contents(tmp_path / "run").keys() == contents(finished).keys()


@pytest.mark.slow
def test_accelerate_starts_processes_that_give_ones_figures(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    sizes = ["--training.batch_size", "24", "--data.scenes", "{train: 241, audit: 307, test: 1003, bank: 101}"]
    reports = []
    for count in (1, 2, 3):
        more = ["--multi_gpu", "--num_processes", str(count)] if count > 1 else []
        given = arguments(tmp_path / str(count), *sizes)
        done = subprocess.run([*launch, *more, recipe.__file__, *given], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / str(count) / "report.json").read_text()))
        close(reports[0]["measurements"], reports[-1]["measurements"])
    assert [report["machine"]["processes"] for report in reports] == [1, 2, 3], "one that never started proves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_from_outside_leaves_a_run_that_resumes(number: int, finished: Path, tmp_path: Path) -> None:
    given, arm = arguments(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "control"
    ended = run(given, tmp_path / "log", signal=number, when=lambda: any(arm.glob("step-*/position.json")))
    assert ended.status == {signal.SIGINT: 1, signal.SIGTERM: 143, signal.SIGKILL: -9}[signal.Signals(number)]
    assert ("go on with: python " in ended.said) == (number != signal.SIGKILL)
    assert run([*given, "--resume", "true"], tmp_path / "log").status == 0
    assert differences(tmp_path / "run", finished) == []
