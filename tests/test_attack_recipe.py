"""The attack's recipe on tiny scenes: whole, killed and resumed, and on bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import attack as recipe
from singreg.analysis.attack import LAGRANGIAN, TANGENT
from singreg.analysis.steering_curves import the_curve
from singreg.attack_tables import all_checks, attack_warnings
from singreg.config import parse

TINY = [
    *("--data.scenes", '{"train": 90, "audit": 80, "test": 50, "bank": 10}', "--translator.ridge", "1"),
    *("--images", "4", "--batch_size", "3", "--tau", "0.5", "--steps", "16", "--feature_pairs", "20"),
]
QUICK = ["--images", "3", "--steps", "2", "--restarts", "1", "--feature_pairs", "0", "--linf", "[2]"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with patch.dict("os.environ", SINGREG_CACHE=str(tmp_path_factory.mktemp("cache"))):
        yield


def run(out: Path, *more: str) -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    try:
        recipe.main(["--out", str(out), *TINY, *more])
    finally:
        AcceleratorState._reset_state(True)
    report = json.loads((out / "report.json").read_text()) if (out / "report.json").is_file() else {}
    return {name: value for name, value in report.items() if name not in ("seconds", "settings", "machine")}


def test_the_recipe_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, shown = run(tmp_path / "whole"), capsys.readouterr().out
    assert [(m["label"], m["nullity"]) for m in report["models"]] == [("demo", 246), ("demo without null space", 0)]
    assert [check for check in report["checks"] if not check["passed"]] == []
    assert report["verdict"][0].startswith("All ")
    assert len(report["verdict"]) <= 4
    assert report["verdict"][0] in shown
    assert {climb["kind"] for climb in report["climbs"]} == {TANGENT, LAGRANGIAN}
    assert all(s["readings"]["changed meaning"][0] == 0 for s in report["summaries"])  # one encoder is no witness
    assert len(report["transfers"]) == 4
    curves = {label: found["curves"] for label, found in report["features"].items()}
    options = {"attack": "maximiser", "crafted_on": "fitted", "judge": "fitted", "budget": "step"}
    assert the_curve(curves["demo"], **options, defence="")["figures"]["success"][-1] > 0.5
    dropped = the_curve(curves["demo without null space"], **options, defence="drop_null")
    assert set(dropped["figures"]["success"]) == {0.0}

    rows = pd.read_parquet(tmp_path / "whole" / "scores.parquet")
    assert len(rows) == 2 * 2 * 3 * 4
    assert (rows["target"] != rows["label"]).all()
    attacked = rows[rows["arm"] == "attack"]
    assert attacked["kept"].all()
    for name in ("rises", "attacked", "features", "twins"):
        assert (tmp_path / "whole" / "plots" / f"{name}.png").is_file()
    assert "Who was fooled" in (tmp_path / "whole" / "report.html").read_text()
    events = next((tmp_path / "whole" / "tensorboard").rglob("events*"))
    assert "rise/fitted/demo" in EventAccumulator(str(events)).Reload().Tags()["scalars"]


def test_a_killed_run_goes_on_with_the_next_model(tmp_path: Path) -> None:
    options = [*QUICK, "--feature_pairs", "10"]
    whole = run(tmp_path / "whole", *options)
    calls: list[str] = []
    right = recipe.attack_model

    def killed(config: Any, model: Any, *rest: Any) -> Any:
        calls.append(model.known_as)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(config, model, *rest)

    with patch.object(recipe, "attack_model", killed), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", *options)
    resume = [*options, "--resume", "true"]
    with patch.object(recipe, "hash_of_state", lambda _: "another"), pytest.raises(SystemExit, match="other demo"):
        run(tmp_path / "killed", *resume)
    with patch.object(recipe, "attack_model", killed):
        resumed = run(tmp_path / "killed", *resume)
    assert calls == ["demo", "demo without null space", "demo without null space"]
    for report in (whole, resumed):
        for found in report["features"].values():
            found["seconds"] = 0.0
    assert resumed == whole
    for path in (tmp_path / "whole" / "attacked").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_weaker_attacks_and_failed_checks_are_said() -> None:
    figures: dict[str, Any] = {"images": 128, "zero_shot": {"A": 0.3}, "encoders": [], "features": {}}
    figures["models"] = [{"label": "small", "classes": 64}, {"label": "large", "classes": 65}]
    weak, witness = attack_warnings(figures, [])
    assert weak.startswith("Warning: large: above 64 classes")
    assert "slice the heads alike" in weak
    assert "A names only 30%" in witness
    checks = [
        {"model": "m", "name": "success is exactly 0 with the null space dropped", "passed": False, "found": "0.1"}
    ]
    figures |= {
        "checks": [],
        "features": {"m": {"checks": [*checks, {**checks[0], "name": "another"}]}},
        "dropped": ["m"],
    }
    assert [check["passed"] for check in all_checks(figures)] == [False]  # of a dropped null space nothing else counts


def test_what_cannot_be_attacked_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="star is the only target of its own images"):
        run(tmp_path / "none", "--targets", '["star"]', "--images", "50")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "dry", "--dry_run", "true")
    shown = capsys.readouterr().out
    assert "demo without null space: (3, 64, 64) to features 256, logits 10" in shown
    assert "budgets linf 2/255, linf 8/255" in shown
    assert list(tmp_path.iterdir()) == []


def test_bad_values_are_shown_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(
            tmp_path,
            "--linf",
            "[0, 8]",
            "--l2",
            "[-1]",
            "--tau",
            "0",
            "--models",
            '[{"name": "demo"}, {"name": "demo"}]',
        )
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    for part in (
        "linf: expected different sizes",
        "tau: expected a number above 0",
        "listed twice: demo",
        "l2: expected",
    ):
        assert part in shown, part


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("attack_scenes", ["demo", "demo without null space"]),
        ("attack_imagenet16", ["pretrained", "control", "SingLoss", "null dropped"]),
    ],
)
def test_shipped_configurations_parse(name: str, labels: list[str]) -> None:
    path = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    config = parse(recipe.AttackConfig, ["--config", str(path)])
    assert [model.known_as for model in config.models] == labels
    assert [budget.label for budget in config.budgets][:2] == ["linf 2/255", "linf 8/255"]
