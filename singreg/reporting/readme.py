"""Figures in README: written between markers from a run's report.json, never typed.

python -m singreg.reporting.readme README.md demo=runs/demo        # keeps the report as .github/demo.json, then writes its block
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from singreg.analysis.results import FinetuneReport
from singreg.old_seals import read_sealed
from singreg.reporting.readme_pixels import PICTURES as PIXEL_PICTURES
from singreg.reporting.readme_pixels import is_pixels, kept_pixels, pixels_summary
from singreg.reporting.readme_study import PICTURES as STUDY_PICTURES
from singreg.reporting.readme_study import is_study, read_study, rounded, study_summary
from singreg.reporting.report_files import read_report
from singreg.reporting.tables import escape, results_table
from singreg.utils import write_json, write_text


def summary(report: FinetuneReport) -> str:
    """Table, verdict, command and machine of a report as Markdown (angles in degrees; no shapes)."""
    machine, minutes = report.machine, sum(report.seconds.values()) / 60
    where = f"{machine['cores']} cores ({machine['processor']}), {machine['device']}, torch {machine['torch']}"
    command = str(report.settings.get("command", "")).replace("`", "")
    return "\n\n".join(
        [
            f"```text\n{results_table(report, compact=True)}\n```",
            " ".join(escape(sentence) for sentence in [*report.verdict, *report.warnings]),
            f"Generated from this run's report.json: `{command}` on {where}; {minutes:.1f} minutes of fitting, training and measuring.",
        ]
    )


def insert(text: str, name: str, block: str) -> str:
    """`text` with what stands between the markers of `name` replaced (no shapes).

    Raises:
        ValueError: the markers are not there.

    Example:
        >>> insert("<!-- begin generated: a --><!-- end generated: a -->", "a", "x").splitlines()[2]
        'x'
    """
    begin, end = f"<!-- begin generated: {name} -->", f"<!-- end generated: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected the markers {begin} and {end} once, in this order")
    return f"{text[: text.index(begin)]}{begin}\n\n{block}\n\n{text[text.index(end) :]}"


def keep(report: Path, target: Path) -> None:
    """Copy a report.json to the path `target` without what only means something where it ran (folders, whether it was resumed).

    Raises:
        FileNotFoundError: there is no report yet.
    """
    value = read_sealed(report / "report.json" if report.is_dir() else report)
    words = str(value["settings"].get("command", "")).split()
    places = {place for place, word in enumerate(words) for flag in ("--cache", "--runs", "--resume") if word == flag}
    kept = [word for place, word in enumerate(words) if place not in places and place - 1 not in places]
    value["settings"] = {"name": value["settings"]["name"], "command": " ".join(kept)}
    pictures: tuple[str, ...] = ()
    if is_study(value):
        value, pictures = rounded(value), STUDY_PICTURES
    elif is_pixels(value):
        value, pictures = kept_pixels(value), PIXEL_PICTURES
    target.parent.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        shutil.copy(report / "plots" / f"{picture}.png", target.with_name(f"{target.stem}-{picture}.png"))
    write_json(target, value)


def block_of(kept: Path) -> str:
    """What README says about a kept report (a path), a fine-tuning run's, a study's or a pixel attack's."""
    value = json.loads(kept.read_text(encoding="utf-8"))
    if is_pixels(value):
        return pixels_summary(value, kept.stem)
    if is_study(value):
        return study_summary(read_study(kept), kept.stem)
    return summary(read_report(kept))


def main(arguments: Sequence[str] | None = None) -> None:
    """`README NAME=RUN ...`: keep each run's report beside README (path .github/NAME.json) and fill in its block from that."""
    readme, *pairs = sys.argv[1:] if arguments is None else arguments
    text = Path(readme).read_text(encoding="utf-8")
    for pair in pairs:
        name, _, path = pair.partition("=")
        kept = Path(readme).parent / ".github" / f"{name}.json"
        keep(Path(path), kept)
        text = insert(text, name, block_of(kept))
    write_text(readme, text)


if __name__ == "__main__":
    main()
