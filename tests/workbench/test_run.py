"""A run's folder: refused when it is another run's, resumed when it is the same, and named when something ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from singreg.training.config import FinetuneConfig, parse_finetune
from singreg.workbench.run import OtherRunError, Run, describe_machine, explained, make_accelerator, usable_cores


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


def test_fp16_without_a_gpu_is_refused_where_accelerate_would_train_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"mixed_precision: fp16 needs a GPU.*set training\.mixed_precision to bf16 or no"):
        make_accelerator(seed=0, mixed_precision="fp16")
    AcceleratorState._reset_state(True)
    assert make_accelerator(seed=0, mixed_precision="bf16").mixed_precision == "bf16"
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("launched", "wanted", "said"),
    [
        ("bf16", "no", "launched with bf16, the run uses training.mixed_precision: no; set --training.mixed_precision bf16\n"),
        ("fp16", "bf16", "launched with fp16, the run uses training.mixed_precision: bf16; set --training.mixed_precision fp16\n"),
        ("bf16", None, "launched with bf16, this job trains nothing and runs in float32\n"),
        ("bf16", "bf16", ""),
        ("no", "bf16", ""),  # what the launcher says when it was told nothing
    ],
)
def test_the_launchers_precision_gives_way_in_one_line(
    launched: str, wanted: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    AcceleratorState._reset_state(True)
    assert make_accelerator(seed=0, mixed_precision=wanted).mixed_precision == (wanted or "no")
    AcceleratorState._reset_state(True)
    assert capsys.readouterr().err == (f"accelerate was {said}" if said else "")


def test_apples_gpu_is_passed_over_with_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}
    original = Accelerator.__init__

    def noted(self: Accelerator, **options: Any) -> None:
        given.update(options)
        original(self, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(Accelerator, "__init__", noted)
    AcceleratorState._reset_state(True)
    assert make_accelerator(seed=0).device.type == "cpu"
    AcceleratorState._reset_state(True)
    assert given["cpu"] is True
    assert "has no float64" in capsys.readouterr().err
    timeouts = [handler.timeout for handler in given["kwargs_handlers"] if hasattr(handler, "timeout")]
    assert timeouts == [timedelta(hours=3)]


@pytest.mark.parametrize(("kind", "said"), [(Failure, True), (SystemExit, False), (KeyboardInterrupt, False)])
def test_a_process_that_fails_alone_says_how_to_go_on(
    kind: type[BaseException], said: bool, accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first may be ended by the launcher before it can; what was asked of all is said by the first alone."""
    run = open_run(tmp_path, accelerator)
    other: Any = SimpleNamespace(is_main_process=False, process_index=3)
    run.accelerator = other
    with pytest.raises(kind), run.guarded():
        raise kind
    found = capsys.readouterr().err
    assert ("process 3: stopped; all finished work" in found and f"go on with: {run.resume_command()}" in found) is said
    assert bool(found) is said


def test_another_run_is_a_sentence_without_a_command_to_go_on(
    accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tmp_path, accelerator)
    with pytest.raises(SystemExit, match="error: other pictures"), run.guarded():
        raise OtherRunError("other pictures")
    assert capsys.readouterr().err == ""
