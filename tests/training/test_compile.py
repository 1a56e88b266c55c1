"""torch.compile of the backbone: the same step, and nothing that outlives it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.training import loop
from singreg.training.balance import measure_gradients
from singreg.training.config import FinetuneConfig
from singreg.training.task import FinetuneTask
from singreg.translator import LinearTranslator
from singreg.workbench.build import build_classifier
from singreg.workbench.config import ModelConfig
from tests.training.small_arm import Arm
from tests.workbench.test_build import parts

BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


def task(compile: bool) -> FinetuneTask:
    torch.manual_seed(0)
    classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=4).tune("all")
    translator = LinearTranslator(torch.randn(8, classifier.feature_dim), torch.zeros(8))
    sing = SingLoss(classifier, translator, torch.nn.functional.normalize(torch.randn(4, 8), dim=1), weight=1.0)
    return FinetuneTask(classifier, sing, compile=compile).train()


@BACKENDS
def test_a_compiled_step_has_the_loss_and_gradients_of_a_plain_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = functools.partial(torch.compile, backend=backend)

    def counted(function: object) -> object:
        compiled = real(function)
        return lambda x: calls.append(len(x)) or compiled(x)

    monkeypatch.setattr(torch, "compile", counted)
    plain, compiled = task(False), task(True)
    images, clean, labels = torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64), torch.arange(4)
    for each in (plain, compiled):
        each(images, labels, clean)["loss"].backward()
    assert calls == [4, 4], "the picture and its clean view"
    for (name, a), (_, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(b.grad, a.grad, atol=1e-4 * float(a.grad.abs().max()), rtol=1e-3, msg=name)
    measure_gradients(compiled, images, labels, clean)  # two gradients of one graph, which a compiled one need not allow
    assert calls == [4, 4]
    assert "forward_features" not in vars(compiled.classifier.model)
    copied = copy.deepcopy(compiled.classifier)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not torch.equal(copied.eval().features(images), compiled.classifier.eval().features(images))


def test_the_switch_reaches_the_training_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Switched(Arm):
        def config(self) -> FinetuneConfig:
            config = super().config()
            config.model.compile = True
            return config

    def recorded(*args: Any, compile: bool, **options: Any) -> FinetuneTask:
        seen.append(compile)
        return FinetuneTask(*args, **options)

    monkeypatch.setattr(loop, "FinetuneTask", recorded)
    Arm(tmp_path / "plain", training={"epochs": 1}).run()
    Switched(tmp_path / "switched", training={"epochs": 1}).run()
    assert seen == [False, True]


def test_a_model_without_forward_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*args: object, **kwargs: object) -> Classifier:
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.Linear(6, 3))
        return Classifier.from_module(net, head="2")

    monkeypatch.setattr(Classifier, "from_timm", without)
    with pytest.raises(ValueError, match=r"model.compile: timm's plain has no forward_features"):
        build_classifier(ModelConfig(name="plain", pretrained=False, head="new", compile=True), parts((0, 1, 2)))
