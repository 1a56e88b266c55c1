"""One arm on the real loop: accumulation, resuming to the same bits, data order, workers, what is not finite."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from singreg.training.checkpoint import Checkpoints
from singreg.training.loop import TrainingFailed, _Arm
from singreg.workbench.stopping import StopRequest
from tests.processes import run_processes
from tests.training.small_arm import COUNT, Arm, Pixels, Stop

ARMS = pytest.mark.parametrize("regularised", [False, True], ids=["control", "sing"])
# Ratio terms and running means are taken over a forward's pictures, so accumulation may change those.
PLAIN = {"terms": {"hinge": 1.0, "band": 0.3, "capacity": 10.0}, "momentum": 1.0}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


Straight = Callable[[bool, int], tuple[Arm, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Uninterrupted arms and their weights, by (regularised, accumulation), trained when first asked for."""

    @cache
    def train(regularised: bool, accumulation: int) -> tuple[Arm, dict[str, Tensor]]:
        arm = Arm(tmp_path_factory.mktemp("straight"), regularised, training={"accumulation": accumulation})
        return arm, arm.run()

    return train


@ARMS
def test_accumulating_two_times_four_is_a_batch_of_eight(regularised: bool, tmp_path: Path) -> None:
    def train(name: str, **training: int) -> dict[str, Tensor]:
        return Arm(tmp_path / name, regularised, dropout=0.0, training=training, options=PLAIN).run()

    whole = train("8")
    assert largest_difference(whole, train("4+4", accumulation=2)) < 1e-6
    assert largest_difference(whole, train("4", batch_size=4)) > 1e-3  # without accumulation it is another run


@pytest.mark.parametrize(
    ("regularised", "accumulation", "stop_after", "saved"),
    # In the first epoch of five steps; at its end, before that is saved; in the second.
    [(False, 1, 4, 3), (True, 2, 4, 3), (True, 1, 5, 3), (True, 1, 9, 6), (False, 2, 9, 6)],
)
def test_a_stopped_arm_resumes_to_the_same_bits(
    regularised: bool, accumulation: int, stop_after: int, saved: int, straight: Straight, tmp_path: Path
) -> None:
    """Mirroring, dropout, batch norm, Adam's moments, λ, running means and the refreshed translator all come back."""
    whole, expected = straight(regularised, accumulation)
    training = {"accumulation": accumulation}
    with pytest.raises(Stop):
        Arm(tmp_path, regularised, training=training).run(stop_after=stop_after)
    resumed = Arm(tmp_path, regularised, training=training)
    assert same_bits(resumed.run(resume=True), expected)
    assert list(resumed.logged) == list(range(saved + 1, 11)), "it goes on after the newest checkpoint"
    assert {step: whole.logged[step] for step in resumed.logged} == resumed.logged
    if resumed.sing is not None and whole.sing is not None:
        assert same_bits(resumed.sing.state_dict(), whole.sing.state_dict())


def test_a_finished_arm_resumes_to_itself(straight: Straight) -> None:
    whole, expected = straight(True, 1)
    again = Arm(whole.folder)
    assert same_bits(again.run(resume=True), expected)
    assert again.logged == {}
    assert again.part.asked == []


def test_both_arms_see_the_same_pictures_in_the_same_order_and_every_epoch_in_another(straight: Straight) -> None:
    asked = straight(False, 1)[0].part.asked
    assert asked == straight(True, 1)[0].part.asked
    first, second = np.array(asked).reshape(2, 5 * 8)  # the incomplete batch is left out
    assert [len(set(first)), len(set(second))] == [40, 40]
    assert list(first) != list(second)
    assert set(first) != set(second), "what is left out is not always the same either"


def test_the_translator_is_refreshed_where_the_schedule_says(straight: Straight) -> None:
    assert straight(True, 1)[0].refreshed == [5]
    assert straight(False, 1)[0].refreshed == []


