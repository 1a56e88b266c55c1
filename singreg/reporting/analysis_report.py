"""An analysis' files and TensorBoard: takes the report, computes nothing (DESIGN: "A run's folder")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from singreg.analysis.analysis_results import PRIMARY, AnalysisReport
from singreg.analysis.levels.concept_results import ConceptShift
from singreg.data.datasets import Splits
from singreg.reporting import tables, validation_tables
from singreg.reporting.html import write_html
from singreg.reporting.level_plots import (
    draw_class_accuracy,
    draw_class_violins,
    draw_concept_arrows,
    draw_joint_distribution,
    draw_worst_images,
)
from singreg.reporting.page import page_from_markdown
from singreg.reporting.plots import save_figure
from singreg.reporting.report_files import write_rows
from singreg.reporting.tables import escape, number, percent
from singreg.reporting.tensorboard import TensorBoardLog
from singreg.reporting.validation_plots import draw_chance, draw_information, draw_perturbations
from singreg.utils import write_json, write_text

CAPTIONS = {
    "joint": "AS against IS of every test picture",
    "classes": "AS and IS of every class, by the auditor, the leakiest on top",
    "accuracy": "AS⁻ of every class against its accuracy",
    "concepts": "angle of each concept to the pictures before and after the removal",
    "images": "the worst pictures, and the gallery's nearest to their translated features before, after and steered",
    "chance": "every score beside its levels of chance",
    "information": "what can be read from the features, the part the head sees, and the null component",
    "perturbations": "perturbations of equal norm in the null space, in random directions and in the row space",
}


def draw_all(report: AnalysisReport, parts: Splits, *, shown: int) -> dict[str, Figure]:
    """Every figure by name; the images sheet needs the pictures themselves (degrees)."""
    return {
        "joint": draw_joint_distribution(report.joint),
        "classes": draw_class_violins(report.classes),
        "accuracy": draw_class_accuracy(report.classes),
        "concepts": draw_concept_arrows(report.concepts, count=shown),
        "images": draw_worst_images(report.images, report.shifts, parts.test, parts.bank, shown=len(report.images.worst)),
        "chance": draw_chance(report.chance[PRIMARY], PRIMARY),
        "information": draw_information(report.information),
        "perturbations": draw_perturbations(report.perturbation),
    }


def write_analysis_report(report: AnalysisReport, folder: Path, parts: Splits, *, shown: int) -> dict[str, Path]:
    """Write plots/, scores.parquet, report.md, report.html and report.json into the path `folder`; returns the plots' paths."""
    plots = {}
    for name, figure in draw_all(report, parts, shown=shown).items():
        plots[name] = folder / "plots" / f"{name}.png"
        save_figure(figure, plots[name])
    write_rows({report.measurement.head.tag: report.measurement}, folder / "scores.parquet")
    text = analysis_markdown(report, {name: path.relative_to(folder) for name, path in plots.items()}, shown=shown)
    write_text(folder / "report.md", text)
    write_html(folder / "report.html", page_from_markdown(text, folder))
    write_json(folder / "report.json", report.to_json())
    return plots


