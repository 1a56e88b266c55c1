"""Scores as tables and sentences for people: the few figures a reader needs; report.json has the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from singreg.analysis.comparison import finetune_warnings
from singreg.analysis.features import AGREEMENT, IMAGES_PER_FEATURE
from singreg.analysis.levels import Order, select_concepts
from singreg.analysis.scores import VISIBLE, chance_angle, judge_passport
from singreg.analysis.steering_curves import at, natural_marks, the_curve
from singreg.report import Figure, Section, interval, number, percent

KINDS = {
    "observed": "the null space",
    "dimension": "random, equal dimension",
    "energy": "random, equal energy",
    "texts": "another class's text",
}
BLOCKS = {"features": "f, whole", "row_space": "Π_p f, row space", "null_space": "Π_n f, null space"}
SCORES = {"AS_neg": ("AS⁻ °", 2), "AS_abs": ("|AS| °", 2), "IS": ("IS °", 2), "kappa": ("κ", 3)}  # with decimals
AUDITED = {"class_variance": "in the null %", "cross 4 sd": "4 sd %", "harmless_r2": "R² beside %"}
MANY_FLOORED = 0.1
IMAGES_TOLD = 4  # of single images, in sentences
READING = (
    "Means over the same test images with 95 % bootstrap intervals. AS⁻: what removing the null space takes from the "
    "true class (leakage, lower is better). IS: how far it moves the image's meaning. κ: its direction to the class's "
    "text, 0 at chance. fitted: by a translator from the bank; loop: by the one of that kind that the loss saw last; "
    "auditor: by one from images of its own."
)
AUDIT = (
    "By an auditor, fitted on images that training never saw; 95 % intervals over classes and images. In the null: "
    "the share of the class scores' variance that the null space carries, read by two halves of the auditor, whose "
    "errors so cancel. 4 sd: how often a null step of four standard deviations, made on one half, lets another "
    "class's prompt win in the reading of the other half (of a few images it wins without a step). All of these are to "
    "fall together. IS and R² beside the prompts, what features say beside the classes, are to stay."
)
Found = Mapping[str, Any]


def _with(value: float, bounds: Sequence[float] | None, digits: int = 2) -> str:
    low, high = bounds or (None, None)
    return interval(value, low, high, digits)


def _scores(values: Found, intervals: Found) -> dict[str, str]:
    return {title: _with(values[key], intervals[key], digits) for key, (title, digits) in SCORES.items()}


def score_table(measurements: Mapping[str, Found]) -> pd.DataFrame:
    """Return every model by every translator, with 95 % intervals, from what `analyze_model` returned by model."""
    rows = []
    for (model, found), name in ((item, name) for item in measurements.items() for name in item[1]["translators"]):
        by = found["translators"][name]
        row = {"model": model, "translator": name, "top-1": percent(found["top1"])}
        row |= _scores(by["overall"], by["intervals"])
        rows.append({**row, "null share": number(found["null_share"], 3), "zero-shot": percent(by["zero_shot"])})
    return pd.DataFrame(rows)


def audit_table(measurements: Mapping[str, Found]) -> pd.DataFrame:
    """Return the few figures of every model that a claim needs, by the auditor (`analyze_model` with an auditor)."""
    rows = []
    for model, audit in ((model, found["audit"]) for model, found in measurements.items()):
        row = {"model": model, "top-1": percent(audit["top1"])}
        row |= {SCORES[key][0]: _with(audit[key], audit["intervals"][key]) for key in ("AS_neg", "AS_abs", "IS")}
        for key, title in AUDITED.items():
            value, low, high = (100 * each for each in (audit[key], *audit["intervals"][key]))
            row[title] = interval(value, low, high, 1)
        rows.append(row)
    return pd.DataFrame(rows)


def translator_table(measured: Found) -> pd.DataFrame:
    """Return how good every translator of a measurement is."""
    columns = ["fit_images", "ridge", "cosine", "r2", "zero_shot"]
    table = pd.DataFrame([{"translator": name, **by} for name, by in measured["translators"].items()])
    return table[["translator", *columns]].assign(**{"the VLM's own": measured["vlm_zero_shot"]})


def chance_table(found: Found) -> pd.DataFrame:
    """Return both removals beside their chance levels, mean ± sd over draws (`measure_chance`)."""
    rows = []
    for removal in ("paper", "centred"):
        observed = {"mean": found[removal]["observed"], "spread": {}, "energy": found[removal]["energy"]}
        for kind, level in {"observed": observed, **found[removal]["levels"]}.items():
            row = {"removal": removal, "of": KINDS[kind]}
            for key, (title, digits) in SCORES.items():
                spread = f" ± {number(level['spread'][key], digits)}" if level["spread"] else ""
                row[title] = number(level["mean"][key], digits) + spread
            rows.append({**row, "energy": percent(level["energy"])})
    return pd.DataFrame(rows)


def information_table(found: Found) -> pd.DataFrame:
    """Return held-out R² and class accuracy of every block, and what only the null space tells."""
    bounds = found["intervals"]
    blocks = [(title, found["r2"][k], bounds[f"r2 {k}"], found["accuracy"][k]) for k, title in BLOCKS.items()]
    blocks.append(("f less Π_p f, only in the null space", found["unique"], bounds["unique"], found["unique_accuracy"]))
    rows = [(title, _with(r2, ends, 3), percent(accuracy)) for title, r2, ends, accuracy in blocks]
    rows.append(("always the most frequent class", "0", percent(found["chance"])))
    return pd.DataFrame(rows, columns=["fitted on", "R² of the image embedding", "class probe"])


def class_table(found: Found) -> pd.DataFrame:
    """Return every class with its scores, the leakiest first (`analyze_classes`)."""
    rows = []
    for each in found["classes"]:
        scores = _scores(each["means"], each["intervals"])
        accuracy = percent(each["means"]["accuracy"])
        rows.append({"class": each["name"], "images": each["images"], **scores, "accuracy": accuracy})
    return pd.DataFrame(rows)


def passport_table(passports: Sequence[Found]) -> pd.DataFrame:
    """Return heads side by side (`head_passport`)."""
    columns = ["tag", "classes", "features", "rank", "nullity", "conditioning"]
    table = pd.DataFrame(passports, columns=columns)
    table["chance angle °"] = [number(chance_angle(passport), 1) for passport in passports]
    table["verdict"] = [judge_passport(passport) for passport in passports]
    return table


def analysis_verdict(found: Found) -> list[str]:
    """Say what leaks, how much against chance, what only the null space knows, and where, from an analysis' figures."""
    measured, chance, information = found["measurement"], found["chance"]["auditor"]["paper"], found["information"]
    head, by, concepts = measured["head"], measured["translators"]["auditor"], found["concepts"]["overall"]
    (low, high), level = by["intervals"]["AS_neg"], chance["levels"]["energy"]["mean"]["AS_neg"]
    against = "more than" if low > level else "less than" if high < level else "not distinguishable from"
    leaky = ", ".join(f"{each['name']} ({each['means']['AS_neg']:.1f}°)" for each in found["classes"]["classes"][:3])

    def most(order: Order) -> str:
        table = select_concepts(concepts, order, 3)
        return ", ".join(f"{c} ({s:+.1f}°)" for c, s in zip(table["concept"], table["AS"], strict=True)) or "none"

    return [
        f"The null space of {head['tag']} has {head['nullity']} of {head['features']} dimensions and "
        f"{measured['null_share']:.0%} of the feature norm. Removing it leaves every logit and moves an image's "
        f"meaning by IS {_with(by['overall']['IS'], by['intervals']['IS'], 1)}°.",
        f"It takes AS⁻ {interval(by['overall']['AS_neg'], low, high)}° of the true class away, {against} the "
        f"{level:.2f}° of a random displacement of equal energy; most for {leaky}.",
        f"Only the null space tells {information['unique']:.1%} of the embeddings' variance; a probe on it alone names "
        f"the class of {information['accuracy']['null_space']:.0%} of held-out images (always the most frequent one: "
        f"{information['chance']:.0%}).",
        f"Of {len(concepts['concept'])} concepts, removal takes most from {most('falls')} and brings {most('rises')} "
        "closer.",
    ]


