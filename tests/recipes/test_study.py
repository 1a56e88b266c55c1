"""recipes/study.py on tiny scenes: files, resuming arm by arm, changed arms, bad configurations."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

from recipes.study import main
from singreg.training.study import Study
from singreg.training.study_store import ArmStore

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "data": {"scenes_train": 48, "scenes_audit": 60, "scenes_test": 30, "scenes_bank": 0, "augmentation": "none", "image_size": 32},
    "model": {"name": "test_resnet", "pretrained": False, "head": "new"},
    "training": {"epochs": 1, "batch_size": 16, "checkpoint_every": 1},
    "translator": {"refreshes": 0, "ridge": 1.0},
    "auditor": {"ridge": 1.0},
    "halves": False,
    "corruptions": [],
    "attributes": True,
    "validation_per_class": 2,
    "agreement_sizes": [6, 12, 10000],
    "seeds": [0, 1],
    "arms": [
        {"name": "plain", "train": "head", "role": "baseline", "overrides": {"loss.weight": 0}},
        {"name": "sing", "overrides": {"training.learning_rate": 0.001}},
        {"name": "mixed", "from": "sing", "train": "none", "interpolate": 0.5, "seeds": 1},
        {"name": "aligned", "train": "head", "aligned": True, "constrain": True, "seeds": 1},
        {"name": "dropped", "train": "none", "drop_null": True},
    ],
}
RUNS = ["plain 0", "sing 0", "mixed 0", "aligned 0", "dropped 0", "plain 1", "sing 1"]


def study(runs: Path, cache: Path, *more: str, **changes: Any) -> None:
    file = runs / "study.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    AcceleratorState._reset_state(True)
    try:
        main(["--config", str(file), "--runs", str(runs), "--cache", str(cache), *more])
    finally:
        AcceleratorState._reset_state(True)


def report_of(folder: Path) -> dict[str, Any]:
    """report.json without what may differ between two runs of the same configuration."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    for name in ("seconds", "settings", "machine"):
        report.pop(name)
    for arm in report["arms"]:
        arm.pop("seconds")
    return report


