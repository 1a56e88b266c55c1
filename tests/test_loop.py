"""An arm on the recipe's loop: accumulation, resuming to the same bits, data order, processes, what is not finite."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from singreg import loop
from singreg.loop import TrainingFailed, own_random_numbers
from singreg.losses import SingLoss
from singreg.task import LoopTranslator, loop_bank
from tests import small_arm
from tests.images import names
from tests.processes import run_processes
from tests.reference import formulas
from tests.small_arm import COUNT, Arm, Pixels, Stop, embeddings, largest_difference, same_bits, small_classifier
from tests.toy import ToySplit

ARMS = pytest.mark.parametrize("regularised", [False, True], ids=["control", "sing"])
Straight = Callable[..., tuple[Arm, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Uninterrupted arms and their weights, trained when first asked for."""

    @cache
    def train(regularised: bool = True) -> tuple[Arm, dict[str, Tensor]]:
        arm = Arm(tmp_path_factory.mktemp("straight"), regularised)
        return arm, arm.run()

    return train


def resumed(folder: Path, stop_after: int, **options: Any) -> tuple[Arm, dict[str, Tensor]]:
    """An arm that was stopped after a step and then went on to its end."""
    with pytest.raises(Stop):
        Arm(folder, **options).run(stop_after=stop_after)
    again = Arm(folder, **options)
    return again, again.run()


@ARMS
def test_accumulating_two_times_four_is_a_batch_of_eight(regularised: bool, tmp_path: Path) -> None:
    def train(name: str, accumulation: int = 1, size: int = 8) -> dict[str, Tensor]:
        values = {"training.batch_size": size}
        return Arm(tmp_path / name, regularised, 0.0, accumulation, options=small_arm.PLAIN, values=values).run()

    whole = train("8")
    assert largest_difference(whole, train("4+4", accumulation=2)) < 1e-6
    assert largest_difference(whole, train("4", size=4)) > 1e-3  # without accumulation it is another run


SLOW_START = {"warmup_steps": 3}
VALUES = [{"training.l2_sp": 30.0}, {"training.optimizer": "momentum", "training.schedule": "step"}]
VALUES += [{"data.augmentation": "none"}]
CASES: list[tuple[dict[str, Any], int, int]] = [  # what, the step after which it stops, the newest checkpoint then
    ({"regularised": False}, 4, 3),  # in the first epoch of five steps
    ({"accumulation": 2}, 4, 3),
    ({}, 5, 3),  # at its end, before that is saved
    ({}, 9, 6),
    ({"regularised": False, "accumulation": 2}, 9, 6),
    *[({"values": values, "options": SLOW_START}, *stop) for values in VALUES for stop in ((4, 3), (8, 6))],
]


@pytest.mark.parametrize(("options", "stop_after", "saved"), CASES)
def test_a_stopped_arm_resumes_to_the_same_bits(
    options: dict[str, Any], stop_after: int, saved: int, straight: Straight, tmp_path: Path
) -> None:
    """Mirroring, dropout, batch norm, Adam's moments, λ, running means and the refreshed translator all come back."""
    whole = Arm(tmp_path / "whole", **options)
    expected = whole.run()
    again, weights = resumed(tmp_path / "stopped", stop_after, **options)
    assert same_bits(weights, expected)
    assert list(again.logged) == list(range(saved + 1, 11)), "it goes on after the newest checkpoint"
    assert {step: whole.logged[step] for step in again.logged} == again.logged
    assert options == {} or largest_difference(expected, straight()[1]) > 1e-6
    if again.sing is not None and whole.sing is not None:
        assert same_bits(again.sing.state_dict(), whole.sing.state_dict())


def test_both_arms_see_the_same_images_in_the_same_order(straight: Straight) -> None:
    asked = straight(False)[0].split.asked
    assert asked == straight(True)[0].split.asked
    first, second = np.array(asked).reshape(2, 5 * 8)  # the incomplete batch is left out
    assert [len(set(first)), len(set(second))] == [40, 40]
    assert list(first) != list(second)
    assert set(first) != set(second), "what is left out is not always the same either"


