"""One batch of pictures through every arm of the pixel attack, each picture written as a PNG (METHOD section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singreg.analysis.pixels.ascent import ascend, one_step
from singreg.analysis.pixels.budgets import LEVELS, Budget, random_pictures
from singreg.analysis.pixels.model import PixelModel, away_from_decision, save_picture, towards_prompt, without_limits
from singreg.analysis.pixels.passes import Climbed, climbs_of
from singreg.analysis.pixels.results import ATTACK, HOLD, NO_BUDGET, NO_LIMITS, ONE_STEP, RANDOM, AttackedPicture
from singreg.translator import Translator

UNLIMITED = Budget("linf", LEVELS)
UNLIMITED_PICTURES = 8


@dataclass(frozen=True)
class AttackSettings:
    """How the attack is made. hold: how far a cosine may move in the opposite direction."""

    budgets: Sequence[Budget]
    tau: float
    steps: int = 40
    restarts: int = 2
    hold: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Pictures (B, 3, H, W) in [0, 1] on the 8-bit grid, by place in the part; labels and target classes; names."""

    indices: Sequence[int]
    identifiers: Sequence[str]
    pictures: Tensor
    labels: Sequence[int]
    targets: Sequence[int]


@dataclass(frozen=True)
class BatchFound:
    """Attacked pictures (B, 3, H, W) by (budget, arm), and how far the passes got by themselves."""

    pictures: dict[tuple[str, str], Tensor]
    climbs: list[Climbed]


def attack_batch(
    model: PixelModel, translator: Translator, texts: Tensor, batch: Batch, settings: AttackSettings, *, number: int, hold: int = 0
) -> BatchFound:
    """Attacked pictures of every budget and arm, in the first batch the controls too.

    `hold` pictures are moved the opposite way too, at the first L-infinity budget.

    Every random number hangs on (seed, number of the batch, place of the budget), so a batch made again is the same. A larger
    budget of one norm starts from what the smaller one found. Shapes: texts (C, n) unit rows of the class prompts.
    """
    x = batch.pictures.to(model.mean.device)
    with torch.no_grad():
        features, logits = model(x)
        cosines = normalize(translator(features), dim=-1) @ texts.T
    judged = towards_prompt(model, translator, logits, texts[list(batch.targets)], settings.tau)
    found: dict[tuple[str, str], Tensor] = {}
    climbs: list[Climbed] = []
    best: dict[str, Tensor] = {}
    for place, budget in enumerate(settings.budgets):
        generator = _generator(settings.seed, number, place)
        ascent = ascend(
            judged, x, budget, steps=settings.steps, restarts=settings.restarts, generator=generator, start=best.get(budget.norm)
        )
        best[budget.norm] = ascent.images
        found[budget.label, ATTACK] = ascent.images
        single = one_step(judged, x, budget)
        found[budget.label, ONE_STEP] = single.images
        climbs += climbs_of(ascent, single, budget, batch.indices)
        found[budget.label, RANDOM] = random_pictures(x, budget, generator)
    if number == 0:
        nothing = Budget("linf", 0)
        found[nothing.label, NO_BUDGET] = ascend(judged, x, nothing, steps=2, generator=_generator(settings.seed, 0, -1)).images
        some = slice(UNLIMITED_PICTURES)
        judged = without_limits(model, translator, texts, batch.targets[some])
        freely = ascend(judged, x[some], UNLIMITED, steps=settings.steps, generator=_generator(settings.seed, 0, -3))
        found[UNLIMITED.label, NO_LIMITS] = freely.images
    held = x[:hold]
    if len(held):
        budget = next(b for b in settings.budgets if b.norm == "linf")
        opposite = away_from_decision(model, translator, texts, cosines[:hold], logits[:hold].argmax(1), settings.hold)
        generator = _generator(settings.seed, number, -2)
        found[budget.label, HOLD] = ascend(opposite, held, budget, steps=settings.steps, generator=generator).images
    return BatchFound(found, climbs)


def _generator(seed: int, number: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number, place + 3]).generate_state(1)[0]))


def save_batch(found: dict[tuple[str, str], Tensor], batch: Batch, model: str, folder: Path, at: Path) -> list[AttackedPicture]:
    """Write all pictures and their originals as PNG below `folder / at`, and say where (paths in `folder`)."""
    rows = []
    originals = [at / "original" / f"{index:06d}.png" for index in batch.indices]
    for path, picture in zip(originals, batch.pictures, strict=True):
        save_picture(picture, folder / path)
    for (budget, arm), pictures in found.items():
        under = at / budget.replace("/", "-").replace(" ", "-") / arm.replace(" ", "-")
        for place, picture in enumerate(pictures):
            path = under / f"{batch.indices[place]:06d}.png"
            save_picture(picture, folder / path)
            rows.append(
                AttackedPicture(
                    model=model, budget=budget, arm=arm, picture=int(batch.indices[place]), identifier=batch.identifiers[place],
                    label=int(batch.labels[place]), target=int(batch.targets[place]),
                    original=originals[place].as_posix(), file=path.as_posix(),
                )
            )
    return rows
