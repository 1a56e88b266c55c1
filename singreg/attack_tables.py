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
TWINS = (
    "Pairs of held-out images of two classes, as close in logits as images of one class and as far apart for an "
    "encoder as others; nobody attacked them."
)


def attack_verdict(figures: Mapping[str, Any]) -> list[str]:
    """Say in at most four sentences what may be claimed, from the figures of an attack's report."""
    failed = [f"{check['name']} ({check['model']})" for check in figures["checks"] if not check["passed"]]
    said = [
        f"{len(failed)} of {len(figures['checks'])} checks of the attack failed: {'; '.join(failed)}. Nothing may be "
        "claimed of robustness: a low rise may be a broken attack."
        if failed
        else f"All {len(figures['checks'])} checks of the attack passed: the rises are lower bounds of what a "
        "white-box attacker reaches."
    ]
    attacks = {s["model"]: s for s in figures["summaries"] if s["arm"] == ATTACK and s["budget"] == _largest(figures)}
    each = [
        f"{label} {', '.join(f'{rise[0]:+.1f}° ({judge})' for judge, rise in s['rise'].items())}, target first by the "
        f"attacked translator in {s['success']['fitted'][0]:.0%}"
        for label, s in attacks.items()
    ]
    held = f"Within {_largest(figures)}, logits within {figures['tau']:g}, images turn towards the target's prompt by: "
    said.append(held + "; ".join(each) + ".")
    if figures["features"]:
        each = [f"{label} {_mean_success(figures, label):.0%}" for label in figures["features"]]
        said.append(
            "In feature space exactly null directions put the target first, on average over the step, in: "
            f"{', '.join(each)}."
        )
    if len(figures["encoders"]) < 2:
        said.append(
            "Changed meaning cannot be claimed: that takes two image encoders that name half of the untouched images "
            f"rightly, and {len(figures['encoders'])} of {len(figures['zero_shot'])} do."
        )
    return said


def _largest(figures: Mapping[str, Any]) -> str:
    """The largest budget of the first norm."""
    budgets = [s["budget"] for s in figures["summaries"]]
    return str([budget for budget in budgets if budget.split()[0] == budgets[0].split()[0]][-1])


def _mean_success(figures: Mapping[str, Any], label: str) -> float:
    """Of the maximiser by the translator it attacks, after the dropping where the null space is dropped."""
    defence = "drop_null" if label in figures["dropped"] else ""
    curve = the_curve(
        figures["features"][label]["curves"],
        attack=MAXIMISER,
        crafted_on="fitted",
        judge="fitted",
        budget="step",
        defence=defence,
    )
    return float(curve["area"]["success"][0] or 0.0)


def attack_warnings(figures: Mapping[str, Any], left_out: Sequence[str], further: Sequence[str] = ()) -> list[str]:
    """List reasons not to believe an attack's figures, and `further` ones."""
    models, images = figures["models"], figures["pictures"]
    warnings = [
        f"the image encoder {name} names only {share:.0%} of the untouched images rightly: it is no witness"
        for name, share in figures["zero_shot"].items()
        if name not in figures["encoders"]
    ]
    if left_out:
        warnings.append(f"{len(left_out)} images of one colour were left out: {', '.join(left_out[:4])}")
    if images < 100:
        warnings.append(f"only {images} images were attacked; a share is known to ±{100 / images**0.5:.0f} points")
    if len(models) == 1:
        warnings.append("with a single model no image was carried over, so white box and transfer are not compared")
    weak = [model["label"] for model in models if model["classes"] > MOST_HELD]
    if weak:
        compared = "; do not compare them with the others, slice the heads alike" if len(weak) < len(models) else ""
        warnings.append(
            f"{', '.join(weak)}: above {MOST_HELD} classes the attack does not follow the logits' tangent and finds "
            f"far less (a quarter of the rise where both were tried), so a low rise shows little{compared}"
        )
    failed = [
        f"{label}: {check['name']}: {check['found']}"
        for label, found in figures["features"].items()
        for check in found["checks"]
        if not check["passed"]
    ]
    if failed:
        warnings.append(f"in feature space checks failed: {'; '.join(failed)}")
    return [f"Warning: {sentence}." for sentence in (*warnings, *further)]


def attack_sections(figures: Found, plots: Mapping[str, Figure]) -> list[Section]:
    """Return an attack's report as sections, from report.json's figures."""

    def plot(name: str) -> list[Figure]:
        return [plots[name]] if name in plots else []

    failed = [check for check in figures["checks"] if not check["passed"]]
    sections = [Section("Checks that failed", [pd.DataFrame(failed)[["model", "name", "found"]]])] if failed else []
    sections.append(Section("Attacked images", [*plot("rises"), rise_table(figures), RISE, *plot("attacked")]))
    sections.append(Section("Who was fooled", [fooled_table(figures), WHO]))
    if figures["features"]:
        sections.append(Section("In feature space", [*plot("features"), feature_table(figures), IN_FEATURES]))
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
        table = pd.DataFrame(rows).drop(columns=["shown", "rate_interval", "pictures"])
        sections.append(Section("Natural twins", [table, TWINS, *plot("twins")]))
    robust = [
        {"model": r["model"], "clean": r["clean"], **r["adversarial"], **r["corrupted"]} for r in figures["robustness"]
    ]
    sections.append(Section("Ordinary robustness", [pd.DataFrame(robust), ROBUST]))
    sections.append(Section("Models", [pd.json_normalize(figures["models"])]))
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
    """Return the attacks in feature space by model, attack and judge, and those that could not be made."""
    rows = []
    for label, found in figures["features"].items():
        for curve in found["curves"]:
            if curve["budget"] == "step" and (label in figures["dropped"]) == (curve["defence"] == "drop_null"):
                row = {"model": label, "attack": curve["attack"], "crafted on": curve["crafted_on"]}
                area = curve["area"]
                success = "–" if area["success"][0] is None else _share(area["success"])
                row |= {"judge": curve["judge"], "target first": success, "AS °": number(area["AS"][0])}
                rows.append(row | {"max Δlogit": f"{max(curve['logit_change']):.1g}"})
        rows += [{"model": label, "attack": name, "judge": f"not made: {why}"} for name, why in found["absent"].items()]
    return _table(rows)
