"""A run's report: its tables and figures as JSON, Parquet, Markdown, HTML and in the trackers. Computes nothing."""

import base64
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from accelerate import Accelerator
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image
from torch.utils.tensorboard.summary import hparams

from singreg.runs import Run, describe_machine
from singreg.setup import Setup
from singreg.utils import atomic_write, plain, write_json, write_text

FORMAT = 2
TEMPLATES = Environment(loader=PackageLoader("singreg", "templates"), autoescape=select_autoescape(["html.j2"]))
# Of HPARAMS; config.yaml has the other settings.
COLUMNS = ("loss.weight", "run", "seed", "training.epochs", "training.learning_rate")


@dataclass(frozen=True)
class Figure:
    """A PNG file and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it in that order: paragraphs, tables, figures."""

    title: str
    blocks: Sequence[str | pd.DataFrame | Figure]


def number(value: float | None, digits: int = 2) -> str:
    """Write a figure, or a dash where there is none; what rounds to nothing has no sign."""
    if value is None or math.isnan(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("inf", "∞")


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share in [0, 1] as a percentage."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}%}"


def interval(value: float | None, low: float | None, high: float | None, digits: int = 2) -> str:
    """Write a figure with its 95 % interval: 1.23 [1.10, 1.30]."""
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def write_report(
    run: Run,
    *,
    title: str,
    verdict: Sequence[str],
    warnings: Sequence[str] = (),
    sections: Sequence[Section] = (),
    figures: Mapping[str, Any],
    rows: pd.DataFrame | None = None,
) -> None:
    """Write report.json, report.md, report.html and scores.parquet of a run, then print its last lines.

    The main process calls it. `figures` go into report.json as they are; `rows` are per-image scores.
    """
    settings = {**asdict(run.config), "command": shlex.join([f"recipes/{run.recipe}.py", *sys.argv[1:]])}
    machine, stages = describe_machine(run.accelerator), run.seconds
    if rows is not None:
        with atomic_write(run.folder / "scores.parquet") as temporary:
            rows.to_parquet(temporary, index=False)
    facts = {"command": settings["command"], "machine": ", ".join(f"{k} {v}" for k, v in machine.items())}
    facts["seconds"] = ", ".join(f"{stage} {value:.0f}" for stage, value in stages.items())
    made = Section("How this was made", [pd.DataFrame(facts.items(), columns=["", "value"])])
    page = (title, verdict, warnings, [*sections, made])
    write_text(run.folder / "report.md", _markdown(run.folder, *page))
    write_text(run.folder / "report.html", _html(*page))
    report = {"kind": run.recipe, "format": FORMAT, "verdict": verdict, "warnings": warnings, "settings": settings}
    report |= {"machine": machine, "seconds": stages, **figures}
    write_json(run.folder / "report.json", report)  # last: a run with a report.json is whole
    print("\n".join([*warnings, *verdict]))  # the verdict is what the last lines on the screen say
    print(f"report       {run.folder / 'report.html'}")
    print(f"tensorboard  tensorboard --logdir {shlex.quote(str(run.folder / 'tensorboard'))}", flush=True)


def write_model_card(
    run: Run, setup: Setup, figures: Mapping[str, Any], *, table: pd.DataFrame, verdict: Sequence[str], reading: str
) -> None:
    """Write model/README.md of a fine-tuning run: the hub's model card, with the report's first table in it."""
    config: Any = run.config
    start: Mapping[str, Any] = getattr(setup.classifier.model, "pretrained_cfg", {})
    front = {"library_name": "timm", "license": start.get("license") or "other"}
    front["tags"] = ["image-classification", "timm", "singreg"]
    front |= {"base_model": start["hf_hub_id"]} if start.get("hf_hub_id") else {}
    card = TEMPLATES.get_template("model_card.md.j2").render(
        front=yaml.safe_dump(front, sort_keys=False),
        title=_text(run.folder.name),
        tag=_text(setup.classifier.tag),
        verdict=map(_text, verdict),
        table=_text(table),
        reading=_text(reading),
        vlm=_text(Path(tag).name if (tag := setup.vlm.tag).startswith("local-dir:") else tag),
        auditor=figures["translators"]["auditor"],
        prompts=_text("; ".join(config.vlm.templates)),
        data=_text(Path(config.data.source).name),
        classes=len(setup.splits.class_names),
        place=f"hf-hub:{config.push_to_hub}" if config.push_to_hub else "local-dir:model",
        known=start.get("license"),
    )
    write_text(run.folder / "model" / "README.md", card + "\n")


def _cell(value: Any) -> str:
    """A table's cell as text: floats with three digits, nothing as a dash."""
    if isinstance(value, (float, np.floating)):
        return number(float(value), 3)
    return "–" if value is None else str(value)


def _text(value: str | pd.DataFrame) -> str:
    """A paragraph or a table in Markdown; a folder's or class's name cannot break a table or bring markup."""
    if isinstance(value, str):
        return value.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "\\`")
    table = value.map(lambda cell: _text(_cell(cell))).rename(columns=lambda name: _text(str(name)))
    return str(table.to_markdown(index=False, disable_numparse=True))


