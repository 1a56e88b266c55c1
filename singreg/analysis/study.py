"""A study's arms over seeds and against the reference: paired figures, targets, Pareto front, verdict (METHOD 8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.comparison import GAMED, MARGIN
from singreg.analysis.fitting import IMAGES_PER_FEATURE
from singreg.analysis.statistics import paired_difference, paired_ratio, resampled_means

AUDITOR, SECOND = "auditor", "auditor VLM2"
GAP = 1.25  # the largest audit gap that is aimed at
AIMS = (
    ("AS_neg", "auditor AS⁻", "at most", 0.2),
    ("AS_abs", "auditor |AS|", "at most", 0.5),
    ("IS", "IS", "at least", 0.8),
    ("harmless_r2", "harmless-attribute R²", "at least", 0.8),
    ("step", "step to IS = 40°", "at least", 3.0),
    ("AS25", "|AS| towards the target at a step of 25 %", "at most", 0.5),
    ("manifold_success95", "success on the manifold at its 95th percentile", "at most", 0.5),
    (f"manifold_success95 {SECOND}", "the same for the second vision-language model", "at most", 0.5),
)
"""Ratios to plain fine-tuning: the figure, its name, which side is wanted, the bound."""
Rows = pd.DataFrame
Summary = dict[str, Any]


@dataclass(frozen=True)
class ArmRun:
    """One arm at one seed as it was measured.

    Attributes:
        trained: False where its seed says nothing: neither it nor the arm it took its weights from was trained.
        control_of: the arm a placebo stands beside.
        figures: by name ("AS_neg/auditor"); top1 alone where no null space is left.
        intervals: [low, high] of some figures.
        rows: one row an image, None where no null space is left.
        extra: what to note of it.
        validation: the few figures an arm is chosen by, on images that serve nothing else; empty without them.
    """

    arm: str
    seed: int
    figures: dict[str, float]
    role: str = "method"
    train: str = "all"
    note: str = ""
    trained: bool = True
    control_of: str | None = None
    intervals: dict[str, list[float]] = field(default_factory=dict)
    rows: Rows | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def summarize_study(runs: Sequence[ArmRun], reference: str) -> list[Summary]:
    """Aggregate the runs arm by arm and compare each with the reference, plain fine-tuning with the same budget.

    Returns:
        A dict an arm: arm, role, train, trained, note, control_of, seeds, seconds, extra; mean and spread (standard
        deviation over seeds) of every figure and of validation; intervals over images, ends averaged over seeds;
        paired: see `compare_with_reference`; top1_kept: the interval of its change stays above minus the margin;
        targets; front: no arm is better in both top-1 and auditor AS⁻; omitted: why there are no figures, or None.

    Raises:
        ValueError: no finished run of the reference, or arms of other images.
    """
    by_arm: dict[str, list[ArmRun]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    if not any(run.rows is not None for run in by_arm.get(reference, [])):
        raise ValueError(f"there is no finished run of the reference arm {reference!r}, so nothing is compared with it")
    arms = [_summary(found, by_arm[reference]) for found in by_arm.values()]
    plain = by_name(arms, reference)
    front = pareto_front(
        {a["arm"]: (a["mean"]["top1"], a["mean"][f"AS_neg/{AUDITOR}"]) for a in arms if not a["omitted"]}
    )
    for arm in arms:
        arm["front"] = arm["arm"] in front
        arm["targets"] = [] if arm["arm"] == reference else targets(arm, plain)
    return arms


def by_name(arms: Sequence[Summary], name: str) -> Summary:
    """Return the summary of one arm."""
    return next(arm for arm in arms if arm["arm"] == name)


def _summary(runs: Sequence[ArmRun], reference: Sequence[ArmRun]) -> Summary:
    first = runs[0]
    mine, theirs = ({r.seed: r.rows for r in found if r.rows is not None} for found in (runs, reference))
    if mine and not first.trained:
        mine = dict.fromkeys(theirs, next(iter(mine.values())))
    paired = compare_with_reference(mine, theirs) if mine and first.arm != reference[0].arm else {}
    table = pd.DataFrame([_with_gap(run.figures) for run in runs])
    ends = {name: np.mean([run.intervals[name] for run in runs], axis=0).tolist() for name in first.intervals}
    return {
        **{name: getattr(first, name) for name in ("arm", "role", "train", "trained", "note", "control_of", "extra")},
        "seeds": [run.seed for run in runs],
        "seconds": sum(run.seconds for run in runs),
        "mean": table.mean(skipna=False).to_dict(),
        "spread": table.std(ddof=1, skipna=False).to_dict(),
        "intervals": ends,
        "validation": pd.DataFrame([run.validation for run in runs]).mean().to_dict(),
        "paired": paired,
        "top1_kept": paired["top1"]["low"] > -100 * MARGIN if paired else None,
        "omitted": None if mine else "no null space is left, so there is nothing to measure or to steer through",
    }


def _with_gap(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures with the audit gap: the auditor's AS⁻ over that of the translator the loss saw."""
    loop = figures.get("AS_neg/loop", 0.0)
    return {**figures, **({"audit_gap": figures[f"AS_neg/{AUDITOR}"] / loop} if loop > 0 else {})}


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of (top-1, AS⁻) that no other beats: as good in both and better in one.

    Example:
        >>> sorted(pareto_front({"a": (0.9, 2.0), "b": (0.8, 1.0), "c": (0.8, 3.0)}))
        ['a', 'b']
    """

    def beaten(point: tuple[float, float]) -> bool:
        return any(top1 >= point[0] and harm <= point[1] and (top1, harm) != point for top1, harm in points.values())

    return {name for name, point in points.items() if not beaten(point)}


Column = Callable[[Rows], np.ndarray]


def _column(name: str, change: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Column:
    return lambda rows: change(rows[name].to_numpy(np.float64))


def _harm(scores: np.ndarray) -> np.ndarray:
    harm: np.ndarray = np.maximum(-scores, 0)
    return harm


RATIOS: dict[str, Column] = {
    "AS_neg": _column(f"AS/{AUDITOR}", _harm),
    "AS_abs": _column(f"AS/{AUDITOR}", np.abs),
    "IS": _column(f"IS/{AUDITOR}"),
    "step": _column(f"steering_step/{AUDITOR}"),
    "AS25": _column(f"AS25/{AUDITOR}", np.abs),
    "success25": _column(f"success25/{AUDITOR}"),
    "area_success": _column(f"area_success/{AUDITOR}"),
    "manifold_success95": _column(f"manifold_success95/{AUDITOR}"),
    f"AS_neg {SECOND}": _column(f"AS/{SECOND}", _harm),
    f"manifold_success95 {SECOND}": _column(f"manifold_success95/{SECOND}"),
}
"""Ratios of means to the reference; an image that is not steered or out of reach in either arm is in neither."""


def compare_with_reference(arm: Mapping[int, Rows], reference: Mapping[int, Rows]) -> dict[str, dict[str, Any]]:
    """Compare an arm with the reference, paired by image, seeds averaged first; only common seeds are compared.

    Args:
        arm: rows by seed; an arm whose seed says nothing is given with every seed of the reference.

    Returns:
        By figure: value, low, high (95 % bootstrap over classes and images), unit (× of means, or points), by_seed.

    Raises:
        ValueError: no seed in common, or other images.
    """
    common = sorted(arm.keys() & reference.keys())
    if not common:
        raise ValueError(f"no seed in common: {sorted(arm)} and {sorted(reference)}")
    pairs = [(arm[seed], reference[seed]) for seed in common]
    if any(list(one["image"]) != list(other["image"]) for one, other in pairs):
        raise ValueError("the arms were measured on other images, so they cannot be paired")
    groups = pairs[0][1]["label"].to_numpy()
    found = {}
    for name, column in RATIOS.items():
        try:
            both = np.stack([[column(rows) for rows in pair] for pair in pairs])  # seeds, arm and reference, images
        except KeyError:  # a second vision-language model that one of them was not read by
            continue
        if np.isfinite(both).any(2).all():
            found[name] = _ratio(both, groups)
    hits = 100 * np.stack([[rows["correct"].to_numpy(np.float64) for rows in pair] for pair in pairs])
    change = paired_difference(*hits.mean(0), groups=groups)
    found["top1"] = _paired(*change, "points", (hits[:, 0] - hits[:, 1]).mean(1))
    found["harmless_r2"] = _r2_ratio(pairs, groups)
    return found


def _paired(value: float, low: float, high: float, unit: str, by_seed: np.ndarray) -> dict[str, Any]:
    return {"value": float(value), "low": float(low), "high": float(high), "unit": unit, "by_seed": by_seed.tolist()}


def _ratio(both: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Ratio of means over the images (S, 2, N) that are defined in both arms at every seed."""
    defined = np.isfinite(both).all((0, 1))
    if not defined.any():
        return _paired(math.nan, math.nan, math.nan, "×", np.full(len(both), math.nan))
    both = both[:, :, defined]
    means = both.mean(2)
    by_seed = np.divide(means[:, 0], means[:, 1], out=np.full(len(both), math.nan), where=means[:, 1] != 0)
    return _paired(*paired_ratio(*both.mean(0), groups=groups[defined]), "×", by_seed)


