"""A study's figures as tables: on screen and in report.md. Nothing is computed here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from singreg.analysis.study.results import AUDITOR, SECOND, ArmSummary, Paired, StudyReport
from singreg.analysis.study.targets import attribute_groups
from singreg.reporting.tables import escape, number, percent, render

RATIO_TITLES = {
    "top1": "top-1 (points)",
    "AS_neg": "AS⁻",
    "AS_abs": "|AS|",
    "IS": "IS",
    "harmless_r2": "harmless R²",
    "step": "step to IS 40°",
    "AS25": "|AS| at 25 % step",
    "success25": "success at 25 % step",
    "area_success": "success, area",
    "manifold_success95": "success on the manifold",
    f"AS_neg {SECOND}": "AS⁻, second VLM",
    f"manifold_success95 {SECOND}": "success on the manifold, second VLM",
}
"""How the figures against the reference are called wherever people read them; escaped where they stand in a Markdown table."""


def _mean(arm: ArmSummary, key: str, digits: int = 2, *, share: bool = False, compact: bool = False) -> str:
    """Mean over seeds ± spread, with the interval over pictures where there is one."""
    value, spread, interval = arm.mean.get(key, math.nan), arm.spread.get(key, math.nan), arm.intervals.get(key)
    shown = percent(value) if share else number(value, digits)
    if compact or math.isnan(value):
        return shown
    shown += "" if math.isnan(spread) else f" ± {100 * spread:.1f}" if share else f" ± {number(spread, digits)}"
    if interval is None:
        return shown
    low, high = (f"{100 * end:.1f}" if share else number(end, digits) for end in interval)
    return f"{shown} [{low}, {high}]"


def study_table(report: StudyReport, compact: bool = False) -> str:
    """Every arm: top-1, AS⁻, |AS|, IS by the auditor, null share, null probe, steering (degrees, shares; no shapes).

    Markdown with the spread over seeds and 95 % intervals over pictures, or plain without them if compact.
    """
    columns = [
        ("top-1", "top1", 1, True), ("AS⁻ °", f"AS_neg/{AUDITOR}", 2, False), ("|AS| °", f"AS_abs/{AUDITOR}", 2, False),
        ("IS °", f"IS/{AUDITOR}", 1, False), ("IS / |AS|", f"ratio/{AUDITOR}", 1, False), ("null share", "null_share", 2, False),
        ("null probe", "null_probe", 1, True), ("harmless R²", "harmless_r2", 3, False), ("audit gap", "audit_gap", 2, False),
        ("step to IS 40°", f"steering_step/{AUDITOR}", 3, False), ("|AS| at 25 % °", f"AS_abs25/{AUDITOR}", 1, False),
        ("success at 25 %", f"success25/{AUDITOR}", 1, True),
    ]  # fmt: skip
    if not compact:
        columns += [("success, area", f"area_success/{AUDITOR}", 1, True)]
    rows = []
    for arm in report.arms:
        cells = [_mean(arm, key, digits, share=share, compact=compact) for _, key, digits, share in columns]
        rows.append([_name(arm, compact), str(len(arm.seeds)), *cells])
    return render(rows, ["arm", "seeds", *(title if compact else title.replace("|", "\\|") for title, *_ in columns)], compact)


def _name(arm: ArmSummary, compact: bool = False) -> str:
    mark = " *" if arm.front and compact else " (front)" if arm.front else ""
    return (arm.arm if compact else escape(arm.arm)) + mark


def reading_table(report: StudyReport) -> str:
    """AS⁻ and |AS| of every arm by every translator that read it (Markdown; degrees, mean over seeds)."""
    every = [key.partition("/")[2] for arm in report.arms for key in arm.mean if key.startswith("AS_neg/")]
    names = list(dict.fromkeys(every))
    rows = []
    for arm in report.arms:
        cells = [
            f"{number(arm.mean.get(f'AS_neg/{name}', math.nan))} / {number(arm.mean.get(f'AS_abs/{name}', math.nan))}" for name in names
        ]
        rows.append([_name(arm), *cells, number(arm.mean.get(f"agreement/{AUDITOR} A|{AUDITOR} B", math.nan))])
    return render(rows, ["arm", *(escape(name) for name in names), "agreement of the halves"])


def ratio_table(report: StudyReport) -> str:
    """Every arm against the reference, paired by picture, with 95 % intervals and the range over seeds (Markdown; ×, points)."""
    arms = [arm for arm in report.arms if arm.paired]
    names = [name for name in RATIO_TITLES if any(name in arm.paired for arm in arms)]
    rows = [[_name(arm), *(_paired(arm.paired.get(name)) for name in names)] for arm in arms]
    return render(rows, ["arm", *(RATIO_TITLES[name].replace("|", "\\|") for name in names)])


def _paired(found: Paired | None) -> str:
    if found is None:
        return "–"
    sign = "+" if found.unit == "points" else ""
    if math.isnan(found.value):
        return "–"
    return f"{found.value:{sign}.2f} [{found.low:{sign}.2f}, {found.high:{sign}.2f}]"


def target_table(report: StudyReport) -> str:
    """Which aims each arm reaches, with the figure (Markdown)."""
    names = list(dict.fromkeys((t.name, t.wanted) for arm in report.arms for t in arm.targets))
    rows = []
    for arm in report.arms:
        if not arm.targets:
            continue
        found = {target.name: target for target in arm.targets}
        cells = [f"{'yes' if found[n].reached else 'no'}: {found[n].found}" if n in found else "–" for n, _ in names]
        rows.append([_name(arm), f"{sum(t.reached for t in arm.targets)} of {len(arm.targets)}", *cells])
    return render(rows, ["arm", "reached", *(f"{name} ({wanted})".replace("|", "\\|") for name, wanted in names)])


def validation_table(report: StudyReport) -> str:
    """The few figures an arm is chosen by, on the validation part (Markdown; degrees, shares; means over seeds)."""
    columns = (("AS⁻ °", "AS_neg", 2), ("\\|AS\\| °", "AS_abs", 2), ("IS °", "IS", 1), ("step to IS 40°", "step", 3))
    rows = [
        [_name(arm), arm.role, percent(arm.validation["top1"]), *(number(arm.validation[key], digits) for _, key, digits in columns)]
        for arm in report.arms
        if arm.validation
    ]
    return render(rows, ["arm", "role", "top-1", *(title for title, *_ in columns)])


def side_effect_table(report: StudyReport) -> str:
    """Calibration, corrupted accuracy and OOD AUROCs of every arm (Markdown; shares, mean over seeds ± spread)."""
    known = [key for arm in report.arms for key in arm.mean]
    corrupted = list(dict.fromkeys(key for key in known if key.startswith("corrupted/")))
    strange = [key for key in ("ood_null_energy", "ood_energy", "ood_vim") if key in known]
    rows = [
        [
            _name(arm),
            _mean(arm, "top1", share=True, compact=True),
            *(_mean(arm, key, share=True) for key in corrupted),
            _mean(arm, "ece", 3),
            _mean(arm, "nll", 3),
            *(_mean(arm, key, 3) for key in strange),
        ]
        for arm in report.arms
    ]
    titles = [key.removeprefix("corrupted/") for key in corrupted]
    auroc = [f"AUROC by {key.removeprefix('ood_').replace('_', ' ').replace('vim', 'ViM')}" for key in strange]
    return render(rows, ["arm", "top-1 clean", *titles, "ECE", "NLL", *auroc])


def attribute_table(report: StudyReport) -> str:
    """R² of the known attributes from Π_n f (and from all of f) in every arm (Markdown); empty text where none are known."""
    groups = {arm.arm: attribute_groups(arm.mean) for arm in report.arms}
    names = list(dict.fromkeys(group for found in groups.values() for group in found))
    if not names:
        return ""
    rows = [[_name(arm), *(_attribute(groups[arm.arm], name) for name in names)] for arm in report.arms if groups[arm.arm]]
    return render(rows, ["arm", *names])


def _attribute(found: dict[str, dict[str, float]], name: str) -> str:
    blocks = found.get(name, {})
    return f"{number(blocks.get('null_space', math.nan))} of {number(blocks.get('features', math.nan))}"


def arm_list(report: StudyReport) -> str:
    """What every arm is (Markdown): how it was trained, its role, its note, what its edit cost, its minutes."""
    rows = [
        [_name(arm), arm.role, arm.train, escape(arm.note or "–"), escape(_extra(arm)), number(arm.seconds / 60, 1)] for arm in report.arms
    ]
    return render(rows, ["arm", "role", "trained", "what it is", "noted", "minutes"])


def _extra(arm: ArmSummary) -> str:
    shown: Sequence[str] = [
        f"{key.replace('_', ' ')} {value:.2g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
        for key, value in arm.extra.items()
    ]
    return "; ".join([*([arm.omitted] if arm.omitted else []), *shown]) or "–"
