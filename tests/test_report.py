"""Reports: the same tables in every form, nothing of a user's that breaks them, and trackers that get plain numbers."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG as EXPERIMENT
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG as START
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data, parse_session_start_info_plugin_data

from singreg.config import RunConfig
from singreg.report import Figure, Section, interval, log, log_figures, number, percent, track, write_report
from singreg.runs import Run, start

NASTY = 'a|b <script>alert("x")</script> `c`'


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = RunConfig(out=str(tmp_path / "run"))
    return Run(config, start(config), "finetune").open()


def figure(run: Run) -> Figure:
    path = run.folder / "plots" / "a.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (30, 20), "red").save(path)
    return Figure(path, f"caption {NASTY}")


def test_numbers_as_people_read_them() -> None:
    assert [number(None), number(1.005, 1), number(-0.0001), number(np.inf)] == ["–", "1.0", "0.00", "∞"]
    assert percent(0.1234) == "12.3%"
    assert interval(1, 0.5, float("nan"), 1) == "1.0 [0.5, –]"


def test_a_report_holds_everything_in_every_form(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.DataFrame({"|AS|": [1.23456, np.nan], "name": [NASTY, None]})
    rows = pd.DataFrame({"image": ["a.png", "b.png"], "AS/auditor": [0.5, -0.5]})
    with run.timed("measure"):
        sections = [Section("Results", ["a paragraph", table, figure(run)])]
    said = {"title": f"Run {NASTY}", "verdict": ["It leaks."], "warnings": ["Few images."], "sections": sections}
    write_report(run, **said, figures={"top1": np.float32(0.5), "gap": float("nan")}, rows=rows)  # type: ignore[arg-type]
    report = json.loads((run.folder / "report.json").read_text())
    assert (report["kind"], report["top1"], report["gap"], report["verdict"]) == ("finetune", 0.5, None, ["It leaks."])
    assert {"settings", "machine", "seconds"} <= set(report)
    pd.testing.assert_frame_equal(pd.read_parquet(run.folder / "scores.parquet"), rows)
    page, text = (run.folder / "report.html").read_text(), (run.folder / "report.md").read_text()
    for form in (page, text):
        assert "<script>" not in form
        assert "1.235" in form
        assert "Few images." in form
    assert page.count("data:image/png;base64,") == 1
    assert "](plots/a.png)" in text
    lines = [line for line in text.splitlines() if line.startswith("| 1.235")]
    assert lines[0].replace("\\|", "").count("|") == 3, "a name cannot add a column"
    assert capsys.readouterr().out.splitlines()[:2] == ["Few images.", "It leaks."]


def test_trackers_get_flat_settings_and_plain_numbers(run: Run) -> None:
    """TensorBoard raises on nested settings and drops np.float32, None and vectors without a word."""
    accelerator = run.accelerator
    track(accelerator, "sing", run.config, ["b", "a"])
    log(accelerator, {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": None, "d": 3}, step=1)
    log(accelerator, {"a": 0.25}, step=2)
    log_figures(accelerator, [figure(run)])
    with pytest.raises(TypeError):
        log(accelerator, {"vector": np.ones(2)}, step=1)
    accelerator.end_training()
    events = EventAccumulator(str(run.folder / "tensorboard" / "sing"), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["a", "b", "d"]
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(1, 0.5), (2, 0.25)]
    assert events.Tags()["images"] == ["plots/a"]
    settings = parse_session_start_info_plugin_data(events.summary_metadata[START].plugin_data.content).hparams
    assert (settings["data.source"].string_value, settings["run"].string_value) == ("scenes", "sing")
    table = parse_experiment_plugin_data(events.summary_metadata[EXPERIMENT].plugin_data.content)
    assert {info.name for info in table.hparam_infos if info.differs} == {"run", "seed"}, "the columns shown first"
    assert [info.name.tag for info in table.metric_infos] == ["b", "a"]
