"""A run's folder, refused or resumed, and what ends it; its reports, and trackers that get plain numbers."""

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands import launch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from singreg import runs
from singreg.config import FinetuneConfig, parse
from singreg.report import Figure, Section, interval, log, log_figures, number, percent, track, write_report
from singreg.runs import Run, StopRequest, explained, start

Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run in a folder of its own, with other values where they are given."""
    usual = {"out": str(tmp_path / "one")}
    accelerator = start(FinetuneConfig(**usual))  # type: ignore[arg-type]
    return lambda **changes: Run(FinetuneConfig(**{**usual, **changes}), accelerator, "finetune")


def test_a_new_folder_holds_the_resolved_configuration(make: Make, tmp_path: Path) -> None:
    make().check()
    assert list(tmp_path.iterdir()) == [], "checking makes nothing"
    run = make().open()
    assert [path.name for path in run.folder.iterdir()] == ["config.yaml"]
    assert parse(FinetuneConfig, ["--config", str(run.folder / "config.yaml")]) == run.config


def test_a_place_that_cannot_be_written_is_refused_early(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"as .*file is a file; give another --out"):
        make(out=str(tmp_path / "file" / "run"), dry_run=True).check()


@pytest.mark.parametrize(("name", "words"), [("tensorbord", "is none of all, aim"), ("swanlab", "is not installed")])
def test_a_tracker_that_is_not_there_is_refused(name: str, words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        start(FinetuneConfig(log_with=name, dry_run=True))


def test_a_folder_with_another_run_is_refused(make: Make) -> None:
    for _ in range(2):
        make(resume=True).open()  # a cluster's job script gives the same command every time
    with pytest.raises(FileExistsError, match="already holds a run"):
        make().open()
    with pytest.raises(ValueError, match="differs from the configuration given"):
        make(resume=True, seed=1).open()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_end_says_how_to_go_on(kind: Any, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a space and a quote in its name too; the script is the one that was started."""
    run = make(out=str(tmp_path / "anna's run")).open()
    with patch("sys.argv", ["/my scripts/finetune.py", "--seed", "0"]), pytest.raises(kind), run.guarded():
        raise kind
    script, *given = shlex.split(capsys.readouterr().err.partition("go on with: python ")[2])
    assert script == "/my scripts/finetune.py"
    assert Run(parse(FinetuneConfig, given), run.accelerator, "finetune").open().folder == run.folder
    with patch.object(Accelerator, "num_processes", 2):
        assert run.command.startswith("accelerate launch --multi_gpu --num_processes 2 ")


def test_an_error_that_says_what_is_wrong_is_all(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="other images"), make().open().guarded():
        raise SystemExit("error: other images")
    assert "go on with" not in capsys.readouterr().err


def test_sigterm_ends_a_run_and_is_handled_inside_only(make: Make) -> None:
    run, outside = make().open(), signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as stop, run.guarded():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, outside)
    assert stop.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(("repeated", "waits"), [(0.0, False), (5.0, True)])
def test_a_loop_takes_one_signal_and_a_late_second_ends(
    repeated: float, waits: bool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = make().open(), list[str]()
    monkeypatch.setattr(runs, "REPEATED", repeated)
    with pytest.raises(SystemExit), run.guarded(), StopRequest(run.accelerator) as request:
        signal.raise_signal(signal.SIGTERM)
        assert request.came()
        signal.raise_signal(signal.SIGTERM)
        steps.append("saved")
        request.end()
    assert bool(steps) is waits


def test_a_users_mistake_is_a_sentence_and_a_bug_is_not() -> None:
    with pytest.raises(SystemExit, match="error: what is wrong"), explained():
        raise FileNotFoundError("what is wrong")
    with pytest.raises(SystemExit, match=r"not UTF-8: 'a/caf\\udce9.png'"), explained():
        os.fsdecode(b"a/caf\xe9.png").encode()
    with pytest.raises(RuntimeError), explained():
        raise RuntimeError


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "model.compile"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "needs a GPU"),
        ("MASTER_ADDR", "127.0.0.1", "one process only"),  # of accelerate launch --num_processes 2 on a CPU
    ],
)
def test_what_accelerate_cannot_do_here_is_refused(key: str, value: str, said: str, tmp_path: Path) -> None:
    without_gpu = patch("torch.cuda.is_available", return_value=False)
    with without_gpu, patch.dict(os.environ, {key: value}), pytest.raises(SystemExit, match=said):
        start(FinetuneConfig(out=str(tmp_path / "run")))


