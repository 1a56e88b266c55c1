"""Figures in README.md and recipes/README.md: written between markers from runs' report.json, never typed.

python .github/docs.py                       # fill every block from the reports kept in this folder
python .github/docs.py demo=runs/demo        # first keep that run's report as .github/demo.json
python .github/docs.py bank=runs/a,runs/b    # the same of several fine-tuning runs, a row each
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
from docstring_parser import parse as parse_docstring

from singreg.config import FinetuneConfig
from singreg.report import interval, percent
from singreg.tables import audit_table
from singreg.utils import write_json, write_text

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE.parent / "recipes" / "README.md", HERE.parent / "configs" / "README.md")
FLAGS = ("--out", "--runs", "--cache", "--resume", "--name")
PLOTS = {"bank": (), "finetune": ("summary",), "study": ("pareto",), "attack": ("rises", "features")}
GROWN = ("confirmed", "class_variance", "AS_neg")
GROWN_COMMAND = "recipes/finetune.py --config configs/demo.yaml --data.scenes.bank N"
FURTHER = ("class_variance", "AS_neg", "AS_abs", "IS", "cross 4 sd", "cross 25% of |f|")
"""What the page shows of a reading by another vision-language model."""
STAGES = {"before": "before", "control": "plain fine-tuning", "sing": "SingLoss", "dropped": "plain, null dropped"}
RATIOS = {
    "class_variance": "class-score variance ×",
    "AS_neg": "AS⁻ ×",
    "AS_abs": "abs. AS ×",
    "contrast AS_abs": "contrast abs. AS ×",
    "IS": "IS ×",
    "orthogonal IS": "IS beside prompts ×",
    "unique_r2": "unique R² ×",
    "harmless_r2": "harmless R² ×",
    "cross 4 sd": "4 sd step ×",
    "cross 25% of |f|": "25 % step ×",
    "confirmed": "confirmed share",
}


def kind_of(report: Mapping[str, Any]) -> str:
    """Name the recipe that wrote a report."""
    if "runs" in report:
        return "bank"
    if "arms" in report:
        return "study"
    return "attack" if "summaries" in report else "finetune"


def keep(run: Path, target: Path) -> None:
    """Copy what the pages show of a run's report, and its figures, into this folder."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    kind = kind_of(report)
    words = str(report["settings"]["command"]).split()
    places = {place for place, word in enumerate(words) if word in FLAGS}
    command = [word for place, word in enumerate(words) if place not in places and place - 1 not in places]
    kept = {name: report[name] for name in ("warnings", "machine", "seconds")}
    kept |= {"settings": {"command": " ".join(command)}, "verdict": report["verdict"]}
    kept |= {"finetune": _kept_finetune, "study": _kept_study, "attack": _kept_attack}[kind](report)
    for plot in PLOTS[kind]:
        shutil.copy(run / "plots" / f"{plot}.png", target.with_name(f"{target.stem}-{plot}.png"))
    write_json(target, _rounded(kept))


def keep_several(runs: Sequence[Path], target: Path) -> None:
    """Copy what the pages show of several fine-tuning runs that differ in their bank alone."""
    reports = [json.loads((run / "report.json").read_text(encoding="utf-8")) for run in runs]
    rows = []
    for report in reports:
        loop = report["measurements"]["before"]["translators"]["loop"]
        rows.append({"bank": loop["fit_images"], **{name: report["paired"][name] for name in GROWN}})
    first = reports[0]
    kept = {
        "runs": rows,
        "machine": first["machine"],
        "settings": {"command": GROWN_COMMAND},
        "verdict": [],
        "warnings": [],
    }
    write_json(target, _rounded({**kept, "seconds": {"all": sum(sum(each["seconds"].values()) for each in reports)}}))


def _kept_finetune(report: Mapping[str, Any]) -> dict[str, Any]:
    stages = report["measurements"].items()
    measurements = {stage: {name: found[name] for name in ("images", "audit")} for stage, found in stages}
    return {"measurements": measurements, "paired": report["paired"]}


def _kept_study(report: Mapping[str, Any]) -> dict[str, Any]:
    arms = []
    for arm in report["arms"]:
        kept = {name: arm[name] for name in ("arm", "role", "seeds", "note")}
        kept["mean"] = {name: arm["mean"][name] for name in ("top1", "retrieval") if name in arm["mean"]}
        kept["paired"] = {name: arm["paired"][name] for name in ("top1", *RATIOS) if name in arm["paired"]}
        further = arm.get("further", {}).items()
        kept["further"] = {label: {name: found[name] for name in FURTHER if name in found} for label, found in further}
        arms.append(kept)
    return {"arms": arms, "reference": report["reference"], "images": report["images"]}


