"""A study's arms over seeds and against the reference: paired figures, aims, Pareto front, verdict (METHOD 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.arms import AUDITOR, Measured
from singreg.analysis.comparison import GAMED, MARGIN, no_claim
from singreg.analysis.statistics import paired_difference, paired_ratio, resampled_means
from singreg.study import Work

GAP = 1.25  # the largest audit gap that is aimed at
AIMS = (
    ("AS_neg", "auditor AS⁻", "at most", 0.2),
    ("AS_abs", "auditor |AS|", "at most", 0.5),
    ("IS", "IS", "at least", 0.8),
    ("harmless_r2", "harmless-attribute R²", "at least", 0.8),
    ("step", "step to IS = 40°", "at least", 3.0),
    ("AS25", "|AS| towards the target at a step of 25 %", "at most", 0.5),
    ("manifold_success95", "success on the manifold at its 95th percentile", "at most", 0.5),
)
"""Ratios to plain fine-tuning: the figure, its name, which side is wanted, the bound."""
RATIOS = {
    "AS_neg": ("AS", lambda values: np.maximum(-values, 0)),
    "AS_abs": ("AS", np.abs),
    "IS": ("IS", np.asarray),
    "step": ("steering_step", np.asarray),
    "AS25": ("AS25", np.abs),
    "success25": ("success25", np.asarray),
    "manifold_success95": ("manifold_success95", np.asarray),
}
"""Ratios of means to the reference: the auditor's column, and what is averaged of it."""
Summary = dict[str, Any]


def summarize_study(runs: Sequence[tuple[Work, Measured]], reference: str) -> list[Summary]:
    """Aggregate the runs arm by arm and compare each with the reference, plain fine-tuning with the same budget.

    Returns:
        A dict an arm: what it is, its seeds; mean and spread (standard deviation over seeds) of figures, mean of
        validation; intervals over images, ends averaged over seeds; paired: see `compare_with_reference`; targets;
        top1_kept; front: no arm is better in both top-1 and auditor AS⁻; omitted: why there are no figures, or None.
    """
    by_arm: dict[str, list[tuple[Work, Measured]]] = {}
    for work, run in runs:
        by_arm.setdefault(work.arm.name, []).append((work, run))
    plain_rows = {work.seed: run.rows for work, run in by_arm[reference] if run.rows is not None}
    arms = [_summary(found, plain_rows, reference) for found in by_arm.values()]
    plain = by_name(arms, reference)
    shown = {a["arm"]: (a["mean"]["top1"], a["mean"][f"AS_neg/{AUDITOR}"]) for a in arms if not a["omitted"]}
    front = pareto_front(shown)
    return [{**arm, "front": arm["arm"] in front, "targets": _targets(arm, plain)} for arm in arms]


def by_name(arms: Sequence[Summary], name: str) -> Summary:
    """Return the summary of one arm."""
    return next(arm for arm in arms if arm["arm"] == name)


