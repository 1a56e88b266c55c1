"""How far features can be steered by every attack, as every judge reads it (METHOD section 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import PassSettings, iterate_features
from singreg.analysis.statistics import resampled_means
from singreg.analysis.steering import PairPlan, SteeringRows, judged, largest_change, own_prompt
from singreg.analysis.steering_curves import FIGURES, curve_figures, sum_by_image
from singreg.data.datasets import ImageSplit
from singreg.maximiser import Maximiser, NearNull
from singreg.models.classifier import Classifier
from singreg.nullspace import Invariance, NullSpace
from singreg.steering import similarity_gradient, unit_in_null
from singreg.translator import LinearTranslator
from singreg.utils import gather_rows, plain

SINGLE, MAXIMISER, RANDOM = "single step", "maximiser", "random direction"
EXACT = 1e-6  # logits: what a null direction may move them by, in float64 with features of any usual size
NEAR_RATIOS = (0.05, 1.0)  # of σ_1: below it a direction counts as nearly null; 1: held by the logit tolerance alone
DEFENCES = ("", "drop_null")
FAR_BELOW, ROUNDING = 0.5, 1e-3  # share of the gradient's mean rise; degrees

Craft = Callable[[SteeringRows], Iterator[Tensor]]
"""Rows to their displacements (R, m) float64, one for each relative step."""


@dataclass(frozen=True)
class Attack:
    """A way to displace features, crafted on a translator, that moves no logit by more than its tolerance."""

    name: str
    crafted_on: str
    craft: Craft
    tolerance: float = EXACT


def straight(translator: LinearTranslator | None, null_space: NullSpace, steps: Sequence[float]) -> Craft:
    """Take the whole step along the gradient's null part; without a translator along a random null direction."""

    def craft(rows: SteeringRows) -> Iterator[Tensor]:
        if translator is None:  # fixed by image and target: the same in any order and on any number of processes
            seeds = ([0, *pair] for pair in zip(rows.image.tolist(), rows.target.tolist(), strict=True))
            drawn = np.stack([np.random.default_rng(s).standard_normal(rows.features.shape[1]) for s in seeds])
            guess = torch.from_numpy(drawn).to(rows.features)
        else:
            guess = similarity_gradient(rows.features, rows.text, translator)
        direction, length = unit_in_null(null_space.component(guess), guess), rows.features.norm(dim=1, keepdim=True)
        return (step * length * direction for step in steps)

    return craft


def climb(translator: LinearTranslator, null_space: NullSpace, steps: Sequence[float], near: NearNull | None) -> Craft:
    """Maximise the cosine; each step begins from the one below it and is never worse."""
    maximiser = Maximiser(translator, null_space, near)

    def craft(rows: SteeringRows) -> Iterator[Tensor]:
        start: Tensor | None = None
        for step in steps:
            found = maximiser.maximise(rows.features, rows.text, step * rows.features.norm(dim=1), start=start)
            start = found.coordinates
            yield found.displacement

    return craft


def usual_attacks(
    translators: Mapping[str, LinearTranslator],
    weight: Tensor,
    null_space: NullSpace,
    steps: Sequence[float],
    tolerance: float,
) -> list[Attack]:
    """Make the single step and the maximiser on every translator, and on the first one the controls.

    These are a random direction, and the maximiser with directions beside the null space that keep every logit within
    the tolerance: those that are nearly null, and any.
    """
    attacks = []
    for name, translator in translators.items():
        attacks.append(Attack(SINGLE, name, straight(translator, null_space, steps)))
        attacks.append(Attack(MAXIMISER, name, climb(translator, null_space, steps, None)))
    on, first = next(iter(translators.items()))
    attacks.append(Attack(RANDOM, on, straight(None, null_space, steps)))
    for ratio in NEAR_RATIOS:
        near = NearNull.below(weight, null_space, ratio=ratio, tolerance=tolerance)
        if near.basis.shape[1]:
            name = f"near-null {100 * ratio:g} %, τ {tolerance:g}"
            attacks.append(Attack(name, on, climb(first, null_space, steps, near), tolerance))
    return attacks


@torch.no_grad()
def measure_robustness(
    classifier: Classifier,
    split: ImageSplit,
    embeddings: np.ndarray,
    texts: Tensor,
    translators: Mapping[str, LinearTranslator],
    *,
    plan: PairPlan,
    steps: Sequence[float],
    tolerance: float,
    invariance: Invariance,
    settings: PassSettings,
) -> dict[str, Any]:
    """Steer a split's images by every attack and let every translator judge, with and without the null component.

    Exact over processes, in float64. Success: the target prompt did not outrank all classes before, and does after,
    with the decision kept.

    Args:
        translators: by name; all are attacked and all judge, so each is the others' transfer and adaptive attacker.
        steps: shares of |f|.
        tolerance: |Δlogit| that attacks with nearly null directions may take.

    Shape: embeddings (N, n), texts (C, n) unit rows of all class prompts.

    Returns:
        images, rows, nullity; curves (attack, crafted_on, judge, defence "" or "drop_null", grid; figures, intervals
        and area of `FIGURES`; logit_change, the largest at each step; tolerance); checks (name, passed, found).
    """
    weight, exact = classifier.weight.detach().double(), texts.double()
    space = NullSpace.from_weight(weight, invariance=invariance).to(weight.device)
    bias = 0.0 if classifier.bias is None else classifier.bias.detach().double()
    attacks = usual_attacks(translators, weight, space, steps, tolerance)
    columns = []
    for batch in iterate_features(classifier, split, embeddings, settings, "robustness to steering"):
        for rows in plan.rows(batch, len(texts)):
            columns.append(_attacked(rows, attacks, weight, bias, space, translators, exact))
    table, curves = gather_rows(columns, sort_by="image"), list[dict[str, Any]]()
    for attack in attacks:
        for defence in DEFENCES:
            curves += [_curve(table, attack, defence, judge, steps) for judge in translators]
    counts = {"images": len(table["rows"]), "rows": int(table["rows"].sum()), "nullity": space.nullity}
    found: dict[str, Any] = plain({**counts, "curves": curves, "checks": sanity_checks(curves)})
    return found