def _r2_ratio(pairs: Sequence[tuple[Rows, Rows]], groups: np.ndarray) -> dict[str, Any]:
    """R² of the harmless part, arm over reference: 1 - Σ residual / Σ spread each, the same images drawn for both."""

    def ratio(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            value: np.ndarray = (1 - means[..., 0] / means[..., 1]) / (1 - means[..., 2] / means[..., 1])
            return value

    columns = np.stack(
        [[one["harmless_residual"], one["harmless_spread"], other["harmless_residual"]] for one, other in pairs]
    )
    mean = columns.mean(0).T
    drawn = ratio(resampled_means(mean, groups=groups))
    low, high = np.quantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).all() else (math.nan, math.nan)
    return _paired(float(ratio(mean.mean(0))), low, high, "×", ratio(columns.mean(2)))


def targets(arm: Summary, plain: Summary) -> list[dict[str, Any]]:
    """Judge which aims an arm reaches against plain fine-tuning, by the value; the interval stands beside it.

    Returns:
        name, wanted, found (in words), reached.
    """
    paired = arm["paired"]
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
    gap = arm["mean"].get("audit_gap")
    if gap is not None:
        found.append(("audit gap", f"at most {GAP:g}", f"{gap:.2f}", gap <= GAP))
    return [dict(zip(("name", "wanted", "found", "reached"), each, strict=True)) for each in found]


