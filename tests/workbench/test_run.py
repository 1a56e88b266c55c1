"""A run's folder: refused when it is another run's, resumed when it is the same, and named when something ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from singreg.training.config import FinetuneConfig, parse_finetune
from singreg.workbench.run import Run, describe_machine, explained, make_accelerator, usable_cores


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield make_accelerator(seed=0)
    AcceleratorState._reset_state(True)


def config(folder: Path, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(runs=str(folder), **{"name": "one", **changes})


def open_run(folder: Path, accelerator: Accelerator, **changes: Any) -> Run:
    return Run(config(folder, **changes), accelerator, "finetune").open()


def test_a_new_folder_holds_the_resolved_configuration(accelerator: Accelerator, tmp_path: Path) -> None:
    run = open_run(tmp_path, accelerator)
    assert run.folder == tmp_path / "one"
    assert [path.name for path in run.folder.iterdir()] == ["config.yaml"]
    assert parse_finetune(["--config", str(run.folder / "config.yaml")]) == run.config


def test_checking_makes_nothing(accelerator: Accelerator, tmp_path: Path) -> None:
    Run(config(tmp_path), accelerator, "finetune").check()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_in_it_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    open_run(tmp_path, accelerator)
    with pytest.raises(FileExistsError, match=r"one already holds a run; use --resume true .*or another --name"):
        open_run(tmp_path, accelerator)


def test_resuming_wants_the_same_configuration(accelerator: Accelerator, tmp_path: Path) -> None:
    open_run(tmp_path, accelerator)
    text = (tmp_path / "one" / "config.yaml").read_text()
    assert open_run(tmp_path, accelerator, resume=True).config.resume
    with pytest.raises(ValueError, match=r"config\.yaml differs from the configuration given.*--config .*config\.yaml --resume true"):
        open_run(tmp_path, accelerator, resume=True, seed=1)
    assert (tmp_path / "one" / "config.yaml").read_text() == text


def test_a_run_may_begin_with_resume(accelerator: Accelerator, tmp_path: Path) -> None:
    """A cluster's job script gives the same command every time."""
    open_run(tmp_path, accelerator, resume=True)
    assert "resume: false" in (tmp_path / "one" / "config.yaml").read_text()
    open_run(tmp_path, accelerator, resume=True)


class Failure(Exception):
    """Any error in the middle of a run."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Failure])
def test_what_ends_a_run_passes_on_after_the_command_to_go_on_with(
    kind: type[BaseException], accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tmp_path, accelerator)
    with pytest.raises(kind), run.guarded():
        raise kind
    said = capsys.readouterr().err
    folder = tmp_path / "one"
    assert f"kept in {folder}\n" in said
    command = said.partition("go on with: ")[2].strip()
    assert command == f"accelerate launch recipes/finetune.py --config {folder / 'config.yaml'} --resume true"
    resumed = parse_finetune(command.split()[3:])  # it is the same run, as the folder will have it
    assert Run(resumed, accelerator, "finetune").open().folder == folder


def test_nothing_is_promised_when_there_is_no_folder_or_no_failure(
    accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(config(tmp_path), accelerator, "finetune")
    with pytest.raises(Failure), run.guarded():
        raise Failure
    with open_run(tmp_path, accelerator).guarded():
        pass
    assert capsys.readouterr().err == ""


def test_sigterm_ends_a_run_like_an_interruption_and_only_while_it_runs(
    accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tmp_path, accelerator)
    outside = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as stop, run.guarded():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "as it was before the run"
    finally:
        signal.signal(signal.SIGTERM, outside)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "--resume true" in capsys.readouterr().err


def test_a_run_in_another_thread_leaves_signals_alone(accelerator: Accelerator, tmp_path: Path) -> None:
    run, finished = open_run(tmp_path, accelerator), []

    def work() -> None:
        with run.guarded():
            finished.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert finished == [True]


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, FileExistsError])
def test_a_users_mistake_is_a_sentence_and_a_bug_keeps_its_traceback(kind: type[Exception]) -> None:
    with pytest.raises(SystemExit, match="error: what is wrong"), explained():
        raise kind("what is wrong")
    with pytest.raises(RuntimeError), explained():
        raise RuntimeError


def test_the_machine_is_described(accelerator: Accelerator) -> None:
    machine = describe_machine(accelerator)
    assert machine["processes"] == 1
    assert machine["cores"] == usable_cores() >= 1
    assert machine["torch"] == torch.__version__
    assert machine["memory_gib"] > 0


def test_equal_seeds_give_equal_draws(accelerator: Accelerator) -> None:
    drawn = []
    for seed in (3, 3, 4):
        AcceleratorState._reset_state(True)
        make_accelerator(seed=seed)
        drawn.append(torch.rand(2).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("key", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
def test_sharded_weights_are_refused_in_words(key: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(key, "false")
    make_accelerator(seed=0)
    monkeypatch.setenv(key, "true")
    with pytest.raises(SystemExit, match=f"started with {name}, which shards the weights.*--multi_gpu"):
        make_accelerator(seed=0)


def test_accelerates_own_compile_switch_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    make_accelerator(seed=0)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(SystemExit, match=r"dynamo backend 'inductor'.*set model\.compile: true"):
        make_accelerator(seed=0)
