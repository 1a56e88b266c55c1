"""A study's arms over seeds, against plain fine-tuning and placebos: paired figures, front, verdict (METHOD 8)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.comparison import CONFIRMED, MARGIN, SMALLEST, confirmed_share, no_claim, resampled, too_few
from singreg.analysis.crossfit import AUDITED, figures
from singreg.analysis.statistics import ends, paired_proportions
from singreg.study.arms import AUDITOR, Measured, Work

HARM = "class_variance"  # what arms are ordered by: steering, AS⁻ and |AS| all come of it (METHOD section 8.8)
PAIRED = {
    "top1": "top-1",
    HARM: "class-score variance in the null",
    "AS_neg": "AS⁻",
    "AS_abs": "|AS|",
    "contrast AS_abs": "contrast |AS|",
    "IS": "IS",
    "orthogonal IS": "IS beside all prompts",
    "unique_r2": "unique R²",
    "harmless_r2": "harmless R²",
    "cross 4 sd": "4 sd step, judged by another",
    "cross 25% of |f|": "25 % step, judged by another",
    "confirmed": "confirmed share",
}
"""Ratios to the reference, paired by image; top-1 is a difference in points."""
CLAIMED = (HARM, "AS_neg", "AS_abs", "cross 4 sd")  # what must fall together for a claim
Summary = dict[str, Any]
Rows = Mapping[int, pd.DataFrame]


def summarize_study(runs: Sequence[tuple[Work, Measured]], reference: str, claim: str) -> list[Summary]:
    """Aggregate the runs arm by arm and compare each with the reference, plain fine-tuning with the same budget.

    Returns:
        A dict an arm: what it is, its seeds; mean and spread (standard deviation over seeds) of figures, mean of
        validation; intervals over images, ends averaged over seeds; paired: see `compare_rows`; further: the same by
        the label of every further vision-language model; placebo: the claimed arm against this one, likewise; front:
        no arm is better in both top-1 and class-score variance; weight: λ of the arms that differ in λ alone, or None.
    """
    by_arm: dict[str, list[tuple[Work, Measured]]] = {}
    for work, run in runs:
        by_arm.setdefault(work.arm.name, []).append((work, run))
    seeds = [work.seed for work, _ in by_arm[reference]]

    def rows(name: str, label: str | None = None) -> Rows:
        found = {work.seed: run.rows if label is None else run.further[label] for work, run in by_arm[name]}
        only = next(iter(found.values()))
        return found if by_arm[name][0][0].trained else dict.fromkeys(seeds, only)  # an untrained arm's seed is nothing

    arms = [_summary(found) for found in by_arm.values()]
    for arm in arms:
        name, compared = arm["arm"], arm["arm"] != reference
        arm["paired"] = compare_rows(rows(name), rows(reference)) if compared else {}
        further = by_arm[name][0][1].further if compared else ()
        arm["further"] = {label: compare_rows(rows(name, label), rows(reference, label)) for label in further}
        arm["placebo"] = compare_rows(rows(claim), rows(name)) if arm["role"] == "placebo" else {}
    front = pareto_front({arm["arm"]: (arm["mean"]["top1"], arm["mean"][HARM]) for arm in arms})
    return [{**arm, "front": arm["arm"] in front} for arm in arms]


def _summary(found: Sequence[tuple[Work, Measured]]) -> Summary:
    (first, _), runs = found[0], [run for _, run in found]
    table, arm = pd.DataFrame([run.figures for run in runs]), first.arm
    curve = arm.make == "train" and set(arm.overrides) <= {"loss.weight"}
    return {
        "arm": arm.name,
        **{name: getattr(arm, name) for name in ("role", "make", "note")},
        "trained": first.trained,
        "weight": first.config.loss.weight if curve else None,
        "seeds": [work.seed for work, _ in found],
        "mean": table.mean(skipna=False).to_dict(),
        "spread": table.std(ddof=1, skipna=False).to_dict(),
        "intervals": {n: np.mean([run.intervals[n] for run in runs], axis=0).tolist() for n in runs[0].intervals},
        "validation": pd.DataFrame([run.validation for run in runs]).mean().to_dict(),
        "extra": runs[0].extra,
    }


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of (top-1, harm) that no other beats: as good in both and better in one."""
    every = set(points.values())
    beaten = {(a, b) for a, b in every for top1, harm in every - {(a, b)} if top1 >= a and harm <= b}
    return {name for name, point in points.items() if point not in beaten}


