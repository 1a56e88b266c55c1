"""The sanity rules on plain numbers: each holds where it should and fails where it should."""

from __future__ import annotations

import math

import pytest

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

NAN = math.nan
GRID = [0.0, 0.1, 0.5]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (success_reaches_all("a", "100 |f|", 0.995), success_reaches_all("a", "100 |f|", 0.9)),
        (success_reaches_all("a", "100 |f|", 1.0), success_reaches_all("a", "100 |f|", None)),
        (success_reaches_all("a", "b", 0.995, reachable=0.4), success_reaches_all("a", "b", 0.9, reachable=0.4)),
        (success_reaches_all("a", "b", None, reachable=0.0), success_reaches_all("a", "b", None, reachable=0.1)),
        (success_grows("a", GRID, [0, 0.2, 0.19]), success_grows("a", GRID, [0, 0.2, 0.1])),
        (success_grows("a", GRID, [0, None, 0.19]), success_grows("a", GRID, [None, None, None])),
        (many_steps_beat_one("a", GRID, [0, 0.2, 0.3], [0, 0.2, 0.2]), many_steps_beat_one("a", GRID, [0, 0.2, 0.3], [0, 0.21, 0.2])),
        (many_steps_beat_one("a", [0.1], [0.1], [0.1 + 1e-9]), many_steps_beat_one("a", [0.1], [NAN], [0.1])),
        (many_steps_beat_one("a", [0.1], [0.1], [0.0]), many_steps_beat_one("a", [], [], [])),
        (white_box_beats_transfer("a", GRID, [0, 3, 9], [0, 3.01, 2]), white_box_beats_transfer("a", GRID, [0, 3, 9], [0, 3.2, 2])),
        (random_is_far_below("a", 0.4, 1.0), random_is_far_below("a", 0.6, 1.0)),
        (random_is_far_below("a", -0.4, 1.0), random_is_far_below("a", -4.0, -1.0)),
        (random_is_far_below("a", -0.4, 1.0), random_is_far_below("a", NAN, 1.0)),
        (nothing_without_budget("a", 0.0, 1e-6), nothing_without_budget("a", 0.01, 0.0)),
        (nothing_without_budget("a", 0.0, 1e-6), nothing_without_budget("a", 0.0, 0.1)),
        (nothing_without_budget("a", 0.0, 1e-6), nothing_without_budget("a", None, NAN)),
        (logits_within("a", 0.01, 0.01), logits_within("a", 0.011, 0.01)),
        (logits_within("a", 0.0, 1e-6), logits_within("a", NAN, 1e-6)),
        (budget_is_kept("a", GRID, [0, 0.1, 0.2]), budget_is_kept("a", GRID, [0, 0.1, 0.51])),
        (budget_is_kept("a", GRID, [0, 0.1, 0.5 + 1e-9]), budget_is_kept("a", GRID, [0.001, 0.1, NAN])),
        (budget_is_kept("a", [0.0], [0.0]), budget_is_kept("a", [], [])),
        (is_exactly_zero("a", {"b": 0.0}), is_exactly_zero("a", {"b": 1e-9})),
        (is_exactly_zero("a", {"b": 0.0}), is_exactly_zero("a", {"b": None})),
        (is_exactly_zero("a", {"b": 0.0}), is_exactly_zero("a", {})),
    ],
)
def test_rules_hold_and_fail(good: Check, bad: Check) -> None:
    assert good.passed, str(good)
    assert not bad.passed, str(bad)
    assert good.name == bad.name
    assert good.found
    assert bad.found
    assert "(a)" in good.name


def test_what_is_found_names_the_budget() -> None:
    worst = budget_is_kept("a", GRID, [0, 0.3, 0.2])
    assert worst.found == "0.3 at budget 0.1"
    assert success_grows("a", GRID, [0, 0.5, 0.2]).found == "it falls by 30.0 % from budget 0.1 to 0.5"
    assert "1 of 3 budgets below, worst by 0.2 ° at budget 0.1" in white_box_beats_transfer("a", GRID, [0, 1, 2], [0, 1.2, 1]).found
    assert Check("x", True, "y").to_json() == {"name": "x", "passed": True, "found": "y", "read": "features"}
    assert str(Check("x", False, "y")) == "FAIL  x: y"
