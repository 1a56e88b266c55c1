"""One step's module: views, L2-SP, compile; placebos; parameter groups, the schedule, batches."""

import functools
import math
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock, patch

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import finetune
from singreg import task as tasks
from singreg.classes import imagenet_names
from singreg.config import FinetuneConfig, overridden
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.ridge import RidgeStatistics
from singreg.task import FinetuneTask, Schedule
from singreg.translator import LinearTranslator
from tests.small_arm import CLASSES, DIM, SIDE, Pixels, embeddings, small_classifier, small_fitted, small_setup
from tests.toy import ToySplit

BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


def configured(**values: Any) -> FinetuneConfig:
    return overridden(FinetuneConfig(), {name.replace("__", "."): value for name, value in values.items()})


def fake(processes: int = 1, device: str = "cpu", accumulation: int = 1) -> Accelerator:
    found = {"num_processes": processes, "device": torch.device(device), "gradient_accumulation_steps": accumulation}
    return cast(Accelerator, SimpleNamespace(**found))


def timm_task(**options: Any) -> FinetuneTask:
    torch.manual_seed(0)
    classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=4, drop_rate=0.5)
    classifier.tune("all")
    f, z = torch.rand(200, classifier.feature_dim), torch.randn(200, 8)
    statistics = RidgeStatistics(classifier.feature_dim, 8).update(f, z)
    texts = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    sing = SingLoss(classifier, LinearTranslator.from_solution(statistics.solve(0.1)), texts, statistics)
    return FinetuneTask(classifier, sing, **options).train()


def test_sing_reads_the_clean_view_in_eval_mode_and_ce_the_augmented() -> None:
    task = timm_task()
    classifier, sing = task.classifier, task.sing
    images, clean, labels = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.arange(4)
    seen: list[Tensor] = []
    sing.register_forward_pre_hook(lambda _, inputs: seen.extend((inputs[0], inputs[2])))
    buffers = {name: value.clone() for name, value in classifier.named_buffers()}
    z = torch.randn(4, 8)
    outputs = task(images, labels, clean, z)
    assert classifier.training, "the mode is put back"
    torch.testing.assert_close(seen[0], classifier.eval().features(clean))
    assert all(torch.equal(value, buffers[name]) for name, value in classifier.named_buffers())
    torch.testing.assert_close(outputs["loss"].detach(), outputs["ce"] + sing.weight * outputs["sing"])
    assert seen[1] is z
    task.train()(images, labels, None, z)
    assert not torch.allclose(seen[2], classifier.features(images))  # no clean view: the augmented one, dropout too


def test_l2_sp_is_the_squared_distance_of_the_backbone_from_its_start() -> None:
    classifier = small_classifier(dropout=0.0)
    model = cast(Any, classifier.model)
    model.norm.weight.requires_grad_(False)
    start_of = {name: value.detach().clone() for name, value in model.named_parameters()}
    task = FinetuneTask(classifier, l2_sp=3.0).train()
    images, labels = torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64), torch.arange(4) % CLASSES
    assert float(task(images, labels)["l2_sp"].detach()) == 0
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    outputs = task(images, labels)
    moved = ["first.weight", "first.bias", "norm.bias"]  # neither the head nor what is frozen
    expected = sum(1.5 * float((model.get_parameter(name).detach() - start_of[name]).square().sum()) for name in moved)
    assert float(outputs["l2_sp"]) == pytest.approx(expected)
    assert float((outputs["loss"] - outputs["ce"]).detach()) == pytest.approx(expected)
    plain = FinetuneTask(classifier)(images, labels)["loss"]
    (gradient,) = torch.autograd.grad(outputs["loss"] - plain, model.norm.bias)
    torch.testing.assert_close(gradient, 3.0 * (model.norm.bias.detach() - start_of["norm.bias"]))
    assert not [name for name in task.state_dict() if name.startswith("start_")], "checkpoints need not hold it"
    head = small_classifier().tune("head")
    assert float(FinetuneTask(head, l2_sp=3.0)(images, labels)["l2_sp"]) == 0


def test_torchs_adamw_gets_head_and_backbone_matrices_and_flat_ones_apart() -> None:
    classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=4).tune("all")
    config = configured(training__learning_rate=1e-3, training__head_factor=5.0, training__weight_decay=0.1)
    made = tasks.make_optimizer(classifier, config)
    groups, usual = made.param_groups, torch.optim.AdamW(classifier.parameters()).defaults
    assert type(made) is torch.optim.AdamW
    found = sorted((group.pop("lr"), group.pop("weight_decay")) for group in groups)
    assert found == [(1e-3, 0.0), (1e-3, 0.1), (5e-3, 0.0), (5e-3, 0.1)]
    together = [id(p) for group in groups for p in group.pop("params")]
    assert sorted(together) == sorted(id(p) for p in classifier.parameters())
    assert all(group == {name: usual[name] for name in group} for group in groups)