def test_accelerate_takes_our_files(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine of many cores, where a file with `use_cpu` would make the launcher warn of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 8)
    files = {"cpu": 1, "cpu --multi_gpu --num_processes 3": 3, "one_gpu": 1, "multi_gpu": 8, "multi_node": 16}
    for given, processes in files.items():
        name, *more = given.split()
        arguments = ["--config_file", f"configs/accelerate/{name}.yaml", *more, "recipes/finetune.py"]
        found, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
        assert (found.num_processes, found.multi_gpu) == (processes, processes > 1)
    assert caplog.text == ""


NASTY = 'a|b <script>alert("x")</script> `c`'


@pytest.fixture
def run(make: Make) -> Run:
    return make().open()


def figure(run: Run) -> Figure:
    path = run.folder / "plots" / "a.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (30, 20), "red").save(path)
    return Figure(path, f"caption {NASTY}")


def test_numbers_as_people_read_them() -> None:
    assert [number(None), number(1.005, 1), number(-0.0001), number(np.inf)] == ["–", "1.0", "0.00", "∞"]
    assert percent(0.1234) == "12.3%"
    assert interval(1, 0.5, float("nan"), 1) == "1.0 [0.5, –]"


def test_a_report_holds_everything_in_every_form(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.DataFrame({"|AS|": [1.23456, np.nan], "name": [NASTY, None]})
    rows = pd.DataFrame({"image": ["a.png", "b.png"], "AS/auditor": [0.5, -0.5]})
    with run.timed("measure"):
        sections = [Section("Results", ["a paragraph", table, figure(run)])]
    said = {"title": f"Run {NASTY}", "verdict": ["It leaks."], "warnings": ["Few images."], "sections": sections}
    write_report(run, **said, figures={"top1": np.float32(0.5), "gap": float("nan")}, rows=rows)  # type: ignore[arg-type]
    report = json.loads((run.folder / "report.json").read_text())
    assert (report["kind"], report["top1"], report["gap"], report["verdict"]) == ("finetune", 0.5, None, ["It leaks."])
    assert {"settings", "machine", "seconds"} <= set(report)
    pd.testing.assert_frame_equal(pd.read_parquet(run.folder / "scores.parquet"), rows)
    page, text = (run.folder / "report.html").read_text(), (run.folder / "report.md").read_text()
    for form in (page, text):
        assert "<script>" not in form
        assert "1.235" in form
        assert "Few images." in form
    assert page.count("data:image/png;base64,") == 1
    assert "](plots/a.png)" in text
    lines = [line for line in text.splitlines() if line.startswith("| 1.235")]
    assert lines[0].replace("\\|", "").count("|") == 3, "a name cannot add a column"
    assert capsys.readouterr().out.splitlines()[:2] == ["Few images.", "It leaks."]


def test_trackers_get_flat_settings_and_plain_numbers(run: Run) -> None:
    """TensorBoard raises on nested settings and drops np.float32, None and vectors without a word."""
    accelerator = run.accelerator
    track(accelerator, "sing", run.config, ["b", "a"])
    log(accelerator, {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": None, "d": 3}, step=1)
    log(accelerator, {"a": 0.25}, step=2)
    log_figures(accelerator, [figure(run)])
    with pytest.raises(TypeError):
        log(accelerator, {"vector": np.ones(2)}, step=1)
    accelerator.end_training()
    events = EventAccumulator(str(run.folder / "tensorboard" / "sing"), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["a", "b", "d"]
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(1, 0.5), (2, 0.25)]
    assert events.Tags()["images"] == ["plots/a"]
    started = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(started).hparams
    assert settings.keys() == {"run", "seed", "loss.weight", "training.epochs", "training.learning_rate"}
    assert (settings["run"].string_value, settings["training.epochs"].number_value) == ("sing", 2)
    table = metadata.parse_experiment_plugin_data(events.summary_metadata[metadata.EXPERIMENT_TAG].plugin_data.content)
    assert [info.name.tag for info in table.metric_infos] == ["b", "a"]
