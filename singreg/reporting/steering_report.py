"""A steering run's files and TensorBoard: takes the report, computes nothing (DESIGN: "A run's folder")."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from singreg.analysis.old_steering.findings import LINEAR
from singreg.analysis.old_steering.results import SteerReport
from singreg.reporting import steering_tables as tables
from singreg.reporting.html import write_html
from singreg.reporting.page import page_from_markdown
from singreg.reporting.plots import save_figure
from singreg.reporting.steering_plots import save_steering_plots
from singreg.reporting.tables import escape
from singreg.reporting.tensorboard import TensorBoardLog
from singreg.utils import write_json, write_text

CAPTIONS = {
    "curves": "success and AS against the relative step and the Mahalanobis radius, with 95 % bands and natural percentiles",
    "pairs": "source by target: the absolute AS at the wanted image score by each translator, and success by the auditor",
    "unclip": "each picture, its embedding, and the auditor's T(f), T(f~) and T of the steered feature, drawn by a diffusion model",
}
TICKS = 1000  # TensorBoard's axis is whole numbers: a grid value times this


def write_steer_report(report: SteerReport, folder: Path, sheet: Figure | None = None) -> dict[str, Path]:
    """Write plots/, report.md, report.html and report.json into the path `folder`; returns the plots' paths by name.

    sheet: the drawings of `report.shown`, where there are any.
    """
    plots = save_steering_plots(report, folder / "plots")
    if sheet is not None:
        plots["unclip"] = folder / "plots" / "unclip.png"
        save_figure(sheet, plots["unclip"])
    text = steer_markdown(report, {name: path.relative_to(folder) for name, path in plots.items()})
    write_text(folder / "report.md", text)
    write_html(folder / "report.html", page_from_markdown(text, folder))
    write_json(folder / "report.json", report.to_json())
    return plots


def steer_markdown(report: SteerReport, plots: Mapping[str, Path]) -> str:
    """report.md: findings, table 1, curves, pairs, how it was made (relative paths in `plots`)."""
    natural, read = report.natural, {(p.attacker, p.judge): p for p in report.pairs}
    worst = max((p.calibration_error for p in report.pairs if p.calibration_error is not None), default=None)
    pictures = {name: f"![{CAPTIONS[name]}]({path.as_posix()})" for name, path in plots.items()}
    blocks = [
        f"# {escape(report.settings.get('name', 'run'))}: steering {escape(report.measurement.head.tag)} through its null space",
        *[escape(sentence) for sentence in report.findings],
        *[f"**{escape(sentence)}**" for sentence in report.warnings],
        f"## Table 1: at an image score of {report.image_score:g}°",
        tables.table1(report),
        "AS is the angle gained towards the target prompt, |AS| its size, mean ± standard deviation over steerings that reach the score; "
        "a step is ε over the norm of f; success is the share of all steerings after which the target prompt outranks every class "
        "prompt. Intervals are 95 % bootstrap over source classes and their pictures. Lower is harder to steer. "
        "*fitted*: a translator from the bank's pictures; "
        "*auditor*: an independent one from other pictures, standardised. "
        + _non_linear(report)
        + "The attacker finds direction and step, the judge reads. "
        + ("" if worst is None else f"Largest miss of the wanted image score among the reachable: {worst:.1e}°."),
        "## Steering at equal effort",
        pictures.get("curves", ""),
        tables.curve_table(report),
        "Mean AS and mean success are the area under the curve divided by the width of its grid, with 95 % bootstrap intervals over "
        f"pictures. The radius is the Mahalanobis distance of the null component from what the row-space component predicts, by a Gaussian "
        f"from {natural.fit_images} pictures of the bank, in units of its median over {natural.images} untouched test pictures "
        f"({natural.median:.2f}, for {natural.dimensions} dimensions; 95 %: {natural.p95:.2f}, 99 %: {natural.p99:.2f}). Variances below "
        f"{natural.floor:g} of their mean count as that ({natural.floored} of {natural.dimensions}). A picture outside a radius that no "
        "step brings back stays where it is. The on-manifold direction is the covariance times the gradient: most gain for the radius.",
        "### Relative steps: the fitted translator attacks, the auditor judges",
        tables.step_table(report),
        "## Pairs",
        pictures.get("pairs", ""),
        "### |AS| towards the target °: the fitted translator attacks and reads",
        tables.pair_table(report, read["fitted", "fitted"]),
        "### |AS| towards the target °: the fitted translator attacks, the auditor reads",
        tables.pair_table(report, read["fitted", "auditor"]),
        *_drawn(report, pictures.get("unclip", "")),
        "## Translators",
        tables.translator_table(report),
        "## How this was made",
        _facts(report),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _non_linear(report: SteerReport) -> str:
    """What the further translators are, or nothing."""
    kinds = [name for name in report.measurement.translators if name not in LINEAR]
    return f"*{', '.join(kinds)}*: non-linear, from the bank's pictures; steps by bisection, judging table 1 only. " if kinds else ""


def _drawn(report: SteerReport, picture: str) -> list[str]:
    """The section of drawn pictures, or nothing when none were asked for."""
    if not report.shown:
        return []
    lost = [shown for shown in report.shown if shown.step is None]
    drawn = (
        f"The first picture of {len(report.shown) - len(lost)} source classes, steered by the fitted translator to an image score of "
        f"{report.image_score:g}°, drawn by {escape(report.settings.get('unclip'))}. Drawings of one row start from the same noise; "
        "each embedding is scaled to the length of the picture's own."
    )
    left = f"{len(lost)} more cannot reach it and are not drawn: {', '.join(escape(shown.image) for shown in lost)}." if lost else ""
    return ["## Pictures", *([picture, drawn] if picture else []), *([left] if left else [])]


def _facts(report: SteerReport) -> str:
    head = report.measurement.head
    machine = ", ".join(f"{escape(key)}: {escape(value)}" for key, value in report.machine.items())
    seconds = ", ".join(f"{escape(stage)} {value:.0f} s" for stage, value in report.seconds.items())
    return "\n".join(
        [
            f"- command: `{str(report.settings.get('command', '')).replace('`', '')}`",
            "- configuration: config.yaml beside this file",
            f"- head: {head.classes} classes, {head.features} features, rank {head.rank}, null space {head.null_dimensions:.0%} of the "
            f"dimensions, {report.measurement.null_share:.0%} of the feature norm; top-1 {report.measurement.top1:.1%} on "
            f"{report.measurement.images} test pictures",
            f"- machine: {machine}",
            f"- time: {seconds}",
        ]
    )


def report_to_tensorboard(report: SteerReport, folder: Path, plots: Mapping[str, Path]) -> None:
    """Curves as scalars (step: grid value times 1000), table 1 as scalars and text, plots as images, in the path `folder`."""
    with TensorBoardLog(folder) as log:
        for curve in report.curves:
            for name, values in curve.figures.items():
                tag = f"curve {curve.budget} (x 1000)/{name}/{curve.attacker} attacks, {curve.judge} judges"
                for place, value in zip(curve.grid, values, strict=True):
                    log.scalars({tag: value}, round(TICKS * place))
        for pairs in report.pairs:
            figures = {name: value for name, value in pairs.overall.items() if value is not None}
            log.scalars({f"table 1/{name}/{pairs.attacker} attacks, {pairs.judge} judges": v for name, v in figures.items()}, 0)
        log.text("table 1", tables.table1(report), 0)
        log.text("equal effort", tables.curve_table(report), 0)
        log.text("findings", "\n\n".join([*report.findings, *report.warnings]), 0)
        for name, path in plots.items():
            log.image_file(f"plots/{name}", path, 0)
