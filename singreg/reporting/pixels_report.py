"""A pixel attack's files and TensorBoard: takes the report, computes nothing (DESIGN: "A run's folder")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from singreg.analysis.pixels.results import ATTACK, HOLD, PixelReport
from singreg.analysis.old_robustness.attacks import MAXIMISER
from singreg.data.datasets import ImageSplit
from singreg.reporting import pixels_tables as tables
from singreg.reporting.html import write_html
from singreg.reporting.page import page_from_markdown
from singreg.reporting.pixels_features import absent_table
from singreg.reporting.pixels_features import feature_table as tables_of_features
from singreg.reporting.pixels_plots import save_pixel_plots
from singreg.reporting.tables import escape, facts
from singreg.reporting.tensorboard import TensorBoardLog
from singreg.utils import write_json, write_text

CAPTIONS = {
    "rises": "rise towards the target prompt by budget and judge, with 95 % intervals; dots are random directions of the same length",
    "attacked": "originals, attacked pictures at the largest budget, and what was moved, amplified",
    "twins": "natural twins: pictures of two classes that the logits hardly tell apart and the image encoder does",
    "features": "steered in feature space: success and AS over the relative step and the natural radius, by attack and judge",
    "feature_pairs": "AS towards the target by source (down) and target (across), in feature space",
    "robustness": "ordinary robustness: top-1 under PGD and under corruptions",
}
ROWS = "attacked.json"


def write_pixels_report(report: PixelReport, folder: Path, part: ImageSplit) -> dict[str, Path]:
    """Write attacked.json (a row a picture), plots/, report.md, report.html and report.json to the path `folder`; the plots' paths."""
    write_json(folder / ROWS, [asdict(row) for row in report.rows])
    plots = save_pixel_plots(report, folder, part)
    text = pixels_markdown(report, {name: path.relative_to(folder) for name, path in plots.items()})
    write_text(folder / "report.md", text)
    write_html(folder / "report.html", page_from_markdown(text, folder))
    write_json(folder / "report.json", report.to_json())
    return plots


def pixels_markdown(report: PixelReport, plots: Mapping[str, Path]) -> str:
    """report.md: what may be claimed, checks, rises, who was fooled, transfer, twins, ordinary robustness (relative paths in `plots`)."""
    pictures = {name: f"![{CAPTIONS[name]}]({path.as_posix()})" for name, path in plots.items()}
    blocks = [
        f"# {escape(report.settings.get('name', 'run'))}: {len(report.models)} classifiers steered in pixels",
        *[escape(sentence) for sentence in report.findings],
        *[f"**{escape(sentence)}**" for sentence in report.warnings],
        "## Sanity checks",
        "Made in every run: on pictures from the saved 8-bit files, on the passes alone from what the attack logged as it went, on "
        "features (named so) in memory. One that fails takes every claim with it.",
        tables.checks_table(report),
        "## Steering in pixels",
        pictures["rises"],
        tables.pixels_table(report),
        f"Rise: angle gained towards the target class's prompt, of pictures whose logits stay within {report.tau:g}, whose decision stays "
        "and which are within the budget, all read from the saved file (*kept*: their share; others count as 0, and a picture for which "
        "nothing better was found is the original). *fitted* is the translator under attack, *auditor* another one from other pictures; "
        "the rest are real image encoders, which the attack never saw. *one step*: a single gradient step at its best length. *random*: a "
        "random direction of the whole budget, held to nothing. Intervals are 95 % bootstrap over pictures. Low is hard to steer.",
        "## Who was fooled",
        tables.success_table(report),
        "Shares of pictures whose target prompt became first by each judge, and how that is read: *fooled the translator*, the attacked "
        "one alone; *fooled the translators*, the auditor too, and no image encoder; *fooled the VLM*, an image encoder but not all; "
        "*changed meaning*, all image encoders, of which there must be two that know these classes. Intervals are Wilson's at 95 %.",
        pictures["attacked"],
        *_optional(
            "## The same pictures in feature space", _feature_words(report), tables_of_features(report) if report.features else "",
            absent_table(report), pictures.get("features", ""), pictures.get("feature_pairs", ""),
        ),
        *_optional("## The opposite direction", *_hold_words(report)),
        *_optional("## Models compared", tables.difference_table(report) if report.differences else ""),
        *_optional("## Carried over", tables.transfer_table(report) if report.transfers else ""),
        *_optional("## Natural twins", tables.twin_table(report) if report.twins else "", pictures.get("twins", "")),
        "## Ordinary robustness",
        tables.robustness_table(report),
        f"Top-1 of the same {report.pictures} pictures: untouched, under L-infinity PGD on the margin (white box, saved to 8 bits as it "
        "goes), and blurred, noisy or of low contrast. Upper bounds: a stronger attack finds no fewer.",
        pictures["robustness"],
        "## Models",
        tables.model_table(report),
        "## How this was made",
        facts(
            report.settings, report.machine, report.seconds,
            f"every picture: {ROWS} (judged), attacked/ (PNG at the classifier's input size, to be judged again by anyone)",
        ),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block) + "\n"


