"""The comparison recipe on tiny scenes: whole, on two processes, without a null space or a head, and on bad input."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.compare import main
from singreg.analysis.comparing.results import CompareReport
from singreg.evaluation import compare
from singreg.evaluation.compare import Comparing
from singreg.evaluation.compare_bench import CompareBench, space_labels
from singreg.evaluation.compare_config import ComparedModelConfig, parse_compare
from singreg.mlp import MLPSettings
from singreg.models.classifier import Classifier
from singreg.workbench.config import VisionLanguageConfig
from singreg.workbench.run import Run, make_accelerator
from tests.demo import ASSETS
from tests.models.tiny_vlm import write_tiny_vlm
from tests.processes import run_processes

TINY = [
    "--data.scenes_train", "80", "--data.scenes_audit", "80", "--data.scenes_test", "50", "--data.scenes_bank", "10",
    "--data.image_size", "32", "--resamples", "100", "--chance_draws", "2",
    "--translator.ridge", "1.0", "--auditor.ridge", "1.0",
]  # fmt: skip
FULL = {"name": "test_resnet", "label": "full", "pretrained": False, "head": "keep"}
UNTRAINED = {"name": "test_efficientnet", "label": "untrained", "pretrained": False, "head": "new"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a finished run's folder with another head, a model without a head, a second vision-language model."""
    root = tmp_path_factory.mktemp("compare")
    tuned = Classifier.from_timm(f"local-dir:{ASSETS / 'demo_classifier'}", head_mode="slice", class_names=names())
    with torch.no_grad():
        tuned.head.weight.mul_(1 + torch.rand_like(tuned.head.weight))
    tuned.save(root / "tuned" / "model")
    torch.manual_seed(0)
    headless = timm.create_model("test_efficientnet", num_classes=0)
    timm.models.save_for_hf(headless, str(root / "headless"), safe_serialization=True)
    write_tiny_vlm(root / "other_vlm")
    (root / "empty").mkdir()
    return root


def names() -> list[str]:
    return list(json.loads((ASSETS / "demo_classifier" / "config.json").read_text())["label_names"])


def arguments(runs: Path, folders: Path, models: list[dict[str, Any]], *more: str) -> list[str]:
    return ["--runs", str(runs), "--cache", str(folders / "cache"), *TINY, "--models", json.dumps(models), *more]


def run_job(runs: str, folders: str, models: list[dict[str, Any]], *more: str) -> CompareReport | None:
    """What the recipe does between parsing and the end, with the report in hand."""
    AcceleratorState._reset_state(True)
    config = parse_compare(arguments(Path(runs), Path(folders), models, *more))
    accelerator = make_accelerator(seed=config.seed)
    run = Run(config, accelerator, "compare").check()
    job = Comparing(run.open(), config, CompareBench.build(config, accelerator))
    job.measure()
    try:
        return job.report()
    finally:
        AcceleratorState._reset_state(True)


def test_the_recipe_from_end_to_end(tmp_path: Path, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A packaged model, a run's folder, an untrained network, one without null space and one without head, in two spaces."""
    headless = {"name": f"local-dir:{folders / 'headless'}", "head": "keep"}
    models = [{"name": "demo"}, {"name": str(folders / "tuned")}, UNTRAINED, FULL, headless]
    spaces = ["--further_vlms", json.dumps([{"name": f"local-dir:{folders / 'other_vlm'}"}])]
    main(arguments(tmp_path, folders, models, "--name", "whole", *spaces))
    folder, shown = tmp_path / "whole", capsys.readouterr().out
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "report.json", "report.md", "report.html", "scores.parquet", "plots/comparison.png"} <= files
    assert "full" in shown
    assert "no null space" in shown

    report = json.loads((folder / "report.json").read_text())
    assert [head["label"] for head in report["heads"]] == ["demo", "tuned", "untrained", "full", "headless"]
    why = {head["label"]: head["omitted"] for head in report["heads"]}
    assert why["demo"] is why["tuned"] is why["untrained"] is None
    assert why["full"] == "no null space: 1000 classes fill all 96 features, every direction moves a logit"
    assert why["headless"].startswith("no linear head: ")
    assert set(report["measurements"]) == {"demo", "other_vlm"}
    for measured in report["measurements"].values():
        assert list(measured) == ["demo", "tuned", "untrained"]
        assert all(m["images"] == 50 for m in measured.values())
    heads = {m["head"]["head_hash"] for m in report["measurements"]["demo"].values()}
    assert len(heads) == 3
    assert len(report["differences"]) == 3 * (1 + 4 * 4)
    leakage = report["orders"][0]
    assert (leakage["figure"], leakage["views"]) == ("AS_neg", ["demo, fitted", "demo, auditor", "other_vlm, fitted", "other_vlm, auditor"])
    assert all(sorted(order) == ["demo", "tuned", "untrained"] for order in leakage["orders"])
    assert len(report["findings"]) == 3
    assert set(report["chance"]["demo"]) == {"demo", "tuned", "untrained"}

    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert text.count("no null space: 1000 classes fill all 96 features") == 2  # once a space
    assert "In 3 of" in page or "pairs of models" in page
    assert page.count("data:image/png;base64,") == 1
    table = pq.read_table(folder / "scores.parquet")
    assert table.num_rows == 2 * 3 * 50
    assert set(table["model"].to_pylist()) == {f"{m} in {s}" for m in ("demo", "tuned", "untrained") for s in ("demo", "other_vlm")}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert events.Tags()["images"] == ["plots/comparison"]
    assert {"findings/text_summary", "models/text_summary", "order/text_summary"} <= set(events.Tags()["tensors"])
    value = report["measurements"]["demo"]["tuned"]["translators"]["auditor"]["overall"]["AS_neg"]
    assert events.Scalars("demo/auditor/AS_neg/tuned")[0].value == pytest.approx(value)


