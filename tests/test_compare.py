"""recipes/compare.py on tiny scenes: whole, on two processes, without a null space or a head, and on bad input."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import timm
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import compare as recipe
from singreg import setup
from singreg.config import ComparedModel, VLMConfig, parse
from singreg.mlp import MLPSettings
from singreg.models.classifier import Classifier
from singreg.setup import space_labels
from tests.demo import ASSETS
from tests.fakes import write_tiny_vlm
from tests.processes import run_same
from tests.recipe_run import run_recipe, same

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = ["--data.scenes", "{train: 80, audit: 80, test: 50, bank: 10}", "--data.image_size", "32"]
FULL = {"name": "test_resnet", "label": "full", "pretrained": False, "head": "keep"}
UNTRAINED = {"name": "test_efficientnet", "label": "untrained", "pretrained": False, "head": "new"}
DEMO = {"name": "demo"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder with another head, a model without a head, a second vision-language model."""
    root = tmp_path_factory.mktemp("compare")
    names = list(json.loads((ASSETS / "demo_classifier" / "config.json").read_text())["label_names"])
    tuned = Classifier.from_timm(f"local-dir:{ASSETS / 'demo_classifier'}", head_mode="slice", class_names=names)
    with torch.no_grad():
        tuned.head.weight.mul_(1 + torch.rand_like(tuned.head.weight))
    for name in ("model", "model-control"):
        tuned.save(root / "tuned" / name)
    timm.models.save_for_hf(timm.create_model("test_efficientnet", num_classes=0), str(root / "headless"))
    write_tiny_vlm(root / "other_vlm")
    (root / "empty").mkdir()
    return root


def compare(out: Path, models: list[dict[str, Any]], *more: str) -> dict[str, Any]:
    return run_recipe(recipe.main, out, *TINY, "--translator.ridge", "1", "--models", json.dumps(models), *more)


