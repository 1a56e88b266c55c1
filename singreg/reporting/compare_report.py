"""A comparison's files and TensorBoard: takes the report, computes nothing (DESIGN: "A run's folder")."""

from __future__ import annotations

from pathlib import Path

from singreg.analysis.results import PRIMARY
from singreg.analysis.comparing.results import CompareReport
from singreg.reporting import compare_tables as tables
from singreg.reporting.compare_plots import draw_comparison
from singreg.reporting.html import write_html
from singreg.reporting.page import page_from_markdown
from singreg.reporting.plots import save_figure
from singreg.reporting.report_files import write_rows
from singreg.reporting.tables import escape, facts
from singreg.reporting.tensorboard import TensorBoardLog
from singreg.reporting.validation_tables import passport_table
from singreg.utils import write_json, write_text

CAPTION = "IS against the absolute AS of every model in every space, and its rank by AS⁻ in every view"


def write_compare_report(report: CompareReport, folder: Path) -> Path | None:
    """Write the plot, scores.parquet, report.md, report.html and report.json into the path `folder`; returns the plot's path."""
    plot = folder / "plots" / "comparison.png" if any(report.measurements.values()) else None
    if plot is not None:
        save_figure(draw_comparison(report), plot)
        measured = {f"{name} in {space}": m for space, found in report.measurements.items() for name, m in found.items()}
        write_rows(measured, folder / "scores.parquet")
    text = compare_markdown(report, None if plot is None else plot.relative_to(folder))
    write_text(folder / "report.md", text)
    write_html(folder / "report.html", page_from_markdown(text, folder))
    write_json(folder / "report.json", report.to_json())
    return plot


def compare_markdown(report: CompareReport, plot: Path | None) -> str:
    """report.md: findings, the table, the figure, paired differences, order, passports, how it was made (relative path `plot`)."""
    views = [(space, name) for space, found in report.measurements.items() for name in _translators(report, space)]
    shown = sorted(views, key=lambda view: view[1] != PRIMARY)
    blocks = [
        f"# {escape(report.settings.get('name', 'run'))}: {len(report.heads)} classifiers compared",
        *[escape(sentence) for sentence in report.findings],
        *[f"**{escape(sentence)}**" for sentence in report.warnings],
        "## The models",
        tables.compare_table(report),
        "Angles in degrees, mean over the same held-out test pictures for all models, with 95 % bootstrap intervals. AS⁻: what removing "
        "the null space takes from the true class (leakage; lower is better). IS: how far it moves the picture's meaning. κ: AS as a share "
        "of what IS would allow. *at chance*: the same scores when as much energy is taken away from every picture in a random "
        "direction; compare models with other heads by their distance from it. *null share*: of the feature norm. *fitted*: a translator "
        "from the bank's pictures; *auditor*: an independent one from other pictures.",
        "" if plot is None else f"![{CAPTION}]({plot.as_posix()})",
    ]
    if report.differences:
        blocks += ["## Differences", "Paired by picture: both models see the same ones. Not corrected for the number of pairs."]
        for space, translator in shown:
            blocks += [f"### In {escape(space)}, by the {translator}", tables.difference_table(report, space, translator)]
    if report.orders:
        blocks += [
            "## Does the order hold?",
            tables.order_table(report.orders),
            "τ: Kendall's rank correlation between two views, 1 for the same order. *alike in resamples*: share of the bootstrap resamples "
            "in which this view and the first order all models alike; *own order again*: share in which the view repeats its own.",
            *_between_views(report),
        ]
    blocks += [
        "## Passports of the heads",
        passport_table([head.passport for head in report.heads if head.passport]),
        "## How this was made",
        tables.source_table(report),
        facts(report.settings, report.machine, report.seconds),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _between_views(report: CompareReport) -> list[str]:
    leakage = next(order for order in report.orders if order.figure == "AS_neg")
    if len(leakage.views) < 3:  # two are in the table above
        return []
    return ["### AS⁻: τ between every two views (and the share of resamples that order alike)", tables.view_table(leakage)]


def _translators(report: CompareReport, space: str) -> list[str]:
    found = {(d.space, d.translator) for d in report.differences}
    names = dict.fromkeys(name for m in report.measurements[space].values() for name in m.translators)
    return [name for name in names if (space, name) in found]


def compare_to_tensorboard(report: CompareReport, folder: Path, plot: Path | None) -> None:
    """Scores as scalars by model and space, findings and tables as text, the figure as an image, in the path `folder`."""
    with TensorBoardLog(folder) as log:
        for space, found in report.measurements.items():
            for step, (label, measured) in enumerate(found.items()):
                for name, scores in measured.translators.items():
                    figures = ("AS_neg", "AS_abs", "IS", "ratio", "kappa")
                    log.scalars({f"{space}/{name}/{key}/{label}": scores.overall[key] for key in figures}, 0)
                    log.histograms({f"{space}/AS/{name}": measured.rows[f"AS/{name}"]}, step)
        log.text("findings", "\n\n".join([*report.findings, *report.warnings]), 0)
        log.text("models", tables.compare_table(report), 0)
        if report.orders:
            log.text("order", tables.order_table(report.orders), 0)
        if plot is not None:
            log.image_file("plots/comparison", plot, 0)
