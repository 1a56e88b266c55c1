"""A study's files: takes the report, computes nothing (DESIGN: "A run's folder")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from singreg.analysis.study.results import StudyReport
from singreg.reporting import study_tables as tables
from singreg.reporting.html import write_html
from singreg.reporting.page import page_from_markdown
from singreg.reporting.plots import save_figure
from singreg.reporting.study_curves import draw_auditor_need, draw_tradeoff
from singreg.reporting.study_plots import draw_pareto, draw_study
from singreg.reporting.tables import escape, facts
from singreg.utils import write_json, write_text

CAPTIONS = {
    "study": "every arm by the auditor: mean over seeds, 95 % intervals over classes and pictures, spread over seeds",
    "pareto": "top-1 against the auditor's AS⁻ of every arm, with the Pareto front",
    "tradeoff": "what harder steering costs in image score, arm by arm",
    "auditor": "how many pictures an auditor needs",
}
DRAWINGS: dict[str, Callable[[StudyReport], Figure]] = {
    "study": draw_study, "pareto": draw_pareto, "tradeoff": draw_tradeoff, "auditor": draw_auditor_need,
}  # fmt: skip


def write_study_report(report: StudyReport, folder: Path) -> dict[str, Path]:
    """Write plots, report.md, report.html and, last, report.json into the path `folder`; returns the plots' paths by name."""
    plots = {name: folder / "plots" / f"{name}.png" for name in CAPTIONS if name != "auditor" or report.agreement}
    for name, path in plots.items():
        save_figure(DRAWINGS[name](report), path)
    text = study_markdown(report, {name: path.relative_to(folder) for name, path in plots.items()})
    write_text(folder / "report.md", text)
    write_html(folder / "report.html", page_from_markdown(text, folder))
    write_json(folder / "report.json", report.to_json())
    return plots


def study_markdown(report: StudyReport, plots: Mapping[str, Path]) -> str:
    """report.md: three sentences, the table, the figures, pairs, targets, auditors, side effects, arms (relative paths in `plots`)."""
    attributes = tables.attribute_table(report)
    reference = escape(report.reference)
    blocks = [
        f"# {escape(report.settings.get('name', 'study'))}: {len(report.arms)} arms",
        *[escape(sentence) for sentence in report.sentences],
        *[f"**{escape(sentence)}**" for sentence in report.warnings],
        "## Results",
        tables.study_table(report),
        f"Angles in degrees, by the auditor, mean over the same {report.images} test pictures; ± is the standard deviation over seeds, "
        "in brackets the 95 % bootstrap interval over classes and their pictures. "
        "AS⁻: what removing the null space takes from the true class (leakage; "
        "lower is better). IS: how far it moves the picture's meaning (to be kept). *null probe*: accuracy of a fresh linear probe for "
        "the class on the null component. *harmless R²*: how well what is not class can be read from the features. *audit gap*: the "
        "auditor's AS⁻ over that of the translator the loss saw. *step*: share of the feature norm needed to move the meaning by 40° "
        "towards another class's prompt. *success*: the target's prompt outranks all classes. *front*: no arm is better in both top-1 "
        "and AS⁻.",
        f"![{CAPTIONS['study']}]({plots['study'].as_posix()})",
        f"![{CAPTIONS['pareto']}]({plots['pareto'].as_posix()})",
        f"![{CAPTIONS['tradeoff']}]({plots['tradeoff'].as_posix()})",
        _TRADEOFF,
        f"## Against {reference}",
        tables.ratio_table(report),
        f"Ratios of means to {reference}'s, top-1 as a difference in points; paired by picture and averaged over the seeds both have, with "
        "95 % bootstrap intervals over classes and their pictures. A step is compared on pictures that both arms bring to the image score.",
        "## What was to be reached",
        tables.target_table(report),
        "Judged by the value; the interval is beside it. Nothing here was chosen on these pictures unless the first sentence says so.",
        *_validation(report),
        *(["## Known attributes", attributes, _ATTRIBUTES] if attributes else []),
        "## By every translator",
        tables.reading_table(report),
        "AS⁻ / \\|AS\\| in degrees. *frozen*: fitted before training; *loop*: the one the loss saw last; *auditor*: fitted afterwards on "
        "pictures training never used, A and B on disjoint halves of them. Believe the auditor.",
        *([f"![{CAPTIONS['auditor']}]({plots['auditor'].as_posix()})"] if "auditor" in plots else []),
        "## Side effects",
        tables.side_effect_table(report),
        "Corruptions are made from the test pictures. ECE: expected calibration error. AUROC: of telling pictures of no class from known "
        "ones, by the energy in the null space, by the energy score, and by ViM's combination of both.",
        "## The arms",
        tables.arm_list(report),
        "## How this was made",
        facts(report.settings, report.machine, {"all arms": sum(report.seconds.values())}),
    ]
    return "\n\n".join(blocks) + "\n"


def _validation(report: StudyReport) -> list[str]:
    if not any(arm.validation for arm in report.arms):
        return []
    return ["## By the validation part", tables.validation_table(report), _VALIDATION]


_TRADEOFF = (
    "A step of the length of the pictures' own null component moves their meaning by IS already, so an attacker who may move as far "
    "needs no more than that for an angle below IS: keeping the variety bounds how long the step to 40° can be made."
)
_VALIDATION = "Of pictures that serve nothing else, by the same auditor: what an arm is chosen by. Means over seeds."
_ATTRIBUTES = (
    "R² with which an attribute of the scene can be read from the null component, of R² from all features; mean over its values. The "
    "class is the shape: it is what should leave the null space, the others are what may stay."
)
