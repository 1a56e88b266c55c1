"""λ is balanced once against cross-entropy's gradient on the backbone: the slow norm is the oracle, nothing else may notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singreg.training.balance import balance, balanced_parameters, measure_gradients, ramp_begins
from singreg.training.task import FinetuneTask, trained_backbone
from tests.processes import run_processes
from tests.training.small_arm import CLASSES, SIDE, Arm, Stop, small_classifier, small_sing
from tests.training.test_arm import largest_difference, same_bits

# Plain means over pictures: a process's share gives its share of the gradient.
PLAIN = {"terms": {"hinge": 1.0, "band": 0.3, "capacity": 10.0}, "momentum": 1.0}


def small_task(**options: Any) -> tuple[FinetuneTask, Tensor, Tensor]:
    classifier = small_classifier()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(6, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    task = FinetuneTask(classifier, small_sing(classifier, **{"ramp_steps": 0, **options})).train()
    return task, images, torch.arange(6) % CLASSES


def slow_norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    for parameter in parameters:
        parameter.grad = None
    loss.backward(retain_graph=True)
    return float(torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]).norm())


def test_norms_are_those_of_backward_over_the_backbone_alone() -> None:
    task, images, labels = small_task()
    assert task.sing is not None
    torch.manual_seed(5)
    norms = measure_gradients(task, images, labels)
    task.sing.eval()
    torch.manual_seed(5)  # the same dropout
    ce, weighted, _ = task.losses(images, labels)
    assert weighted is not None
    backbone = [p for name, p in task.classifier.model.named_parameters() if not name.startswith("fc.")]
    assert norms.ce == pytest.approx(slow_norm(ce, backbone))
    assert norms.sing == pytest.approx(slow_norm(weighted, backbone))
    assert norms.unweighted == pytest.approx(norms.sing / 0.5)
    everything = slow_norm(ce, list(task.classifier.parameters()))
    assert everything > 1.01 * norms.ce, "the head's gradient is left out"
    assert {name: float(value) for name, value in norms.figures().items()} == pytest.approx(
        {"gradient_ce": norms.ce, "gradient_sing": norms.sing}
    )


def test_where_the_head_alone_trains_norms_are_the_heads() -> None:
    task, _, _ = small_task()
    assert balanced_parameters(task) == trained_backbone(task.classifier) != []
    task.classifier.tune("head")
    assert balanced_parameters(task) == list(task.classifier.head.parameters())


def test_after_balancing_the_ratio_is_the_share_at_full_weight() -> None:
    task, images, labels = small_task(ramp_steps=4)
    sing = task.sing
    assert sing is not None
    torch.manual_seed(5)
    before = measure_gradients(task, images, labels)
    told = balance(sing, before, 0.2)
    sing.step.fill_(99)
    torch.manual_seed(5)
    after = measure_gradients(task, images, labels)
    assert after.sing / after.ce == pytest.approx(0.2)
    assert before.sing / before.ce != pytest.approx(0.2, rel=0.5)
    assert told.sing < after.sing, "while the ramp rises the share is smaller"


def test_measuring_is_noticed_by_nothing() -> None:
    task, images, labels = small_task()
    task(images, labels)
    sing = task.sing
    assert sing is not None
    state = {name: value.clone() for name, value in task.state_dict().items()}
    random, last = torch.get_rng_state(), dict(sing.last_terms)
    measure_gradients(task, images, labels)
    assert same_bits(task.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert sing.last_terms == last
    assert sing.training
    assert all(parameter.grad is None for parameter in task.parameters())


def test_what_cannot_be_balanced_says_so() -> None:
    task, images, labels = small_task(terms={"capacity": 1.0})
    assert task.sing is not None
    with pytest.raises(ValueError, match=r"loss.balance = 0.1 cannot be reached.*'capacity'.*norm 0;"):
        balance(task.sing, measure_gradients(task, images, labels), 0.1)
    with pytest.raises(ValueError, match="no SingLoss"):
        measure_gradients(FinetuneTask(task.classifier), images, labels)


def test_the_arm_balances_where_its_ramp_begins_and_logs_both_norms(tmp_path: Path) -> None:
    options = {"warmup_steps": 3, "ramp_steps": 2}
    arm = Arm(tmp_path, balance=0.2, options={**options, "weight": 7.0})
    weights = arm.run()
    assert arm.sing is not None
    assert float(arm.sing.scale) not in (0.0, 1.0)
    shares = {step: figures["gradient_sing"] / figures["gradient_ce"] for step, figures in arm.logged.items()}
    assert [shares[step] for step in (1, 2, 3)] == [0, 0, 0]
    assert shares[4] == pytest.approx(0.2 * 0.25)  # the first of two steps of the cosine ramp: (1 - cos 60°) / 2
    # λ itself does not matter any more: its scale takes it back.
    other = Arm(tmp_path / "other", balance=0.2, options={**options, "weight": 0.1})
    assert largest_difference(weights, other.run()) < 1e-6
    unbalanced = Arm(tmp_path / "unbalanced", options={**options, "weight": 7.0})
    assert largest_difference(weights, unbalanced.run()) > 1e-3
    assert "gradient_ce" not in unbalanced.logged[4]


@pytest.mark.parametrize("stop_after", [2, 4, 8])  # before the ramp, in the step that begins it, after it
def test_a_stopped_balanced_arm_resumes_to_the_same_bits(stop_after: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"balance": 0.2, "options": {"warmup_steps": 3}, "training": {"accumulation": 2, "checkpoint_every": 1}}
    expected = Arm(tmp_path / "whole", **options).run()
    with pytest.raises(Stop):
        Arm(tmp_path / "stopped", **options).run(stop_after=stop_after)
    assert same_bits(Arm(tmp_path / "stopped", **options).run(resume=True), expected)


def test_ramp_begins_counts_forwards_of_accumulated_steps() -> None:
    task, _, _ = small_task(warmup_steps=3, accumulation=2)
    sing, found = task.sing, []
    assert sing is not None
    for forward in range(12):
        sing.step.fill_(forward)
        if ramp_begins(sing):
            found.append(forward)
    assert found == [6]


def _in_process(rank: int, world: int, folder: str) -> Any:
    arm = Arm(Path(folder), dropout=0.0, balance=0.2, options={**PLAIN, "warmup_steps": 2})
    weights = arm.run()
    assert arm.sing is not None
    return weights, float(arm.sing.scale), arm.logged[3]


def test_two_processes_find_the_norms_of_one(tmp_path: Path) -> None:
    weights, scale, logged = _in_process(0, 1, str(tmp_path / "one"))
    for theirs, their_scale, their_log in run_processes(2, _in_process, str(tmp_path / "two")):
        assert their_scale == pytest.approx(scale, rel=1e-5)
        for name in ("gradient_ce", "gradient_sing"):
            assert their_log[name] == pytest.approx(logged[name], rel=1e-5)
        assert largest_difference(theirs, weights) < 1e-6