@ARMS
@patch("singreg.runs.KEEP", 99)
def test_the_best_epoch_is_kept_also_when_resumed(regularised: bool, tmp_path: Path) -> None:
    values = {"training.best_checkpoint": True, "training.epochs": 5, "training.learning_rate": 0.3}
    arm = Arm(tmp_path / "whole", regularised, values=values, chooses=True)
    kept = arm.run()
    top1 = {step: figures["val/top1"] for step, figures in arm.logged.items() if "val/top1" in figures}
    best = max(list(top1)[1:], key=lambda step: top1[step])
    assert list(top1) == [0, 5, 10, 15, 20, 25]
    assert best < 25, "or keeping the last would do"
    stored = load_file(next(arm.folder.glob(f"checkpoints/*/step-{best:08d}")) / "model.safetensors")
    assert all(torch.equal(stored[f"classifier.{name}"], value) for name, value in kept.items())
    assert same_bits(resumed(tmp_path / "two", best + 2, regularised=regularised, values=values, chooses=True)[1], kept)


def test_an_arm_stops_that_no_longer_gets_better(tmp_path: Path) -> None:
    values = {"training.best_checkpoint": 2, "training.epochs": 9, "training.learning_rate": 1e-12}
    arms = [Arm(tmp_path, dropout=0.0, values=values, chooses=True) for _ in range(2)]
    assert same_bits(arms[0].run(), arms[1].run())
    assert max(arms[0].logged) == 15
    assert arms[1].logged == {}, "a resumed run knows that it had ended"


def test_without_a_weight_the_regularised_arm_is_the_control(straight: Straight, tmp_path: Path) -> None:
    """The clean view, the loss's own buffers and the refresh change nothing by themselves."""
    control = straight(False)[1]
    assert same_bits(control, Arm(tmp_path, options={"weight": 0.0}).run())
    assert largest_difference(control, straight(True)[1]) > 1e-3


def test_loader_processes_change_nothing(straight: Straight, tmp_path: Path) -> None:
    elsewhere = Arm(tmp_path, values={"data.workers": 2})
    assert same_bits(elsewhere.run(), straight()[1])
    assert not elsewhere.split.asked, "the images were read by other processes"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step(what: str, straight: Straight, tmp_path: Path) -> None:
    """A finite loss can have no finite gradient; the step would spoil the weights and the next checkpoint keep them."""
    original = loop.micro_step

    def poisoned(arm: loop.Arm, batch: Sequence[Tensor], step: int) -> Any:
        if step == 7 and what == "loss":
            batch = [*(torch.full_like(view, float("nan")) for view in batch[:-2]), *batch[-2:]]
        elif step == 7:
            cast(Any, arm.plain.classifier.head).weight.register_hook(lambda value: value * float("nan"))
        return original(arm, batch, step)

    arm, said = Arm(tmp_path), rf"the {what} is not finite at step 8 .*toy-\d+"
    with patch.object(loop, "micro_step", poisoned), pytest.raises(TrainingFailed, match=said) as failed:
        arm.run()
    images = [int(word.rstrip(".,")[4:]) for word in str(failed.value).split() if word.startswith("toy-")]
    assert images == [index for index in arm.split.asked if index in images][-8:]
    assert arm.checkpoints == ["step-00000005", "step-00000006"]
    assert same_bits(Arm(tmp_path).run(), straight()[1])


def test_fp16_may_skip_nineteen_steps_in_a_row_and_not_one_more() -> None:
    arm: Any = SimpleNamespace(name="control", split=Pixels(), skipped=0, accelerator=SimpleNamespace(scaler=object()))

    def gradient(norm: float, step: int) -> None:
        loop._check_gradient(arm, {"gradient_norm": torch.tensor(norm)}, torch.tensor([4, 2]), step)

    for norm in [*[float("inf")] * 19, 1.0, *[float("nan")] * 19]:
        gradient(norm, 7)
    with pytest.raises(TrainingFailed, match=r"the gradient, the 20th in a row .* at step 9 .*toy-4, toy-2"):
        gradient(float("inf"), 8)


def _in_process(rank: int, world: int, folder: str, stop_after: int | None, view: str) -> Any:
    arm, read = Arm(Path(folder), dropout=0.0, values={"data.augmentation": view}), []
    original = SingLoss.forward

    def noted(self: SingLoss, features: Tensor, labels: Tensor, given: Tensor | None = None) -> Tensor:
        read.append(cast(Tensor, given).clone())
        return original(self, features, labels, given)

    with patch.object(SingLoss, "forward", noted):
        try:
            weights = arm.run(stop_after=stop_after)
        except Stop:
            return None
    return weights, arm.split.asked, arm.sing.state_dict(), torch.cat(read)


