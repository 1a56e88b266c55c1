"""A run's folder: refused when it is another run's, resumed when it is the same, and named when something ends it."""

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.state import AcceleratorState

from singreg import runs
from singreg.config import FinetuneConfig, parse
from singreg.runs import Run, StopRequest, explained, start


@pytest.fixture
def accelerator(tmp_path: Path) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield start(config(tmp_path))
    AcceleratorState._reset_state(True)


def config(folder: Path, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"out": str(folder / "one"), **changes})


def open_run(folder: Path, accelerator: Accelerator, **changes: Any) -> Run:
    return Run(config(folder, **changes), accelerator, "finetune").open()


def test_a_new_folder_holds_the_resolved_configuration(accelerator: Accelerator, tmp_path: Path) -> None:
    Run(config(tmp_path), accelerator, "finetune").check()
    assert list(tmp_path.iterdir()) == [], "checking makes nothing"
    run = open_run(tmp_path, accelerator)
    assert [path.name for path in run.folder.iterdir()] == ["config.yaml"]
    assert parse(FinetuneConfig, ["--config", str(run.folder / "config.yaml")]) == run.config


def test_a_place_that_cannot_be_written_is_refused_early(accelerator: Accelerator, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"as .*file is a file; give another --out"):
        Run(config(tmp_path, out=str(tmp_path / "file" / "run"), dry_run=True), accelerator, "finetune").check()


@pytest.mark.parametrize(("name", "words"), [("tensorbord", "is none of all, aim"), ("swanlab", "is not installed")])
def test_a_tracker_that_is_not_there_is_refused(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=words):
        start(config(tmp_path, log_with=name, dry_run=True))


def test_a_folder_with_another_run_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    open_run(tmp_path, accelerator, resume=True)  # a cluster's job script gives the same command every time
    open_run(tmp_path, accelerator, resume=True)
    with pytest.raises(FileExistsError, match="already holds a run"):
        open_run(tmp_path, accelerator)
    with pytest.raises(ValueError, match="differs from the configuration given"):
        open_run(tmp_path, accelerator, resume=True, seed=1)


class Failure(Exception):
    """Any error in the middle of a run."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Failure])
def test_what_ends_a_run_says_how_to_go_on(
    kind: type[BaseException],
    accelerator: Accelerator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder with a space and a quote in its name too; the script is the one that was started."""
    monkeypatch.setattr("sys.argv", ["/my scripts/finetune.py", "--seed", "0"])
    run = open_run(tmp_path, accelerator, out=str(tmp_path / "anna's run"))
    with pytest.raises(kind), run.guarded():
        raise kind
    said = capsys.readouterr().err
    script, *given = shlex.split(said.partition("go on with: python ")[2])
    assert script == "/my scripts/finetune.py"
    assert Run(parse(FinetuneConfig, given), accelerator, "finetune").open().folder == run.folder
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    assert run.command.startswith("accelerate launch --multi_gpu --num_processes 2 ")


def test_an_error_that_says_what_is_wrong_is_all_that_is_said(
    accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="other images"), open_run(tmp_path, accelerator).guarded():
        raise SystemExit("error: other images")
    assert "go on with" not in capsys.readouterr().err


def test_sigterm_ends_a_run_and_is_handled_inside_only(accelerator: Accelerator, tmp_path: Path) -> None:
    run = open_run(tmp_path, accelerator)
    outside = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as stop, run.guarded():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, outside)
    assert stop.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(("repeated", "waits"), [(0.0, False), (5.0, True)])
def test_a_loop_takes_the_first_signal_and_a_late_second_one_ends(
    repeated: float, waits: bool, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "REPEATED", repeated)
    steps: list[str] = []
    with pytest.raises(SystemExit), open_run(tmp_path, accelerator).guarded(), StopRequest(accelerator) as request:
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
def test_what_accelerate_cannot_do_here_is_refused(
    key: str, value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(True)
    start(config(tmp_path))
    AcceleratorState._reset_state(True)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match=said):
        start(config(tmp_path))
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("name", "more", "processes"),
    [
        ("cpu", "", 1),
        ("cpu", "--multi_gpu --num_processes 3", 3),
        ("one_gpu", "", 1),
        ("multi_gpu", "", 8),
        ("multi_node", "", 16),
    ],
)
def test_accelerate_takes_our_files_without_a_word(
    name: str, more: str, processes: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine of many cores, where a file with `use_cpu` would make the launcher warn of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 8)
    arguments = ["--config_file", f"configs/accelerate/{name}.yaml", *more.split(), "recipes/finetune.py"]
    found, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    assert (found.num_processes, found.multi_gpu) == (processes, processes > 1)
    assert caplog.text == ""
