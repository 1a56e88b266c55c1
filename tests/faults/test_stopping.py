"""SIGTERM, Ctrl-C, full disks, folders that cannot be written, checkpoints that were cut: what is kept, what is said."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from singreg import files
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.old_seals import read_sealed
from singreg.training.experiment import Experiment
from singreg.training.loop import _Arm
from singreg.training.streaming import LoopTranslator
from singreg.workbench import stopping
from singreg.workbench.stopping import _State
from tests.faults.in_process import Refused, recipe
from tests.faults.processes import differences, one_core, run, tiny

RARELY = ["--training.checkpoint_every", "1000", "--training.batch_size", "2", "--training.epochs", "1"]  # 40 steps, no checkpoint before


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopping")


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    ended = run(tiny(place / "whole", place / "cache"), place / "whole.log")
    assert ended.status == 0, ended.said
    return place / "whole" / "run"


def contents(folder: Path) -> dict[str, bytes]:
    """All files but TensorBoard's, which grow with every start."""
    found = [path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def unasked() -> Iterator[None]:
    yield
    assert _State.number is None
    assert not _State.waited_for


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int, step: int, times: int = 1, arm: str = "control") -> None:
    """Send this process a signal in the middle of an arm's step, as often as wanted."""
    original = _Arm._micro_step

    def interrupted(self: _Arm, batch: object, now: int) -> None:
        if now == step and self.name == arm:
            for _ in range(times):
                signal.raise_signal(number)
        original(self, batch, now)  # type: ignore[arg-type]

    monkeypatch.setattr(_Arm, "_micro_step", interrupted)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_in_a_step_saves_that_step_and_leaves_with_the_command_to_go_on(
    number: int, whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = tiny(tmp_path, place / "cache")
    with one_core(), monkeypatch.context() as patch:  # as the run it is compared with
        stop_in_step(patch, number, 6)  # checkpoints are due after steps 3, 5, 6, 9 and 10
        with pytest.raises(Refused) as stop:
            recipe("finetune", *given)
    said = str(stop.value)
    assert said.startswith(f"{128 + number}\n")
    assert f"{signal.Signals(number).name}: stopping after this step" in said
    assert "go on with: accelerate launch recipes/finetune.py" in said
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints" / "control").glob("step-*"))
    assert steps[-1] == "step-00000007", "the step that was under way is in the checkpoint"
    with one_core():
        recipe("finetune", *given, "--resume", "true")
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(("repeated", "saved"), [(0.0, "step-00000006"), (5.0, "step-00000007")], ids=["later", "at once"])
def test_a_second_signal_does_not_wait_but_one_sent_twice_is_one(
    repeated: float, saved: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler signals the launcher, which passes it on, and every process itself: two signals within milliseconds."""
    stop_in_step(monkeypatch, signal.SIGTERM, 6, times=2)
    monkeypatch.setattr(stopping, "REPEATED", repeated)
    with pytest.raises(Refused, match="143") as stop:
        recipe("finetune", *tiny(tmp_path, place / "cache"))
    assert "go on with: accelerate launch" in str(stop.value)
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints" / "control").glob("step-*"))
    assert steps[-1] == saved


@pytest.mark.usefixtures("unasked")
def test_a_request_does_not_wait_for_the_translators_refresh_which_is_done_on_resume(
    whole: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refresh comes after step 5 and may take as long as an epoch: the scheduler would have killed the run by then."""
    given = tiny(tmp_path, place / "cache")
    refreshed: list[int] = []
    original = LoopTranslator.refresh

    def counted(self: LoopTranslator, classifier: Classifier, sing: SingLoss) -> None:
        refreshed.append(int(sing.step))
        original(self, classifier, sing)

    monkeypatch.setattr(LoopTranslator, "refresh", counted)
    with one_core(), monkeypatch.context() as patch:
        stop_in_step(patch, signal.SIGTERM, 4, arm="sing")
        with pytest.raises(Refused, match="143"):
            recipe("finetune", *given)
    assert refreshed == []
    newest = sorted((tmp_path / "run" / "checkpoints" / "sing").glob("step-*"))[-1]
    assert newest.name == "step-00000005"
    assert read_sealed(newest / "position.json")["refresh_due"] is True
    with one_core():
        recipe("finetune", *given, "--resume", "true")
    assert refreshed == [5]
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.slow
def test_sigterm_from_outside_ends_the_process_with_143(place: Path, tmp_path: Path) -> None:
    begun = tmp_path / "run" / "tensorboard" / "control"
    given = tiny(tmp_path, place / "cache", *RARELY)
    ended = run(given, tmp_path / "log", signal=signal.SIGTERM, when=lambda: any(begun.glob("*tfevents*")))
    assert ended.status == 143, ended.said
    assert "stopped; all finished work is kept in" in ended.said
    assert f"--config {tmp_path / 'run' / 'config.yaml'} --resume true" in ended.said
    assert "Traceback" not in ended.said
    steps = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints" / "control").glob("step-*")]
    assert len(steps) <= 1  # none when it came before the first step: then nothing is lost
    assert all(0 < step <= 40 for step in steps)
    print(f"\nSIGTERM: saved at step {steps} of 40, none was due before 40; exit status {ended.status}")


@pytest.mark.parametrize(("where", "number"), [("mkstemp", errno.EROFS), ("fsync", errno.ENOSPC), ("replace", errno.ENOSPC)])
def test_a_disk_that_cannot_be_written_is_one_sentence_and_overwrites_nothing(
    where: str, number: int, whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(whole)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.tempfile if where == "mkstemp" else files.os, where, refuse)
        with pytest.raises(Refused) as stop:
            recipe("finetune", *tiny(whole.parent, place / "cache", "--resume", "true"))
    assert f"error: [Errno {number}] {os.strerror(number)}" in str(stop.value)
    assert f"kept in {whole}" in str(stop.value)
    assert contents(whole) == before


def test_a_run_is_not_resumed_on_other_pictures_or_models(whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration is the same: a folder of pictures or of weights may have changed behind it."""
    before, now = contents(whole), Experiment.inputs
    for name in ("test pictures", "starting classifier", "vision-language model"):
        monkeypatch.setattr(Experiment, "inputs", lambda self, name=name: {**now(self), name: "f" * 64})
        with pytest.raises(Refused) as stop:
            recipe("finetune", *tiny(whole.parent, place / "cache", "--resume", "true"))
        assert f"inputs.json: the run was begun with other {name} (then " in str(stop.value.__cause__)
        assert "use another --name" in str(stop.value.__cause__)
        assert "go on with" not in str(stop.value)
    assert contents(whole) == before


@pytest.mark.slow
def test_a_disk_that_fills_up_in_training_keeps_what_is_finished(whole: Path, place: Path, tmp_path: Path) -> None:
    given = tiny(tmp_path, place / "cache")
    ended = run(given, tmp_path / "log", limit=200_000)
    assert ended.status == 1, ended.said
    assert "Traceback" not in ended.said
    assert "error: " in ended.said
    assert f"kept in {tmp_path / 'run'}" in ended.said
    assert (tmp_path / "run" / "checkpoints" / "stages" / "before" / "measurement.json").is_file()
    assert not list((tmp_path / "run" / "checkpoints" / "control").glob("step-*")), "half a checkpoint counts as one"
    again = run([*given, "--resume", "true"], tmp_path / "log")
    assert again.status == 0, again.said
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.slow
def test_a_cut_checkpoint_is_named_and_the_one_before_is_used(whole: Path, place: Path, tmp_path: Path) -> None:
    given = tiny(tmp_path, place / "cache")
    arm = tmp_path / "run" / "checkpoints" / "control"
    run(given, tmp_path / "log", signal=signal.SIGKILL, when=lambda: len(list(arm.glob("step-*/position.json"))) > 1)
    first, last = sorted(arm.glob("step-*"))[-2:]
    content = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(content[: len(content) // 2])
    ended = run([*given, "--resume", "true"], tmp_path / "log")
    assert ended.status == 0, ended.said
    assert f"checkpoint {last} cannot be read ({last / 'model.safetensors'} is damaged" in ended.said
    assert f"resuming from {first}" in ended.said
    assert differences(tmp_path / "run", whole) == []
