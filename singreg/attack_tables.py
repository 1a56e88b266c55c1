"""An attack's sentences and tables for people: the few figures a reader needs; report.json has the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from singreg.analysis.attack import MOST_HELD
from singreg.analysis.attack_images import ATTACK
from singreg.analysis.attack_judges import READINGS
from singreg.analysis.attackers import MAXIMISER
from singreg.analysis.steering_curves import the_curve
from singreg.report import Figure, Section, interval, number, percent

Found = Mapping[str, Any]
RISE = (
    "Rise: degrees gained towards the prompt of the target class, read from the saved 8-bit files; an image whose "
    "logits, decision or budget were not kept counts as 0. fitted: the translator that was attacked; auditor: another "
    "one from other images; the rest are image encoders that the attack never saw. one step: the single gradient step; "
    "random: a random direction of the whole budget, held to nothing. Low is hard to steer."
)
WHO = (
    "Share of images whose target came first, with Wilson's 95 % intervals. Fooled the translator: the attacked one "
    "alone; the translators: the auditor too; the VLM: an image encoder too; changed meaning: all encoders, at least "
    "two."
)
IN_FEATURES = (
    "Means over relative steps up to 0.4 of the feature norm. maximiser: the best null displacement within the step; "
    "near-null: directions that keep the logits within a tolerance, as images do; transfer from and null space of: by "
    "an attacker who holds the first model. A dropped null space is judged after the dropping."
)
ROBUST = (
    "Top-1 of the same images: untouched, under L-infinity PGD (255ths) and corrupted. A stronger attack finds no more."
)
DROPPED = (
    "A model whose null space was dropped is attacked and judged in pixels by its features before the dropping, so its "
    "images come out like those of the model it was made from by construction: the dropping hides nothing there."
)
TWINS = (
    "Pairs of held-out images of two classes, as close in logits as images of one class and as far apart for an "
    "encoder as others; nobody attacked them."
)


def all_checks(figures: Found) -> list[Found]:
    """Return the checks of the images and of feature space; of a dropped null space only that nothing is left."""
    found = list(figures["checks"])
    for label, features in figures["features"].items():
        for check in features["checks"]:
            if label not in figures["dropped"] or "null space dropped" in check["name"]:
                found.append({"model": label, **check, "name": f"{check['name']}, in feature space"})
    return found


def attack_verdict(figures: Found) -> list[str]:
    """Say in at most four sentences what may be claimed, from the figures of an attack's report."""
    checks = all_checks(figures)
    failed = [f"{check['name']} ({check['model']})" for check in checks if not check["passed"]]
    first = f"All {len(checks)} checks passed: the rises are lower bounds of what a white-box attacker reaches."
    if failed:
        first = (
            f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}. Nothing may be claimed of robustness."
        )
    budget, each = largest_budget(figures), []
    for s in figures["summaries"]:
        if (s["arm"], s["budget"]) == (ATTACK, budget):
            rises = ", ".join(f"{rise[0]:+.1f}° ({judge})" for judge, rise in s["rise"].items())
            each.append(
                f"{s['model']} {rises}, target first for the attacked translator {s['success']['fitted'][0]:.0%}"
            )
    held = f"Within {budget} and logits within {figures['tau']:g} images turn towards the target's prompt by: "
    said = [first, f"{held}{'; '.join(each)}."]
    successes = []
    for label, found in figures["features"].items():
        wanted = {"attack": MAXIMISER, "crafted_on": "fitted", "judge": "fitted", "budget": "step"}
        defence = "drop_null" if label in figures["dropped"] else ""
        area = the_curve(found["curves"], **wanted, defence=defence)["area"]["success"]
        successes.append(f"{label} {percent(area[0], 0)}")
    if successes:
        said.append(f"In feature space null directions put the target first, mean over steps: {', '.join(successes)}.")
    if (count := len(figures["encoders"])) < 2:
        said.append(
            "Changed meaning cannot be claimed: that takes two image encoders that name half of the untouched images "
            f"rightly, and {count} of {len(figures['zero_shot'])} do."
        )
    return said


def largest_budget(figures: Found) -> str:
    """Return the largest budget of the first norm."""
    budgets = [s["budget"] for s in figures["summaries"]]
    return str([budget for budget in budgets if budget.split()[0] == budgets[0].split()[0]][-1])


