"""A study's section in README: what it does and what it does not, from the kept report.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from singreg.analysis.study.results import StudyReport
from singreg.reporting.study_tables import RATIO_TITLES, study_table
from singreg.reporting.tables import escape, render

PICTURES = ("pareto", "tradeoff")
"""Figures of the run that are kept beside its report."""
DIGITS = 6


def is_study(value: dict[str, object]) -> bool:
    """Whether a report.json's content is a study's (no shapes)."""
    return "arms" in value


def read_study(path: str | Path) -> StudyReport:
    """A study's report back from the path of its report.json.

    Raises:
        FileNotFoundError: there is no report yet. ValueError: another kind or format.
    """
    return StudyReport.from_json(json.loads(Path(path).read_text(encoding="utf-8")))


def rounded(value: Any) -> Any:
    """Nested JSON values with numbers of six digits: enough for a table, a third of the size (no shapes).

    Example:
        >>> rounded({"a": [0.123456789, 1e-9], "b": None})
        {'a': [0.123457, 1e-09], 'b': None}
    """
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def study_summary(report: StudyReport, name: str) -> str:
    """Sentences, table, aims of the arms spoken of, figures, command and machine as Markdown (angles in degrees; no shapes)."""
    machine, minutes = report.machine, sum(report.seconds.values()) / 60
    where = f"{machine['cores']} cores ({machine['processor']}), {machine['device']}, torch {machine['torch']}"
    command = str(report.settings.get("command", "")).replace("`", "")
    return "\n\n".join(
        [
            *(f"- {escape(sentence)}" for sentence in report.sentences),
            _ratios(report),
            f"All ratios are to *{escape(report.reference)}*, paired by picture, with 95 % bootstrap intervals over {report.images} test "
            f"pictures, by an auditor fitted on {report.auditor_images} others.",
            f"<details><summary>All {len(report.arms)} arms</summary>\n\n```text\n{study_table(report, compact=True)}\n```\n\n</details>",
            *(f"![{picture} of {name}](.github/{name}-{picture}.png)" for picture in PICTURES),
            *(escape(warning) for warning in report.warnings),
            f"Generated from this run's report.json: `{command}` on {where}; {minutes:.0f} minutes of making and measuring arms.",
        ]
    )


def _ratios(report: StudyReport) -> str:
    """The figures the aims are about, of the arms that the sentences name and the placebos (Markdown)."""
    said = " ".join(report.sentences)
    arms = [arm for arm in report.arms if arm.paired and (said.find(f"{arm.arm} (") >= 0 or arm.role == "placebo" or arm.front)]
    keys = ("top1", "AS_neg", "AS_abs", "IS", "step", "AS25", "success25")
    rows = []
    for arm in arms:
        cells = []
        for key in keys:
            found = arm.paired.get(key)
            sign = "+" if key == "top1" else ""
            cells.append("–" if found is None else f"{found.value:{sign}.2f} [{found.low:{sign}.2f}, {found.high:{sign}.2f}]")
        rows.append([escape(arm.arm), str(len(arm.seeds)), *cells])
    return render(rows, ["arm", "seeds", *(RATIO_TITLES[key].replace("|", "\\|") for key in keys)])
