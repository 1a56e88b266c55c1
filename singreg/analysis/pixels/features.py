"""What the feature half of a pixel report says: its sanity rules gathered by rule, and a sentence a model (METHOD section 9)."""

from __future__ import annotations

import re

from singreg.analysis.pixels.results import PixelReport
from singreg.analysis.old_robustness.attacks import EXACT, MAXIMISER, NEAR, SINGLE
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.analysis.old_robustness.sanity import Check

DROPPED = "success is exactly 0"


def feature_rules(report: PixelReport) -> list[Check]:
    """The rules of every model's feature curves: each rule that always held once with its count, each failure by itself (no shapes).

    Of a model whose null space was dropped only that counts: no success at all is left.
    """
    found = []
    for label, figures in report.features.items():
        checks = [check for check in figures.checks if label not in report.dropped or check.name.startswith(DROPPED)]
        for rule in dict.fromkeys(_rule(check) for check in checks):
            same = [check for check in checks if _rule(check) == rule]
            failed = [check for check in same if not check.passed]
            if failed:
                found += [Check(f"{check.name} (features of {label})", False, check.found) for check in failed]
            else:
                more = "" if len(same) == 1 else f", and the same of {len(same) - 1} more"
                found.append(Check(f"{rule} (features of {label})", True, f"{same[0].found}{more}"))
    return found


def _rule(check: Check) -> str:
    return re.sub(r" \(.*$", "", check.name)


def gain_over_single(figures: RobustnessFigures, judge: str = "fitted") -> float | None:
    """How many times as far (mean AS over the curve) the maximiser turns features as the single gradient step (no unit)."""
    many, one = (figures.curve(attack, crafted_on="fitted", judge=judge).area["AS"][0] for attack in (MAXIMISER, SINGLE))
    return many / one if many is not None and one else None


def feature_sentence(label: str, figures: RobustnessFigures, *, dropped: bool) -> str:
    """A model's feature curves in words: mean success over the curve by both translators, and what many steps gain (shares)."""
    if dropped:
        return f"{label}, in feature space: {_dropped_words(figures)}"
    own, other = (figures.curve(MAXIMISER, crafted_on="fitted", judge=judge) for judge in ("fitted", "auditor"))
    single = figures.curve(SINGLE, crafted_on="fitted", judge="fitted")
    factor = gain_over_single(figures)
    many = "" if factor is None else f" Many steps turn features {factor:.2f} times as far as the single gradient step does on average."
    return (
        f"{label}, in feature space: over steps up to {max(own.grid):g} of the feature norm the maximiser puts the target first in "
        f"{_percent(own.area['success'])} of {figures.rows} steerings on average by the attacked translator and in "
        f"{_percent(other.area['success'])} by the auditor; the single gradient step in {_percent(single.area['success'])}."
        f"{many}{_soft_words(figures)}{_reach_words(figures)}"
    )


def _dropped_words(figures: RobustnessFigures) -> str:
    """What is left once the null part is dropped: nothing of exactly null directions, much of those that a tolerance holds."""
    exact = [c for c in figures.curves if (c.defence, c.tolerance) == ("drop_null", EXACT)]
    most = max((value or 0.0 for curve in exact for value in curve.figures["success"]), default=0.0)
    said = "exactly 0" if most == 0 else f"at most {most:.1%}"
    soft = _soft_words(figures, defence="drop_null") or " Nearly null directions were not tried."
    return f"by exactly null directions success is {said} at every step and by every such attack, for they are what was dropped.{soft}"


def _soft_words(figures: RobustnessFigures, *, defence: str = "") -> str:
    """What the soft null does: any direction, as long as logits stay within the tolerance, as in pixels."""
    curves = [c for c in figures.curves if c.attack.startswith(NEAR) and (c.judge, c.defence) == ("fitted", defence)]
    said = [f"{c.attack}: {_percent(c.area['success'])}" for c in curves]
    after = ", which dropping leaves" if defence else ""
    return f" By directions that only keep logits within the tolerance{after}, on average ({'; '.join(said)})." if said else ""


def _reach_words(figures: RobustnessFigures) -> str:
    """How much could be reached by null directions of any length, where that is not everything (shares)."""
    said = [f"{share:.1%} ({name})" for name, share in figures.reachable.items() if share is not None and share < 1]
    return f" Null directions of any length could put the target first in {', '.join(said)} of the steerings, no more." if said else ""


def _percent(area: list[float | None]) -> str:
    value, low, high = area
    return "none" if value is None else f"{value:.0%}" + ("" if low is None or high is None else f" [{low:.0%}, {high:.0%}]")