def test_a_model_compared_with_itself_differs_in_nothing(tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MLPSettings", partial(MLPSettings, hidden=16, epochs=2))
    report = run_job(str(tmp_path), str(folders), [{"name": "demo"}, {"name": "demo", "label": "twin"}], "--mlp", '["mlp3"]')
    assert report is not None
    assert {(d.value, d.low, d.high) for d in report.differences} == {(0.0, 0.0, 0.0)}
    assert {d.translator for d in report.differences} == {"-", "fitted", "auditor", "mlp3"}
    assert report.findings[2].startswith("In 0 of 1 pairs")


def test_the_softmax_null_space_is_one_dimension_larger(tmp_path: Path, folders: Path) -> None:
    models = [{"name": "demo"}, {"name": "demo", "label": "softmax", "invariance": "softmax"}]
    report = run_job(str(tmp_path), str(folders), models)
    assert report is not None
    nullity = {name: measured.head.nullity for name, measured in report.measurements["demo"].items()}
    assert nullity == {"demo": 246, "softmax": 247}
    assert report.measurements["demo"]["softmax"].null_share > report.measurements["demo"]["demo"].null_share


def test_the_resolved_configuration_is_the_run(tmp_path: Path, folders: Path) -> None:
    """The same again under another name finds the same, untrained networks too."""
    models = [{"name": str(folders / "tuned")}, UNTRAINED]
    main(arguments(tmp_path, folders, models, "--name", "first"))
    resolved = tmp_path / "first" / "config.yaml"
    assert [model["label"] for model in yaml.safe_load(resolved.read_text())["models"]] == [None, "untrained"]
    main(["--config", str(resolved), "--name", "again"])
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "again"))
    assert (again["differences"], again["orders"]) == (first["differences"], first["orders"])
    with pytest.raises(SystemExit, match="already holds a run"):
        main(["--config", str(resolved)])


def test_nothing_to_measure_is_a_report_too(tmp_path: Path, folders: Path) -> None:
    report = run_job(str(tmp_path), str(folders), [FULL, {**FULL, "label": "full too"}], "--name", "none")
    assert report is not None
    assert report.findings[0].startswith("None of the models has a null space")
    assert (report.differences, report.orders) == ([], [])
    assert "no null space: 1000 classes" in (tmp_path / "none" / "report.html").read_text()
    one = run_job(str(tmp_path), str(folders), [FULL, {"name": "demo"}], "--name", "one")
    assert one is not None
    assert one.findings[0].startswith("Only demo could be measured")
    assert (tmp_path / "one" / "plots" / "comparison.png").is_file()


def _in_process(rank: int, world: int, runs: str, folders: str) -> dict[str, Any] | None:
    report = run_job(runs, folders, [{"name": "demo"}, UNTRAINED], "--name", "two")
    return None if report is None else report.to_json()


def test_two_processes_find_what_one_finds(tmp_path: Path, folders: Path) -> None:
    one = run_job(str(tmp_path), str(folders), [{"name": "demo"}, UNTRAINED], "--name", "one")
    assert one is not None
    first, second = run_processes(2, _in_process, str(tmp_path), str(folders))
    assert second is None  # only the main process reports
    assert len(one.differences) == len(first["differences"]) == 1 + 2 * 4
    for a, b in zip(one.differences, first["differences"], strict=True):
        assert (a.figure, a.translator) == (b["figure"], b["translator"])
        assert (a.value, a.low, a.high) == pytest.approx((b["value"], b["low"], b["high"]), abs=1e-3)
    assert all(m["images"] == 50 for m in first["measurements"]["demo"].values())
    assert first["machine"]["processes"] == 2


