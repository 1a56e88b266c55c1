"""What an experiment makes of its configuration: the loss's terms and prompts, and who keeps its translator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from accelerate.state import AcceleratorState

from singreg.analysis.features import PassSettings
from singreg.analysis.fitting import FittedTranslator
from singreg.losses import SingLoss
from singreg.training.config import FinetuneConfig
from singreg.training.experiment import Experiment
from singreg.translator import LinearTranslator, TranslatorInfo
from singreg.workbench.run import make_accelerator
from tests.training.small_arm import CLASSES, COUNT, DIM, WIDTH, Pixels, small_classifier


def experiment(config: FinetuneConfig) -> Experiment:
    AcceleratorState._reset_state(True)
    parts: Any = SimpleNamespace(train=Pixels(), bank=Pixels())
    texts = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(4)), dim=1)
    embeddings = {"bank": np.zeros((COUNT, DIM), np.float32)}
    return Experiment(
        config, make_accelerator(seed=0), parts, small_classifier(), texts, embeddings, TranslatorInfo(), PassSettings(progress=False)
    )


def first() -> LinearTranslator:
    return LinearTranslator(torch.randn(DIM, WIDTH), torch.zeros(DIM))


def loss_of(**loss: Any) -> SingLoss:
    config = FinetuneConfig()
    config.training.batch_size = 8
    for name, value in loss.items():
        setattr(config.loss, name, value)
    made = experiment(config)
    fitted = FittedTranslator(first(), torch.zeros(WIDTH), torch.zeros(CLASSES, WIDTH))
    return made.sing_loss(made.classifier, fitted, torch.full((CLASSES,), 10.0))


def test_the_preset_with_its_changes_is_what_the_loss_sums() -> None:
    assert loss_of(preset="label_only").terms == {"class_share": 1.0}
    sing = loss_of(preset="sing")
    assert "leak" in sing.terms
    assert loss_of(preset="sing", terms={"leak": 0.0, "steer": 2.0}).terms == {
        **{name: weight for name, weight in sing.terms.items() if name != "leak"}, "steer": 2.0,
    }  # fmt: skip


def test_a_placebo_reaches_the_prompts() -> None:
    true, shuffled, random = (loss_of(placebo=name).texts for name in ("none", "shuffled", "random"))
    assert not any(torch.equal(a, b) for a, b in zip(true, shuffled, strict=True))
    torch.testing.assert_close(shuffled.sum(0), true.sum(0))
    assert not torch.allclose(random.sum(0), true.sum(0))


def test_the_keeper_of_the_translator_is_given_the_bank_and_the_configuration() -> None:
    config = FinetuneConfig(seed=7)
    config.translator.folds, config.model.invariance = 3, "softmax"
    made = experiment(config)
    keeper = made.loop_translator(first())
    assert keeper.bank is made.parts.bank
    assert keeper.embeddings is cast(Any, made.embeddings["bank"])
    assert (keeper.config.folds, keeper.invariance, keeper.seed, keeper.settings) == (3, "softmax", 7, made.settings)
