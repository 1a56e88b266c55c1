"""Scores as tables and sentences for people: the few figures a reader needs; report.json has the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.concepts import Order, select_concepts
from singreg.analysis.fitting import AGREEMENT, IMAGES_PER_FEATURE, ZERO_SHOT
from singreg.analysis.passport import VISIBLE, chance_angle, judge_passport
from singreg.analysis.probes import BLOCKS
from singreg.analysis.steering_curves import BUDGETS, at, natural_marks, the_curve
from singreg.report import Figure, Section, interval, number, percent

KIND_TITLES = {
    "observed": "the null space",
    "dimension": "random, equal dimension",
    "energy": "random, equal energy",
    "texts": "another class's text",
}
BLOCK_TITLES = {"features": "f, whole", "row_space": "Π_p f, row space", "null_space": "Π_n f, null space"}
SCORES = {"AS_neg": "AS⁻ °", "AS_abs": "|AS| °", "IS": "IS °"}
CHANCE = {**{key: (title, 2) for key, title in SCORES.items()}, "kappa": ("κ", 3)}  # with decimals
MANY_FLOORED = 0.1
Found = Mapping[str, Any]


def _table(rows: Any, columns: list[str] | None = None) -> pd.DataFrame:
    table: pd.DataFrame = pd.DataFrame(rows, columns=columns)
    return table


def _with(value: float, bounds: Sequence[float] | None, digits: int = 2, factor: float = 1.0) -> str:
    low, high = (None, None) if bounds is None else (factor * bounds[0], factor * bounds[1])
    return interval(factor * value, low, high, digits)


def score_table(measurements: Mapping[str, Found]) -> pd.DataFrame:
    """Return every model by every translator, with 95 % intervals, from what `analyze_model` returned by model."""
    rows = []
    for model, measured in measurements.items():
        for name, by in measured["translators"].items():
            figures = {title: _with(by["overall"][key], by["intervals"][key]) for key, title in SCORES.items()}
            kappa = _with(by["overall"]["kappa"], by["intervals"]["kappa"], 3)
            row = {"model": model, "translator": name, "top-1": percent(measured["top1"]), **figures, "κ": kappa}
            rows.append(row | {"null share": number(measured["null_share"], 3), "zero-shot": percent(by["zero_shot"])})
    return _table(rows)


def translator_table(measured: Found) -> pd.DataFrame:
    """Return how good every translator of a measurement is."""
    columns = ["fit_images", "ridge", "cosine", "r2", "zero_shot"]
    table: pd.DataFrame = _table(measured["translators"]).T[columns].rename_axis("translator").reset_index()
    table["the VLM's own"] = measured["vlm_zero_shot"]
    return table


def chance_table(chance: Mapping[str, Found]) -> pd.DataFrame:
    """Return the paper's removal beside its chance levels, mean ± sd over draws, by translator (`measure_chance`)."""
    rows = []
    for name, found in chance.items():
        scores = found["paper"]
        observed = [number(scores["observed"][key], digits) for key, (_, digits) in CHANCE.items()]
        rows.append([name, KIND_TITLES["observed"], *observed, percent(scores["energy"])])
        for kind, level in scores["levels"].items():
            pairs = [(level["mean"][key], level["spread"][key], digits) for key, (_, digits) in CHANCE.items()]
            cells = [f"{number(mean, digits)} ± {number(spread, digits)}" for mean, spread, digits in pairs]
            rows.append([name, KIND_TITLES[kind], *cells, percent(level["energy"])])
    titles = [title for title, _ in CHANCE.values()]
    return _table(rows, ["translator", "what is removed", *titles, "energy removed"])


def information_table(found: Found) -> pd.DataFrame:
    """Return held-out R² and class accuracy of every block, and what only the null space tells."""
    pairs = {BLOCK_TITLES[k]: (f"r2 {k}", found["r2"][k], f"accuracy {k}", found["accuracy"][k]) for k in BLOCKS}
    only = ("unique", found["unique"], "unique_accuracy", found["unique_accuracy"])
    bounds, rows = found["intervals"], []
    for title, (of_r2, r2, of_class, accuracy) in (pairs | {"only in the null space: f less Π_p f": only}).items():
        rows.append([title, _with(r2, bounds[of_r2], 3), _with(accuracy, bounds[of_class], 1, 100)])
    rows.append(["always the most frequent class", "0", number(100 * found["chance"], 1)])
    return _table(rows, ["fitted on", "R² of the image embedding", "class probe, %"])


def class_table(found: Found) -> pd.DataFrame:
    """Return every class with its scores, the leakiest first (`analyze_classes`)."""
    rows = []
    for score in found["classes"]:
        figures = {title: _with(score["means"][key], score["intervals"][key]) for key, title in SCORES.items()}
        accuracy = percent(score["means"]["accuracy"])
        rows.append({"class": score["name"], "images": score["images"], **figures, "accuracy": accuracy})
    return _table(rows)


