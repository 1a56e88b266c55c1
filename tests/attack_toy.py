"""Four images of 48 pixels and a linear model of them, so that linear algebra knows what an attack can reach."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from singreg.analysis.attack import Budget
from singreg.analysis.attack_images import AttackSettings, PixelModel, attack_images, save_batch
from singreg.analysis.attack_judges import judge_images, translator_judge
from singreg.models.classifier import Classifier
from singreg.translator import LinearTranslator

TAU = 0.1  # tight for the toy's logits, so that forgetting it shows
SMALL, LARGE = Budget("linf", 2), Budget("linf", 8)
SETTINGS = AttackSettings([SMALL, LARGE], tau=TAU, steps=12, restarts=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_images(count: int, side: int, seed: int = 0, low: int = 40, high: int = 216) -> Tensor:
    """Images far enough from black and white that no budget meets an edge."""
    return torch.randint(low, high, (count, 3, side, side), generator=seeded(seed)) / 255


class Linear(nn.Module):
    """Logits that are linear in the pixels, through features that are the pixels themselves."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * side * side, classes, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(self.fc.weight.shape, generator=seeded(5)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out


def linear_model(side: int = 4, classes: int = 2) -> PixelModel:
    classifier = Classifier.from_module(Linear(side, classes)).requires_grad_(False)
    return PixelModel(classifier, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


@cache
def parts() -> tuple[PixelModel, LinearTranslator, Tensor, Tensor, pd.DataFrame]:
    """The model (3 logits, so 45 directions are free), a translator, prompts, images, and which they are."""
    model, x = linear_model(classes=3), grid_images(4, 4)
    translator = LinearTranslator(torch.randn(5, 48, generator=seeded(1)), torch.zeros(5))
    texts = normalize(torch.randn(3, 5, generator=seeded(2)), dim=-1)
    label = model(x)[1].argmax(1)
    chosen = {"image": [3, 1, 4, 7], "identifier": list("abcd"), "label": label, "target": (label + 1) % 3}
    return model, translator, texts, x, pd.DataFrame(chosen)


def attacked(settings: AttackSettings = SETTINGS) -> tuple[dict[tuple[str, str], Tensor], pd.DataFrame]:
    """Attacked images by budget and arm, and what the passes found by themselves."""
    model, translator, texts, x, chosen = parts()
    found, climbs = attack_images(model, translator, x, texts[chosen["target"].tolist()], settings, number=0)
    return found, climbs.assign(model="toy")


def judged(folder: Path, settings: AttackSettings = SETTINGS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The toy through the whole chain: attack, PNG, judges."""
    model, translator, texts, x, chosen = parts()
    found, climbs = attacked(settings)
    rows = save_batch(found, x, chosen, folder, Path("attacked")).assign(model="toy")
    judges = dict.fromkeys(("fitted", "auditor"), translator_judge(model, translator, texts))
    return judge_images(rows, folder, model, judges, settings.budgets, tau=TAU), climbs


@cache
def sound_climbs() -> pd.DataFrame:
    return attacked()[1]