def test_schedule_drops_the_last_batch_and_refreshes_evenly() -> None:
    config = configured(training__epochs=3, training__batch_size=32, translator__refreshes=3)
    schedule = Schedule(config, 1003)
    assert (schedule.steps_per_epoch, schedule.total, schedule.warmup) == (31, 93, 10)
    assert schedule.refresh_at == [23, 46, 70]
    with pytest.raises(ValueError, match=r"training.batch_size = 32 training images, got 31"):
        Schedule(config, 31)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [  # in steps 11, 22, 52, 83 and the last of 93: k / 84 of the way after the warm-up
        ("cosine", [0.5 * (1 + math.cos(math.pi * k / 84)) for k in (1, 12, 42, 73, 83)]),
        ("poly", [1 - k / 84 for k in (1, 12, 42, 73, 83)]),
        ("step", [1, 1, 0.1, 0.01, 0.01]),
        ("multistep", [1, 1, 0.1, 0.01, 0.01]),
        ("wsd", [1, 1, 1, 1 - (17 / 28) ** 0.5, 1 - (27 / 28) ** 0.5]),
        ("constant", [1] * 5),
    ],
)
def test_every_schedule_warms_up_and_lasts_to_the_end(schedule: str, factors: list[float]) -> None:
    config = configured(training__epochs=3, training__schedule=schedule, training__optimizer="sgd")
    optimizer = tasks.make_optimizer(small_classifier(), config)
    steps, peaks = Schedule(config, 1003), [group["lr"] for group in optimizer.param_groups]
    rates, found = steps.rates(optimizer), {}
    for number in (93, *range(1, 94)):  # whatever came before: a resumed run starts anywhere
        rates.step_update(number)
        found[number] = [group["lr"] / peak for group, peak in zip(optimizer.param_groups, peaks, strict=True)]
        assert found[number] == pytest.approx([found[number][0]] * len(peaks)), "the head keeps its factor"
    assert [found[number][0] for number in range(1, 11)] == pytest.approx([number / 10 for number in range(1, 11)])
    assert [found[number][0] for number in (11, 22, 52, 83, 93)] == pytest.approx(factors)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"training__optimizer": "adamx"}, r"optimizer: timm cannot make 'adamx' .*near it: adam"),
        ({"training__optimizer": "adahessian"}, "second derivatives"),
        ({"training__schedule": "plateau"}, "schedule"),
    ],
)
def test_optimizers_and_schedules_that_cannot_train_are_refused(values: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tasks.describe_training(configured(**values), fake(), small_classifier(), 100)


def test_a_best_checkpoint_needs_two_labelled_audit_images_a_class() -> None:
    config, splits = configured(training__best_checkpoint=True), SimpleNamespace(train=ToySplit(43), audit=ToySplit(5))
    with pytest.raises(ValueError, match=r"best_checkpoint.*two labelled audit images"):
        finetune.check(config, cast(Any, SimpleNamespace(accelerator=fake())), cast(Any, splits), small_classifier())


def test_micro_batches_are_even_or_refused() -> None:
    config = configured(training__batch_size=32)
    assert [tasks.micro_batch(config, fake(2, accumulation=count)) for count in (1, 4)] == [32, 8]
    for batch, processes in ((30, 1), (32, 3)):
        with pytest.raises(ValueError, match=f"4 accumulation step.* over {processes} process"):
            tasks.micro_batch(configured(training__batch_size=batch), fake(processes, accumulation=4))


def sing_of(**values: Any) -> SingLoss:
    classifier = small_classifier()
    fitted = small_fitted(classifier)
    config = configured(**{"training__batch_size": 10, "training__epochs": 5, **values})
    return tasks.make_sing(config, small_setup(classifier.float(), Pixels()), fitted, 2)


def test_the_loss_is_what_the_configuration_says() -> None:
    sing = sing_of(loss__weight=0.3, loss__floor=7.0)
    assert (sing.weight, sing.warmup_steps, sing.ramp_steps, sing.accumulation) == (0.3, 2, 4, 2)
    assert (sing.floor, sing.terms) == (7.0, {"readout": 1.0, "capacity": 10.0})
    assert sing_of(loss__terms={"readout": 0.0, "capacity": 2.0}).terms == {"capacity": 2.0}


def test_placebos_change_what_the_loss_is_given_and_nothing_else() -> None:
    names, rows = (*imagenet_names()[:2], "a thing of one's own"), embeddings()
    vlm = Mock(embed_classes=Mock(return_value=torch.full((3, DIM), 3.0)))
    setup: Any = Mock(splits=Mock(class_names=names), vlm=vlm, texts=torch.randn(3, DIM), embeddings={"bank": rows})
    kinds = ("none", "shuffled", "random", "foreign")
    given = {kind: tasks.loss_texts(configured(loss__placebo=kind), setup) for kind in kinds}
    assert given["none"] is given["shuffled"] is setup.texts
    torch.testing.assert_close(given["random"].norm(dim=1), torch.ones(3))
    assert torch.equal(given["random"], tasks.loss_texts(configured(loss__placebo="random", seed=8), setup))
    assert not torch.allclose(given["random"], setup.texts, atol=0.1)
    assert torch.equal(given["foreign"], torch.full((3, DIM), 3.0))
    foreign, templates = vlm.embed_classes.call_args.args
    assert (len(set(foreign)), templates) == (3, ("an image of a {class}",))
    assert set(foreign) <= set(imagenet_names()) - set(names)
    for name in ("none", "random", "foreign"):
        assert tasks.loss_embeddings(configured(loss__placebo=name), setup) is rows
    shuffled = tasks.loss_embeddings(configured(loss__placebo="shuffled"), setup)
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, rows))
    assert (shuffled == rows).all(1).mean() < 0.2


@BACKENDS
def test_a_compiled_step_has_the_loss_and_gradients_of_a_plain_one(backend: str) -> None:
    calls: list[int] = []
    real = functools.partial(torch.compile, backend=backend)

    def counted(function: object) -> object:
        compiled = real(function)
        return lambda x: calls.append(len(x)) or compiled(x)

    with patch.object(torch, "compile", counted):
        plain, compiled = timm_task(), timm_task(compile=True)
    images, clean, labels = torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64), torch.arange(4)
    for each in (plain, compiled):
        torch.manual_seed(1)
        each(images, labels, clean, torch.ones(4, 8))["loss"].backward()
    assert calls == [4, 4], "the image and its clean view"
    for (name, a), (_, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-4 * float(a.grad.abs().max()), rtol=1e-3, msg=name)
    assert "forward_features" not in vars(compiled.classifier.model), "copies made later find the plain one"