def analysis_warnings(measured: Found, agreement: float = 1.0) -> list[str]:
    """Say why not to believe a measurement: too few images, translators that disagree or lose the class, blind VLM."""
    warnings = finetune_warnings(measured, list(measured["translators"]))
    if agreement < AGREEMENT:
        warnings.append(
            f"The two translators, fitted on different images, agree on the classes' directions to {agreement:.2f} "
            f"only (below {AGREEMENT}); class-level figures depend on which images were taken."
        )
    if measured["translators"]["auditor"]["overall"]["IS"] < VISIBLE:
        warnings.append(f"An IS below {VISIBLE:g}° is hardly visible in an image; this null space does little.")
    return warnings


def analysis_sections(found: Found, figures: Mapping[str, Figure]) -> list[Section]:
    """Arrange an analysis' tables and figures (`plot_analysis`) as the sections of its report."""
    measured, head, empty = found["measurement"], found["measurement"]["head"], found["classes"]["empty"]
    left_out = [f"{len(empty)} classes have no image: {', '.join(empty)}."] if empty else []
    concepts = select_concepts(found["concepts"]["overall"], "strongest", 12)
    moved = concepts[["concept", "before", "after", "AS", "AS_low", "AS_high", "kappa"]]
    table = score_table({head["tag"]: measured})
    return [
        Section("The whole model", [table, READING, figures["joint"]]),
        Section("Beside chance", [chance_table(found["chance"]["auditor"])]),
        Section("Unique information", [information_table(found["information"])]),
        Section("Classes", [class_table(found["classes"]), *left_out, figures["classes"]]),
        Section("Concepts", [moved, figures["concepts"]]),
        Section("Images", [figures["images"]]),
        Section("Validation", [figures["perturbations"], passport_table([head]), translator_table(measured)]),
    ]


