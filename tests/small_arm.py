"""A training arm that takes milliseconds: a small net in float64 on random images, driven by the recipe's own loop."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

import finetune
from singreg import loop
from singreg.analysis.features import FittedTranslator
from singreg.config import FinetuneConfig, overridden
from singreg.data.embeddings import PassSettings
from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.ridge import RidgeStatistics
from singreg.runs import start
from singreg.setup import Setup
from singreg.task import LoopTranslator
from singreg.translator import LinearTranslator
from tests.toy import ToySplit

COUNT, SIDE, CLASSES, WIDTH, DIM = 43, 4, 3, 12, 6
PLAIN = {"terms": {"capacity": 10.0}}  # no ratio over a batch's images: accumulation may not change it


class Stop(Exception):
    """Stands for whatever ends a run at a moment it did not choose."""


class Pixels(ToySplit):
    """COUNT small images of noise; which of them were asked for, in order, is in `asked`."""

    side = SIDE

    def __init__(self) -> None:
        super().__init__(COUNT, classes=CLASSES)
        self.asked: list[int] = []

    def image(self, index: int) -> Image.Image:
        self.asked.append(int(index))
        return super().image(index)


def as_double(image: Image.Image) -> Tensor:
    """An image as (3, H, W) in float64, so that the order of sums can be told from mistakes."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).double() / 127.5 - 1


def small_classifier(*, dropout: float = 0.5) -> Classifier:
    """With a batch norm, which keeps its statistics, and a dropout before the head."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("flat", nn.Flatten())
    net.add_module("first", nn.Linear(3 * SIDE * SIDE, WIDTH))
    net.add_module("norm", nn.BatchNorm1d(WIDTH))
    net.add_module("act", nn.ReLU())
    net.add_module("drop", nn.Dropout(dropout))
    net.add_module("fc", nn.Linear(WIDTH, CLASSES))
    classifier = Classifier.from_module(net.double(), head="fc", transform=as_double)
    return classifier.tune("all")


def embeddings() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((COUNT, DIM), dtype=np.float32)


def features_of(classifier: Classifier) -> Tensor:
    """Features (N, m) of the images, in float32 as a pass over them gives them."""
    with torch.no_grad():
        images = torch.stack([as_double(Pixels().image(index)) for index in range(COUNT)])
        return copy.deepcopy(classifier).eval().features(images.to(classifier.weight)).float()


def small_fitted(classifier: Classifier) -> FittedTranslator:
    """A translator of the images at a ridge of a hundredth."""
    f, z = features_of(classifier), torch.from_numpy(embeddings())
    halves = [RidgeStatistics(WIDTH, DIM).update(f[half::2], z[half::2]) for half in (0, 1)]
    whole = halves[0] + halves[1]
    solution = whole.solve(0.01, standardize=NullSpace.from_weight(classifier.weight).basis)
    translator = LinearTranslator.from_solution(solution)
    return FittedTranslator(translator, f.mean(0), (halves[0], halves[1]))


def small_sing(classifier: Classifier, **options: Any) -> SingLoss:
    generator, fitted = torch.Generator().manual_seed(1), small_fitted(classifier)
    texts = nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)
    options = {"weight": 0.5, "ramp_steps": 4, **options}
    return SingLoss(classifier, fitted.translator, texts, fitted.statistics, **options).double()


def small_setup(classifier: Classifier, train: Pixels, held: Any = None) -> Setup:
    splits: Any = SimpleNamespace(train=train, bank=Pixels())
    vlm: Any = None
    passes = PassSettings(16, 0, progress=False)
    return Setup(splits, classifier, vlm, torch.eye(CLASSES, DIM), {"bank": embeddings()}, passes, held=held)


@dataclass
class Arm:
    """One call of the recipe's `train`: what to train, and what came of it.

    options: of SingLoss. values: of the configuration, by dotted keys. chooses: whether images are held out for that.
    """

    folder: Path
    regularised: bool = True
    dropout: float = 0.5
    accumulation: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    chooses: bool = False
    split: Pixels = field(default_factory=Pixels)
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    sing: SingLoss | None = None

    def config(self) -> FinetuneConfig:
        """11 optimiser steps an epoch at most, checkpoints that do not fall on epochs."""
        usual = {"training.epochs": 2, "training.batch_size": 8, "training.learning_rate": 0.01}
        usual |= {"translator.refreshes": 1, "data.augmentation": "flip"}
        return overridden(FinetuneConfig(out=str(self.folder)), {**usual, **self.values})

    def run(self, *, stop_after: int | None = None) -> dict[str, Tensor]:
        """The trained classifier's state, from the newest checkpoint on; `Stop` comes after a step, before a save."""
        AcceleratorState._reset_state(True)
        config, threads = self.config(), torch.get_num_threads()
        accelerator = start(config)
        accelerator.gradient_accumulation_steps = self.accumulation
        torch.set_num_threads(1)  # more only wait for one another on sums this small
        classifier = small_classifier(dropout=self.dropout)
        options = {"accumulation": self.accumulation, **self.options}
        self.sing = small_sing(classifier, **options) if self.regularised else None

        def log(_: Accelerator, figures: dict[str, float], step: int) -> None:
            if figures:
                self.logged.setdefault(step, {}).update(figures)
            if figures and step == stop_after:
                raise Stop

        setup = small_setup(classifier, self.split, (Pixels(), embeddings()) if self.chooses else None)
        run: Any = SimpleNamespace(accelerator=accelerator, folder=self.folder)
        self.keeper = LoopTranslator(small_fitted(classifier), setup, embeddings(), self.sing)
        name = "sing" if self.regularised else "control"
        try:
            with (
                patch.multiple(finetune, log=log, CHECKPOINT_EVERY=3),
                patch.multiple(loop, log=log, LOG_EVERY=1),
            ):
                finetune.train(loop.Arm(name, self.keeper, config, run))
        finally:
            torch.set_num_threads(threads)
            AcceleratorState._reset_state(True)
        return {key: value.clone() for key, value in classifier.state_dict().items()}

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoints/*/step-*"))


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