def test_the_recipe_from_end_to_end(tmp_path: Path, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A packaged model, a run's folder, an untrained network, no null space, no head; two spaces."""
    headless = {"name": f"local-dir:{folders / 'headless'}", "head": "keep"}
    models = [DEMO, {"name": str(folders / "tuned")}, UNTRAINED, FULL, headless]
    second = json.dumps([{"name": f"local-dir:{folders / 'other_vlm'}"}])
    report = compare(tmp_path / "whole", models, "--further_vlms", second)
    names = {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert {"report.html", "scores.parquet", "plots/comparison.png"} <= names
    assert "for want of a null space: full" in capsys.readouterr().out
    why = {head["label"]: head["omitted"] for head in report["heads"]}
    assert list(why) == ["demo", "tuned", "untrained", "full", "headless"]
    assert why["full"] == "no null space: 1000 classes fill all 96 features, every direction moves a logit"
    assert why["headless"].startswith("no linear head: ")
    assert set(report["measurements"]) == set(report["chance"]) == {"demo", "other_vlm"}
    for measured in report["measurements"].values():
        assert list(measured) == ["demo", "tuned", "untrained"]
        assert {found["images"] for found in measured.values()} == {50}
        assert len({found["head"]["head_hash"] for found in measured.values()}) == 3
    assert len(report["differences"]) == 3 * (1 + 4 * 4)
    assert report["order"]["views"] == [f"{s}, {t}" for s in ("demo", "other_vlm") for t in ("fitted", "auditor")]
    few, left_out = report["verdict"]
    assert few.startswith("No claim: an interval from 50 test images")
    assert left_out.endswith("full, headless.")
    table = pd.read_parquet(tmp_path / "whole" / "scores.parquet")
    assert len(table) == 2 * 3 * 50
    assert "tuned in other_vlm" in set(table["model"])
    events = EventAccumulator(str(next((tmp_path / "whole" / "tensorboard").rglob("events*")).parent)).Reload()
    value = report["measurements"]["demo"]["tuned"]["translators"]["auditor"]["overall"]["AS_neg"]
    assert events.Scalars("demo/auditor/AS_neg/tuned")[0].value == pytest.approx(value)


def test_a_model_compared_with_itself_differs_in_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "MLPSettings", partial(MLPSettings, hidden=16, epochs=2))
    models = [DEMO, {"name": "demo", "label": "twin"}, {"name": "demo", "label": "softmax", "invariance": "softmax"}]
    report = compare(tmp_path / "same", models, "--mlp", '["mlp3"]')
    twins = [d for d in report["differences"] if (d["first"], d["second"]) == ("demo", "twin")]
    assert {(d["value"], d["low"], d["high"]) for d in twins} == {(0.0, 0.0, 0.0)}
    assert {d["translator"] for d in twins} == {"-", "fitted", "auditor", "mlp3"}
    nullity = {name: found["head"]["nullity"] for name, found in report["measurements"]["demo"].items()}
    assert nullity == {"demo": 246, "twin": 246, "softmax": 247}


def test_nothing_to_measure_is_a_report_too(tmp_path: Path) -> None:
    report = compare(tmp_path / "none", [FULL, {**FULL, "label": "full too"}])
    assert report["verdict"][0].startswith("None of the models has a null space")
    assert (report["differences"], report["order"]) == ([], None)
    one = compare(tmp_path / "one", [FULL, DEMO])
    assert one["verdict"][0].startswith("Only demo could be measured")
    assert (tmp_path / "one" / "plots" / "comparison.png").is_file()


def test_the_same_again_on_two_processes_finds_the_same(tmp_path: Path, folders: Path) -> None:
    one = compare(tmp_path / "one", [{"name": str(folders / "tuned")}, UNTRAINED])
    resolved = tmp_path / "one" / "config.yaml"
    models = yaml.safe_load(resolved.read_text())["models"]
    assert [model["label"] for model in models] == [None, "untrained"]
    two = run_same(2, compare, tmp_path / "two", models)[0]
    assert len(one["differences"]) == 1 + 2 * 4
    same(two["differences"], one["differences"])
    assert two["machine"]["processes"] == 2
    with pytest.raises(SystemExit, match="already holds a run"):
        recipe.main(["--config", str(resolved)])


def test_models_that_do_not_exist_are_all_named_before_any_work(tmp_path: Path, folders: Path) -> None:
    wrong = ["resnet5000", str(folders / "empty"), "some/where", "local-dir:/nowhere"]
    models = [{"name": "test_resnet", "pretrained": False}, *({"name": name} for name in wrong)]
    places = r"(.|\n)*".join(rf"models\[{place}\] \(.*\): " for place in range(5))
    with pytest.raises(SystemExit, match=places):
        compare(tmp_path / "wrong", models)
    assert list(tmp_path.iterdir()) == []


def test_models_and_spaces_are_known_by_the_last_part_of_their_names(folders: Path) -> None:
    """And a run alone is compared with its control."""
    alone = parse(recipe.CompareConfig, ["--models", str(folders / "tuned")]).models
    assert [model.known_as for model in alone] == ["tuned", "tuned-control"]
    assert [model.source for model in alone] == [f"local-dir:{folders}/tuned/model{end}" for end in ("", "-control")]
    names = ["resnet50.tv_in1k", "runs/demo/", "local-dir:runs/a/model", "runs/a/model-control", "hf-hub:someone/net"]
    assert [ComparedModel(name=name).known_as for name in names] == [names[0], "demo", "a", "a-control", "net"]
    assert ComparedModel(name=names[0], label="mine").known_as == "mine"
    plain = [(name, None) for name in ("demo", "demo", "local-dir:/a/lite")]
    vlms = [*plain, ("ViT-L-14", "openai"), ("x", "weights/own.st")]
    labels = space_labels([VLMConfig(name, weights) for name, weights in vlms])
    assert labels == ["demo", "demo (2)", "lite", "ViT-L-14 openai", "x own.st"]


def test_the_papers_models_are_timms() -> None:
    import open_clip

    config = parse(recipe.CompareConfig, ["--config", str(CONFIGS / "paper.yaml")])
    widths = {}
    for model in config.models:
        assert model.name in timm.list_pretrained(model.name.split(".")[0] + ".*")
        widths[model.known_as] = timm.get_pretrained_cfg(model.name).num_classes  # type: ignore[union-attr]
    assert len(widths) == 14
    assert {name for name, classes in widths.items() if classes != 1000} == {"DINOv2-L"}
    for vlm in (config.vlm, *config.further_vlms):
        assert vlm.pretrained in open_clip.list_pretrained_tags_by_model(vlm.name)