def _markdown(
    folder: Path, title: str, verdict: Sequence[str], warnings: Sequence[str], sections: list[Section]
) -> str:
    def block(value: str | pd.DataFrame | Figure) -> str:
        if not isinstance(value, Figure):
            return _text(value)
        return f"![{_text(value.caption)}]({value.path.relative_to(folder).as_posix()})"

    parts = [f"# {_text(title)}", *map(_text, verdict), *[f"**{_text(warning)}**" for warning in warnings]]
    for section in sections:
        parts += [f"## {_text(section.title)}", *map(block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _html(title: str, verdict: Sequence[str], warnings: Sequence[str], sections: list[Section]) -> str:
    def block(value: str | pd.DataFrame | Figure) -> dict[str, str]:
        if isinstance(value, Figure):
            data = base64.b64encode(value.path.read_bytes()).decode("ascii")
            return {"kind": "figure", "data": data, "caption": value.caption}
        if isinstance(value, str):
            return {"kind": "text", "text": value}
        return {"kind": "table", "html": value.map(_cell).to_html(index=False, border=0, justify="left")}

    blocks = [{"title": section.title, "blocks": list(map(block, section.blocks))} for section in sections]
    return TEMPLATES.get_template("report.html.j2").render(
        title=title, verdict=verdict, warnings=warnings, sections=blocks
    )


def track(accelerator: Accelerator, name: str, config: Any, figures: Iterable[str] = ()) -> None:
    """Begin a tracker run of that name (a curve's colour in TensorBoard) with the configuration, on every tracker.

    TensorBoard's table of runs (HPARAMS) can be sorted by the last values of `figures`.
    """
    for tracker in accelerator.trackers:  # accelerate would go on logging to the runs begun before
        tracker.finish()
    accelerator.trackers.clear()
    if accelerator.log_with:
        accelerator.init_trackers(name)
    flat = pd.json_normalize(asdict(config)).to_dict("records")[0]  # trackers take no nested ones
    known = {"run": name, **{str(key): value for key, value in flat.items() if value is not None}}
    settings = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in known.items()}
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(settings)
        elif accelerator.is_main_process:  # its own way would add a run in a folder named by the clock
            shown = {name: settings[name] for name in COLUMNS if name in settings}
            for summary in hparams(shown, dict.fromkeys(figures)):  # type: ignore[no-untyped-call]
                tracker.tracker.file_writer.add_summary(summary)


def log(accelerator: Accelerator, figures: Mapping[str, Any], step: int) -> None:
    """Log numbers on every tracker, None and NaN left out: TensorBoard drops what is no plain number without a word."""
    if known := {name: float(value) for name, value in plain(figures).items() if value is not None}:
        accelerator.log(known, step=step)


def log_text(accelerator: Accelerator, name: str, blocks: Sequence[str | pd.DataFrame]) -> None:
    """Log paragraphs and tables as one page of TensorBoard's TEXT tab."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log({name: "\n\n".join(map(_text, blocks))}, step=0)


def log_figures(accelerator: Accelerator, figures: Sequence[Figure]) -> None:
    """Log PNG figures as images on every tracker that takes images."""
    for figure in figures:
        log_image(accelerator, f"plots/{figure.path.stem}", np.asarray(Image.open(figure.path).convert("RGB"))[None])


def log_image(accelerator: Accelerator, name: str, image: np.ndarray, step: int = 0) -> None:
    """Log an image (1, height, width, 3) on every tracker that takes images."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: image}, step=step, **layout)