def passport_table(passports: Sequence[Found]) -> pd.DataFrame:
    """Return heads side by side (`head_passport`)."""
    columns = ["tag", "classes", "features", "rank", "nullity", "conditioning"]
    angles = [number(chance_angle(passport), 1) for passport in passports]
    table: pd.DataFrame = _table([passport["summary"] for passport in passports])[columns].assign(
        **{"chance angle °": angles}
    )
    table["verdict"] = [judge_passport(passport) for passport in passports]
    return table


def _names(concepts: Found, order: Order) -> str:
    table = select_concepts(concepts, order, 3)[["concept", "AS"]]
    return ", ".join(f"{name} ({score:+.1f}°)" for name, score in table.itertuples(index=False)) or "none"


def analysis_verdict(found: Found) -> list[str]:
    """Say what leaks, how much against chance, what only the null space knows, and where, from an analysis' figures."""
    measured, chance, information = found["measurement"], found["chance"]["auditor"]["paper"], found["information"]
    head, by = measured["head"], measured["translators"]["auditor"]
    (low, high), level = by["intervals"]["AS_neg"], chance["levels"]["energy"]["mean"]["AS_neg"]
    against = "more than" if low > level else "less than" if high < level else "no different from"
    leaky = ", ".join(f"{score['name']} ({score['means']['AS_neg']:.1f}°)" for score in found["classes"]["classes"][:3])
    lost, gained = (_names(found["concepts"], order) for order in ("falls", "rises"))
    return [
        f"The null space of {head['tag']} has {head['nullity']} of {head['features']} dimensions and "
        f"{measured['null_share']:.0%} of the feature norm. Removing it leaves every logit and moves an image's "
        f"meaning by IS {_with(by['overall']['IS'], by['intervals']['IS'], 1)}°.",
        f"It takes AS⁻ {_with(by['overall']['AS_neg'], (low, high))}° of the true class away, {against} the "
        f"{level:.2f}° of a random displacement of equal energy; most for {leaky}.",
        f"Only the null space tells {information['unique']:.1%} of the embeddings' variance; a probe on it alone names "
        f"the class of {information['accuracy']['null_space']:.0%} of held-out images (always the most frequent one: "
        f"{information['chance']:.0%}).",
        f"Of {len(found['concepts']['concepts'])} concepts, removal takes most from {lost} and brings {gained} closer.",
    ]


def analysis_warnings(measured: Found, agreement: float) -> list[str]:
    """Say why not to believe a measurement: too few images, translators that disagree or lose the class, blind VLM."""
    warnings, own = [], measured["vlm_zero_shot"]
    for name, by in measured["translators"].items():
        if by["fit_images"] < IMAGES_PER_FEATURE * measured["head"]["features"]:
            warnings.append(
                f"The {name} translator was fitted on {by['fit_images']} images for {measured['head']['features']} "
                f"features; below {IMAGES_PER_FEATURE:g} a feature it is not identified well and AS⁻ reads too high."
            )
        if by["zero_shot"] < ZERO_SHOT * own:
            warnings.append(
                f"Features translated by the {name} translator name {by['zero_shot']:.0%} of the classes where the "
                f"vision-language model's own embeddings name {own:.0%}; too much is lost for AS to mean the class."
            )
    if agreement < AGREEMENT:
        warnings.append(
            f"The two translators, fitted on different images, agree on the classes' directions to {agreement:.2f} "
            f"only (below {AGREEMENT}); class-level figures depend on which images were taken."
        )
    if own < 0.5:
        warnings.append(f"The vision-language model itself names only {own:.0%} of the test images' classes.")
    if measured["translators"]["auditor"]["overall"]["IS"] < VISIBLE:
        warnings.append(f"An IS below {VISIBLE:g}° is hardly visible in an image; this null space does little.")
    return warnings


def analysis_sections(found: Found, figures: Mapping[str, Figure]) -> list[Section]:
    """Arrange an analysis' tables and figures (`plot_analysis`) as the sections of its report."""
    measured, passport = found["measurement"], found["passport"]
    scores = (
        "Angles in degrees, means over held-out test images with 95 % bootstrap intervals. AS⁻: what removing the null "
        "space takes from the true class; IS: how far it moves the image's meaning; κ: AS as a share of what IS would "
        "allow, 0 at chance. fitted: a translator from the bank's images; auditor: one from other images, by which the "
        f"levels below are read. They agree on the classes' directions to {found['agreement']:.2f} (cosine)."
    )
    ties = {name: tie for name, tie in found["classes"]["correlations"].items() if tie["value"] is not None}
    said = ", ".join(f"{SCORES[name]} {_with(tie['value'], (tie['low'], tie['high']))}" for name, tie in ties.items())
    classes = [f"Rank correlation with accuracy over classes: {said}."] if said else []
    if empty := found["classes"]["empty"]:
        classes.append(f"{len(empty)} classes have no image: {', '.join(empty)}.")
    moved = ["concept", "before", "after", "AS", "AS_low", "AS_high", "kappa"]
    concepts = select_concepts(found["concepts"], "strongest", 12)[moved]
    return [
        Section("The whole model", [score_table({passport["summary"]["tag"]: measured}), scores, figures["joint"]]),
        Section("Beside chance", [chance_table(found["chance"]), figures["chance"]]),
        Section("Unique information", [information_table(found["information"]), figures["information"]]),
        Section("Classes", [class_table(found["classes"]), *classes, figures["classes"], figures["accuracy"]]),
        Section("Concepts", [concepts, *found["omissions"], figures["concepts"]]),
        Section("Images", [figures["images"]]),
        Section("Validation", [figures["perturbations"], passport_table([passport]), translator_table(measured)]),
    ]