def test_dry_run_makes_nothing(tmp_path: Path, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(tmp_path, folders, [{"name": "demo"}, FULL], "--dry_run", "true"))
    shown = capsys.readouterr().out
    assert "demo: one batch gives features (50, 256), logits (50, 10)" in shown
    assert "full: left out, no null space" in shown
    assert "views: 2" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("models", "more", "expected"),
    [
        ([], [], ["models: expected at least two to compare, got 0"]),
        ([{"name": "demo"}, {"name": "demo"}], [], ["models: listed twice: demo; give each a label"]),
        ([{"name": "demo"}, {"name": " "}], [], ["models[1].name: expected a name"]),
        ([{"name": "demo"}, {"naem": "x"}], [], ["Option 'naem' is not accepted", "models: expected at least two"]),
        (
            [{"name": "demo"}, FULL],
            [
                "--chance_draws", "1", "--resamples", "10", "--further_vlms", '[{"name": "x", "templates": ["a"]}]',
                "--mlp", '["mlp3", "mlp3"]',
            ],
            ["chance_draws", "resamples", "further_vlms[0].templates: 'a' has no", "mlp: listed twice: mlp3"],
        ),
    ],
)  # fmt: skip
def test_bad_values_are_shown_together(
    tmp_path: Path, folders: Path, capsys: pytest.CaptureFixture[str], models: list[dict[str, Any]], more: list[str], expected: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, folders, models, *more))
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert all(part in shown for part in expected)
    assert f"{len(expected)} problem(s)" in shown
    assert list(tmp_path.iterdir()) == []


def test_models_on_the_command_line_replace_those_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    """jsonargparse alone would give the new ones the labels and heads of the old."""
    flags = ["--config", "compare_demo", "--models", '[{"name": "a"}, {"name": "b", "head": "keep"}]']
    config = parse_compare(flags)
    assert config.models == [ComparedModelConfig(name="a"), ComparedModelConfig(name="b", head="keep")]
    assert [model.known_as for model in parse_compare(flags[:2]).models][:2] == ["demo", "demo (softmax)"]
    with pytest.raises(SystemExit):  # and beside another key's mistake they are still judged
        parse_compare([*flags, "--seeed", "1", "--models", '[{"name": "a"}, {"name": "a"}]'])
    shown = capsys.readouterr().err
    assert "seeed: no such key" in shown
    assert "models: listed twice: a" in shown


def test_models_that_do_not_exist_are_all_named_before_any_work(tmp_path: Path, folders: Path) -> None:
    wrong = ["resnet5000", "resnet50.nosuch_in1k", str(folders / "empty"), "some/where"]
    expected = (
        r"models\[0\]\.name: 'resnet5000' is neither(.|\n)*models\[1\]\.name: timm has no weights 'resnet50\.nosuch_in1k'; it has "
        r"resnet50\.a1(.|\n)*models\[2\]\.name: .*empty has no model/config\.json(.|\n)*models\[3\]\.name: 'some/where' is neither"
    )
    with pytest.raises(SystemExit, match=expected):
        main(arguments(tmp_path, folders, [{"name": name} for name in wrong]))
    foreign = [{"name": "test_resnet", "pretrained": False, "label": "a"}, {"name": "local-dir:/nowhere", "label": "b"}]
    with pytest.raises(SystemExit, match=r"models\[0\] \(a\): .*head(.|\n)*models\[1\] \(b\): "):
        main(arguments(tmp_path, folders, foreign))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("resnet50.tv_in1k", "resnet50.tv_in1k"), ("runs/demo", "demo"), ("runs/demo/", "demo"), ("local-dir:runs/a/model", "a"),
        ("local-dir:runs/a/model-control", "a control"), ("hf-hub:someone/net", "net"), ("local-dir:../assets/lite0", "lite0"),
    ],
)  # fmt: skip
def test_a_model_is_known_by_the_last_part_of_its_name(name: str, label: str) -> None:
    assert ComparedModelConfig(name=name).known_as == label
    assert ComparedModelConfig(name=name, label="mine").known_as == "mine"


def test_spaces_have_names_of_their_own() -> None:
    vlms = [("demo", None), ("demo", None), ("ViT-L-14", "openai"), ("local-dir:/a/lite", None), ("ViT-L-14", "/w/own.safetensors")]
    labels = space_labels([VisionLanguageConfig(name=name, pretrained=weights) for name, weights in vlms])
    assert labels == ["demo", "demo (2)", "ViT-L-14 openai", "lite", "ViT-L-14 own.safetensors"]


def test_the_papers_models_are_timms_and_the_one_without_a_head_is_known() -> None:
    config = parse_compare(["--config", "paper"])
    widths = {}
    for model in config.models:
        assert model.name in timm.list_pretrained(model.name.split(".")[0] + ".*")
        widths[model.known_as] = timm.get_pretrained_cfg(model.name).num_classes  # type: ignore[union-attr]
    assert len(widths) == 14
    assert {name for name, classes in widths.items() if classes != 1000} == {"DINOv2-L"}
    import open_clip

    for vlm in config.vlms:
        assert vlm.pretrained in open_clip.list_pretrained_tags_by_model(vlm.name)
