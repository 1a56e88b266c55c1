"""The curves: both arms by the same translator, all processes' pictures in every figure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure

from singreg.analysis.features import PassSettings
from singreg.training.config import FinetuneConfig
from singreg.training.experiment import Experiment
from singreg.training.watching import log_watched, watch
from singreg.translator import LinearTranslator, TranslatorInfo
from singreg.workbench.run import make_accelerator
from tests.processes import run_processes
from tests.training.small_arm import CLASSES, COUNT, DIM, WIDTH, Pixels, small_classifier


class Kept:
    """Stands for TensorBoard."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.drawn: dict[str, float] = {}

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.values |= values

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self.drawn[name] = sum(bar.get_height() for bar in figure.axes[0].patches)  # type: ignore[attr-defined]


def _logged(rank: int, world: int, count: int) -> tuple[dict[str, float], dict[str, float]]:
    AcceleratorState._reset_state(True)
    config, log = FinetuneConfig(), Kept()
    config.training.watch = count
    parts: Any = SimpleNamespace(audit=Pixels())
    generator = torch.Generator().manual_seed(4)
    texts = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)
    frozen, loop = (LinearTranslator(torch.randn(DIM, WIDTH, generator=generator), torch.zeros(DIM)) for _ in range(2))
    experiment = Experiment(
        config, make_accelerator(seed=0), parts, small_classifier(), texts, {"audit": np.zeros((COUNT, DIM), np.float32)},
        TranslatorInfo(), PassSettings(4, 0, progress=False),
    )  # fmt: skip
    classifier = experiment.classifier.float()
    classifier._transform = lambda image: torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    for tag, watched in watch(experiment, classifier, {"watch": frozen, "watch_loop": loop}).items():
        log_watched(log, tag, watched, 1)  # type: ignore[arg-type]
    AcceleratorState._reset_state(True)
    return log.values, log.drawn


def test_every_process_draws_all_pictures_and_each_translator_has_its_curve() -> None:
    one, drawn = _logged(0, 1, 11)
    assert drawn == {"watch/histogram": 2 * 11, "watch_loop/histogram": 2 * 11}  # a bar of AS and one of IS for every picture
    assert one["watch/count"] == one["watch_loop/count"] == 11
    assert one["watch/IS"] != one["watch_loop/IS"]
    for values, figures in run_processes(2, _logged, 11):
        assert figures == drawn
        assert values.keys() == one.keys()
        for name, value in values.items():
            np.testing.assert_allclose(value, one[name], rtol=1e-5)


def test_nothing_is_watched_where_nothing_is_wanted() -> None:
    assert _logged(0, 1, 0) == ({}, {})