def _summary(found: Sequence[tuple[Work, Measured]], plain_rows: Mapping[int, pd.DataFrame], reference: str) -> Summary:
    arm, trained, runs = found[0][0].arm, found[0][0].trained, [run for _, run in found]
    rows = {work.seed: run.rows for work, run in found if run.rows is not None}
    if rows and not trained:  # its seed says nothing
        rows = dict.fromkeys(plain_rows, next(iter(rows.values())))
    paired = compare_with_reference(rows, plain_rows) if rows and arm.name != reference else {}
    table = pd.DataFrame([run.figures for run in runs])
    return {
        "arm": arm.name,
        **{name: getattr(arm, name) for name in ("role", "train", "note", "control_of")},
        "trained": trained,
        "seeds": [work.seed for work, _ in found],
        "mean": table.mean(skipna=False).to_dict(),
        "spread": table.std(ddof=1, skipna=False).to_dict(),
        "intervals": {n: np.mean([run.intervals[n] for run in runs], axis=0).tolist() for n in runs[0].intervals},
        "validation": pd.DataFrame([run.validation for run in runs]).mean().to_dict(),
        "extra": runs[0].extra,
        "paired": paired,
        "top1_kept": paired["top1"]["low"] > -100 * MARGIN if paired else None,
        "omitted": None if rows else "no null space is left, so there is nothing to measure or to steer through",
    }


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of (top-1, AS⁻) that no other beats: as good in both and better in one."""
    every = set(points.values())
    beaten = {(a, b) for a, b in every for top1, harm in every - {(a, b)} if top1 >= a and harm <= b}
    return {name for name, point in points.items() if point not in beaten}


def compare_with_reference(
    arm: Mapping[int, pd.DataFrame], reference: Mapping[int, pd.DataFrame]
) -> dict[str, dict[str, Any]]:
    """Compare rows by seed with the reference's, paired by image, seeds averaged first; only common seeds are compared.

    An image that is not steered or out of reach in either arm is in neither mean.

    Returns:
        By figure: value, low, high (95 % bootstrap over classes and images) and unit (× of means, or points).
    """
    pairs = [(arm[seed], reference[seed]) for seed in sorted(arm.keys() & reference.keys())]
    if any(list(one["image"]) != list(other["image"]) for one, other in pairs):
        raise ValueError("the arms were measured on other images, so they cannot be paired")
    groups, found = pairs[0][1]["label"].to_numpy(), {}

    def seed_means(name: str, change: Any = np.asarray) -> np.ndarray:  # (2, N): the arm, the reference
        columns = [[change(rows[name].to_numpy(np.float64)) for rows in pair] for pair in pairs]
        return np.asarray(np.mean(columns, axis=0))

    for key, (name, change) in RATIOS.items():
        both = seed_means(f"{name}/{AUDITOR}", change)
        defined = np.isfinite(both).all(0)
        if defined.any():
            found[key] = (*paired_ratio(*both[:, defined], groups=groups[defined]), "×")
    found["top1"] = (*paired_difference(*(100 * seed_means("correct")), groups=groups), "points")
    found["harmless_r2"] = (*_r2_ratio(seed_means("harmless_residual"), seed_means("harmless_spread"), groups), "×")
    return {key: dict(zip(("value", "low", "high", "unit"), each, strict=True)) for key, each in found.items()}


def _r2_ratio(residual: np.ndarray, spread: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """R² of the harmless part, arm over reference: 1 - Σ residual / Σ spread each, the same images drawn for both."""
    columns = np.concatenate([residual, spread]).T
    means = np.concatenate([columns.mean(0)[None], resampled_means(columns, groups=groups)])
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = 1 - means[:, :2] / means[:, 2:]
        value, *drawn = r2[:, 0] / r2[:, 1]
    low, high = np.quantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).all() else (math.nan, math.nan)
    return float(value), float(low), float(high)


def _targets(arm: Summary, plain: Summary) -> list[dict[str, Any]]:
    """Name, wanted, found (in words) and reached of every aim: by the value; the interval stands beside it."""
    paired, gap = arm["paired"], arm["mean"].get("audit_gap")
    if not paired:
        return []
    found = [
        (name, f"{side} {bound:g}×", words(paired[key]), _reached(paired[key]["value"], side, bound))
        for key, name, side, bound in AIMS
        if key in paired
    ]
    found.append(("top-1", f"kept within {100 * MARGIN:g} points", words(paired["top1"]), bool(arm["top1_kept"])))
    probes = f"{arm['mean']['null_probe']:.0%} against {plain['mean']['null_probe']:.0%}"
    lower = arm["intervals"]["null_probe"][1] < plain["intervals"]["null_probe"][0]
    found.append(("null probe for the class", "clearly lower", probes, lower))
    found += [("audit gap", f"at most {GAP:g}", f"{gap:.2f}", gap <= GAP)] if gap is not None else []
    return [dict(zip(("name", "wanted", "found", "reached"), each, strict=True)) for each in found]


def _reached(value: float, side: str, bound: float) -> bool:
    return value <= bound if side == "at most" else value >= bound


def words(paired: Mapping[str, Any]) -> str:
    """Write a paired figure with its unit and interval, such as "0.50× [0.40, 0.60]"."""
    value, low, high, unit = paired.values()
    if unit == "points":
        return f"{value:+.2f} points [{low:+.2f}, {high:+.2f}]"
    return f"{value:.2f}{unit} [{low:.2f}, {high:.2f}]"


def best_arm(arms: Sequence[Summary], reference: str) -> Summary | None:
    """Return the method that by the validation images keeps top-1 (if any does), reaches most aims, leaks least."""
    plain = by_name(arms, reference)["validation"]
    ratios = [aim for aim in AIMS if plain.get(aim[0])]

    def order(arm: Summary) -> tuple[bool, int, float]:
        held = arm["validation"]
        reached = [_reached(held[key] / plain[key], side, bound) for key, _, side, bound in ratios]
        return held["top1"] >= plain["top1"] - MARGIN, sum(reached), -held["AS_neg"]

    methods = [arm for arm in arms if arm["role"] == "method" and arm["validation"] and arm["paired"]]
    return max(methods, key=order, default=None)


def study_verdict(
    arms: Sequence[Summary], reference: str, claim: str | None, *, images: int, auditor_images: int, features: int
) -> list[str]:
    """Say what the claimed (or chosen) arm does, what the placebos do, what is not reached, in at most four lines."""
    refused, chosen = no_claim(auditor_images, features), best_arm(arms, reference)
    best = by_name(arms, claim) if claim else chosen
    if refused or best is None or not best["paired"]:
        return [refused or f"No method was compared with {reference!r}, so this study says nothing about one."]
    on = f"{images} test images, auditor of {auditor_images} others"
    told = {"the arm named beforehand": best if claim else None}
    told["chosen on the validation images"] = None if claim and chosen is best else chosen
    found = [_effect(arm, why, reference, on) for why, arm in told.items() if arm is not None]
    missed = [f"{aim['name']} {aim['found']} (wanted {aim['wanted']})" for aim in best["targets"] if not aim["reached"]]
    reached = f"Of {len(best['targets'])} aims {best['arm']} reaches {len(best['targets']) - len(missed)}"
    return [*found, _placebos(arms, best), f"{reached}; not reached: {'; '.join(missed)}." if missed else f"{reached}."]


def _effect(arm: Summary, chosen: str, reference: str, on: str) -> str:
    paired, titles = arm["paired"], {"AS_abs": "|AS|", "IS": "IS", "step": "steering step"}
    ratios = ", ".join(f"{title} {words(paired[key])}" for key, title in titles.items() if key in paired)
    return (
        f"{arm['arm']} ({chosen}) leaves an auditor's AS⁻ of {arm['mean'][f'AS_neg/{AUDITOR}']:.2f}°, "
        f"{words(paired['AS_neg'])} of {reference}'s, with {ratios}; top-1 {words(paired['top1'])}, "
        f"{'kept' if arm['top1_kept'] else 'not shown to be kept'} ({on}, {len(arm['seeds'])} seed(s))."
    )


def _placebos(arms: Sequence[Summary], best: Summary) -> str:
    """What each placebo leaves beside the arm it controls; overlapping intervals are no proof of equality."""
    found = []
    for arm in arms:
        beside = best if arm["control_of"] is None else by_name(arms, arm["control_of"])
        if arm["role"] == "placebo" and arm["paired"] and beside["paired"]:
            mine, theirs = arm["paired"]["AS_neg"], beside["paired"]["AS_neg"]
            more = "clearly more" if mine["low"] > theirs["high"] else "not clearly more"
            found.append(f"{arm['arm']} {words(mine)}, {more} than {beside['arm']} ({words(theirs)})")
    if not found:
        return "There was no placebo arm, so nothing here shows that the classes' prompts matter."
    return f"Placebos' AS⁻: {'; '.join(found)}. Where it is not clearly more, the prompts are not shown to matter."


def study_warnings(arms: Sequence[Summary]) -> list[str]:
    """Give reasons not to believe a figure: one seed, gamed loops."""
    single = "; ".join(arm["arm"] for arm in arms if len(arm["seeds"]) == 1 and arm["trained"])
    gamed = "; ".join(arm["arm"] for arm in arms if arm["mean"].get("audit_gap", 0.0) > GAMED)
    found = [f"Of one seed only, so without a spread over seeds: {single}."] if single else []
    return [*found, *([f"The loop's translator was gamed (audit gap above {GAMED}): {gamed}."] if gamed else [])]
