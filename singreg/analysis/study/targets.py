"""What a study's arms were to reach, and three sentences about it (METHOD section 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from singreg.analysis.comparison import MARGIN
from singreg.analysis.results import Rows
from singreg.analysis.study.auditors import AgreementPoint
from singreg.analysis.study.results import (
    AUDITOR,
    SECOND,
    ArmRun,
    ArmSummary,
    Paired,
    StudyReport,
    Target,
    compare_with_reference,
    pareto_front,
    summarize,
)

GAP = 1.25
AIMS: tuple[tuple[str, str, str, float], ...] = (
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


def study_report(
    runs: Sequence[ArmRun],
    *,
    reference: str,
    claim: str | None = None,
    images_per_feature: float = 6.0,
    settings: dict[str, Any] | None = None,
    machine: dict[str, Any] | None = None,
    seconds: dict[str, float] | None = None,
    agreement: Sequence[AgreementPoint] = (),
) -> StudyReport:
    """Everything the report says, from the measured arms (no shapes; rows of each run (N,)).

    Raises:
        ValueError: no finished run of the reference, or arms of other pictures.
    """
    by_arm: dict[str, list[ArmRun]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    if not any(run.figures is not None for run in by_arm.get(reference, [])):
        raise ValueError(f"there is no finished run of the reference arm {reference!r}, so nothing can be compared with it")
    summaries = [_summary(found, by_arm[reference]) for found in by_arm.values()]
    plain = next(summary for summary in summaries if summary.arm == reference)
    measured = {s.arm: (s.mean["top1"], s.mean[f"AS_neg/{AUDITOR}"]) for s in summaries if s.omitted is None}
    front = pareto_front(measured)
    summaries = [replace(s, front=s.arm in front, targets=[] if s.arm == reference else targets(s, plain)) for s in summaries]
    first = next(run.figures for run in by_arm[reference] if run.figures is not None).measurement
    report = StudyReport(
        summaries, reference, [], [], settings or {}, machine or {}, seconds or {}, first.images,
        first.translators[AUDITOR].fit_images, list(agreement), images_per_feature * first.head.features,
    )  # fmt: skip
    return replace(report, sentences=sentences(report, claim), warnings=warnings(report, first.head.features))


def _summary(runs: Sequence[ArmRun], reference: Sequence[ArmRun]) -> ArmSummary:
    mean, spread = summarize(runs)
    first = runs[0]
    mine, theirs = _rows(runs), _rows(reference)
    if mine and not first.trained:
        mine = dict.fromkeys(theirs, next(iter(mine.values())))
    paired = compare_with_reference(mine, theirs) if mine and first.arm != reference[0].arm else {}
    return ArmSummary(
        arm=first.arm,
        trained=first.trained,
        role=first.role,
        train=first.train,
        note=first.note,
        seeds=[run.seed for run in runs],
        mean=mean,
        spread=spread,
        intervals=_intervals(runs),
        paired=paired,
        top1_kept=None if "top1" not in paired else paired["top1"].low > -100 * MARGIN,
        targets=[],
        front=False,
        omitted=None if mine else "no null space is left, so there is nothing to measure or to steer through",
        extra=first.extra,
        control_of=first.control_of,
        validation=_validation(runs),
        seconds=sum(run.seconds for run in runs),
    )


def _validation(runs: Sequence[ArmRun]) -> dict[str, float]:
    return {name: float(np.mean([run.validation[name] for run in runs])) for name in runs[0].validation}


def _rows(runs: Sequence[ArmRun]) -> dict[int, Rows]:
    return {run.seed: run.figures.rows for run in runs if run.figures is not None}


def _intervals(runs: Sequence[ArmRun]) -> dict[str, list[float]]:
    """95 % intervals over pictures [low, high] of figures that have them, ends averaged over seeds."""
    found: list[dict[str, list[float]]] = []
    for run in runs:
        if run.figures is not None:
            measured = run.figures.measurement
            each = {"top1": measured.top1_interval, "harmless_r2": run.figures.harmless_r2[1:]}
            each["null_probe"] = run.figures.information.intervals["accuracy null_space"]
            for name, scores in measured.translators.items():
                each |= {f"{key}/{name}": scores.intervals[key] for key in ("AS_neg", "AS_abs", "IS", "ratio", "kappa")}
            found.append(each)
    return {name: np.mean([each[name] for each in found], axis=0).tolist() for name in (found[0] if found else {})}


def targets(arm: ArmSummary, plain: ArmSummary) -> list[Target]:
    """Which aims one arm reaches against plain fine-tuning; ratios are judged by their value, their interval is shown (no shapes)."""
    if not arm.paired:
        return []
    found = []
    for key, name, side, bound in AIMS:
        if key in arm.paired:
            ratio = arm.paired[key]
            reached = ratio.value <= bound if side == "at most" else ratio.value >= bound
            found.append(Target(name, f"{side} {bound:g}×", words(ratio), reached))
    top1 = arm.paired["top1"]
    found.append(Target("top-1", f"kept within {100 * MARGIN:g} points", words(top1), bool(arm.top1_kept)))
    probe, other = arm.intervals["null_probe"], plain.intervals["null_probe"]
    value = f"{arm.mean['null_probe']:.0%} against {plain.mean['null_probe']:.0%}"
    found.append(Target("null probe for the class", "clearly lower", value, probe[1] < other[0]))
    if "audit_gap" in arm.mean:
        gap = arm.mean["audit_gap"]
        found.append(Target("audit gap", f"at most {GAP:g}", f"{gap:.2f}", gap <= GAP))
    return found


def words(paired: Paired) -> str:
    """A paired figure with its interval and unit as text (no shapes).

    Example:
        >>> words(Paired(0.5, 0.4, 0.6, "×", []))
        '0.50× [0.40, 0.60]'
    """
    sign = "+" if paired.unit == "points" else ""
    unit = " points" if paired.unit == "points" else paired.unit
    return f"{paired.value:{sign}.2f}{unit} [{paired.low:{sign}.2f}, {paired.high:{sign}.2f}]"


def best_arm(report: StudyReport) -> ArmSummary | None:
    """The method that keeps top-1 and reaches most aims, then leaks least; of those that lose it where none keeps it (no shapes).

    By the validation part where there is one, and then by plain values: intervals are for the test part.
    """
    methods = [arm for arm in report.arms if arm.role == "method" and arm.paired and arm.arm != report.reference]
    plain = report.by_name(report.reference).validation

    def order(arm: ArmSummary) -> tuple[bool, int, float]:
        if not (plain and arm.validation):
            return bool(arm.top1_kept), sum(target.reached for target in arm.targets), -arm.paired["AS_neg"].value
        ratios = {key: arm.validation[key] / plain[key] for key, *_ in AIMS if plain.get(key)}
        reached = [ratios[key] <= bound if side == "at most" else ratios[key] >= bound for key, _, side, bound in AIMS if key in ratios]
        return arm.validation["top1"] >= plain["top1"] - MARGIN, sum(reached), -ratios["AS_neg"]

    return max(methods, key=order, default=None)


def sentences(report: StudyReport, claim: str | None = None) -> list[str]:
    """What the claimed (or best) arm does, what the placebo does, what is not reached (degrees; no shapes).

    An auditor of too few pictures supports no claim, and then there is one sentence that says so.
    """
    if report.auditor_images < report.images_needed:
        return [
            f"No claim: the auditor was fitted on {report.auditor_images} pictures and needs {report.images_needed:.0f}; the figures "
            "below compare arms only roughly."
        ]
    chosen = best_arm(report)
    best = report.by_name(claim) if claim else chosen
    if best is None or not best.paired:
        return [f"No method was compared with {report.reference!r}, so this study says nothing about one."]
    validated = bool(report.by_name(report.reference).validation)
    how = "chosen on the validation part" if validated else "chosen afterwards on these very pictures, so it flatters itself"
    found = [_effect(report, best, "the arm named beforehand" if claim else how)]
    if chosen is not None and chosen is not best and validated:
        found.append(_effect(report, chosen, how))
    placebos = [arm for arm in report.arms if arm.role == "placebo" and arm.paired]
    for arm in placebos:
        beside = best if arm.control_of is None else report.by_name(arm.control_of)
        if not beside.paired:
            continue
        more = arm.paired["AS_neg"].low > beside.paired["AS_neg"].high
        # Overlapping intervals are no proof of equality: then this study has not shown what the effect rests on.
        verdict = "clearly more, so the effect rests" if more else "not clearly more, so it is not shown that the effect rests"
        found.append(
            f"{arm.arm} (a placebo{f': {arm.note}' if arm.note else ''}) leaves {words(arm.paired['AS_neg'])}, {beside.arm} "
            f"{words(beside.paired['AS_neg'])}: {verdict} on what the placebo takes away."
        )
    if not placebos:
        found.append("There was no placebo arm, so nothing here shows that the classes' prompts matter.")
    missed = [target for target in best.targets if not target.reached]
    reached = len(best.targets) - len(missed)
    listed = "; ".join(f"{target.name} {target.found} (wanted {target.wanted})" for target in missed)
    found.append(
        f"Of {len(best.targets)} aims {best.arm} reaches {reached}" + (f"; not reached: {listed}." if missed else ", all of them.")
    )
    return found


def _effect(report: StudyReport, arm: ArmSummary, chosen: str) -> str:
    """One arm's effect with its intervals, its auditor and the number of pictures."""
    paired, kept = arm.paired, "kept" if arm.top1_kept else "not shown to be kept"
    step = f", a step {words(paired['step'])} as long to the same image score" if "step" in paired else ""
    return (
        f"{arm.arm} ({chosen}) leaves an auditor's AS⁻ of {arm.mean[f'AS_neg/{AUDITOR}']:.2f}°, {words(paired['AS_neg'])} of "
        f"{report.reference}'s, with |AS| {words(paired['AS_abs'])}, IS {words(paired['IS'])}{step}; top-1 {words(paired['top1'])}, "
        f"which is {kept} ({report.images} test pictures, auditor of {report.auditor_images} others, {len(arm.seeds)} seed(s))."
    )


