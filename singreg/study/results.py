"""A study's arms over seeds, against plain fine-tuning and placebos: paired figures, front, verdict (METHOD 8)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis import comparison
from singreg.analysis.comparison import CONFIRMED, HARM, Measured, Rows, compare_rows, no_claim, too_few, words
from singreg.study.arms import Work

Summary = dict[str, Any]


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

    def rows(name: str, label: str = "") -> Rows:
        found = {work.seed: rows_by(table, label) for work, (table, _) in by_arm[name]}
        only = next(iter(found.values()))
        return found if by_arm[name][0][0].trained else dict.fromkeys(seeds, only)  # an untrained arm's seed is nothing

    arms = [_summary(found) for found in by_arm.values()]
    for arm in arms:
        name, compared = arm["arm"], arm["arm"] != reference
        arm["paired"] = compare_rows(rows(name), rows(reference)) if compared else {}
        further = [label for label in by_arm[name][0][1][0]["by"].unique() if label] if compared else ()
        arm["further"] = {label: compare_rows(rows(name, label), rows(reference, label)) for label in further}
        arm["placebo"] = compare_rows(rows(claim), rows(name)) if arm["role"] == "placebo" else {}
    front = pareto_front({arm["arm"]: (arm["mean"]["top1"], arm["mean"][HARM]) for arm in arms})
    return [{**arm, "front": arm["arm"] in front} for arm in arms]


def rows_by(table: pd.DataFrame, label: str = "") -> pd.DataFrame:
    """Return an arm's rows by the study's own vision-language model, or by a further one, which no loop reads."""
    return table[table["by"] == label].drop(columns=[name for name in table if label and str(name).endswith("/loop")])


def _summary(found: Sequence[tuple[Work, Measured]]) -> Summary:
    (first, _), runs = found[0], [run for _, (_, run) in found]
    table, arm = pd.DataFrame([run["figures"] for run in runs], dtype=float), first.arm
    curve = arm.make == "train" and set(arm.overrides) <= {"loss.weight"}
    return {
        "arm": arm.name,
        **{name: getattr(arm, name) for name in ("role", "make", "note")},
        "trained": first.trained,
        "weight": first.config.loss.weight if curve else None,
        "seeds": [work.seed for work, _ in found],
        "mean": table.mean(skipna=False).to_dict(),
        "spread": table.std(ddof=1, skipna=False).to_dict(),
        "intervals": {
            name: np.mean([np.array(run["intervals"][name], float) for run in runs], axis=0).tolist()
            for name in runs[0]["intervals"]
        },
        "validation": pd.DataFrame([run["validation"] for run in runs], dtype=float).mean().to_dict(),
    }


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of (top-1, harm) that no other beats: as good in both and better in one."""
    every = set(points.values())
    beaten = {(a, b) for a, b in every for top1, harm in every - {(a, b)} if top1 >= a and harm <= b}
    return {name for name, point in points.items() if point not in beaten}


def study_verdict(
    arms: Sequence[Summary], reference: str, claim: str, images: int, classes: int, auditor_images: int, features: int
) -> list[str]:
    """Say in at most four lines what the claimed arm does, its price, and what placebos and a dropped null space do."""
    arm = next(each for each in arms if each["arm"] == claim)
    refused = no_claim(auditor_images, features) or too_few(images, classes)
    if refused or not arm["paired"]:
        return [refused or f"{claim!r} is compared with nothing, so this study says nothing about it."]
    on = f"{images} test images, auditor of {auditor_images} others, {len(arm['seeds'])} seed(s)"
    first = f"{claim}, named beforehand, against {reference}: {comparison.claim(arm['paired'])} ({on})."
    price = f"{comparison.price(arm['paired'])} {comparison.audit(arm['paired'])}"
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
