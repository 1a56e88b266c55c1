"""A run's folder: refused when it is another run's, resumed when it is the same, and named when something ends it."""

import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from accelerate import Accelerator
from accelerate.commands import launch

from singreg import runs
from singreg.config import FinetuneConfig, parse
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