def _attacked(
    rows: SteeringRows,
    attacks: Sequence[Attack],
    weight: Tensor,
    bias: Tensor | float,
    space: NullSpace,
    judges: Mapping[str, LinearTranslator],
    texts: Tensor,
) -> dict[str, np.ndarray]:
    """Sums of `FIGURES` (3, G) over each image's rows, by attack, defence and judge, and of the eligible rows."""
    same, keys = own_prompt(rows.text, texts), [(defence, judge) for defence in DEFENCES for judge in judges]

    def read(defence: str, judge: str, features: Tensor) -> tuple[Tensor, Tensor]:
        return judged(judges[judge], space.remove(features) if defence else features, rows.text, texts, same)

    before, decided = {key: read(*key, rows.features) for key in keys}, (rows.features @ weight.T + bias).argmax(1)
    sums = {f"{defence}|{judge}": (~before[defence, judge][1]).double() for defence, judge in keys}
    largest = {}
    for attack in attacks:
        changes, points = [], {key: list[Tensor]() for key in keys}
        for d in attack.craft(rows):
            moved = rows.features + d
            kept = (moved @ weight.T + bias).argmax(1) == decided
            changes.append(largest_change(d @ weight.T, space).max())
            for key in keys:
                (angle, first), (after, won) = before[key], read(*key, moved)
                gained = angle - after
                points[key].append(torch.stack([gained, gained.abs(), (won & ~first & kept).double()], dim=1))
        name = f"{attack.name}|{attack.crafted_on}"
        sums |= {f"{name}|{d}|{judge}": torch.stack(values, dim=2) for (d, judge), values in points.items()}
        largest[name] = torch.stack(changes).cpu().numpy()
    by_image = sum_by_image(rows, sums)
    # every image carries the largest change of its chunk, so that the largest of all is the largest over images
    return by_image | {name: np.tile(values, (len(by_image["image"]), 1)) for name, values in largest.items()}


def _curve(
    table: Mapping[str, np.ndarray], attack: Attack, defence: str, judge: str, steps: Sequence[float]
) -> dict[str, Any]:
    """Ratios of sums over images with 95 % intervals: success over the eligible rows, AS over all."""
    name = f"{attack.name}|{attack.crafted_on}"
    sums = table[f"{name}|{defence}|{judge}"]
    counts = np.stack([table["rows"], table["rows"], table[f"{defence}|{judge}"]], axis=1)
    columns = np.concatenate([sums.reshape(len(sums), -1), counts], axis=1)
    both = np.concatenate([columns.mean(0, keepdims=True), resampled_means(columns)])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = both[:, :-3].reshape(len(both), 3, -1) / both[:, -3:, None]
    names = {"attack": attack.name, "crafted_on": attack.crafted_on, "judge": judge, "defence": defence, "grid": steps}
    found = curve_figures(FIGURES, ratios[0], ratios[1:], steps)
    return {**names, **found, "logit_change": table[name].max(0), "tolerance": attack.tolerance}


def sanity_checks(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hold curves to the rules that every sound attack keeps: name, passed and found (who broke it) of each."""
    moved, left, weaker, guesses = [], [], [], []
    own: dict[tuple[str, str], Mapping[str, np.ndarray]] = {}
    for curve in curves:
        who, tolerance = f"{curve['attack']} on {curve['crafted_on']}", curve["tolerance"]
        if not curve["defence"] and curve["crafted_on"] == curve["judge"]:
            own[curve["attack"], curve["judge"]] = curve["figures"]
        if not curve["logit_change"].max() <= tolerance:
            moved.append(who)
        if curve["defence"] and tolerance == EXACT and (curve["figures"]["success"] > 0).any():
            left.append(who)
    for (attack, judge), figures in own.items():
        single = own[SINGLE, judge]["AS"]
        if attack == MAXIMISER and (single - figures["AS"] > ROUNDING).any():
            weaker.append(judge)
        # The mean of max(gain, 0): gains of random directions cancel, and an attacker would keep the helpful ones.
        if attack == RANDOM and not (figures["AS"] + figures["AS_abs"]).mean() / 2 <= FAR_BELOW * single.mean():
            guesses.append(judge)
    broken = {
        "logits stay within what the attack promises": moved,
        "many steps reach at least what one step does": weaker,
        "a random direction is far below the gradient": guesses,
        "success is exactly 0 with the null space dropped": left,
    }
    return [
        {"name": name, "passed": not wrong, "found": ", ".join(dict.fromkeys(wrong)) or "holds"}
        for name, wrong in broken.items()
    ]