def test_every_epoch_mirrors_other_pictures(straight: Straight, tmp_path: Path) -> None:
    """One step an epoch on all pictures, no dropout: only the mirroring can make epochs differ."""
    seen: list[dict[int, Tensor]] = []
    arm = Arm(tmp_path, regularised=False, dropout=0.0, training={"epochs": 2, "batch_size": COUNT})
    with pytest.MonkeyPatch.context() as patch:
        original = _Arm._micro_step

        def noted(self: _Arm, batch: tuple[Tensor, ...], step: int) -> None:
            seen.append(dict(zip(batch[-1].tolist(), batch[0], strict=True)))
            original(self, batch, step)

        patch.setattr(_Arm, "_micro_step", noted)
        arm.run()
    first, second = seen
    assert first.keys() == second.keys()
    changed = sum(not torch.equal(first[index], second[index]) for index in first)
    assert 10 < changed < COUNT - 10


def test_without_a_weight_the_regularised_arm_is_the_control(straight: Straight, tmp_path: Path) -> None:
    """The clean view, the loss's own buffers and the refresh change nothing by themselves."""
    control = straight(False, 1)[1]
    assert same_bits(control, Arm(tmp_path, options={"weight": 0.0}).run())
    assert largest_difference(control, straight(True, 1)[1]) > 1e-3


def test_loader_processes_change_nothing(straight: Straight, tmp_path: Path) -> None:
    elsewhere = Arm(tmp_path, workers=2)
    assert same_bits(elsewhere.run(), straight(True, 1)[1])
    assert not elsewhere.part.asked, "the pictures were read by other processes"