def images_verdict(images: Sequence[Found]) -> list[str]:
    """Say of each of the first images (`explain_images`) what stays when its null component goes, and what moves."""
    said = []
    for image in images[:IMAGES_TOLD]:
        score, moved = image["attribute_score"], [*image["falls"][:2], *image["rises"][:2]]
        kind = "class meaning that the head ignores goes" if score < 0 else "what goes was in the class's way"
        words = ", ".join(f"{row['concept']} ({row['AS']:+.1f}°)" for row in moved)
        said.append(
            f"{image['image']} is named {image['predicted']}. Removing its null component ({image['null_share']:.0%} "
            f"of the feature's norm) moves no logit by more than {image['logit_change']:.0e} and its meaning by IS "
            f"{image['image_score']:.1f}°; AS to {image['class_name']} {score:+.1f}°: {kind}. Most moved: {words}."
        )
    return said


def images_sections(images: Sequence[Found], figure: Figure) -> list[Section]:
    """Arrange the figures of single images as the sections of their report."""
    names = {"image": "image", "class_name": "class", "predicted": "named", "attribute_score": "AS °"}
    names |= {"image_score": "IS °", "kappa": "κ", "null_share": "null share", "cosine": "cosine"}
    scores = pd.DataFrame(images)[list(names)].rename(columns=names)
    scores["logits moved"] = [f"{image['logit_change']:.0e}" for image in images]
    moved = pd.DataFrame([{"image": i["image"], **row} for i in images for row in (*i["falls"], *i["rises"])])
    reading = "cosine: of T f to the image's own embedding; low where the translator does not know such images."
    return [Section("Scores", [scores, reading, figure]), Section("Concepts, which move", [moved])]


def steering_verdict(found: Found) -> list[str]:
    """Say how far features turn at a fixed image score, at equal effort and within natural radii."""
    read = {(p["attacker"], p["judge"]): p["overall"] for p in found["pairs"]}
    own, audited, score = read["fitted", "fitted"], read["fitted", "auditor"], found["image_score"]
    curves = [the_curve(found["curves"], budget=b, attacker="fitted", judge="auditor") for b in ("step", "radius")]
    mark = natural_marks(found["natural"])["95 %"]
    first = f"No image can be steered to an image score of {score:g}°; use a smaller one."
    if own["AS_abs"] is not None:
        first = (
            f"Steered to an image score of {score:g}°, features turn towards the target by {own['AS_abs']:.2f}° as the "
            f"fitted translator reads it, {audited['AS_abs']:.2f}° as the auditor does; {own['reachable']:.0%} can be, "
            f"with a step of {own['step']:.0%} of |f|."
        )
    return [
        first,
        f"At a step of 10% of |f| the target outranks every class prompt in {at(curves[0], 0.1, 'success'):.0%} "
        f"of the steerings by the auditor, against {at(curves[0], 0.0, 'success'):.0%} without a step.",
        f"Within the radius of 95 % of natural images {at(curves[1], mark, 'success'):.0%} succeed, by the auditor.",
        f"Logits moved by at most {max(p['logit_change'] for p in found['pairs']):.1e}. One gradient step each, so "
        "these are lower bounds of how easily the classifier is steered.",
    ]


def steering_warnings(found: Found) -> list[str]:
    """Say why not to believe a steering's figures, and which pairs have none."""
    natural, width = found["natural"], found["measurement"]["head"]["features"]
    warnings = analysis_warnings(found["measurement"])
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
    table1 = pd.DataFrame([{**pairs, **pairs["overall"]} for pairs in found["pairs"]])
    table1["AS °"] = [interval(pairs["overall"]["AS"], *pairs["intervals"]["AS"]) for pairs in found["pairs"]]
    table1 = table1.rename(columns={"AS_abs": "|AS| °", "AS_abs_std": "sd", "step": "step / |f|"})
    table1 = table1[["attacker", "judge", "|AS| °", "sd", "AS °", "step / |f|", "reachable", "success"]]
    table1[["reachable", "success"]] = table1[["reachable", "success"]].map(percent)
    areas = pd.DataFrame(found["curves"])[["budget", "attacker", "judge"]]
    for name in ("AS", "success"):
        areas[f"mean {name}"] = [interval(*curve["area"][name]) for curve in found["curves"]]
    reading = (
        "AS: angle gained towards the target prompt over steerings that reach the score; success: share of all "
        "steerings after which the target prompt outranks every class prompt. 95 % intervals over classes and images; "
        "lower is harder to steer."
    )
    effort = (
        "Mean height over the grid. Radius: Mahalanobis distance of the null component from what the row-space "
        "component predicts, over its median on untouched test images."
    )
    return [
        Section(f"Table 1: at an image score of {found['image_score']:g}°", [table1, reading]),
        Section("Steering at equal effort", [figures["curves"], areas, effort]),
        Section("Pairs", [figures["pairs"]]),
        Section("Translators", [translator_table(found["measurement"])]),
    ]
