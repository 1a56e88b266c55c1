"""Several processes: masks of their own, batch norms that agree or are refused, heads that are the same everywhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn

from singreg.models.classifier import Classifier
from singreg.training.config import FinetuneConfig
from singreg.training.experiment import Experiment
from singreg.training.head_only import train_head
from singreg.training.loop import _Arm
from singreg.training.processes import own_random_numbers, synchronise_batch_norm
from singreg.workbench.run import make_accelerator
from tests.processes import run_processes
from tests.training.small_arm import Arm, small_classifier
from tests.training.test_head_only import config as head_config
from tests.training.test_head_only import data


def training_norms() -> FinetuneConfig:
    config = FinetuneConfig()
    config.model.batch_norm = "train"
    return config


def _refused(rank: int, world: int) -> str:
    AcceleratorState._reset_state(True)
    try:
        Experiment.build(training_norms(), make_accelerator(seed=0))
    except ValueError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state(True)
    return "nothing was refused"


def test_batch_norms_that_train_are_refused_on_two_processes_without_gpus() -> None:
    for said in run_processes(2, _refused):
        assert said.startswith("model.batch_norm: train on 2 processes needs GPUs")
        assert said.endswith("set model.batch_norm to eval, or use one process")


def many(device: str) -> Accelerator:
    return cast(Accelerator, SimpleNamespace(num_processes=2, device=torch.device(device)))


@pytest.mark.parametrize("name", ["test_resnet", "resnet10t", "test_efficientnet"])
def test_batch_norms_are_converted_with_weights_statistics_and_activations(name: str) -> None:
    """timm's BatchNormAct2d (in efficientnets) holds its activation, which torch's own conversion would drop."""
    classifier = Classifier.from_timm(name, pretrained=False, num_classes=4).tune("all", batch_norm="train")
    pictures = torch.randn(2, 3, 64, 64)
    before, parameters, state = classifier(pictures), list(classifier.parameters()), classifier.state_dict()
    plain = sum(isinstance(module, nn.BatchNorm2d) for module in classifier.modules())
    synchronise_batch_norm(classifier, training_norms(), many("cuda"))
    synced = [module for module in classifier.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(synced) == plain > 0
    assert any(isinstance(module, SyncBatchNormAct) for module in synced) == (name == "test_efficientnet")
    assert all(one is other for one, other in zip(parameters, classifier.parameters(), strict=True))
    assert classifier.state_dict().keys() == state.keys()
    torch.testing.assert_close(classifier(pictures), before, rtol=0, atol=0)
    assert all(module.training for module in classifier.train().modules() if isinstance(module, nn.SyncBatchNorm))


def test_one_process_keeps_its_batch_norms_and_a_heads_own_one_is_refused() -> None:
    classifier = small_classifier()
    one = cast(Accelerator, SimpleNamespace(num_processes=1, device=torch.device("cpu")))
    synchronise_batch_norm(classifier, training_norms(), one)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in classifier.modules())
    head = Classifier.from_module(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))), head="1")
    with pytest.raises(ValueError, match=r"the head '1' .* has a batch norm of its own"):
        synchronise_batch_norm(head, training_norms(), many("cuda"))


def _masks(rank: int, world: int, folder: str) -> tuple[list[float], list[float], list[list[int]]]:
    """What dropout would draw in the first steps, what is drawn after the arm, and the pictures seen."""
    drawn: list[float] = []
    original = _Arm._micro_step

    def noted(self: _Arm, batch: tuple[torch.Tensor, ...], step: int) -> None:
        drawn.append(float(torch.rand(1)))
        original(self, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Arm, "_micro_step", noted)
        arm = Arm(Path(folder), dropout=0.0)
        arm.run()
    return drawn, torch.rand(2).tolist(), [arm.part.asked]


def test_every_process_draws_its_own_masks_and_all_draw_alike_afterwards(tmp_path: Path) -> None:
    one = _masks(0, 1, str(tmp_path / "one"))
    first, second = run_processes(2, _masks, str(tmp_path / "two"))
    assert first[0] == one[0], "the first draws as one process alone"
    assert not set(first[0]) & set(second[0])
    assert first[1] == second[1] == one[1]
    assert sorted(first[2][0] + second[2][0]) == sorted(one[2][0]), "the order of the pictures has a seed of its own"


def test_one_process_alone_is_left_as_it_is() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2).tolist()
    torch.manual_seed(3)
    with own_random_numbers(cast(Accelerator, SimpleNamespace(num_processes=1)), 9):
        assert torch.rand(2).tolist() == wanted


def _head(rank: int, world: int) -> Any:
    """A process whose sums round otherwise: its features differ by a little."""
    classifier = small_classifier().float().eval()
    features, labels = data(classifier)
    trained = train_head("x", classifier, None, features + rank * 1e-3, labels, head_config())
    return trained.weight.detach().clone()


def test_a_head_trained_on_stored_features_is_the_first_processes_everywhere() -> None:
    first, second = run_processes(2, _head)
    assert torch.equal(first, second)
    assert torch.equal(first, _head(0, 1))
    assert not torch.equal(first, _head(1, 1))