def _reached(value: float, side: str, bound: float) -> bool:
    return value <= bound if side == "at most" else value >= bound


def words(paired: Mapping[str, Any]) -> str:
    """Write a paired figure with its unit and interval.

    Example:
        >>> words({"value": 0.5, "low": 0.4, "high": 0.6, "unit": "×"})
        '0.50× [0.40, 0.60]'
    """
    value, low, high = (paired[name] for name in ("value", "low", "high"))
    if paired["unit"] == "points":
        return f"{value:+.2f} points [{low:+.2f}, {high:+.2f}]"
    return f"{value:.2f}{paired['unit']} [{low:.2f}, {high:.2f}]"


def best_arm(arms: Sequence[Summary], reference: str) -> Summary | None:
    """Return the method that keeps top-1 (if any does) and reaches most aims, then leaks least.

    By the validation images where there are some, and then by plain values: intervals are for the test images.
    """
    plain = by_name(arms, reference)["validation"]

    def order(arm: Summary) -> tuple[bool, int, float]:
        held, harm = arm["validation"], arm["paired"]["AS_neg"]["value"]
        if not (plain and held):
            return bool(arm["top1_kept"]), sum(each["reached"] for each in arm["targets"]), -harm
        ratios = {key: held[key] / plain[key] for key, *_ in AIMS if plain.get(key)}
        reached = [_reached(ratios[key], side, bound) for key, _, side, bound in AIMS if key in ratios]
        return held["top1"] >= plain["top1"] - MARGIN, sum(reached), -ratios["AS_neg"]

    return max((arm for arm in arms if arm["role"] == "method" and arm["paired"]), key=order, default=None)


def study_verdict(arms: Sequence[Summary], reference: str, claim: str | None, facts: Mapping[str, int]) -> list[str]:
    """Say what the claimed (or best) arm does, what the placebos do, what is not reached, in at most four lines.

    Args:
        facts: images, auditor_images, features. An auditor of too few images supports no claim, which is then said.
    """
    needed = IMAGES_PER_FEATURE * facts["features"]
    if facts["auditor_images"] < needed:
        few = f"fitted on {facts['auditor_images']} images and needs {needed:.0f}, or AS⁻ reads too high"
        return [f"No claim: the auditor was {few}."]
    chosen = best_arm(arms, reference)
    best = by_name(arms, claim) if claim else chosen
    if best is None or not best["paired"]:
        return [f"No method was compared with {reference!r}, so this study says nothing about one."]
    validated = bool(by_name(arms, reference)["validation"])
    how = "chosen on the validation images" if validated else "chosen afterwards on these images, so it flatters itself"
    found = [_effect(best, reference, "the arm named beforehand" if claim else how, facts)]
    if chosen is not None and chosen is not best and validated:
        found.append(_effect(chosen, reference, how, facts))
    missed = [f"{t['name']} {t['found']} (wanted {t['wanted']})" for t in best["targets"] if not t["reached"]]
    count = len(best["targets"])
    reached = f"Of {count} aims {best['arm']} reaches {count - len(missed)}"
    return [*found, _placebos(arms, best), f"{reached}; not reached: {'; '.join(missed)}." if missed else f"{reached}."]


def _effect(arm: Summary, reference: str, chosen: str, facts: Mapping[str, int]) -> str:
    paired, titles = arm["paired"], {"AS_abs": "|AS|", "IS": "IS", "step": "steering step"}
    ratios = ", ".join(f"{title} {words(paired[key])}" for key, title in titles.items() if key in paired)
    return (
        f"{arm['arm']} ({chosen}) leaves an auditor's AS⁻ of {arm['mean'][f'AS_neg/{AUDITOR}']:.2f}°, "
        f"{words(paired['AS_neg'])} of {reference}'s, with {ratios}; top-1 {words(paired['top1'])}, "
        f"{'kept' if arm['top1_kept'] else 'not shown to be kept'} ({facts['images']} test images, auditor of "
        f"{facts['auditor_images']} others, {len(arm['seeds'])} seed(s))."
    )


def _placebos(arms: Sequence[Summary], best: Summary) -> str:
    """What each placebo leaves beside the arm it controls; overlapping intervals are no proof of equality."""
    found = []
    for arm in arms:
        beside = best if arm["control_of"] is None else by_name(arms, arm["control_of"])
        if arm["role"] != "placebo" or not arm["paired"] or not beside["paired"]:
            continue
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