def same(found: Any, wanted: Any) -> None:
    """Equal in every word and count; numbers but for rounding, which follows where memory happens to lie."""
    assert type(found) is type(wanted)
    if isinstance(found, dict):
        assert found.keys() == wanted.keys()
        for key in found:
            same(found[key], wanted[key])
    elif isinstance(found, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(found, float):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-3, nan_ok=True)
    else:
        assert found == wanted


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    runs = tmp_path_factory.mktemp("studies")
    study(runs, cache)
    return runs / "tiny"


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arms that were made, in order."""
    found: list[str] = []
    original = Study._work

    def noted(self: Study, maker: Any, other: Any, arm: Any, store: ArmStore, source: Any) -> None:
        found.append(f"{arm.name} {store.seed}")
        original(self, maker, other, arm, store, source)

    monkeypatch.setattr(Study, "_work", noted)
    return found


def test_the_folder_holds_the_report_and_every_finished_arm(whole: Path) -> None:
    for name in ("config.yaml", "report.json", "report.md", "report.html", "agreement.json", "plots/study.png", "plots/pareto.png"):
        assert (whole / name).is_file(), name
    for run in RUNS:
        arm, seed = run.split()
        names = {path.name for path in (whole / "arms" / arm / f"seed-{seed}").iterdir()}
        assert names == {"hash.txt", "measurement.json", "rows.npz", "weights.safetensors"}, run
    assert not (whole / "features").exists()
    arms = {arm["arm"]: arm for arm in report_of(whole)["arms"]}
    assert {name: arm["seeds"] for name, arm in arms.items()} == {
        "plain": [0, 1], "sing": [0, 1], "mixed": [0], "aligned": [0], "dropped": [0],
    }  # fmt: skip
    assert arms["dropped"]["omitted"].startswith("no null space")
    assert arms["dropped"]["extra"]["logit_change"] < 1e-3
    assert {"AS_neg", "IS", "step", "top1", "harmless_r2"} <= set(arms["sing"]["paired"])
    assert "null_space_r2/color: red" in arms["sing"]["mean"]
    # The aligned head's null space is clean for the very translator it was aligned with.
    assert arms["aligned"]["mean"]["AS_neg/frozen"] < 0.5 * arms["plain"]["mean"]["AS_neg/frozen"]
    text = (whole / "report.md").read_text()
    assert "## Known attributes" in text
    assert "No claim: the auditor was fitted on" in text
    report = report_of(whole)
    assert [point["images"] for point in report["agreement"]] == [6, 12]
    assert arms["sing"]["validation"]["images"] == 20
    assert arms["dropped"]["validation"] == {}


@pytest.mark.parametrize(
    "kept", [["plain 0", "sing 0", "mixed 0", "aligned 0", "dropped 0"], pytest.param(["plain 0"], marks=pytest.mark.slow)]
)
def test_a_study_that_was_killed_goes_on_and_gives_the_same_table(
    kept: list[str], whole: Path, cache: Path, tmp_path: Path, worked: list[str]
) -> None:
    for run in kept:
        arm, seed = run.split()
        shutil.copytree(whole / "arms" / arm / f"seed-{seed}", tmp_path / "tiny" / "arms" / arm / f"seed-{seed}")
    shutil.copy(whole / "config.yaml", tmp_path / "tiny" / "config.yaml")
    study(tmp_path, cache, "--resume", "true")
    assert worked == [run for run in RUNS if run not in kept]
    same(report_of(tmp_path / "tiny"), report_of(whole))
    lead = [(folder / "report.md").read_text().split("## The arms")[0] for folder in (tmp_path / "tiny", whole)]
    assert lead[0] == lead[1]


def test_a_finished_study_is_read_back_and_never_overwritten_unasked(whole: Path, cache: Path, worked: list[str]) -> None:
    before = report_of(whole)
    with pytest.raises(SystemExit, match="already holds a run; use --resume true"):
        study(whole.parent, cache)
    study(whole.parent, cache, "--resume", "true")
    assert not worked
    assert report_of(whole) == before


def test_a_changed_arm_is_made_again_with_what_depends_on_it_and_says_so(
    whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "tiny")
    arms = [{**arm} for arm in SETTINGS["arms"]]
    arms[1] = {**arms[1], "overrides": {"training.learning_rate": 0.002}}
    arms[0] = {**arms[0], "note": "words change nothing"}
    wanted: list[str] = []

    def stop(self: Study, maker: Any, other: Any, arm: Any, store: ArmStore, source: Any) -> None:
        wanted.extend(f"{each.name} {kept.seed}" for each, kept, _ in self.stores() if kept.load() is None)
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "_work", stop)
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        study(tmp_path, cache, "--resume", "true", arms=arms)
    assert wanted == ["sing 0", "mixed 0", "sing 1"]
    assert "arm sing, seed 0 was made with another configuration and is made again" in caplog.text


def test_all_that_is_wrong_with_a_configuration_is_said_at_once(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [
        {"name": "a", "train": "nothing", "alligned": True},
        {"name": "a", "from": "later", "overrides": {"loss.wieght": 1, "data.seed": 3, "training.epochs": "many", "training.clip": -1}},
        {"name": "later", "constrain": True, "interpolate": 2},
        {"overrides": {"loss.terms": {"leek": 1}}},
        {"name": "../up", "train": "head", "overrides": {"loss.balance": 0.1}},
    ]
    with pytest.raises(SystemExit) as stop:
        study(tmp_path, cache, arms=arms, seeds=[0, 0, -1], reference="plain", corruptions=["fog"], claim="b")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    for words in (
        "arm a: alligned: no such key; did you mean aligned?", "arm a: train: expected one of none, head, all", "arms: listed twice: a",
        "arm a: from: there is no arm 'later' before it", "loss.wieght: no such key; did you mean loss.weight?",
        "data.seed: all arms share this", "training.epochs: expected int, got 'many'", "training.clip: expected a number above 0",
        "arm later: constrain keeps an aligned head's rows", "arm later: interpolate: expected a share", "arm number 4: name: expected",
        "loss.terms.leek: no such term", "arm ../up: its name must do for a folder", "loss.balance is for fine-tuning",
        "seeds: listed twice: 0", "got -1", "reference: there is no arm 'plain'", "claim: there is no arm 'b'", "no such corruption: fog",
    ):  # fmt: skip
        assert words in said, words
    assert not (tmp_path / "tiny").exists()


def test_an_aligned_head_is_refused_where_it_cannot_empty_the_null_space(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study(tmp_path, cache, "--model.invariance", "softmax", arms=[{"name": "aligned", "aligned": True}])
    assert "arm aligned: aligned empties the logits' null space" in capsys.readouterr().err


def test_a_dry_run_lists_the_arms_and_writes_nothing(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path, cache, "--dry_run", "true")
    said = capsys.readouterr().out
    assert "mixed: train none, from sing, 0 steps, 1 seed(s)" in said
    assert not (tmp_path / "tiny").exists()
