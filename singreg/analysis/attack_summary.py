"""What an attack found: summaries with intervals, models compared, checks of the attack itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.attack import LAGRANGIAN, TANGENT, Budget
from singreg.analysis.attack_images import ATTACK, ONE_STEP, RANDOM
from singreg.analysis.attack_judges import READINGS, counted_rise, judges_of, readings_of, share_interval, won
from singreg.analysis.statistics import mean_interval, paired_difference

SLACK = 0.05  # degrees by which a search may fall short, and that passes must gain by themselves


def summarize_attack(judged: pd.DataFrame, encoders: Sequence[str], *, seed: int = 0) -> list[dict[str, Any]]:
    """Summarise every model, budget and arm, with 95 % intervals: of degrees by bootstrap, of shares by Wilson.

    Args:
        encoders: names of the image encoders that count as witnesses.
    """
    judges, found = judges_of(judged), []
    readings = readings_of(judged, encoders)
    for (model, budget, arm), rows in judged.groupby(["model", "budget", "arm"], sort=False):
        count, of_these = len(rows), readings[rows.index]
        found.append(
            {
                "model": model,
                "budget": budget,
                "arm": arm,
                "pictures": count,
                "kept": float(rows["kept"].mean()),
                "flipped": float((rows["decision"] != rows["decision_before"]).mean()),
                "logit_change": float(rows["logit_change"].max()),
                "rise": {name: _interval(counted_rise(rows, name), seed) for name in judges},
                "shift": {name: _interval(rows[f"shift {name}"], seed) for name in judges},
                "success": {name: share_interval(int(won(rows, name).sum()), count) for name in judges},
                "readings": {name: share_interval(int((of_these == name).sum()), count) for name in READINGS},
            }
        )
    return found


def _interval(values: pd.Series, seed: int) -> list[float]:
    return list(mean_interval(values.to_numpy(np.float64), seed=seed))


def model_differences(judged: pd.DataFrame, *, seed: int = 0) -> list[dict[str, Any]]:
    """Compare every later model with the first at every budget, paired by image: rise in degrees, success in points."""
    attacks = judged[judged["arm"] == ATTACK]
    first, *others = attacks["model"].unique()
    found = []
    for second, budget, judge in itertools.product(others, attacks["budget"].unique(), judges_of(judged)):
        pair = [
            attacks[(attacks["model"] == name) & (attacks["budget"] == budget)].set_index("image").sort_index()
            for name in (second, first)
        ]
        for figure in ("rise", "success"):
            values = [counted_rise(m, judge) if figure == "rise" else 100.0 * won(m, judge) for m in pair]
            value, low, high = paired_difference(*(v.to_numpy(np.float64) for v in values), seed=seed)
            row = {"first": first, "second": second, "budget": budget, "figure": figure, "judge": judge}
            found.append({**row, "value": value, "low": low, "high": high})
    return found


def transfers_of(own: pd.DataFrame, carried: pd.DataFrame, crafted_on: str) -> list[dict[str, Any]]:
    """Compare, at every budget, images crafted on another model with a model's own, both judged on the latter."""
    found = []
    for budget, mine in own[own["arm"] == ATTACK].groupby("budget", sort=False):
        theirs = carried[(carried["arm"] == ATTACK) & (carried["budget"] == budget)]
        row = {"crafted_on": crafted_on, "judged_on": mine["model"].iloc[0], "budget": budget}
        rises = {
            "rise": float(counted_rise(theirs, "fitted").mean()),
            "own": float(counted_rise(mine, "fitted").mean()),
        }
        found.append({**row, **rises, "kept": float(theirs["kept"].mean())})
    return found


def summarize_climbs(climbs: pd.DataFrame) -> list[dict[str, Any]]:
    """Average how far the passes of each model, budget and kind got by themselves (degrees)."""
    found = []
    for (model, budget, kind), rows in climbs.groupby(["model", "budget", "kind"], sort=False):
        means = {name: float(rows[name].mean()) for name in ("one_step", "began", "alone")}
        found.append({"model": model, "budget": budget, "kind": kind, "pictures": len(rows), **means})
    return found


