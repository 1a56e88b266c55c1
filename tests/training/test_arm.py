"""One arm on the real loop: accumulation, resuming to the same bits, data order, workers, what is not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.training.checkpoint import Checkpoints
from singreg.training.loop import TrainingFailed, _Arm
from tests.training.small_arm import COUNT, Arm, Stop

ARMS = pytest.mark.parametrize("regularised", [False, True], ids=["control", "sing"])
# Ratio terms and running means are taken over a forward's pictures, so accumulation may change those.
PLAIN = {"terms": {"hinge": 1.0, "band": 0.3, "capacity": 10.0}, "momentum": 1.0}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@ARMS
def test_accumulating_two_times_four_is_a_batch_of_eight(regularised: bool, tmp_path: Path) -> None:
    def train(name: str, **training: int) -> dict[str, Tensor]:
        return Arm(tmp_path / name, regularised, dropout=0.0, training=training, options=PLAIN).run()

    whole, halves = train("8"), train("4+4", accumulation=2)
    assert largest_difference(whole, halves) < 1e-6
    quarters = train("2+2+2+2", accumulation=4)
    assert largest_difference(whole, quarters) < 1e-6
    assert largest_difference(whole, train("4", batch_size=4)) > 1e-3  # without accumulation it is another run


@ARMS
@pytest.mark.parametrize("stop_after", [4, 5, 9])  # in the first epoch; at its end, before it is saved; in the second
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_arm_resumes_to_the_same_bits(regularised: bool, stop_after: int, accumulation: int, tmp_path: Path) -> None:
    """Mirroring, dropout, batch norm, Adam's moments, λ, running means and the refreshed translator all come back."""
    training = {"accumulation": accumulation}
    straight = Arm(tmp_path / "straight", regularised, training=training)
    expected = straight.run()
    stopped = Arm(tmp_path / "stopped", regularised, training=training)
    with pytest.raises(Stop):
        stopped.run(stop_after=stop_after)
    resumed = Arm(tmp_path / "stopped", regularised, training=training)
    assert same_bits(resumed.run(resume=True), expected)
    saved = 3 * (stop_after // 3) if stop_after != 9 else 6
    assert min(resumed.logged) == max(saved, 5 if stop_after > 5 else 0) + 1, "it went on after the newest checkpoint"
    assert {step: straight.logged[step] for step in resumed.logged} == resumed.logged
    if regularised:
        assert resumed.sing is not None
        assert straight.sing is not None
        assert same_bits(resumed.sing.state_dict(), straight.sing.state_dict())
    wrong = Arm(tmp_path / "stopped", regularised, training={**training, "learning_rate": 0.02}).run(resume=False)
    assert not same_bits(wrong, expected)


def test_a_finished_arm_resumes_to_itself(tmp_path: Path) -> None:
    expected = Arm(tmp_path).run()
    again = Arm(tmp_path)
    assert same_bits(again.run(resume=True), expected)
    assert again.logged == {}
    assert again.part.asked == []


def test_both_arms_see_the_same_pictures_in_the_same_order(tmp_path: Path) -> None:
    control, sing = Arm(tmp_path / "c", regularised=False), Arm(tmp_path / "s", regularised=True)
    control.run()
    sing.run()
    assert control.part.asked == sing.part.asked
    epochs = np.array(control.part.asked).reshape(2, -1)
    assert epochs.shape[1] in (40, 48)[:1] or epochs.shape[1] <= COUNT
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch), "a picture came twice in one epoch"
    assert list(epochs[0]) != list(epochs[1]), "the second epoch has another order"


def test_without_a_weight_the_regularised_arm_is_the_control(tmp_path: Path) -> None:
    """The clean view, the loss's own buffers and its random draws change nothing by themselves."""
    control = Arm(tmp_path / "c", regularised=False).run()
    idle = Arm(tmp_path / "i", options={"weight": 0.0}).run()
    active = Arm(tmp_path / "a").run()
    assert same_bits(control, idle)
    assert largest_difference(control, active) > 1e-3


def test_loader_processes_change_nothing(tmp_path: Path) -> None:
    here, elsewhere = Arm(tmp_path / "0"), Arm(tmp_path / "2", workers=2)
    assert same_bits(here.run(), elsewhere.run())
    assert here.part.asked
    assert not elsewhere.part.asked, "the pictures were read by other processes"


@ARMS
def test_a_loss_that_is_not_finite_stops_before_the_step(
    regularised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert same_bits(Arm(tmp_path, regularised).run(resume=True), Arm(tmp_path / "straight", regularised).run())


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


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_only_whole_checkpoints(kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

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
    assert same_bits(Arm(tmp_path).run(resume=True), Arm(tmp_path / "straight").run())
    assert not list(tmp_path.glob(".writing-*")), "what the interruption left was cleared away"