def compare_rows(arm: Rows, reference: Rows) -> dict[str, dict[str, Any]]:
    """Compare rows by seed with the reference's, paired by image, seeds averaged first; only common seeds are compared.

    Returns:
        By figure of `PAIRED`: value, low, high (95 % bootstrap over classes and images, of top-1 a score interval over
        images, ends averaged over seeds) and unit (× of means, points); no "confirmed" where the loop reads no fall.
    """
    seeds = sorted(arm.keys() & reference.keys())
    if any(list(arm[seed]["image"]) != list(reference[seed]["image"]) for seed in seeds):
        raise ValueError("the arms were measured on other images, so they cannot be paired")
    both = [pd.concat([_columns(rows[seed]) for seed in seeds]).groupby(level=0).mean() for rows in (arm, reference)]
    classes = reference[seeds[0]]["label"].to_numpy()
    means = resampled(both, [str(name) for name in both[0]], classes)
    one, other = ({**figures(each), **each, "AS_neg": -each["AS/auditor"]} for each in means)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {key: (*ends(one[key] / other[key]), "×") for key in PAIRED if key not in ("top1", "confirmed")}
    hits = [[rows[seed]["correct"].to_numpy(np.float64) for rows in (arm, reference)] for seed in seeds]
    # Of these classes, so over images alone; of one seed each, since an average of seeds has no score interval.
    value, low, high = (float(end) for end in 100 * np.mean([paired_proportions(*pair) for pair in hits], axis=0))
    found["top1"] = (value, low, high, "points")
    if "AS/loop" in one and one["AS/loop"][0] > other["AS/loop"][0]:
        found["confirmed"] = (*confirmed_share(both, classes), "×")
    return {key: dict(zip(("value", "low", "high", "unit"), each, strict=True)) for key, each in found.items()}


def _columns(rows: pd.DataFrame) -> pd.DataFrame:
    """What is averaged over seeds: of AS the harmful side alone, by both translators."""
    harmful = {name: np.minimum(rows[name], 0.0) for name in ("AS/loop", f"AS/{AUDITOR}") if name in rows}
    scores = {"AS_abs": rows[f"AS/{AUDITOR}"].abs(), "IS": rows[f"IS/{AUDITOR}"], "correct": rows["correct"]}
    return rows[sorted(AUDITED)].assign(**harmful, **scores).astype(np.float64).reset_index(drop=True)


def words(paired: Mapping[str, Any] | None) -> str:
    """Write a paired figure with its unit and interval, such as "0.50× [0.40, 0.60]"."""
    if paired is None:
        return "–"
    *found, unit = paired.values()
    value, low, high = (round(end, 2) + 0.0 for end in found)  # what rounds to nothing has no sign
    if unit == "points":
        return f"{value:+.2f} points [{low:+.2f}, {high:+.2f}]"
    return f"{value:.2f}{unit} [{low:.2f}, {high:.2f}]"


def study_verdict(
    arms: Sequence[Summary], reference: str, claim: str, images: int, classes: int, auditor_images: int, features: int
) -> list[str]:
    """Say in at most four lines what the claimed arm does, its price, and what placebos and a dropped null space do."""
    arm = next(each for each in arms if each["arm"] == claim)
    refused = no_claim(auditor_images, features) or too_few(images, classes)
    if refused or not arm["paired"]:
        return [refused or f"{claim!r} is compared with nothing, so this study says nothing about it."]
    paired, on = arm["paired"], f"{images} test images, auditor of {auditor_images} others, {len(arm['seeds'])} seed(s)"
    fallen = "; ".join(f"{PAIRED[key]} {words(paired[key])}" for key in CLAIMED)
    failed = [PAIRED[key] for key in CLAIMED if not (paired[key]["high"] < 1 and paired[key]["value"] < 1 - SMALLEST)]
    together = f"not shown to fall: {', '.join(failed)}" if failed else "all fall together"
    kept = "kept" if paired["top1"]["low"] > -100 * MARGIN else "not shown to be kept"
    beside = ", ".join(f"{PAIRED[key]} {words(paired[key])}" for key in ("IS", "unique_r2", "harmless_r2"))
    price = f"Top-1 {words(paired['top1'])}, {kept}; {beside}; confirmed share {words(paired.get('confirmed'))}."
    first = f"{claim}, named beforehand, against {reference}: {fallen}: {together} ({on})."
    said = [first, price, _placebos(arms, arm)]
    for each in arms:
        if each["make"] == "drop":
            cost = f"top-1 {words(each['paired']['top1'])} and harmless R² {words(each['paired']['harmless_r2'])}"
            said.append(f"The baseline to beat, {each['arm']}, leaves nothing to steer through, with {cost}.")
    return said[:4]


def _placebos(arms: Sequence[Summary], claimed: Summary) -> str:
    """Whether the true loss is clearly better than each placebo; intervals about 1 are no proof of equality."""
    found = []
    for arm in arms:
        if arm["role"] == "placebo":
            beaten = arm["placebo"][HARM]["high"] < 1
            found.append(f"{arm['arm']} {words(arm['placebo'][HARM])}, {'fails' if beaten else 'does not fail'}")
    if not found:
        return "There was no placebo arm, so nothing here shows that the classes' prompts matter."
    left = f"{claimed['arm']}'s class-score variance over each placebo's"
    return f"Placebos ({left}): {'; '.join(found)}. One that does not fail leaves open whether the prompts matter."


def study_warnings(arms: Sequence[Summary]) -> list[str]:
    """Give reasons not to believe a figure: one seed, gamed loops."""
    single = "; ".join(arm["arm"] for arm in arms if len(arm["seeds"]) == 1 and arm["trained"])
    shares = {arm["arm"]: arm["paired"].get("confirmed") for arm in arms if arm["role"] == "method" and arm["trained"]}
    gamed = "; ".join(name for name, share in shares.items() if share and not share["high"] >= CONFIRMED)
    found = [f"Of one seed only, so without a spread over seeds: {single}."] if single else []
    return [*found, *([f"The loss was gamed (less than {CONFIRMED:.0%} confirmed): {gamed}."] if gamed else [])]
