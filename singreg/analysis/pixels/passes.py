"""What the passes of an attack reach by themselves, and the rules that a dead or a wrong-sign one breaks (METHOD section 9).

The finished attack begins with the single step and with the smaller budget's pictures, so it is at least as good as both whatever
its passes do. Here the passes are measured without that help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.pixels.ascent import LAGRANGIAN, TANGENT
from singreg.analysis.pixels.budgets import Ascent, Budget
from singreg.analysis.old_robustness import sanity
from singreg.analysis.old_robustness.sanity import ATTACK_LOG, Check

STRICT = 0.05
"""Degrees that passes must gain by themselves, on average, at one budget or more."""


@dataclass(frozen=True)
class Climbed:
    """One picture, budget and kind of pass: degrees gained towards the target, as the attack read the 8-bit pictures itself.

    one_step: by the single gradient step. began: before any pass, by the better of that step and the smaller budget's picture.
    alone: by the steps of these passes, their start not counted.
    """

    budget: str
    kind: str
    picture: int
    one_step: float
    began: float
    alone: float


@dataclass(frozen=True)
class ClimbSummary:
    """Means over pictures of `Climbed` (degrees)."""

    model: str
    budget: str
    kind: str
    pictures: int
    one_step: float
    began: float
    alone: float


def climbs_of(found: Ascent, one_step: Ascent, budget: Budget, pictures: Sequence[int]) -> list[Climbed]:
    """Rows of one ascent towards a prompt, whose objective is a cosine; pictures (B,) by place in the part."""
    assert found.began is not None
    step, began = (_degrees(found.before, after).tolist() for after in (one_step.after, found.began))
    rows = []
    for kind, after in found.alone.items():
        alone = _degrees(found.before, after).tolist()
        rows += [
            Climbed(budget.label, kind, int(picture), step[place], began[place], alone[place]) for place, picture in enumerate(pictures)
        ]
    return rows


def _degrees(before: Tensor, after: Tensor) -> Tensor:
    gained: Tensor = torch.rad2deg(before.clamp(-1, 1).arccos() - after.clamp(-1, 1).arccos())
    return gained


def climb_summaries(model: str, climbs: Sequence[Climbed]) -> list[ClimbSummary]:
    """Means by budget and kind, in the order they come (degrees)."""
    groups: dict[tuple[str, str], list[Climbed]] = {}
    for row in climbs:
        groups.setdefault((row.budget, row.kind), []).append(row)
    return [
        ClimbSummary(
            model, budget, kind, len(rows),
            *(float(np.mean([getattr(row, name) for row in rows])) for name in ("one_step", "began", "alone")),
        )
        for (budget, kind), rows in groups.items()
    ]  # fmt: skip


def pass_checks(model: str, climbs: Sequence[Climbed], budgets: Sequence[Budget], random: Sequence[float]) -> list[Check]:
    """The passes alone: those that begin at the single step reach it and climb beyond; those from random points beat random ones.

    random: mean gains of random directions by budget (degrees), as the rule on them counts them.
    """
    summaries = climb_summaries(model, climbs)
    first = TANGENT if any(s.kind == TANGENT for s in summaries) else LAGRANGIAN
    mine = {s.budget: s for s in summaries if s.kind == first}
    rows = [mine[budget.label] for budget in budgets if budget.label in mine]
    places = [float(place) for place in range(1, len(rows) + 1)]
    found = [
        sanity.many_steps_beat_one(
            f"{model}, {first} alone", places, [s.alone for s in rows], [s.one_step for s in rows], unit="°", slack=STRICT
        ),
        _climbs(f"{model}, {first}", [(s.budget, s.alone - s.began) for s in rows]),
    ]  # fmt: skip
    others = {s.budget: s for s in summaries if s.kind != first}
    if others:
        gains = [(budget.label, others[budget.label].alone - by_chance) for budget, by_chance in zip(budgets, random, strict=True)]
        found.append(_climbs(f"{model}, {LAGRANGIAN} from random points, over random directions", gains))
    hint = "; a broken pass, or too few steps"
    return [Check(check.name, check.passed, check.found + ("" if check.passed else hint), ATTACK_LOG) for check in found]


def _climbs(who: str, gains: Sequence[tuple[str, float]]) -> Check:
    """At one budget or more the mean gain is strict (degrees)."""
    said = ", ".join(f"{gain:+.2f}° at {budget}" for budget, gain in gains)
    passed = any(gain > STRICT for _, gain in gains)
    found = f"{said or 'nothing measured'}; above {STRICT:g}° at one of them is needed"
    return Check(f"the passes climb by themselves ({who})", passed, found)