def attack_warnings(figures: Found, left_out: Sequence[str], further: Sequence[str] = ()) -> list[str]:
    """List reasons not to believe an attack's figures, and `further` ones."""
    models, images = figures["models"], figures["images"]
    weak = [model["label"] for model in models if model["classes"] > MOST_HELD]
    alike = "" if len(weak) == len(models) else "; do not compare it with the others, slice the heads alike"
    warnings = {
        f"{len(left_out)} images of one colour were left out: {', '.join(left_out[:4])}": bool(left_out),
        f"only {images} images were attacked; a share is known to ±{100 / images**0.5:.0f} points": images < 100,
        "with a single model no image was carried over, so white box and transfer are not compared": len(models) == 1,
        f"{', '.join(weak)}: above {MOST_HELD} classes the attack does not follow the logits' tangent and finds far "
        f"less (a quarter of the rise where both were tried), so a low rise shows little{alike}": bool(weak),
    }
    for name, share in figures["zero_shot"].items():
        known = name in figures["encoders"]
        warnings[f"{name} names only {share:.0%} of the untouched images rightly: it is no witness"] = not known
    return [f"Warning: {text}." for text in (*(text for text, true in warnings.items() if true), *further)]


def attack_sections(figures: Found, plots: Mapping[str, Figure]) -> list[Section]:
    """Return an attack's report as sections, from report.json's figures."""

    def plot(name: str) -> list[Figure]:
        return [plots[name]] if name in plots else []

    failed = [check for check in all_checks(figures) if not check["passed"]]
    sections = [Section("Checks that failed", [_table(failed)[["model", "name", "found"]]])] if failed else []
    sections.append(Section("Attacked images", [*plot("rises"), rise_table(figures), RISE, *plot("attacked")]))
    sections.append(Section("Who was fooled", [fooled_table(figures), WHO]))
    if figures["features"]:
        blocks: list[Any] = [*plot("features"), feature_table(figures), IN_FEATURES]
        absent = {f"Not made: {n} ({why})." for f in figures["features"].values() for n, why in f["absent"].items()}
        sections.append(Section("In feature space", [*blocks, *sorted(absent)]))
    if figures["transfers"]:
        differences = [
            {"model": d["second"], "minus": d["first"], "budget": d["budget"], "judge": d["judge"]}
            | {"rise °": interval(d["value"], d["low"], d["high"])}
            for d in figures["differences"]
            if d["figure"] == "rise"
        ]
        carried = pd.DataFrame(figures["transfers"]).rename(columns={"own": "its own white box"})
        sections.append(Section("Models compared", [pd.DataFrame(differences), "Carried over:", carried]))
    if figures["twins"]:
        rows = [{**t, "rate": _share([t["rate"], *t["rate_interval"]], 2)} for t in figures["twins"]]
        table = pd.DataFrame(rows).drop(columns=["shown", "rate_interval", "images"])
        sections.append(Section("Natural twins", [table, TWINS, *plot("twins")]))
    robust = [
        {"model": r["model"], "clean": r["clean"], **r["adversarial"], **r["corrupted"]} for r in figures["robustness"]
    ]
    sections.append(Section("Ordinary robustness", [pd.DataFrame(robust), ROBUST]))
    notes = [DROPPED] if figures["dropped"] else []
    sections.append(Section("Models", [pd.json_normalize(figures["models"]), *notes]))
    return sections


def _table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    table: pd.DataFrame = pd.DataFrame(rows).fillna("")
    return table


def _share(values: Sequence[float], digits: int = 0) -> str:
    value, low, high = (100 * value for value in values)
    return f"{interval(value, low, high, digits)} %"


def rise_table(figures: Found) -> pd.DataFrame:
    """Return rises by model, budget, arm and judge."""
    rows = [
        {"model": s["model"], "budget": s["budget"], "arm": s["arm"], "kept": percent(s["kept"], 0)}
        | {f"{judge} °": interval(*rise) for judge, rise in s["rise"].items()}
        for s in figures["summaries"]
    ]
    return _table(rows)


def fooled_table(figures: Found) -> pd.DataFrame:
    """Return shares of images whose target came first, by judge and by who was fooled."""
    rows = [
        {"model": s["model"], "budget": s["budget"]}
        | {judge: _share(share) for judge, share in s["success"].items()}
        | {name: _share(s["readings"][name]) for name in READINGS}
        for s in figures["summaries"]
        if s["arm"] == ATTACK
    ]
    return _table(rows)


def feature_table(figures: Found) -> pd.DataFrame:
    """Return the attacks in feature space by model, attack and judge."""
    rows = []
    for label, found in figures["features"].items():
        for curve in found["curves"]:
            if curve["budget"] == "step" and (label in figures["dropped"]) == (curve["defence"] == "drop_null"):
                row = {"model": label, "attack": curve["attack"], "crafted on": curve["crafted_on"]}
                area = curve["area"]
                success = "–" if area["success"][0] is None else _share(area["success"])
                row |= {"judge": curve["judge"], "target first": success, "AS °": number(area["AS"][0])}
                rows.append(row | {"max Δlogit": f"{max(curve['logit_change']):.1g}"})
    return _table(rows)