@pytest.mark.parametrize("view", ["flip", "none"])
def test_two_processes_take_the_steps_of_one_and_resume(view: str, tmp_path: Path) -> None:
    """Ratios, running means and sums are over the batch of all processes, so nothing but rounding differs."""
    alone = _in_process(0, 1, str(tmp_path / "one"), None, view)
    together = run_processes(2, _in_process, str(tmp_path / "two"), None, view)
    for weights, asked, state, read in [alone, *together]:
        assert largest_difference(weights, alone[0]) < 1e-6
        assert same_bits(weights, together[0][0]) or weights is alone[0]
        assert same_bits(state, together[0][2]) or weights is alone[0]
        assert torch.equal(read, torch.from_numpy(embeddings()[asked])), "each image is read with its own embedding"
    both = np.concatenate([np.array(asked).reshape(10, 4) for _, asked, *_ in together], axis=1)
    assert [set(step) for step in both] == [set(step) for step in np.array(alone[1]).reshape(10, 8)]
    assert run_processes(2, _in_process, str(tmp_path / "stopped"), 8, view) == [None, None]
    for weights, *_ in run_processes(2, _in_process, str(tmp_path / "stopped"), None, view):
        assert same_bits(weights, together[0][0])


def _masks(rank: int, world: int, folder: str) -> tuple[list[float], list[float]]:
    """What dropout would draw in the steps, and what is drawn after the arm."""
    drawn: list[float] = []
    original = loop.micro_step

    def noted(arm: loop.Arm, batch: Sequence[Tensor], step: int) -> Any:
        drawn.append(float(torch.rand(1)))
        return original(arm, batch, step)

    with patch.object(loop, "micro_step", noted):
        Arm(Path(folder), dropout=0.0).run()
    return drawn, torch.rand(2).tolist()


def test_every_process_draws_its_own_masks_and_all_alike_afterwards(tmp_path: Path) -> None:
    one = _masks(0, 1, str(tmp_path / "one"))
    first, second = run_processes(2, _masks, str(tmp_path / "two"))
    assert first[0] == one[0], "the first draws as one process alone"
    assert not set(first[0]) & set(second[0])
    assert first[1] == second[1] == one[1]
    torch.manual_seed(3)
    wanted = torch.rand(2).tolist()
    torch.manual_seed(3)
    with own_random_numbers(cast(Accelerator, SimpleNamespace(num_processes=1)), 9):
        assert torch.rand(2).tolist() == wanted


@pytest.mark.parametrize(("others", "left_out"), [(0, 0), (COUNT - 1, 0), (COUNT, COUNT), (COUNT + 5, COUNT)])
def test_the_bank_is_without_the_training_images_where_as_many_others_are_there(others: int, left_out: int) -> None:
    train, bank = ToySplit(COUNT), ToySplit(COUNT + others)
    splits: Any = SimpleNamespace(train=train, bank=bank)
    rows = np.arange(2 * len(bank), dtype=np.float32).reshape(-1, 2)
    images, found = loop_bank(splits, rows)
    assert names(images) == names(bank)[left_out:]
    np.testing.assert_array_equal(found, rows[left_out:])


def test_refreshing_is_a_fit_of_todays_features_with_the_first_ridge() -> None:
    classifier, other = small_classifier(), small_classifier()
    sing, fitted = small_arm.small_sing(classifier), small_arm.small_fitted(classifier)
    keeper = LoopTranslator(fitted, small_arm.small_setup(classifier, Pixels()), embeddings(), sing)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)))
        classifier.load_state_dict(other.state_dict())
    first = fitted.translator.matrix
    for encode, features in ((False, small_arm.features_of(small_classifier())), (True, small_arm.features_of(other))):
        (keeper.refresh if encode else keeper.refit)()
        scale = formulas.block_scale(features.double().numpy(), other.weight)
        matrix, offset = formulas.ridge(features.double().numpy() @ scale, embeddings().astype(np.float64), 0.01)
        current = keeper.current
        np.testing.assert_allclose(current.matrix.numpy(), matrix @ scale, atol=1e-5)
        np.testing.assert_allclose(current.offset.numpy(), offset, atol=1e-5)
        assert current.info.head_hash == other.head_hash()
        assert (current.matrix - first).abs().max() > 1e-3
        np.testing.assert_allclose(sing.covariance.numpy(), np.cov(features.numpy().T, bias=True), atol=1e-5)
    assert torch.equal(keeper.first.matrix, first)
