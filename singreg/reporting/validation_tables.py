"""Chance levels, unique information, perturbations and passports as tables: on screen and in a report. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from singreg.analysis.chance_results import FIGURES, KINDS, ChanceReport, ChanceScores
from singreg.analysis.information_results import BLOCKS, UniqueInformation
from singreg.analysis.passport import LOOSE, HeadPassport
from singreg.analysis.perturbation import PerturbationReport
from singreg.reporting.tables import escape, number, percent, render

KIND_TITLES = {
    "observed": "the null space",
    "dimension": "random, equal dimension",
    "energy": "random, equal energy",
    "texts": "another class's text",
}
BLOCK_TITLES = {"features": "f, whole", "row_space": "Π_p f, row space", "null_space": "Π_n f, null space"}
PERTURBATION_TITLES = {"null": "null space", "random": "random", "principal": "row space"}
"""How the kinds are called wherever people read them."""
TITLES = {"AS": "AS °", "AS_neg": "AS⁻ °", "AS_pos": "AS⁺ °", "AS_abs": "|AS| °", "IS": "IS °", "kappa": "κ"}


def digits_of(figure: str) -> int:
    """Decimals a figure is shown with: 3 for κ, 2 for degrees (no shapes)."""
    return 3 if figure == "kappa" else 2


def chance_table(reports: Mapping[str, ChanceReport], compact: bool = False) -> str:
    """Every score beside its chance levels, mean ± sd over draws, by translator and removal (Markdown, or plain if compact).

    Degrees; κ without unit. No shapes.
    """
    rows = []
    for translator, report in reports.items():
        for removal, scores in (("paper's", report.paper), ("centred", report.centred)):
            for kind in ("observed", *KINDS):
                rows.append([translator, removal, KIND_TITLES[kind], *_chance_cells(scores, kind)])
    titles = [TITLES[name] if compact else TITLES[name].replace("|", "\\|") for name in FIGURES]
    return render(rows, ["translator", "removal", "what is removed", *titles, "energy removed"], compact)


def _chance_cells(scores: ChanceScores, kind: str) -> list[str]:
    if kind == "observed":
        return [*(number(scores.observed[name], digits_of(name)) for name in FIGURES), percent(scores.energy)]
    level = scores.levels[kind]
    pairs = [(level.mean[name], level.spread[name], digits_of(name)) for name in FIGURES]
    return [*(f"{number(mean, digits)} ± {number(spread, digits)}" for mean, spread, digits in pairs), percent(level.energy)]


def information_table(information: UniqueInformation) -> str:
    """Held-out R² of the image embedding and accuracy of a fresh class probe on f, Π_p f and Π_n f, with 95 % intervals (Markdown)."""

    def interval(name: str, factor: float, digits: int) -> str:
        low, high = information.intervals[name]
        return f"[{number(factor * low, digits)}, {number(factor * high, digits)}]"

    rows = [
        [
            BLOCK_TITLES[name],
            f"{number(information.r2[name], 3)} {interval(f'r2 {name}', 1, 3)}",
            f"{number(100 * information.accuracy[name], 1)} {interval(f'accuracy {name}', 100, 1)}",
        ]
        for name in BLOCKS
    ]
    rows += [
        [
            "only in the null space: f less Π_p f",
            f"{number(information.unique, 3)} {interval('unique', 1, 3)}",
            f"{number(100 * information.unique_accuracy, 1)} {interval('unique_accuracy', 100, 1)}",
        ],
        ["chance", "0", f"{number(100 * information.chance, 1)} {interval('chance', 100, 1)}"],
    ]
    return render(rows, ["fitted on", "R² of the image embedding", "class probe, %"], compact=False)


def perturbation_table(report: PerturbationReport) -> str:
    """What perturbations of equal norm do, mean over pictures: largest |Δlogit|, flipped decisions, translated angle (Markdown, °)."""
    rows = []
    for place, size in enumerate(report.sizes):
        for kind, curve in report.curves.items():
            mean = {name: values[place] for name, values in curve.mean.items()}
            angles = [number(mean[f"angle {name}"]) for name in report.translators]
            changes = [f"{mean[name]:.1e}" for name in ("logit_change", "logit_change_float32")]
            rows.append([f"{size:g}", PERTURBATION_TITLES[kind], *changes, percent(mean["flipped"]), *angles])
    headers = ["size / norm of f", "direction", "largest Δlogit (float64)", "(float32)", "top-1 flipped"]
    return render(rows, [*headers, *(f"{escape(name)}: angle °" for name in report.translators)], compact=False)


def passport_table(passports: Sequence[HeadPassport], compact: bool = False) -> str:
    """Heads side by side: sizes, ranks, null shares, σ_min/σ_max, float32 bound on |Δlogit|, verdict (Markdown, or plain if compact)."""
    rows = [
        [
            escape(p.summary.tag),
            str(p.summary.classes),
            str(p.summary.features),
            str(p.summary.rank),
            str(p.summary.rank_loose),
            f"{p.summary.nullity} ({percent(p.shares['logits'])})",
            f"{p.softmax_nullity} ({percent(p.shares['softmax'])})",
            number(p.chance_angle, 1, "°"),
            f"{p.summary.conditioning:.1e}",
            f"{p.logit_bound:.1e}",
            p.verdict,
        ]
        for p in passports
    ]
    headers = ["classifier", "C", "m", "rank", f"rank at {LOOSE:g}", "null (logits)", "null (softmax)", "chance angle"]
    return render(rows, [*headers, "σ_min/σ_max", "Δlogit bound / norm of f", "verdict"], compact)
