"""How far features can be steered by every attack, as every judge reads it (METHOD section 9)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.features import FeatureBatch
from singreg.analysis.steering import PairPlan, SteeringRows
from singreg.analysis.steering_curves import EXACT, SINGLE, Attack, Craft, measure_curves, null_direction, straight
from singreg.maximiser import Maximiser, NearNull
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.steering import unit_in_null
from singreg.translator import LinearTranslator

MAXIMISER, RANDOM = "maximiser", "random direction"
NEAR_RATIOS = (0.05, 1.0)  # of σ_1: below it a direction counts as nearly null; 1: held by the logit tolerance alone
DROPPED = "drop_null"
FAR_BELOW, ROUNDING = 0.5, 1e-3  # share of the gradient's mean rise; degrees


def random_direction(rows: SteeringRows, space: NullSpace) -> Tensor:
    """Return unit null directions (R, m), fixed by image and target: the same in any order, on any processes."""
    seeds = ([0, *pair] for pair in zip(rows.image.tolist(), rows.target.tolist(), strict=True))
    drawn = np.stack([np.random.default_rng(s).standard_normal(rows.features.shape[1]) for s in seeds])
    guess = torch.from_numpy(drawn).to(rows.features)
    return unit_in_null(space.component(guess), guess)


def climb(translator: LinearTranslator, space: NullSpace, steps: Sequence[float], near: NearNull | None) -> Craft:
    """Maximise the cosine; each step begins from the one below it and is never worse."""
    maximiser = Maximiser(translator, space, near)

    def craft(rows: SteeringRows) -> Iterator[tuple[Tensor, Tensor]]:
        start: Tensor | None = None
        for step in steps:
            limit = step * rows.features.norm(dim=1)
            displacement, start = maximiser.maximise(rows.features, rows.text, limit, start=start)
            yield displacement, rows.features.new_ones(len(rows.features), 1)

    return craft


def usual_attacks(
    translators: Mapping[str, LinearTranslator],
    weight: Tensor,
    space: NullSpace,
    steps: Sequence[float],
    tolerance: float,
) -> list[Attack]:
    """Make the single step and the maximiser on every translator, and on the first one the controls.

    These are a random direction, and the maximiser with directions beside the null space that keep every logit within
    the tolerance: those that are nearly null, and any.
    """
    attacks = []
    for name, each in translators.items():
        along = partial(null_direction, translator=each, space=space)
        attacks.append(Attack(SINGLE, name, steps, partial(straight, direction=along, steps=steps)))
        attacks.append(Attack(MAXIMISER, name, steps, climb(each, space, steps, None)))
    on, first = next(iter(translators.items()))
    drawn = partial(straight, direction=partial(random_direction, space=space), steps=steps)
    attacks.append(Attack(RANDOM, on, steps, drawn))
    for ratio in NEAR_RATIOS:
        near = NearNull.below(weight, space, ratio=ratio, tolerance=tolerance)
        if near.basis.shape[1]:
            name = f"near-null {100 * ratio:g} %, τ {tolerance:g}"
            attacks.append(Attack(name, on, steps, climb(first, space, steps, near), tolerance=tolerance))
    return attacks


def measure_robustness(
    batches: Iterable[FeatureBatch],
    plan: PairPlan,
    translators: Mapping[str, LinearTranslator],
    *,
    classifier: Classifier,
    space: NullSpace,
    steps: Sequence[float],
    tolerance: float,
) -> dict[str, Any]:
    """Steer images by every attack and let every translator judge, with and without the null component.

    Success: the target prompt did not outrank all classes before, and does after, with the decision kept.

    All translators are attacked and all judge, so each is the others' transfer and adaptive attacker.

    Args:
        steps: shares of |f|.
        tolerance: |Δlogit| that attacks with nearly null directions may take.

    Returns:
        nullity, the curves of `measure_curves` and the checks (name, passed, found) they were held to.
    """
    attacks = usual_attacks(translators, classifier.weight, space, steps, tolerance)
    judges = {(name, ""): each for name, each in translators.items()}
    for name, each in translators.items():  # T Π_p f: what is read of features without their null component
        judges[name, DROPPED] = LinearTranslator(space.remove(each.matrix.double()), each.offset)
    how: dict[str, Any] = {"weight": classifier.weight, "bias": classifier.bias, "null_space": space}
    curves = measure_curves(batches, plan, attacks, judges, **how, fresh=True)
    return {"nullity": space.nullity, "curves": curves, "checks": sanity_checks(curves)}


def sanity_checks(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hold curves to the rules that every sound attack keeps: name, passed and found (who broke it) of each."""
    moved, left, weaker, guesses = [], [], [], []
    own: dict[tuple[str, str], np.ndarray] = {}
    for curve in curves:
        who, figures = f"{curve['attack']} on {curve['attacker']}", curve["figures"]
        if not curve["defence"] and curve["attacker"] == curve["judge"]:
            own[curve["attack"], curve["judge"]] = np.array([figures["AS"], figures["AS_abs"]])
        if not max(curve["logit_change"]) <= curve["tolerance"]:
            moved.append(who)
        if curve["defence"] and curve["tolerance"] == EXACT and any(figures["success"]):
            left.append(who)
    for (attack, judge), found in own.items():
        single = own[SINGLE, judge][0]
        if attack == MAXIMISER and (single - found[0] > ROUNDING).any():
            weaker.append(judge)
        # The mean of max(gain, 0): gains of random directions cancel, and an attacker would keep the helpful ones.
        if attack == RANDOM and not found.mean() <= FAR_BELOW * single.mean():
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
