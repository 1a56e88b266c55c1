"""The passes of the pixel attack measured by themselves: a dead or a wrong-sign one is seen, whatever the single step found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from singreg.analysis.pixels import ascent
from singreg.analysis.pixels.ascent import LAGRANGIAN, TANGENT
from singreg.analysis.pixels.passes import Climbed, climb_summaries, pass_checks
from singreg.analysis.old_robustness.sanity import ATTACK_LOG
from tests.analysis.pixels.test_pixels import LARGE, SETTINGS, SMALL, attacked_toy, failing, sound_climbs


def dead(*_: Any, **__: Any) -> None:
    """A pass that does nothing."""


def downhill(one_pass: Callable[..., None]) -> Callable[..., None]:
    """The same pass with the sign of every gradient of it turned round, those of the tangent too, which its projection does not notice."""
    right = torch.autograd.grad

    def turned(*args: Any, **kwargs: Any) -> None:
        with patch.object(torch.autograd, "grad", lambda *a, **k: tuple(-gradient for gradient in right(*a, **k))):
            one_pass(*args, **kwargs)

    return turned


def uphill_nowhere(one_pass: Callable[..., None]) -> Callable[..., None]:
    """The same pass with steps of no length: it looks at its start again and again."""
    return lambda *args, **kwargs: one_pass(*args, **{**kwargs, "size": 0.0})


@pytest.mark.parametrize("fault", [lambda _: dead, downhill, uphill_nowhere], ids=["dead", "wrong sign", "no length"])
@pytest.mark.parametrize(
    ("name", "rule"),
    [("tangent_pass", f"the passes climb by themselves (toy, {TANGENT})"), ("_one_pass", f"climb by themselves (toy, {LAGRANGIAN}")],
)
def test_a_broken_constrained_pass_is_caught(tmp_path: Path, name: str, rule: str, fault: Callable[..., Any]) -> None:
    """Only this kind of pass is broken, and only where something is held: the single step and the free ascents are sound."""
    right = getattr(ascent, name)
    broken = fault(right)

    def constrained(judged: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            held = judged(x).constraints.shape[1] > 0
        (broken if held else right)(judged, x, *args, **kwargs)

    with patch.object(ascent, name, constrained):
        rows, climbs = attacked_toy(tmp_path)
    assert rule in failing(rows, climbs=climbs)
    assert failing(rows, climbs=sound_climbs()) == ""  # the older rules see nothing of it
    if name == "tangent_pass" and fault is not uphill_nowhere:
        assert f"many steps reach at least what one step does (toy, {TANGENT} alone)" in failing(rows, climbs=climbs)


def test_a_broken_pass_is_caught_where_the_lagrangian_stands_alone(tmp_path: Path) -> None:
    """Heads with more classes than a tangent holds: the first pass is an augmented Lagrangian then."""
    with patch.object(ascent, "MOST_HELD", 0):
        rows, climbs = attacked_toy(tmp_path)
        assert {row.kind for row in climbs} == {LAGRANGIAN}
        assert "by themselves" not in failing(rows, climbs=climbs)
        with patch.object(ascent, "_one_pass", dead):
            rows, climbs = attacked_toy(tmp_path)
        assert "the passes climb by themselves" in failing(rows, climbs=climbs)


def test_what_is_recorded_is_each_pass_without_help() -> None:
    """Single step and start are no part of `alone`; where the passes win, what the attack keeps is theirs."""
    climbs = sound_climbs()
    assert {(row.budget, row.kind) for row in climbs} == {(b.label, k) for b in (SMALL, LARGE) for k in (TANGENT, LAGRANGIAN)}
    small = [row for row in climbs if row.budget == SMALL.label]
    assert all(row.began == pytest.approx(row.one_step) for row in small)  # no smaller budget to begin from
    large = [row for row in climbs if row.budget == LARGE.label and row.kind == TANGENT]
    assert all(row.began >= row.one_step - 1e-9 for row in large)
    assert all(row.began > 0 for row in large)
    assert climb_summaries("toy", climbs)[0].pictures == 4


def test_the_rules_on_plain_numbers() -> None:
    budgets, chance = SETTINGS.budgets, [0.2, 0.4]
    rows = [Climbed(b.label, kind, 0, 1.0, 2.0, 3.0) for b in budgets for kind in (TANGENT, LAGRANGIAN)]

    def failed(changed: list[Climbed]) -> list[str]:
        checks = pass_checks("m", changed, budgets, chance)
        assert all(check.read == ATTACK_LOG for check in checks)
        return [check.name for check in checks if not check.passed]

    def with_alone(kind: str, *values: float) -> list[Climbed]:
        each = dict(zip([b.label for b in budgets], values, strict=True))
        return [replace(row, alone=each[row.budget]) if row.kind == kind else row for row in rows]

    assert failed(rows) == []
    assert failed(with_alone(TANGENT, 1.5, 2.5)) == []  # beyond the start at one budget is enough
    assert failed(with_alone(TANGENT, 1.5, 1.5)) == [f"the passes climb by themselves (m, {TANGENT})"]
    assert len(failed(with_alone(TANGENT, 0.5, 3.0))) == 1  # below the single step at one budget
    assert len(failed(with_alone(LAGRANGIAN, 0.2, 0.3))) == 1
    assert len(failed([])) == 2  # nothing measured is no pass
