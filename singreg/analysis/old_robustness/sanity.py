"""Sanity rules of a steering evaluation as named checks that run every time (METHOD section 9).

Each rule takes plain numbers, so that attacks on features and on pixels are held to the same ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ALL_OF_THEM = 0.99
FAR_BELOW = 0.5
ROUNDING = 1e-6
FILES, FEATURES, ATTACK_LOG = "saved files", "features", "the attack's own log"
"""Where what a check judges was read."""


@dataclass(frozen=True)
class Check:
    """One sanity rule: its name, whether it held, what was found (numbers in words), and where that was read."""

    name: str
    passed: bool
    found: str
    read: str = FEATURES

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.found}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict (no shapes)."""
        return asdict(self)


def success_reaches_all(
    who: str, budget: str, success: float | None, *, reachable: float | None = None, needed: float = ALL_OF_THEM
) -> Check:
    """Success goes to 100 % of what is reachable as the budget grows: at a budget far beyond any sensible one it must be there.

    success: share of what is reachable; reachable: share of all; None: not known, so all of it is asked for. Where nothing can be
    reached there is nothing that a sound attack could show, and that is what the check says.

    Example:
        >>> print(success_reaches_all("maximiser", "100 |f|", 0.4))
        FAIL  success goes to 100 % as the budget grows (maximiser): 40.0 % at 100 |f|, at least 99 % are needed
    """
    name = f"success goes to 100 % as the budget grows ({who})"
    if reachable == 0:
        return Check(name, True, "no steering could reach its target at any budget, so there is nothing to test")
    of_those = "" if reachable in (None, 1) else f" of the {_share(reachable)} that can be reached at all"
    found = f"{_share(success)}{of_those} at {budget}, at least {100 * needed:g} % are needed"
    return Check(name, success is not None and success >= needed, found)


def success_grows(who: str, grid: Sequence[float], success: Sequence[float | None], *, slack: float = 0.02) -> Check:
    """A larger budget is never worse by more than `slack` (a share): the smaller one's displacement was allowed too.

    Only as sharp as what is optimised: the cosine to the target, of which success is a consequence.
    """
    known = [(budget, value) for budget, value in zip(grid, success, strict=True) if value is not None]
    drops = [(before[1] - after[1], before[0], after[0]) for before, after in itertools.pairwise(known)]
    worst = max(drops, default=(-math.inf, 0.0, 0.0))
    found = (
        f"it falls by {_share(worst[0])} from budget {worst[1]:g} to {worst[2]:g}" if worst[0] > 0
        else f"it never falls over {len(known)} budgets"
    )  # fmt: skip
    return Check(f"success does not fall as the budget grows ({who})", bool(drops) and worst[0] <= slack, found)


def many_steps_beat_one(
    who: str, grid: Sequence[float], many: Sequence[float], one: Sequence[float], *, unit: str = "cosine", slack: float = ROUNDING
) -> Check:
    """Many steps reach at least what one step reaches at every budget, in the quantity that is maximised.

    Example:
        >>> print(many_steps_beat_one("fitted", [0.1, 0.2], [0.3, 0.5], [0.2, 0.6]))
        FAIL  many steps reach at least what one step does (fitted): 1 of 2 budgets below, worst by 0.1 cosine at budget 0.2
    """
    return _at_least(f"many steps reach at least what one step does ({who})", grid, many, one, unit, slack)


def white_box_beats_transfer(
    who: str, grid: Sequence[float], white: Sequence[float], transfer: Sequence[float], *, unit: str = "°", slack: float = 0.05
) -> Check:
    """An attack crafted on the judge itself reaches at least what one crafted on another translator does, at every budget."""
    return _at_least(f"white box reaches at least what transfer does ({who})", grid, white, transfer, unit, slack)


def random_is_far_below(who: str, random: float, gradient: float, *, unit: str = "°", share: float = FAR_BELOW) -> Check:
    """A random direction of the same length gains at most `share` of what the gradient gains, and the gradient gains something.

    Example:
        >>> print(random_is_far_below("fitted", 0.1, -2.0))
        FAIL  a random direction is far below the gradient (fitted): random 0.100°, gradient -2.000° (at most 0.5 of it allowed)
    """
    found = f"random {random:.3f}{unit}, gradient {gradient:.3f}{unit} (at most {share:g} of it allowed)"
    return Check(f"a random direction is far below the gradient ({who})", gradient > 0 and random <= share * gradient, found)


def nothing_without_budget(who: str, success: float | None, moved: float, *, unit: str = "°") -> Check:
    """At a budget of 0 nothing succeeds that had not, and nothing moves (a share; degrees)."""
    found = f"{_share(success)} succeed and the judge sees {moved:.2g}{unit} at a budget of 0"
    return Check(f"no budget, no success ({who})", success == 0 and abs(moved) <= 1e-4, found)


def logits_within(who: str, change: float, tolerance: float) -> Check:
    """The largest |Δlogit| that was found is within the tolerance it was allowed (logits).

    Example:
        >>> print(logits_within("near-null", 0.02, 0.01))
        FAIL  logits stay within the tolerance (near-null): largest change 0.02, allowed 0.01
    """
    return Check(f"logits stay within the tolerance ({who})", change <= tolerance, f"largest change {change:.3g}, allowed {tolerance:g}")


def budget_is_kept(who: str, grid: Sequence[float], longest: Sequence[float], *, slack: float = ROUNDING) -> Check:
    """No displacement is longer than its budget, measured from the attacked thing itself (in the unit of the grid)."""
    over = {budget: used for budget, used in zip(grid, longest, strict=True) if not used <= budget * (1 + slack) + slack}
    found = "none is longer" if not over else "; ".join(f"{used:.4g} at budget {budget:g}" for budget, used in over.items())
    return Check(f"every displacement is within its budget ({who})", bool(grid) and not over, found)


def is_exactly_zero(who: str, values: Mapping[str, float | None]) -> Check:
    """All of these are exactly 0, as a defence that removes the null space promises (shares).

    Example:
        >>> print(is_exactly_zero("drop_null", {"maximiser": 0.0}))
        pass  success is exactly 0 (drop_null): maximiser 0.0 %
    """
    passed = bool(values) and all(value == 0 for value in values.values())
    some = values if len(values) == 1 or not passed else {f"by all {len(values)} attacks": 0.0}
    found = ", ".join(f"{name} {_share(value)}" for name, value in some.items())
    return Check(f"success is exactly 0 ({who})", passed, found or "nothing measured")


def _at_least(
    name: str, grid: Sequence[float], high: Sequence[float], low: Sequence[float], unit: str, slack: float
) -> Check:
    below = [(b - a, budget) for budget, a, b in zip(grid, high, low, strict=True) if not a >= b - slack]
    if below:
        worst = max(below)
        return Check(name, False, f"{len(below)} of {len(grid)} budgets below, worst by {worst[0]:.3g} {unit} at budget {worst[1]:g}")
    gain = max((a - b for a, b in zip(high, low, strict=True)), default=0.0)
    return Check(name, bool(grid), f"at all {len(grid)} budgets, by up to {gain:.3g} {unit}")


def _share(value: float | None) -> str:
    return "none could be tried" if value is None else f"{100 * value:.1f} %"
