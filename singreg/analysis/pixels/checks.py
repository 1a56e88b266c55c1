"""The sanity rules of a pixel attack, from its judged rows, and what may be said once they are known (METHOD section 9)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from singreg.analysis.pixels.ascent import MOST_HELD
from singreg.analysis.pixels.budgets import Budget
from singreg.analysis.pixels.features import feature_sentence
from singreg.analysis.pixels.judges import counted_rise
from singreg.analysis.pixels.passes import Climbed, pass_checks
from singreg.analysis.pixels.results import (
    ATTACK,
    HOLD,
    NO_BUDGET,
    NO_LIMITS,
    ONE_STEP,
    RANDOM,
    READINGS,
    AttackedModel,
    JudgedPicture,
    PixelReport,
    PixelSummary,
    Transfer,
)
from singreg.analysis.old_robustness import sanity
from singreg.analysis.old_robustness.sanity import ATTACK_LOG, FEATURES, FILES, Check

SLACK = 0.05
"""Degrees by which a mean may fall short of what it must not fall below: the ascent is a search."""
SEARCHED = 0.1
"""The share of its own rise by which pictures crafted elsewhere may beat a white box: two searches of one function differ so much."""
KNOWS = 0.5
"""An image encoder that names fewer of the untouched pictures rightly does not count as a witness."""


def pixel_checks(
    rows: Sequence[JudgedPicture],
    transfers: Sequence[Transfer],
    budgets: Sequence[Budget],
    tau: float,
    *,
    climbs: Mapping[str, Sequence[Climbed]],
    hold: float,
    reachable: Mapping[str, Set[int]],
) -> list[Check]:
    """Every rule on every model as named checks: from the files, but for the passes alone, which the attack itself measured.

    climbs: by model. hold: how far class-prompt cosines may move in the opposite direction. reachable: by model, the targets that
    some feature at all makes the translator put first. (Degrees, logits, cosines.)
    """
    found: list[Check] = []
    alone: list[Check] = []
    for model in dict.fromkeys(row.attacked.model for row in rows):
        own = [row for row in rows if row.attacked.model == model]
        means = {arm: [_mean(own, budget, arm) for budget in budgets] for arm in (ATTACK, ONE_STEP, RANDOM)}
        places = [float(place) for place in range(1, len(budgets) + 1)]
        found.append(_nothing(model, [row for row in own if row.attacked.arm == NO_BUDGET]))
        found.append(_freely(model, own, reachable[model]))
        for norm in dict.fromkeys(budget.norm for budget in budgets):
            sizes = [(budget.size, means[ATTACK][place]) for place, budget in enumerate(budgets) if budget.norm == norm]
            if len(sizes) > 1:
                found.append(_grows(f"{model}, {norm}", sizes))
        found.append(sanity.many_steps_beat_one(model, places, means[ATTACK], means[ONE_STEP], unit="°", slack=SLACK))
        found += [
            sanity.random_is_far_below(f"{model}, {budget.label}", means[RANDOM][place], means[ATTACK][place])
            for place, budget in enumerate(budgets)
        ]
        for crafted in dict.fromkeys(t.crafted_on for t in transfers if t.judged_on == model):
            known = {t.budget: t for t in transfers if (t.crafted_on, t.judged_on) == (crafted, model)}
            pairs = [known[budget.label] for budget in budgets]
            found.append(
                sanity.white_box_beats_transfer(
                    f"{model}, crafted on {crafted}", places, [t.own for t in pairs], [t.rise for t in pairs],
                    slack=SLACK + SEARCHED * max(t.own for t in pairs),
                )
            )
        found += [*_files(model, own, budgets, tau), *_held_within(model, own, hold)]
        alone += pass_checks(model, climbs[model], budgets, means[RANDOM])
    return [*(replace(check, read=FILES) for check in found), *alone]


def _freely(model: str, rows: Sequence[JudgedPicture], reachable: Set[int]) -> Check:
    free = [row for row in rows if row.attacked.arm == NO_LIMITS]
    won = [row.first["fitted"] for row in free if row.attacked.target in reachable]
    return sanity.success_reaches_all(
        model, "255/255 and free logits", float(np.mean(won)) if won else None, reachable=len(won) / len(free) if free else None
    )


def _held_within(model: str, rows: Sequence[JudgedPicture], hold: float) -> list[Check]:
    """Of the opposite direction: what it claims to have held, the cosines to class prompts, read again from the files."""
    held = [row.cosine_change["fitted"] for row in rows if row.attacked.arm == HOLD]
    name = f"class-prompt cosines are held in the opposite direction ({model}, from the saved 8-bit files)"
    found = f"largest change {max(held, default=0.0):.3g} over {len(held)} pictures, allowed {hold:g}"
    return [Check(name, max(held) <= hold, found)] if held else []


def _mean(rows: Sequence[JudgedPicture], budget: Budget, arm: str) -> float:
    """Mean rise in degrees; of random directions what is left when only those that gain are kept, as every attack keeps its best."""
    values = [counted_rise(row, "fitted") for row in rows if (row.attacked.budget, row.attacked.arm) == (budget.label, arm)]
    if arm == RANDOM:
        values = [max(value, 0.0) for value in values]
    return float(np.mean(values)) if values else float("nan")


def _nothing(model: str, rows: Sequence[JudgedPicture]) -> Check:
    moved = max((max(abs(rise) for rise in row.rise.values()) + row.linf for row in rows), default=float("nan"))
    won = np.mean([any(row.won(judge) for judge in row.rise) for row in rows]) if rows else None
    return sanity.nothing_without_budget(model, None if won is None else float(won), moved)


def _grows(who: str, sizes: list[tuple[float, float]]) -> Check:
    falls = [(a[1] - b[1], a[0], b[0]) for a, b in itertools.pairwise(sizes)]
    worst = max(falls)
    found = ", ".join(f"{rise:.2f}° at {size:g}" for size, rise in sizes)
    return Check(f"a larger budget reaches at least what a smaller one does ({who})", worst[0] <= SLACK, found)


def _files(model: str, rows: Sequence[JudgedPicture], budgets: Sequence[Budget], tau: float) -> list[Check]:
    """What the saved 8-bit files must keep: logits within τ, the decision, the budget; of all that is called attacked."""
    claimed = [row for row in rows if row.attacked.arm in (ATTACK, ONE_STEP)]
    flipped = sum(row.decision != row.decision_before for row in claimed)
    change = max((row.logit_change for row in claimed), default=float("nan"))
    longest = [_longest([row for row in rows if row.attacked.budget == budget.label], budget) for budget in budgets]
    return [
        sanity.logits_within(f"{model}, from the saved 8-bit files", change, tau),
        Check(
            f"the decision stays ({model}, from the saved 8-bit files)", bool(claimed) and not flipped,
            f"{flipped} of {len(claimed)} pictures are decided otherwise",
        ),
        sanity.budget_is_kept(f"{model}, from the saved 8-bit files", [budget.size for budget in budgets], longest),
    ]  # fmt: skip


def _longest(rows: Sequence[JudgedPicture], budget: Budget) -> float:
    return max((row.linf if budget.norm == "linf" else row.l2 for row in rows), default=float("nan"))


def unchanged_without_null(label: str, before: PixelSummary, after: PixelSummary) -> Check:
    """Dropping the null space changes nothing in pixels: both means lie in each other's 95 % intervals (degrees)."""
    (a, *first), (b, *second) = before.rise["fitted"], after.rise["fitted"]
    inside = first[0] - SLACK <= b <= first[1] + SLACK and second[0] - SLACK <= a <= second[1] + SLACK
    found = f"rise {a:.2f}° before, {b:.2f}° after, at {before.budget}"
    return Check(f"dropping the null space changes nothing in pixels ({label})", inside, found)


