"""The sanity rules applied to a robustness measurement in feature space (METHOD section 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from singreg.analysis.old_robustness.attacks import EXACT, MAXIMISER, RANDOM, SINGLE
from singreg.analysis.old_robustness.results import RobustnessCurve
from singreg.analysis.old_robustness.sanity import (
    Check,
    budget_is_kept,
    is_exactly_zero,
    logits_within,
    many_steps_beat_one,
    nothing_without_budget,
    random_is_far_below,
    success_grows,
    success_reaches_all,
    white_box_beats_transfer,
)

SPREAD = 0.05  # share by which success may fall from one budget to a larger one: what is maximised is the cosine


def feature_checks(
    curves: Sequence[RobustnessCurve],
    limit: float,
    limit_success: Mapping[str, float | None],
    reachable: Mapping[str, float | None],
    translators: Sequence[str],
) -> list[Check]:
    """Every sanity rule on the curves; `translators` are this model's own, by name; reachable: shares of the steerings (no shapes)."""
    plain = {(c.attack, c.crafted_on, c.judge, c.budget): c for c in curves if not c.defence}
    checks = [
        success_reaches_all(
            f"crafted on and judged by {name}", f"{limit:g} |f| and more", limit_success.get(name), reachable=reachable.get(name)
        )
        for name in translators
    ]
    for name in translators:
        many, one = (plain.get((attack, name, name, "step")) for attack in (MAXIMISER, SINGLE))
        if many is None or one is None:
            continue
        checks.append(success_grows(f"{MAXIMISER}, {name}", many.grid, many.figures["success"], slack=SPREAD))
        checks.append(many_steps_beat_one(name, many.grid, _known(many, "similarity"), _known(one, "similarity")))
        for other in translators:
            transfer = plain.get((MAXIMISER, other, name, "step"))
            if other != name and transfer is not None:
                checks.append(
                    white_box_beats_transfer(f"{other} to {name}", many.grid, _known(many, "AS"), _known(transfer, "AS"))
                )
    checks += [_random(plain, key) for key in plain if key[0] == RANDOM and key[1] == key[2] and key[3] == "step"]
    return [*checks, _without_budget(curves), *_promises(curves), *_dropped(curves)]


def _known(curve: RobustnessCurve, figure: str) -> list[float]:
    return [float("nan") if value is None else value for value in curve.figures[figure]]


def _random(plain: Mapping[tuple[str, str, str, str], RobustnessCurve], key: tuple[str, str, str, str]) -> Check:
    _, name, judge, budget = key
    areas = {attack: plain[attack, name, judge, budget].area for attack in (RANDOM, SINGLE)}
    heights = (areas[RANDOM]["AS"][0], areas[RANDOM]["AS_abs"][0], areas[SINGLE]["AS"][0])
    signed, size, gradient = (float("nan") if height is None else height for height in heights)
    # the mean of max(gain, 0): gains of random directions cancel, and an attacker would keep the helpful ones only
    return random_is_far_below(f"mean gain over the curve, {name}", (signed + size) / 2, gradient)


def _without_budget(curves: Sequence[RobustnessCurve]) -> Check:
    """The worst of all curves that begin at a budget of 0."""
    from_zero = [c for c in curves if c.budget == "step" and c.grid[0] == 0]
    success = [value for c in from_zero if (value := c.figures["success"][0]) is not None]
    moved = [abs(value) for c in from_zero if (value := c.figures["AS_abs"][0]) is not None]
    return nothing_without_budget(
        f"the worst of {len(from_zero)} curves", max(success, default=None), max(moved, default=float("nan"))
    )


def _promises(curves: Sequence[RobustnessCurve]) -> list[Check]:
    """Logits and lengths, once for every attack (they are the same for all judges)."""
    once = {(c.attack, c.crafted_on, c.budget): c for c in curves}
    checks = []
    for c in once.values():
        who = f"{c.attack}, {c.crafted_on}, {c.budget}"
        if c.tolerance is not None:
            checks.append(logits_within(who, max(c.logit_change), c.tolerance))
        checks.append(budget_is_kept(who, c.grid, c.longest))
    return checks


def _dropped(curves: Sequence[RobustnessCurve]) -> list[Check]:
    """Exactly null displacements must do nothing at all once the null part is dropped."""
    values = {
        f"{c.attack} on {c.crafted_on} by {c.judge}": _worst(c)
        for c in curves if c.defence == "drop_null" and c.tolerance == EXACT and c.budget == "step"
    }  # fmt: skip
    return [is_exactly_zero("drop_null", values)] if values else []


def _worst(curve: RobustnessCurve) -> float | None:
    return max((value for value in curve.figures["success"] if value is not None), default=None)