def _feature_words(report: PixelReport) -> str:
    if not report.features:
        return ""
    steps = max(next(iter(report.features.values())).curves[0].grid)
    return (
        f"Displacements in the null space, of relative steps up to {steps:g} of the feature norm; *maximiser*: the best one within the "
        "budget, in closed form where the translator is linear; *single step*: the paper's one gradient step. *near-null*: with directions "
        "of small singular value too (below that share of the largest; 100 %: all of them, as pixels may), every logit within "
        f"τ. *transfer from*, *null space of*: by an attacker who holds the first model and cannot promise the logits; *mean success* "
        f"counts what keeps them all within {report.tau:g}, *decision kept alone* also what moves them further. Mean success and AS are "
        "heights over the whole curve. Of a model whose null space is dropped, what its judges read after the dropping."
    )


def _hold_words(report: PixelReport) -> list[str]:
    if not any(s.arm == HOLD for s in report.summaries):
        return []
    return [
        f"The decision is moved while the cosines of the translated feature to all class prompts are held within "
        f"{report.settings.get('hold', 'the tolerance')}. Class-prompt cosines held is not meaning held: the translated feature may turn "
        "far in directions that no class prompt measures, and how far it did is in the columns *turns*.",
        tables.hold_table(report),
    ]


def _optional(heading: str, *blocks: str) -> list[str]:
    return [heading, *blocks] if any(blocks) else []


def pixels_to_tensorboard(report: PixelReport, folder: Path, plots: Mapping[str, Path]) -> None:
    """Rises and successes as scalars (step: the budget's place), tables as text, plots as images, below the run's folder (path)."""
    with TensorBoardLog(folder / "tensorboard") as log:
        for model in report.models:
            for step, summary in enumerate(s for s in report.summaries if (s.model, s.arm) == (model.label, ATTACK)):
                for judge in summary.rise:
                    log.scalars({f"rise/{judge}/{model.label}": summary.rise[judge][0]}, step)
                    log.scalars({f"success/{judge}/{model.label}": summary.success[judge][0]}, step)
        for found in report.robustness:
            for step, share in enumerate([found.clean, *found.adversarial.values()]):
                log.scalars({f"top-1 under PGD/{found.model}": share}, step)
        for label, figures in report.features.items():
            for curve in figures.curves:
                if (curve.attack, curve.crafted_on, curve.budget) == (MAXIMISER, "fitted", "step"):
                    said = f"{curve.judge}, null space dropped" if curve.defence else curve.judge
                    for step, value in enumerate(curve.figures["success"]):
                        if value is not None:
                            log.scalars({f"success in feature space/{said}/{label}": value}, step)
        log.text("findings", "\n\n".join([*report.findings, *report.warnings]), 0)
        log.text("checks", tables.checks_table(report), 0)
        log.text("rises", tables.pixels_table(report), 0)
        for name, path in plots.items():
            log.image_file(f"plots/{name}", path, 0)