def pixel_findings(report: PixelReport) -> list[str]:
    """What may be claimed, from which checks passed; then every model in a sentence of its own (degrees, shares)."""
    failed = [check for check in report.checks if not check.passed]
    sentences = []
    if failed:
        names = "; ".join(dict.fromkeys(check.name for check in failed))
        sentences.append(
            f"{len(failed)} of {len(report.checks)} sanity checks failed ({names}). Nothing may be claimed of robustness from this run: "
            "a low rise may be a weak or a broken attack."
        )
    else:
        sentences.append(
            f"All {len(report.checks)} sanity checks passed: {_counted(report.checks)}. So the rises and successes below may be "
            "quoted as lower bounds of what a white-box attacker reaches; a smaller one after training shows that this attack got less, "
            "not that no attack gets more."
        )
    if len(report.encoders) < 2:
        sentences.append(
            f"Changed meaning cannot be claimed of any picture: that takes at least two image encoders that name half of the untouched "
            f"pictures rightly, and here {len(report.encoders)} of {len(report.zero_shot)} do. What an encoder sees here is called "
            "fooling it."
        )
    for model in report.models:
        sentences.append(_model_sentence(model, report.largest(model.label), report))
        if model.label in report.features:
            sentences.append(feature_sentence(model.label, report.features[model.label], dropped=model.label in report.dropped))
        sentences += [_held(summary, report) for summary in report.summaries if (summary.model, summary.arm) == (model.label, HOLD)]
    return sentences