def warnings(report: StudyReport, width: int) -> list[str]:
    """Reasons not to believe a figure: too few auditor pictures, one seed, auditors that disagree, gamed loops (no shapes)."""
    found = []
    if report.auditor_images < report.images_needed:
        found.append(
            f"Warning: the auditor was fitted on {report.auditor_images} pictures for {width} features; below "
            f"{report.images_needed / width:g} a feature AS⁻ reads too high."
        )
    single = [arm.arm for arm in report.arms if len(arm.seeds) == 1 and arm.trained]
    if single:
        found.append(f"Warning: of one seed only, so without a spread over seeds: {'; '.join(single)}.")
    gamed = [arm.arm for arm in report.arms if arm.mean.get("audit_gap", math.nan) > 1.5]
    if gamed:
        found.append(f"Warning: the loop's translator was gamed (audit gap above 1.5), do not believe its own figure: {'; '.join(gamed)}.")
    return found


def attribute_groups(mean: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """R² of known attributes by group ("color" of "color: red") and block (features, row_space, null_space), over their values.

    Example:
        >>> attribute_groups({"null_space_r2/color: red": 0.5, "null_space_r2/color: blue": 0.3, "top1": 1.0})
        {'color': {'null_space': 0.4}}
    """
    found: dict[str, dict[str, list[float]]] = {}
    for key, value in mean.items():
        block, _, name = key.partition("_r2/")
        if name and block in ("features", "row_space", "null_space"):
            found.setdefault(name.partition(":")[0], {}).setdefault(block, []).append(value)
    return {group: {block: float(np.nanmean(values)) for block, values in blocks.items()} for group, blocks in found.items()}