def analysis_markdown(report: AnalysisReport, plots: Mapping[str, Path], *, shown: int = 12) -> str:
    """report.md: findings, model level beside chance, classes, concepts, images, validation (relative paths in `plots`)."""

    def picture(name: str) -> str:
        return f"![{CAPTIONS[name]}]({plots[name].as_posix()})" if name in plots else ""

    blocks = [
        f"# {escape(report.settings.get('name', 'run'))}: what the null space of {escape(report.passport.summary.tag)} holds",
        *[escape(sentence) for sentence in report.findings],
        *[f"**{escape(sentence)}**" for sentence in report.warnings],
        "## The whole model",
        tables.measurement_table(report.measurement),
        "Angles in degrees, mean over held-out test pictures, with 95 % bootstrap intervals. AS⁻: what removing the null space takes "
        "from the true class (leakage); IS: how far it moves the picture's meaning; κ: AS as a share of what IS would allow, 0 at chance; "
        "centred: without the mean of the null component. *fitted*: a translator from the bank's pictures; *auditor*: an independent "
        "one from other pictures, with which the levels below are read. They agree on the classes' directions to "
        f"{report.agreement:.2f} (cosine).",
        picture("joint"),
        "## Beside chance",
        validation_tables.chance_table(report.chance),
        picture("chance"),
        "*dimension*: a random subspace as large as the null space; *energy*: a random displacement of the same energy, picture by "
        "picture; *texts*: the real removal read against another class's prompt. Mean ± standard deviation over draws.",
        validation_tables.information_table(report.information),
        picture("information"),
        "## Classes",
        _class_table(report),
        _correlation(report),
        picture("classes"),
        picture("accuracy"),
        "## Concepts",
        _concept_table(report.concepts.select("strongest", shown)),
        f"AS of a concept: its angle to T(f) minus its angle to T(f~), mean over {report.concepts.images} pictures; negative: the concept "
        "went away with the null component. Intervals are mean ± 1.96 standard errors over pictures.",
        picture("concepts"),
        "## Pictures",
        picture("images"),
        _image_table(report),
        "## Validation and passport",
        picture("perturbations"),
        validation_tables.perturbation_table(report.perturbation),
        validation_tables.passport_table([report.passport]),
        "## Translators",
        _translator_table(report),
        "## How this was made",
        _facts(report),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _class_table(report: AnalysisReport) -> str:
    def cell(means: Mapping[str, float], intervals: Mapping[str, tuple[float, float] | None], name: str) -> str:
        interval = intervals[name]
        return number(means[name]) + ("" if interval is None else f" [{number(interval[0])}, {number(interval[1])}]")

    rows = [
        [
            escape(c.name), str(c.images), *(cell(c.means, c.intervals, name) for name in ("AS_neg", "AS_abs", "IS")),
            percent(c.means["accuracy"]),
        ]
        for c in report.classes.classes
    ]  # fmt: skip
    return tables.render(rows, ["class", "pictures", "AS⁻ °", "\\|AS\\| °", "IS °", "accuracy"])


def _correlation(report: AnalysisReport) -> str:
    said = []
    for name, title in {"AS_neg": "AS⁻", "AS_abs": "the absolute AS", "IS": "IS"}.items():
        found = report.classes.correlations[name]
        if found.value is not None:
            said.append(f"{title} {number(found.value)} [{number(found.low)}, {number(found.high)}]")
    omitted = " ".join(escape(sentence) for sentence in report.omissions)
    rank = f"Rank correlation with accuracy over classes (95 % bootstrap over classes): {', '.join(said)}." if said else ""
    return " ".join(part for part in (rank, omitted) if part)


def _concept_table(shifts: Sequence[ConceptShift]) -> str:
    rows = [
        [
            escape(s.concept), number(s.before, 1), number(s.after, 1),
            f"{number(s.score)} [{number(s.low)}, {number(s.high)}]", number(s.std), number(s.kappa, 3),
        ]
        for s in shifts
    ]  # fmt: skip
    return tables.render(rows, ["concept", "angle before °", "after °", "AS °", "sd °", "κ"])


def _image_table(report: AnalysisReport) -> str:
    def moved(shifts: Sequence[ConceptShift]) -> str:
        return ", ".join(f"{escape(s.concept)} {s.score:+.1f}" for s in shifts[:3])

    rows = [
        [
            escape(Path(image.image).name), escape(image.class_name), escape(image.predicted),
            number(image.attribute_score), number(image.image_score), moved(image.falls), moved(image.rises),
        ]
        for image in report.images.worst
    ]  # fmt: skip
    return tables.render(rows, ["picture", "class", "named", "AS °", "IS °", "went away °", "came closer °"])


def _translator_table(report: AnalysisReport) -> str:
    rows = [
        [
            name, str(s.fit_images), f"{s.ridge:g}" if s.ridge else "–", number(s.cosine, 3), number(s.r2, 3), percent(s.zero_shot),
            percent(report.measurement.vlm_zero_shot),
        ]
        for name, s in report.measurement.translators.items()
    ]  # fmt: skip
    return tables.render(rows, ["translator", "fit on", "ridge", "cosine", "R²", "zero-shot", "the VLM's own"])


def _facts(report: AnalysisReport) -> str:
    return tables.facts(
        report.settings, report.machine, report.seconds,
        f"largest logit change between f and f~ over all test pictures: {report.measurement.logit_change_float64:.1e} in float64, "
        f"{report.measurement.logit_change_float32:.1e} in float32",
    )  # fmt: skip


def analysis_to_tensorboard(report: AnalysisReport, folder: Path, plots: Mapping[str, Path]) -> None:
    """Scores as scalars and histograms, findings and table as text, plots as images, in the path `folder`."""
    with TensorBoardLog(folder) as log:
        for name, scores in report.measurement.translators.items():
            log.scalars({f"scores/{key}/{name}": value for key, value in scores.overall.items()}, 0)
        for key in ("AS", "IS"):
            log.histograms({f"{key}/{PRIMARY}": report.measurement.rows[f"{key}/{PRIMARY}"]}, 0)
        log.text("findings", "\n\n".join([*report.findings, *report.warnings]), 0)
        log.text("model", tables.measurement_table(report.measurement), 0)
        for name, path in plots.items():
            log.image_file(f"plots/{name}", path, 0)