def _rounded(degrees: float) -> float:
    """To two digits; what rounds to nothing has no sign of its own."""
    return round(degrees, 2) + 0.0


def _counted(checks: Sequence[Check]) -> str:
    said = {FILES: "read from the saved 8-bit files", FEATURES: "from features in memory, no file", ATTACK_LOG: "from the attack's own log"}
    counts = {where: sum(check.read == where for check in checks) for where in said}
    return ", ".join(f"{count} {said[where]}" for where, count in counts.items() if count)


def _model_sentence(model: AttackedModel, s: PixelSummary, report: PixelReport) -> str:
    judges = "; ".join(
        f"{name} {_rounded(s.rise[name][0]):+.2f}° [{_rounded(s.rise[name][1]):.2f}, {_rounded(s.rise[name][2]):.2f}], target first "
        f"{s.success[name][0]:.0%} [{s.success[name][1]:.0%}, {s.success[name][2]:.0%}]"
        for name in s.rise
    )
    total = sum(share for share, _, _ in s.readings.values())
    seen = ", ".join(f"{name} {s.readings[name][0]:.0%}" for name in READINGS) if total else "nobody puts the target first"
    note = f" {model.note}" if model.note else ""
    return (
        f"{model.label}: within {s.budget} and logits within {report.tau:g} (their standard deviation is {model.logit_sd:.1f}), turned "
        f"towards the target prompt by {judges}. Read as: {seen}.{note}"
    )


def _held(s: PixelSummary, report: PixelReport) -> str:
    seen = ", ".join(f"{name} by {s.shift[name][0]:.1f}°" for name in s.shift)
    return (
        f"{s.model}, the opposite direction (ordinary sensitivity): within {s.budget}, class-prompt cosines held within "
        f"{report.settings.get('hold', 'the tolerance')}, {s.flipped:.0%} of {s.pictures} pictures are decided otherwise. Only those "
        f"cosines are held, not the translated feature; the readings turn: {seen}."
    )


def pixel_warnings(report: PixelReport, left_out: Sequence[str], further: Sequence[str] = ()) -> list[str]:
    """Reasons not to believe it: encoders that know little, pictures left out, few pictures, weak attacks; and `further` ones."""
    warnings = [
        f"Warning: the image encoder {name} names only {share:.0%} of the untouched pictures rightly, so it does not count as a witness."
        for name, share in report.zero_shot.items()
        if name not in report.encoders
    ]
    if left_out:
        warnings.append(
            f"Warning: {len(left_out)} pictures of one colour were left out, nothing is to be seen in them: {', '.join(left_out[:4])}."
        )
    if report.pictures < 100:
        warnings.append(
            f"Warning: only {report.pictures} pictures were attacked; a share is known to no better than "
            f"±{100 / report.pictures**0.5:.0f} points."
        )
    if len(report.models) == 1:
        warnings.append("Warning: with a single model no picture was carried over, so white box against transfer was not checked.")
    return [*warnings, *_weak_attacks(report), *(f"Warning: {sentence}" for sentence in further)]


def _weak_attacks(report: PixelReport) -> list[str]:
    """Heads with more classes than a tangent holds are attacked by the weaker search (no shapes)."""
    weak = [model.label for model in report.models if model.classes > MOST_HELD]
    warnings = [
        f"Warning: {model.label} has {model.classes} classes. Above {MOST_HELD} the attack does not follow the logits' tangent; only the "
        "augmented Lagrangian is left, which finds far less (a quarter of the rise where both were tried). A low rise here shows little."
        for model in report.models
        if model.label in weak
    ]
    if weak and len(weak) < len(report.models):
        others = ", ".join(model.label for model in report.models if model.label not in weak)
        warnings.append(
            f"Warning: models compared: {', '.join(weak)} met a weaker attack than {others} (more than {MOST_HELD} classes against fewer), "
            "so differences between them say nothing of which is harder to steer. Slice the heads to the same classes."
        )
    return warnings
