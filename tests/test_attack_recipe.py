"""The attack's recipe on tiny scenes: whole, killed and resumed, and on bad input."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest

import attack as recipe
from singreg.analysis import attack
from singreg.analysis.attack import LAGRANGIAN, TANGENT
from singreg.plots.steering import attack_verdict, attack_warnings
from tests.recipe_run import run_recipe

MODELS = '[{"name": "demo"}, {"name": "demo", "label": "dropped", "drop_null": true}]'
TINY = [
    *("--data.scenes", '{"train": 90, "audit": 80, "test": 50, "bank": 10}', "--translator.ridge", "1"),
    *("--models", MODELS, "--images", "4", "--batch_size", "3", "--tau", "0.5", "--steps", "16"),
]


def run(out: Path, *more: str) -> dict[str, Any]:
    report = run_recipe(recipe.main, out, *TINY, *more)
    return {name: value for name, value in report.items() if name not in ("seconds", "settings", "machine")}


def test_the_recipe_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, shown = run(tmp_path / "whole"), capsys.readouterr().out
    assert [(m["label"], m["nullity"]) for m in report["models"]] == [("demo", 246), ("dropped", 0)]
    assert [check for check in report["checks"] if not check["passed"]] == []
    assert report["verdict"][0].startswith("All ")
    assert report["verdict"][0] in shown
    assert {climb["kind"] for climb in report["climbs"]} == {TANGENT, LAGRANGIAN}
    assert len(report["transfers"]) == 4
    assert list(report["features"]) == ["demo"]
    rows = pd.read_parquet(tmp_path / "whole" / "scores.parquet")
    assert len(rows) == 2 * 2 * 2 * 4
    assert (rows["target"] != rows["label"]).all()
    assert rows.loc[rows["arm"] == "attack", "kept"].all()
    for model in report["models"]:  # τ is a share of the model's own spread, and the attack uses nearly all of it
        largest = rows[(rows["model"] == model["label"]) & (rows["arm"] == "attack")]["logit_change"].max()
        assert 0.5 < largest / (0.5 * model["logit_sd"]) <= 1
    for name in ("rises", "attacked", "features", "twins"):
        assert (tmp_path / "whole" / "plots" / f"{name}.png").is_file()
    assert "Natural twins" in (tmp_path / "whole" / "report.html").read_text()

    with patch.object(recipe, "hash_of_state", lambda _: "another"), pytest.raises(SystemExit, match="other demo"):
        run(tmp_path / "whole", "--resume", "true")
    with patch.object(attack, "attack_images", None):  # finished batches are read
        assert run(tmp_path / "whole", "--resume", "true") == report


def test_weak_attacks_failed_checks_and_blind_encoders_are_said() -> None:
    summary = {"model": "m", "arm": "attack", "budget": "b", "rise": {"fitted": [1.0]}, "success": {"fitted": [0.5]}}
    figures: dict[str, Any] = {"images": 128, "tau": 1.0, "zero_shot": {"A": 0.3}, "encoders": []}
    figures |= {"models": [{"label": "small", "classes": 64}, {"label": "large", "classes": 65}]}
    weak, witness = attack_warnings(figures)
    assert weak.startswith("Warning: large: above 64 classes")
    assert "A names only 30%" in witness
    figures |= {"checks": [{"model": "m", "name": "climbs", "passed": False}], "summaries": [summary]}
    first, second, third = attack_verdict(figures)
    assert first == "Checks failed: climbs (m). Nothing may be claimed of robustness."
    assert "m +1.0° (fitted), target first for 50%" in second
    assert "0 of 1 do" in third
