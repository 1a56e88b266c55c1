"""Training a head on stored features: the obvious loop, the pace of the terms, rows of embeddings, processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg import loop
from singreg.config import FinetuneConfig, overridden
from singreg.loop import TrainingFailed, head_batches, train_head
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.task import Schedule
from tests.processes import run_processes
from tests.small_arm import embeddings, small_classifier, small_sing


def head_config(**values: Any) -> FinetuneConfig:
    usual = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "head_factor": 2.0, **values}
    return overridden(FinetuneConfig(seed=1), {f"training.{name}": value for name, value in usual.items()})


def head_data(classifier: Classifier) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels = np.arange(40) % classifier.num_classes
    noise = np.random.default_rng(3).standard_normal((40, classifier.feature_dim))
    return (noise + labels[:, None]).astype(np.float32), labels, embeddings()[:40]


def head_network() -> Classifier:
    return small_classifier().float().eval()


def test_training_the_head_is_the_obvious_loop() -> None:
    classifier, wanted = head_network(), head_config()
    features, labels, z = head_data(classifier)
    bias = classifier.bias
    assert bias is not None
    weight, bias = (each.detach().clone().requires_grad_() for each in (classifier.weight, bias))
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    schedule = Schedule(wanted, 40)
    decay = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(decay, lr=2e-2)
    for step, rows in enumerate(head_batches(40, 8, 3, seed=1)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * schedule.learning_rate_factor(step)
        logits = torch.from_numpy(features[rows]) @ weight.T + bias
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows])).backward()
        torch.nn.utils.clip_grad_norm_([weight, bias], loop.CLIP)
        optimizer.step()
    torch.rand(7)  # what others drew before must not matter
    trained = train_head("head", classifier, None, features, labels, z, wanted)
    torch.testing.assert_close(trained.weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained.bias, bias, rtol=1e-5, atol=1e-6)
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"model.fc.weight", "model.fc.bias"}
    assert not trained.training
    first, second = np.split(np.concatenate(list(head_batches(24, 8, 2, seed=0))), 2)
    assert sorted(first) == sorted(second) == list(range(24))
    assert list(first) != list(second)


def test_terms_of_the_head_move_it_at_the_pace_of_the_steps() -> None:
    shares = {}
    for name in ("without", "with"):
        classifier = head_network()
        sing = small_sing(classifier, terms={"capacity": 10.0}, weight=1.0, ramp_steps=0).float()
        trained = train_head(
            "head", classifier, sing if name == "with" else None, *head_data(classifier), head_config(epochs=10)
        )
        directions = sing.texts @ sing.matrix
        outside = NullSpace.from_weight(trained.weight).component(directions)
        shares[name] = float(outside.square().sum() / directions.square().sum())
    assert shares["with"] < 0.5 * shares["without"], shares
    classifier = head_network()
    sing = small_sing(classifier, terms={"capacity": 1.0}, accumulation=2).float()
    train_head("head", classifier, sing, *head_data(classifier), head_config())
    assert int(sing.step) == 2 * 15
    before, (features, labels, z) = classifier.weight.detach().clone(), head_data(classifier)
    with pytest.raises(TrainingFailed, match=r"'broken'.*not finite at step 1"):
        train_head("broken", classifier, None, features * np.float32("nan"), labels, z, head_config())
    assert torch.equal(classifier.weight, before)


def test_every_step_reads_the_embeddings_of_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = head_network()
    features, labels, z = head_data(classifier)
    read = []

    def noted(self: SingLoss, *given: Tensor) -> Tensor:
        read.append(given)
        return given[0].sum() * 0

    monkeypatch.setattr(SingLoss, "forward", noted)
    train_head("head", classifier, small_sing(classifier).float(), features, labels, z, head_config(epochs=1))
    rows = np.concatenate(list(head_batches(40, 8, 1, seed=1)))
    for got, expected in zip(zip(*read, strict=True), (features, labels, z), strict=True):
        np.testing.assert_array_equal(torch.cat(got).numpy(), expected[rows])


def _head(rank: int, world: int) -> Tensor:
    """A process whose sums round otherwise: its features differ by a little."""
    classifier = head_network()
    features, labels, z = head_data(classifier)
    return (
        train_head("head", classifier, None, features + rank * 1e-3, labels, z, head_config()).weight.detach().clone()
    )


def test_a_trained_head_is_the_first_processes_everywhere() -> None:
    first, second = run_processes(2, _head)
    assert torch.equal(first, second)
    assert torch.equal(first, _head(0, 1))
    assert not torch.equal(first, _head(1, 1))