def steering_verdict(found: Found) -> list[str]:
    """Say how far features turn at a fixed image score, at equal effort and within natural radii."""
    read = {(p["attacker"], p["judge"]): p["overall"] for p in found["pairs"]}
    own, audited, score = read["fitted", "fitted"], read["fitted", "auditor"], found["image_score"]
    step, radius, manifold = (the_curve(found["curves"], budget=b, attacker="fitted", judge="auditor") for b in BUDGETS)
    mark = natural_marks(found["natural"])["95 %"]
    removal = found["measurement"]["translators"]["fitted"]["overall"]["IS"]
    first = f"No image can be steered to an image score of {score:g}°; use a smaller one."
    if own["AS_abs"] is not None:
        first = (
            f"Steered to an image score of {score:g}° (removing the null component: {removal:.1f}°), features turn "
            f"towards the target by {own['AS_abs']:.2f}° as the fitted translator reads it, {audited['AS_abs']:.2f}° "
            f"as the auditor does; {own['reachable']:.0%} can be, with a step of {own['step']:.0%} of |f|."
        )
    return [
        first,
        f"At a step of 10% of |f| the target outranks every class prompt in {at(step, 0.1, 'success'):.0%} "
        f"of the steerings by the auditor, against {at(step, 0.0, 'success'):.0%} without a step.",
        f"Within the radius of 95 % of natural images {at(radius, mark, 'success'):.0%} succeed along the gradient "
        f"and {at(manifold, mark, 'success'):.0%} along the on-manifold direction, by the auditor.",
        f"Logits moved by at most {max(p['logit_change'] for p in found['pairs']):.1e}. One gradient step each, so "
        "these are lower bounds of how easily the classifier is steered.",
    ]


def steering_warnings(found: Found) -> list[str]:
    """Say why not to believe a steering's figures, and which pairs have none."""
    measured, natural = found["measurement"], found["natural"]
    warnings, width = analysis_warnings(measured, agreement=1.0), measured["head"]["features"]
    if natural["fit_images"] < IMAGES_PER_FEATURE * width:
        warnings.append(f"The radii rest on the covariance of {natural['fit_images']} images for {width} features.")
    if natural["floored"] > MANY_FLOORED * natural["dimensions"]:
        warnings.append(
            f"{natural['floored']} of {natural['dimensions']} null directions vary less than {natural['floor']:g} of "
            "the mean; their variance is held there, and radii depend on it."
        )
    for pairs in (p for p in found["pairs"] if p["attacker"] == p["judge"]):
        images, reachable = (np.ravel(pairs["matrices"][name]) for name in ("images", "reachable"))
        planned, lost = int((images > 0).sum()), int((reachable[images > 0] == 0).sum())
        if lost:
            warnings.append(
                f"{lost} of {planned} pairs have no image that reaches {found['image_score']:g}° by the "
                f"{pairs['attacker']} translator; they are left out of its mean AS."
            )
    return warnings


def steering_sections(found: Found, figures: Mapping[str, Figure]) -> list[Section]:
    """Arrange a steering's tables and figures (`plot_steering`) as the sections of its report."""
    table1 = [
        {
            **{name: pairs[name] for name in ("attacker", "judge")},
            "|AS| °": f"{number(pairs['overall']['AS_abs'])} ± {number(pairs['overall']['AS_abs_std'])}",
            "AS °": interval(pairs["overall"]["AS"], *pairs["intervals"]["AS"]),
            "step / |f|": number(pairs["overall"]["step"], 3),
            **{name: percent(pairs["overall"][name]) for name in ("reachable", "success")},
        }
        for pairs in found["pairs"]
    ]
    areas = [
        {name: curve[name] for name in ("budget", "attacker", "judge")}
        | {f"mean {t}": interval(*curve["area"][name]) for name, t in (("AS", "AS °"), ("success", "success"))}
        for curve in found["curves"]
    ]
    reading = (
        "AS: angle gained towards the target prompt over steerings that reach the score; success: share of all "
        "steerings after which the target prompt outranks every class prompt. 95 % intervals over classes and images; "
        "lower is harder to steer."
    )
    effort = (
        "Mean height over the grid. Radius: Mahalanobis distance of the null component from what the row-space "
        "component predicts, over its median on untouched test images. On-manifold: the covariance times the gradient."
    )
    return [
        Section(f"Table 1: at an image score of {found['image_score']:g}°", [_table(table1), reading]),
        Section("Steering at equal effort", [figures["curves"], _table(areas), effort]),
        Section("Pairs", [figures["pairs"]]),
        Section("Translators", [translator_table(found["measurement"])]),
    ]