def _kept_attack(report: Mapping[str, Any]) -> dict[str, Any]:
    summaries = [
        {n: s[n] for n in ("model", "budget", "kept", "rise")} for s in report["summaries"] if s["arm"] == "attack"
    ]
    return {"summaries": summaries, "tau": report["tau"], "images": report["images"]}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def block(kept: Mapping[str, Any], name: str, page: Path) -> str:
    """Write what a page says about a kept report: sentences, table, figures, command and machine."""
    kind = kind_of(kept)
    table = {"bank": _bank_table, "finetune": _finetune_table, "study": _study_table, "attack": _attack_table}[kind](
        kept
    )
    machine, minutes = kept["machine"], sum(kept["seconds"].values()) / 60
    where = f"{machine['cores']} cores ({machine['processor']}), {machine['device']}, torch {machine['torch']}"
    up = "" if page.parent == HERE.parent else "../"
    shown = PLOTS[kind] if kind != "finetune" else ()  # README shows that one above
    figures = [path for plot in shown if (path := HERE / f"{name}-{plot}.png").is_file()]
    sentences = kept["verdict"] if kind != "study" else [f"- {sentence}" for sentence in kept["verdict"]]
    parts = [
        table,
        ("\n" if kind == "study" else " ").join([*sentences, *kept["warnings"]]),
        *[f"![{path.stem}]({up}.github/{path.name})" for path in figures],
        f"Generated from report.json of `{kept['settings']['command']}`: {where}, {minutes:.1f} minutes.",
    ]
    return "\n\n".join(part for part in parts if part)


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def _finetune_table(kept: Mapping[str, Any]) -> str:
    found = kept["measurements"]
    table = audit_table({said: found[stage] for stage, said in STAGES.items() if stage in found})
    return str(table.rename(columns={"|AS| °": "abs. AS °"}).to_markdown(index=False, disable_numparse=True))


def _bank_table(kept: Mapping[str, Any]) -> str:
    rows = []
    for run in kept["runs"]:
        cells = {RATIOS[name]: interval(*(run[name][end] for end in ("value", "low", "high"))) for name in GROWN}
        rows.append({"bank images": f"{run['bank']:.0f}", **cells})
    return _markdown(rows)


def _study_table(kept: Mapping[str, Any]) -> str:
    arms = kept["arms"]
    parts = [_ratios({arm["arm"]: arm["paired"] for arm in arms}, arms)]
    for label in dict.fromkeys(label for arm in arms for label in arm.get("further", {})):
        said = f"The same arms, read by an auditor in the space of {label}, which no arm was trained with:"
        parts += [said, _ratios({arm["arm"]: arm["further"].get(label, {}) for arm in arms}, arms)]
    return "\n\n".join(parts)


def _ratios(paired: Mapping[str, Mapping[str, Any]], arms: Sequence[Mapping[str, Any]]) -> str:
    titles = {name: title for name, title in RATIOS.items() if any(name in found for found in paired.values())}
    rows = []
    for arm in arms:
        row = {"arm": arm["arm"], "seeds": str(len(arm["seeds"])), "top-1": percent(arm["mean"]["top1"])}
        for figure, title in titles.items():
            found = paired[arm["arm"]].get(figure)
            row[title] = interval(found["value"], found["low"], found["high"]) if found else "–"
        if "retrieval" in arm["mean"] and "harmless_r2" in titles:
            row["retrieval"] = percent(arm["mean"]["retrieval"])
        rows.append(row)
    return _markdown(rows)


def _attack_table(kept: Mapping[str, Any]) -> str:
    rows = []
    for summary in kept["summaries"]:
        row = {"model": summary["model"], "budget": summary["budget"], "kept": percent(summary["kept"], 0)}
        rows.append({**row, **{f"{judge} °": interval(*rise, 1) for judge, rise in summary["rise"].items()}})
    return _markdown(rows)


def options(kind: type, prefix: str = "") -> list[dict[str, str]]:
    """List every option of a configuration with its default and what its docstring says."""
    documented = [found for each in kind.__mro__ for found in parse_docstring(each.__doc__ or "").params]
    texts = {found.arg_name: found.description or "" for found in reversed(documented)}
    hints, rows = get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            rows += options(hint, f"{name}.")  # type: ignore[arg-type]
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        text = " ".join(texts[field.name].split()).replace("|", "\\|")
        rows.append({"option": f"`{name}`", "default": f"`{json.dumps(default)}`", "meaning": text})
    return rows


def fill(page: Path) -> str:
    """Return a page with each generated block written anew.

    Raises:
        FileNotFoundError: a block has no kept report.
    """
    text = page.read_text(encoding="utf-8")

    def written(match: re.Match[str]) -> str:
        kept = json.loads((HERE / f"{match[1]}.json").read_text(encoding="utf-8"))
        begin, end = (f"<!-- {word} generated: {match[1]} -->" for word in ("begin", "end"))
        return f"{begin}\n\n{block(kept, match[1], page)}\n\n{end}"

    table = _markdown(options(FinetuneConfig))
    text = re.sub(
        r"<!-- begin options -->.*?<!-- end options -->",
        lambda _: f"<!-- begin options -->\n\n{table}\n\n<!-- end options -->",
        text,
        flags=re.DOTALL,
    )
    return re.sub(r"<!-- begin generated: (\w+) -->.*?<!-- end generated: \1 -->", written, text, flags=re.DOTALL)


def main(arguments: Sequence[str]) -> None:
    """Keep the reports named, then fill all pages."""
    for pair in arguments:
        name, _, run = pair.partition("=")
        target, runs = HERE / f"{name}.json", [Path(each) for each in run.split(",")]
        keep_several(runs, target) if len(runs) > 1 else keep(*runs, target)
    for page in PAGES:
        write_text(page, fill(page))


if __name__ == "__main__":
    main(sys.argv[1:])
