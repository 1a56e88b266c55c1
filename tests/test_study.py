"""recipes/study.py from end to end on the smallest arms: table, resuming, changed arms, refusals; plan and splits."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
import yaml

import study as recipe
from singreg.analysis.comparison import FIGURES, HARM
from singreg.analysis.scores import BUDGETS
from singreg.config import parse
from singreg.study import ArmConfig, StudyConfig
from singreg.study.results import plan_study
from tests.recipe_run import run_recipe, same
from tests.tiny_run import report_of

SETTINGS: dict[str, Any] = {
    "data": {"scenes": {"train": 48, "audit": 60, "test": 30, "bank": 0}, "augmentation": "none", "image_size": 32},
    "model": {"name": "test_resnet", "pretrained": False, "head": "new"},
    "training": {"epochs": 1, "batch_size": 16},
    "translator": {"refreshes": 0, "ridge": 1.0},
    "validation_per_class": 2,
    "further_vlms": [{"name": "demo"}],
    "seeds": [0, 1],
    "arms": [
        {"name": "plain", "role": "baseline", "overrides": {"loss.weight": 0}},
        {"name": "sing", "overrides": {"training.learning_rate": 0.001}},
        {"name": "mixed", "make": "average", "weights_from": "plain"},
        {"name": "aligned", "make": "align"},
        {"name": "shuffled", "role": "placebo", "overrides": {"loss.placebo": "shuffled"}},
        {"name": "dropped", "make": "drop", "weights_from": "plain"},
    ],
}
NAMES = ["plain", "sing", "mixed", "shuffled", "dropped"]  # of every seed
RUNS = [*(f"{name} 0" for name in [*NAMES[:3], "aligned", *NAMES[3:]]), *(f"{name} 1" for name in NAMES)]


def study(out: Path, *more: str, **changes: Any) -> list[str]:
    """Run the recipe and return the arms that it made, in order."""
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    with patch.object(recipe, "make_and_measure", side_effect=recipe.make_and_measure) as make:
        run_recipe(recipe.main, out, "--config", str(file), *more)
    return [f"{work.arm.name} {work.seed}" for _, work in (call.args for call in make.call_args_list)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "tiny"
    study(folder)
    return folder


def test_the_folder_holds_the_report_and_every_finished_arm(whole: Path) -> None:
    assert {"config.yaml", "report.html", "scores.parquet"} <= {path.name for path in whole.iterdir()}
    assert {path.stem for path in (whole / "plots").iterdir()} == {"pareto"}
    for run in RUNS:
        arm, seed = run.split()
        folder = whole / "arms" / arm / f"seed-{seed}"
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        stage = f"checkpoints/stages/{arm}-{seed}"
        assert files == {"digest.txt", "weights.safetensors", f"{stage}/stage.json", f"{stage}/rows.parquet"}, run
    assert not (whole / "features").exists()
    report = report_of(whole)
    arms = {arm["arm"]: arm for arm in report["arms"]}
    assert {name: len(arm["seeds"]) for name, arm in arms.items()} == dict.fromkeys(NAMES, 2) | {"aligned": 1}
    assert {*FIGURES} - {"confirmed"} <= set(arms["sing"]["paired"])
    assert arms["sing"]["validation"]["images"] == 20
    assert arms["shuffled"]["placebo"].keys() >= {HARM, "top1"} > arms["sing"]["placebo"].keys()
    assert report["verdict"][0].startswith("No claim: the auditor has 40 images")


def test_a_further_model_that_is_the_first_reads_the_same(whole: Path) -> None:
    for arm in report_of(whole)["arms"]:
        first, again = ({**each} for each in (arm["paired"], arm["further"].get("demo", {})))
        first.pop("confirmed", None)  # of the loop's translator, which reads in the first space alone
        same(again, first)


def test_a_dropped_null_space_leaves_top1_and_nothing_to_steer_through(whole: Path) -> None:
    arms = {arm["arm"]: arm for arm in report_of(whole)["arms"]}
    dropped, plain = (arms[name]["mean"] for name in ("dropped", "plain"))
    assert dropped["top1"] == plain["top1"]
    for figure in (HARM, "AS_neg", "IS", "null_share"):
        assert abs(dropped[figure]) < 1e-6 < abs(plain[figure]), figure
    for budget in BUDGETS:
        assert dropped[f"self {budget}"] == pytest.approx(dropped["self 1 sd"])
    assert arms["dropped"]["paired"]["top1"]["value"] == 0


@pytest.mark.parametrize("kept", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_study_goes_on_to_the_same_table(kept: int, whole: Path, tmp_path: Path) -> None:
    for run in RUNS[:kept]:
        arm, seed = run.split()
        shutil.copytree(whole / "arms" / arm / f"seed-{seed}", tmp_path / "tiny" / "arms" / arm / f"seed-{seed}")
    shutil.copy(whole / "config.yaml", tmp_path / "tiny" / "config.yaml")
    assert study(tmp_path / "tiny", "--resume", "true") == RUNS[kept:]
    same(report_of(tmp_path / "tiny"), report_of(whole))


def test_a_finished_study_is_read_back_never_overwritten(whole: Path) -> None:
    before = report_of(whole)
    with pytest.raises(SystemExit, match="already holds a run; go on with --resume true"):
        study(whole)
    assert study(whole, "--resume", "true") == []
    same(report_of(whole), before)


def test_a_changed_arm_is_made_again_with_what_depends_on_it(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "tiny")
    arms = [{**arm} for arm in SETTINGS["arms"]]
    arms[1]["note"] = "words change nothing"
    arms[0]["overrides"] = {"loss.weight": 0, "training.learning_rate": 0.002}
    nothing = pd.DataFrame({"by": [""]}), dict[str, Any]()
    with patch.object(recipe, "make_and_measure", lambda *_: nothing), patch.object(recipe, "report"):
        made = study(tmp_path / "tiny", "--resume", "true", arms=arms)
    assert made == ["plain 0", "mixed 0", "dropped 0", "plain 1", "mixed 1", "dropped 1"]


WRONG = [
    ({"name": "plain", "make": "nothing"}, "make"),
    ({"name": "../up"}, "arms[0].name: expected a name that does for a folder"),
    ({"name": "plain", "weights_from": "plain"}, "arms[0].weights_from: make: train begins with the starting model"),
    ({"name": "plain", "overrides": {"data.seed": 3}}, "overrides: data.seed: all arms share this"),
    ({"name": "plain", "make": "average"}, "arms[0] (plain): weights_from: expected an earlier arm"),
    ({"name": "plain", "overrides": {"loss.wieght": 1}}, "loss.wieght: no such key; did you mean loss.weight?"),
    ({"name": "plain", "overrides": {"training.epochs": "many"}}, "training.epochs: expected int, got 'many'"),
    (
        {"name": "plain", "overrides": {"training.best_checkpoint": 2}},
        "arms[0] (plain): training.best_checkpoint: needs images to choose on",
    ),
    ({"name": "plain", "make": "drop"}, "arms[0] (plain): make: the reference must train, got drop"),
    ({"name": "plain", "make": "align"}, "arms[0] (plain): align: empties the logits' null space"),
]


@pytest.mark.parametrize(("arm", "words"), WRONG)
def test_all_that_is_wrong_is_said(arm: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {**SETTINGS["model"], "invariance": "softmax"}
    with pytest.raises(SystemExit) as stop:
        study(tmp_path / "tiny", arms=[arm, arm], model=model, seeds=[0, 0], claim="c", ood=5, validation_per_class=0)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    if words.startswith("arms[0] ("):
        assert "arms: listed twice: plain" in said
        assert "seeds: expected different whole numbers from 0, got [0, 0]" in said
        assert "claim: there is no arm 'c'; arms are plain, plain" in said
        assert "ood: needs images in data.unlabeled" in said
    assert not (tmp_path / "tiny").exists()


def test_arms_without_randomness_run_once_and_sources_are_of_the_same_seed() -> None:
    before, plain = ArmConfig("before", make="leave"), ArmConfig("plain", overrides={"loss.weight": 0})
    mixed = ArmConfig("mixed", make="average", weights_from="plain")
    options: dict[str, Any] = {"arms": [before, plain, mixed], "claim": "plain"}
    works = plan_study(StudyConfig(seeds=[3, 4], **options), {"test images": "a"})
    found = [(work.arm.name, work.seed) for work in works]
    assert found == [("before", 3), ("plain", 3), ("mixed", 3), ("plain", 4), ("mixed", 4)]
    assert [work.trained for work in works] == [False, True, True, True, True]
    assert works[4].source is works[3]
    assert len({work.digest for work in works}) == len(works)
    others = plan_study(StudyConfig(seeds=[3], **options), {"test images": "b"})
    assert not {work.digest for work in works} & {work.digest for work in others}  # other images, another study


def test_every_arm_of_the_shipped_studies_can_be_built() -> None:
    for name in ("study_scenes", "study_imagenet16"):
        config = parse(StudyConfig, ["--config", str(Path(__file__).parents[1] / "configs" / f"{name}.yaml")])
        placebos = {arm.config.loss.placebo for arm in plan_study(config, {})}
        assert placebos == {"none", "random", "foreign", "shuffled", "everywhere"}
        assert len(config.seeds) == 3
