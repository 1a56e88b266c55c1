"""A training arm that takes milliseconds: a small net in float64 on random pictures, driven by the real loop. Nothing here asserts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from singreg.analysis.features import PassSettings
from singreg.data.datasets import ImageSplit
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.training.config import FinetuneConfig
from singreg.training.loop import ArmCallbacks, train_arm
from singreg.training.streaming import LoopTranslator
from singreg.translator import LinearTranslator, TranslatorInfo
from singreg.workbench.run import make_accelerator

COUNT, SIDE, CLASSES, WIDTH, DIM = 43, 4, 3, 12, 6


class Stop(Exception):
    """Stands for whatever ends a run at a moment it did not choose."""


class Pixels(ImageSplit):
    """COUNT small pictures of noise; which of them were asked for, in order, is in `asked`."""

    def __init__(self) -> None:
        super().__init__("train", [f"class {n}" for n in range(CLASSES)], np.arange(COUNT) % CLASSES, np.zeros((COUNT, 32), np.uint8))
        self.pixels = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
        self.asked: list[int] = []

    def image(self, index: int) -> Image.Image:
        self.asked.append(int(index))
        return Image.fromarray(self.pixels[index])

    def identifier(self, index: int) -> str:
        return f"pixels-{index}"


def as_double(image: Image.Image) -> Tensor:
    """A picture as (3, H, W) in float64, so that the order of sums can be told from mistakes."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).double() / 127.5 - 1


def small_classifier(*, dropout: float = 0.5) -> Classifier:
    """With a batch norm that trains and a dropout before the head: what a resumed run could get wrong."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, layer in {
        "flat": nn.Flatten(), "first": nn.Linear(3 * SIDE * SIDE, WIDTH), "norm": nn.BatchNorm1d(WIDTH), "act": nn.ReLU(),
        "drop": nn.Dropout(dropout), "fc": nn.Linear(WIDTH, CLASSES),
    }.items():  # fmt: skip
        net.add_module(name, layer)
    classifier = Classifier.from_module(net.double(), head="fc", transform=as_double)
    return classifier.tune("all", batch_norm="train" if dropout else "eval")


def small_sing(classifier: Classifier, **options: Any) -> SingLoss:
    """SingLoss with a random translator, calibrated, in float64."""
    generator = torch.Generator().manual_seed(1)
    translator = LinearTranslator(torch.randn(DIM, WIDTH, generator=generator), torch.randn(DIM, generator=generator))
    texts = nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)
    sing = SingLoss(classifier, translator, texts, **{"weight": 0.5, "ramp_steps": 4, **options}).double()
    class_means = torch.randn(CLASSES, WIDTH, generator=generator)
    return sing.calibrate(class_means.mean(0), class_means, torch.full((CLASSES,), 10.0))


def small_keeper(sing: SingLoss, bank: ImageSplit, config: FinetuneConfig, accelerator: Accelerator) -> LoopTranslator:
    """A keeper of the loop's translator on random embeddings of the pictures, at a ridge of a hundredth."""
    embeddings = np.random.default_rng(2).standard_normal((len(bank), DIM), dtype=np.float32)
    first = LinearTranslator(sing.matrix, sing.offset, TranslatorInfo(ridge=0.01, by_block=True))
    settings = PassSettings(16, 0, progress=False)
    return LoopTranslator(first, bank, embeddings, config.translator, accelerator, settings=settings)


@dataclass
class Arm:
    """One call of the loop: what to train, and what came of it."""

    folder: Path
    regularised: bool = True
    dropout: float = 0.5
    augmentation: str = "flip"
    workers: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    balance: float = 0.0
    tuning: Literal["head", "all"] = "all"
    translator: dict[str, Any] = field(default_factory=dict)
    part: Pixels = field(default_factory=Pixels)
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    refreshed: list[int] = field(default_factory=list)
    sing: SingLoss | None = None
    keeper: LoopTranslator | None = None

    def config(self) -> FinetuneConfig:
        """11 optimiser steps an epoch at most, checkpoints that do not fall on epochs."""
        config = FinetuneConfig()
        config.data.augmentation, config.data.workers = self.augmentation, self.workers  # type: ignore[assignment]
        config.translator.refreshes, config.loss.balance = 1, self.balance
        for name, value in self.translator.items():
            setattr(config.translator, name, value)
        wanted = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "checkpoint_every": 3, "log_every": 1, **self.training}
        for name, value in wanted.items():
            setattr(config.training, name, value)
        return config

    def run(self, *, stop_after: int | None = None, resume: bool = False) -> dict[str, Tensor]:
        """The trained classifier's state; `Stop` is raised after a step, before anything is saved for it."""
        AcceleratorState._reset_state(True)
        config = self.config()
        threads = torch.get_num_threads()
        accelerator = make_accelerator(seed=config.seed, accumulation=config.training.accumulation)
        torch.set_num_threads(1)  # more only wait for one another on sums this small
        classifier = small_classifier(dropout=self.dropout)
        if self.tuning == "head":
            classifier.tune("head", batch_norm=classifier.batch_norm)
        options = {"accumulation": config.training.accumulation, **self.options}
        self.sing = small_sing(classifier, **options) if self.regularised else None

        def log(step: int, figures: dict[str, float]) -> None:
            self.logged[step] = figures
            if step == stop_after:
                raise Stop

        def refresh(_: Classifier, sing: SingLoss) -> None:
            sing.set_translator(LinearTranslator(1.5 * sing.matrix, sing.offset - 1))
            sing.double()
            self.refreshed.append(max(self.logged, default=0))  # 0: at once, before any step of this start

        callbacks = ArmCallbacks(log, lambda *_: None, refresh)
        if self.translator and self.sing is not None:
            self.keeper = small_keeper(self.sing, self.part, config, accelerator)
            callbacks = ArmCallbacks(log, lambda *_: None, self.keeper.refresh, self.keeper)
        try:
            trained = train_arm(
                "sing" if self.regularised else "control", classifier, self.sing, self.part, config, accelerator, self.folder,
                callbacks, resume=resume,
            )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
            AcceleratorState._reset_state(True)
        return {name: value.clone() for name, value in trained.state_dict().items()}
