"""recipes/steer.py from end to end on tiny scenes: files, two processes, what cannot be steered, bad input."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import steer as recipe
from tests.processes import run_same
from tests.recipe_run import run_recipe, same

TINY = [
    *("--data.scenes", "{train: 90, audit: 80, test: 50, bank: 10}", "--images_per_class", "2"),
    *("--sources", '["circle", "star"]', "--targets", '["star", "heart"]', "--prompts", '["an image of grass"]'),
]


def steer(out: Path, *more: str) -> dict[str, Any]:
    return run_recipe(recipe.main, out, *TINY, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, steer(folder)


def test_the_recipe_from_end_to_end(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    written = {f"report.{kind}" for kind in ("json", "md", "html")} | {"plots/curves.png", "plots/pairs.png"}
    assert written | {"config.yaml", "scores.parquet"} <= files
    assert report["kind"] == "steer"
    assert (report["sources"], report["targets"]) == (["circle", "star"], ["star", "heart", "an image of grass"])
    names = ("fitted", "auditor")
    assert [(p["attacker"], p["judge"]) for p in report["pairs"]] == [(a, j) for a in names for j in names]
    own = report["pairs"][0]
    assert (own["overall"]["pairs"], own["overall"]["images"]) == (5, 4)  # star to star is left out
    assert own["matrices"]["images"] == [[2, 2, 2], [0, 2, 2]]
    assert own["logit_change"] < 1e-9
    assert len(report["curves"]) == 4 * 2
    fitted = {name: t["fit_images"] for name, t in report["measurement"]["translators"].items()}
    assert fitted == {"fitted": 100, "auditor": 80}
    assert (report["natural"]["images"], report["natural"]["fit_images"]) == (50, 100)
    assert any("100 images for 256" in warning for warning in report["warnings"])
    assert len(report["verdict"]) == 4
    events = EventAccumulator(str(folder / "tensorboard" / "steer")).Reload()
    assert events.Tags()["images"] == ["plots/curves", "plots/pairs"]
    curve = next(c for c in report["curves"] if (c["budget"], c["attacker"], c["judge"]) == ("step", *names))
    logged = events.Scalars("step (x 1000)/success/fitted attacks, auditor judges")
    assert [event.step for event in logged] == [round(1000 * step) for step in curve["grid"]]
    assert [event.value for event in logged] == pytest.approx(curve["figures"]["success"])


def test_two_processes_find_what_one_finds(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    one, two = finished[1], run_same(2, steer, tmp_path / "two")[0]
    assert two["machine"]["processes"] == 2
    for part in ("pairs", "curves", "natural"):
        same(two[part], one[part])


def test_non_linear_translators_attack_and_judge(tmp_path: Path) -> None:
    report = steer(tmp_path / "mlp", "--mlp", '["mlp3"]', "--image_score", "10")
    names = ["fitted", "auditor", "mlp3"]
    assert [(p["attacker"], p["judge"]) for p in report["pairs"]] == [(a, j) for a in names for j in names]
    own = report["pairs"][-1]
    assert own["overall"]["reachable"] > 0.5
    assert own["logit_change"] < 1e-9
    assert own["overall"]["AS"] > 1
    assert {(c["attacker"], c["judge"]) for c in report["curves"]} == {(a, j) for a in names for j in names[:2]}


def test_a_run_that_reaches_nothing_says_so(tmp_path: Path) -> None:
    """An image score that no null step can turn to: no figure, no crash, a warning for each attacker."""
    report = steer(tmp_path / "far", "--image_score", "179.5")
    assert [p["overall"]["reachable"] for p in report["pairs"]] == [0.0] * 4
    assert report["pairs"][0]["overall"]["AS_abs"] is None
    assert sum("reaches 179.5°" in warning for warning in report["warnings"]) == 2
    assert "No image can be steered" in report["verdict"][0]
    assert "nan" not in (tmp_path / "far" / "report.md").read_text().lower()