def attack_checks(
    judged: pd.DataFrame, climbs: pd.DataFrame, budgets: Sequence[Budget], tau: float
) -> list[dict[str, Any]]:
    """Check the attack on every model: one that fails takes every claim of robustness with it.

    The saved files must keep the logits within τ, the decision and the budgets; the attack must reach what its single
    step does, and at a larger budget what it does at a smaller one. It begins with the single step and with the smaller
    budget's images, so it would pass whatever its passes do; so each kind of pass is also measured without what it
    started from: those that begin at the single step must reach it and climb beyond it at one budget or more, those
    from random points must climb beyond random directions.

    Returns:
        model, name, passed, found (the numbers in words).
    """
    checks = []
    for model, rows in judged.groupby("model", sort=False):
        own = climbs[climbs["model"] == model]
        for name, passed, found in [*_file_checks(rows, budgets, tau), *_rise_checks(rows, own, budgets)]:
            checks.append({"model": model, "name": name, "passed": bool(passed), "found": found})
    return checks


_Found = tuple[str, bool, str]


def _file_checks(rows: pd.DataFrame, budgets: Sequence[Budget], tau: float) -> list[_Found]:
    claimed = rows[rows["arm"] != RANDOM]
    change, flipped = claimed["logit_change"].max(), int((claimed["decision"] != claimed["decision_before"]).sum())
    longest = {budget: rows.loc[rows["budget"] == budget.label, budget.norm].max() for budget in budgets}
    over = [
        f"{longest[budget]:.4g} at {budget.label}"
        for budget in budgets
        if not longest[budget] <= budget.size * (1 + 1e-6) + 1e-6
    ]
    words = f"largest change {change:.3g} of {tau:g} allowed; {flipped} of {len(claimed)} decided otherwise"
    return [
        (
            "logits within the tolerance and the decision stays, in the saved files",
            change <= tau and not flipped,
            words,
        ),
        ("every displacement within its budget, in the saved files", not over, "; ".join(over) or "none is longer"),
    ]


def _rise_checks(rows: pd.DataFrame, climbs: pd.DataFrame, budgets: Sequence[Budget]) -> list[_Found]:
    def mean(budget: Budget, arm: str) -> float:
        values = counted_rise(rows[(rows["budget"] == budget.label) & (rows["arm"] == arm)], "fitted")
        # An attacker would keep only the random directions that help.
        return float((values.clip(lower=0) if arm == RANDOM else values).mean())

    attack, single, random = ([mean(budget, arm) for budget in budgets] for arm in (ATTACK, ONE_STEP, RANDOM))
    falls = [
        a - b
        for (a, b), (one, two) in zip(itertools.pairwise(attack), itertools.pairwise(budgets), strict=True)
        if one.norm == two.norm
    ]
    fall = max(falls, default=0.0)
    found = [
        ("the attack reaches what its single step does", *_at_least(budgets, attack, single)),
        ("a larger budget reaches what a smaller one does", fall <= SLACK, f"worst fall {fall:.2f}°"),
    ]
    kinds = climbs["kind"].unique().tolist() or [LAGRANGIAN]  # nothing measured is no pass
    first = TANGENT if TANGENT in kinds else LAGRANGIAN
    for kind in kinds:
        means = climbs[climbs["kind"] == kind].groupby("budget")[["one_step", "began", "alone"]].mean()
        mine = means.reindex([budget.label for budget in budgets])
        alone = mine["alone"].tolist()
        if kind == first:
            found.append((f"{kind} alone reach the single step", *_at_least(budgets, alone, mine["one_step"].tolist())))
        gains = (mine["alone"] - (mine["began"] if kind == first else random)).tolist()
        words = ", ".join(f"{gain:+.2f}° at {budget.label}" for gain, budget in zip(gains, budgets, strict=True))
        beyond = "what they began from" if kind == first else "random directions"
        found.append((f"{kind} climb by themselves beyond {beyond}", any(gain > SLACK for gain in gains), words))
    return found


def _at_least(budgets: Sequence[Budget], high: Sequence[float], low: Sequence[float]) -> tuple[bool, str]:
    gains = [(a - b, budget.label) for a, b, budget in zip(high, low, budgets, strict=True)]
    worst = min(gains)
    return all(
        gain >= -SLACK for gain, _ in gains
    ), f"{worst[0]:+.2f}° at {worst[1]}, the least of {len(gains)} budgets"
