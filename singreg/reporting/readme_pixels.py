"""A pixel attack's section in README: what may be claimed, rises and feature-space success, from the kept report.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from singreg.analysis.pixels.results import ATTACK
from singreg.analysis.old_robustness.attacks import MAXIMISER, SINGLE
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.reporting.readme_study import rounded
from singreg.reporting.tables import escape, number, percent, render

PICTURES = ("rises", "features")
"""Figures of the run that are kept beside its report."""
READ = ((SINGLE, "fitted"), (MAXIMISER, "fitted"), (MAXIMISER, "auditor"))
"""(attack, judge) of the feature-space columns, all crafted on the fitted translator."""


def is_pixels(value: Mapping[str, Any]) -> bool:
    """Whether a report.json's content is a pixel attack's (no shapes)."""
    return value.get("kind") == "steer pixels"


def kept_pixels(value: Mapping[str, Any]) -> dict[str, Any]:
    """Of a pixel report what README shows: sentences, the attack's rises, mean success in feature space (degrees, shares)."""
    names = ("kind", "pictures", "tau", "findings", "warnings", "settings", "machine", "seconds")
    features = {label: RobustnessFigures.from_json(figures) for label, figures in value["features"].items()}
    kept = {
        **{name: value[name] for name in names},
        "summaries": [s for s in value["summaries"] if s["arm"] == ATTACK],
        "features": {
            label: {f"{attack}, {judge}": _mean_success(figures, attack, judge, label in value["dropped"]) for attack, judge in READ}
            for label, figures in features.items()
        },
    }
    found: dict[str, Any] = rounded(kept)
    return found


def _mean_success(figures: RobustnessFigures, attack: str, judge: str, dropped: bool) -> list[float | None]:
    return next(
        curve.area["success"]
        for curve in figures.curves
        if (curve.attack, curve.crafted_on, curve.judge, curve.budget) == (attack, "fitted", judge, "step")
        and curve.defence == ("drop_null" if dropped else "")
    )


def pixels_summary(kept: Mapping[str, Any], name: str) -> str:
    """Sentences, rises in degrees, mean success in feature space, figures, command and machine as Markdown (no shapes)."""
    machine, minutes = kept["machine"], sum(kept["seconds"].values()) / 60
    where = f"{machine['cores']} cores ({machine['processor']}), {machine['device']}, torch {machine['torch']}"
    command = str(kept["settings"].get("command", "")).replace("`", "")
    labels = tuple(dict.fromkeys(f"{s['model']}{after}" for s in kept["summaries"] for after in (":", ",")))
    of_models = [sentence for sentence in kept["findings"] if sentence.startswith(labels)]
    general = [sentence for sentence in kept["findings"] if sentence not in of_models]
    return "\n\n".join(
        [
            *(f"- {escape(sentence)}" for sentence in [*general, *kept["warnings"]]),
            _rises(kept),
            f"Degrees gained towards the target class's prompt, mean over {kept['pictures']} pictures with its 95 % interval, logits "
            f"within {kept['tau']:g}. *fitted* is attacked; nobody attacks the others.",
            _features(kept),
            "The same pictures in feature space: how often the target prompt comes first, mean over relative steps, by attack and judge.",
            *(f"![{picture} of {name}](.github/{name}-{picture}.png)" for picture in PICTURES),
            "<details><summary>Every model in a sentence</summary>\n\n" + "\n\n".join(map(escape, of_models)) + "\n\n</details>",
            f"Generated from this run's report.json: `{command}` on {where}; {minutes:.0f} minutes of attacking and judging.",
        ]
    )


def _interval(values: list[float | None], factor: float, digits: int) -> str:
    value, low, high = (None if v is None else factor * v for v in values)
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def _rises(kept: Mapping[str, Any]) -> str:
    judges = list(kept["summaries"][0]["rise"])
    rows = [
        [escape(s["model"]), s["budget"], percent(s["kept"], 0), *(_interval(s["rise"][judge], 1, 1) for judge in judges)]
        for s in kept["summaries"]
    ]
    return render(rows, ["model", "budget", "kept", *(escape(judge) for judge in judges)])


def _features(kept: Mapping[str, Any]) -> str:
    columns = list(next(iter(kept["features"].values()), {}))
    rows = [[escape(label), *(f"{_interval(found[column], 100, 0)} %" for column in columns)] for label, found in kept["features"].items()]
    return render(rows, ["model", *columns]) if rows else ""