@ARMS
def test_a_loss_that_is_not_finite_stops_before_the_step(
    regularised: bool, straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = _Arm._micro_step

    def poisoned(self: _Arm, batch: tuple[Tensor, ...], step: int) -> None:
        views = [torch.full_like(view, float("nan")) for view in batch[:-2]] if step == 7 else list(batch[:-2])
        original(self, (*views, *batch[-2:]), step)

    arm = Arm(tmp_path, regularised)
    with monkeypatch.context() as patch:
        patch.setattr(_Arm, "_micro_step", poisoned)
        with pytest.raises(TrainingFailed, match=r"the loss is not finite at step 8 .*'ce': nan.*nothing was updated") as failed:
            arm.run()
    pictures = [int(word.rstrip(".,").removeprefix("pixels-")) for word in str(failed.value).split() if word.startswith("pixels-")]
    first_epoch = 5 * 8  # the loader reads one batch ahead
    assert len(pictures) == 8
    assert pictures == [index for index in arm.part.asked if index in pictures][-8:]
    assert set(pictures) <= set(arm.part.asked[first_epoch:])
    assert [path.name for path in Checkpoints(tmp_path, keep=9).all()] == ["step-00000005", "step-00000006"]
    assert same_bits(Arm(tmp_path, regularised).run(resume=True), straight(regularised, 1)[1])


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss can have no finite gradient; the step would spoil the weights and the next checkpoint would keep them."""
    original = _Arm._micro_step

    def poisoned(self: _Arm, batch: tuple[Tensor, ...], step: int) -> None:
        head = self.task.classifier.head.weight
        handle = head.register_hook(lambda gradient: gradient * float("nan")) if step == 5 else None
        try:
            original(self, batch, step)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(_Arm, "_micro_step", poisoned)
    with pytest.raises(TrainingFailed, match=r"the gradient is not finite at step 6 .*pixels-\d+"):
        Arm(tmp_path).run()
    assert [path.name for path in Checkpoints(tmp_path, keep=9).all()] == ["step-00000003", "step-00000005"]


def test_fp16_may_skip_nineteen_steps_in_a_row_and_not_one_more() -> None:
    """The scaler passes over a gradient that is not finite; one that never becomes finite would be passed over for ever."""
    inner = _Arm.__new__(_Arm)
    inner.name, inner.part, inner.skipped = "control", Pixels(), 0
    inner.accelerator = SimpleNamespace(scaler=object())  # type: ignore[assignment]

    def gradient(norm: float, step: int) -> None:
        inner._check_gradient({"gradient_norm": torch.tensor(norm)}, torch.tensor([4, 2]), step)

    for norm in [*[float("inf")] * 19, 1.0, *[float("nan")] * 19]:
        gradient(norm, 7)
    with pytest.raises(TrainingFailed, match=r"the gradient, the 20th in a row .* is not finite at step 9 .*pixels-4, pixels-2.*--name"):
        gradient(float("inf"), 8)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_what_ends_a_run_while_it_saves_leaves_only_whole_checkpoints(
    kind: type[BaseException], straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Accelerator.save_state, [0]

    def interrupted(self: Accelerator, folder: str, **options: object) -> str:
        calls[0] += 1
        if calls[0] == 2:
            (Path(folder) / "model.safetensors").write_bytes(b"half of i")
            raise kind
        return original(self, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", interrupted)
        with pytest.raises(kind):
            Arm(tmp_path).run()
    assert [path.name for path in Checkpoints(tmp_path, keep=9).all()] == ["step-00000003"]
    assert same_bits(Arm(tmp_path).run(resume=True), straight(True, 1)[1])
    assert not list(tmp_path.glob(".writing-*")), "what the interruption left was cleared away"


def _in_process(rank: int, world: int, folder: str, options: dict[str, Any], stop_after: int | None, resume: bool) -> Any:
    arm = Arm(Path(folder), dropout=0.0, options=options)
    try:
        return arm.run(stop_after=stop_after, resume=resume), arm.part.asked
    except Stop:
        return None


def test_two_processes_take_the_steps_of_one_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    """All terms: ratios and running means are over the batch of all processes, so nothing but rounding differs."""
    alone = Arm(tmp_path / "one", dropout=0.0)
    expected = alone.run()
    together = run_processes(2, _in_process, str(tmp_path / "two"), {}, None, False)
    for weights, _ in together:
        assert largest_difference(weights, expected) < 1e-6
        assert same_bits(weights, together[0][0])
    shares = [np.array(asked).reshape(10, 4) for _, asked in together]
    both = np.concatenate(shares, axis=1)
    assert [set(step) for step in both] == [set(step) for step in np.array(alone.part.asked).reshape(10, 8)]
    assert run_processes(2, _in_process, str(tmp_path / "stopped"), {}, 9, False) == [None, None]
    for weights, _ in run_processes(2, _in_process, str(tmp_path / "stopped"), {}, None, True):
        assert same_bits(weights, together[0][0])


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """A request to stop that is found after this step, as if a scheduler had sent SIGTERM in it."""
    asked = [0]

    def came(_: StopRequest) -> bool:
        asked[0] += 1
        return asked[0] == step

    patch.setattr(StopRequest, "came", came)


@pytest.mark.parametrize("step", [5, 10], ids=["where a refresh and an epoch's end are due", "last"])
def test_an_arm_that_was_asked_to_stop_does_what_was_due_when_it_goes_on(
    step: int, straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = straight(True, 1)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        stopped = Arm(tmp_path)
        with pytest.raises(SystemExit):
            stopped.run()
    assert stopped.refreshed == ([] if step == 5 else [5])
    assert Checkpoints(tmp_path, keep=9).all()[-1].name == f"step-{step:08d}"
    resumed = Arm(tmp_path)
    assert same_bits(resumed.run(resume=True), expected)
    assert resumed.refreshed == ([0] if step == 5 else [])
    assert resumed.sing is not None
    assert whole.sing is not None
    assert same_bits(resumed.sing.state_dict(), whole.sing.state_dict())


def test_streamed_sums_fade_once_for_a_step_that_was_stopped_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"stream_every": 2, "forgetting": 0.9}
    expected = Arm(tmp_path / "whole", translator=options).run()
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(SystemExit):
            Arm(tmp_path / "stopped", translator=options).run()
    assert same_bits(Arm(tmp_path / "stopped", translator=options).run(resume=True), expected)


def _stopped(rank: int, world: int, folder: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        try:
            Arm(Path(folder), dropout=0.0).run()
        except SystemExit as stop:
            return str(stop.code)
    return "went on"


def test_two_processes_that_were_asked_to_stop_go_on_to_the_same_bits(tmp_path: Path) -> None:
    together = run_processes(2, _in_process, str(tmp_path / "two"), {}, None, False)
    assert run_processes(2, _stopped, str(tmp_path / "stopped")) == ["143", "143"]
    for weights, _ in run_processes(2, _in_process, str(tmp_path / "stopped"), {}, None, True):
        assert same_bits(weights, together[0][0])
