"""recipes/analyze.py on tiny scenes: whole, again from the cache, on two processes, and on bad input."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest

import analyze as recipe
from singreg.models.classifier import Classifier
from singreg.tables import analysis_warnings
from singreg.translator import load_translator
from tests.demo import ASSETS
from tests.processes import run_same
from tests.recipe_run import run_recipe, same

TINY = [
    *("--data.scenes", "{train: 150, audit: 140, test: 61, bank: 10}", "--worst", "3", "--neighbours", "2"),
    *("--concepts", '["red", "grass", "water", "Red"]', "--chance_draws", "2"),
]
PLOTS = ("joint", "classes", "concepts", "images", "perturbations")
Found = dict[str, Any]


def analyze(out: Path, *more: str) -> Found:
    return run_recipe(recipe.main, out, *TINY, *more)


def test_the_files_and_what_they_say(analysis: tuple[Path, Found]) -> None:
    folder, found = analysis
    names = [f"plots/{name}.png" for name in PLOTS] + ["config.yaml", "report.md", "report.html"]
    assert all((folder / name).is_file() for name in names)
    assert found["measurement"]["images"] == found["concepts"]["images"] == 61
    assert len(found["concepts"]["overall"]["concept"]) == 3  # "Red" is "red" again
    assert 1 <= len(found["verdict"]) <= 4
    assert any("140 images for 256 features" in sentence for sentence in found["warnings"])
    rows = pd.read_parquet(folder / "scores.parquet")
    assert len(rows) == 61
    worst = rows.sort_values("AS/auditor")[:3]
    assert [image["index"] for image in found["images"]] == worst["index"].tolist()
    assert [image["attribute_score"] for image in found["images"]] == pytest.approx(worst["AS/auditor"], abs=1e-3)
    assert rows["AS/auditor"].mean() == pytest.approx(found["measurement"]["translators"]["auditor"]["overall"]["AS"])
    for name in ("fitted", "auditor"):
        ridge = load_translator(folder / f"translator-{name}.safetensors").info.ridge
        assert ridge == found["measurement"]["translators"][name]["ridge"]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") == len(PLOTS)
    said = {agreement: "\n".join(analysis_warnings(found["measurement"], agreement)) for agreement in (0.5, 0.9)}
    assert ("to 0.50" in said[0.5], "agree on" in said[0.9]) == (True, False)


def test_a_runs_translator_reads_and_features_are_cached(analysis: tuple[Path, Found], tmp_path: Path) -> None:
    """A run's folder with the packaged model, and the first analysis' auditor for its translator."""
    shutil.copytree(ASSETS / "demo_classifier", tmp_path / "run" / "model")
    shutil.copy(analysis[0] / "translator-auditor.safetensors", tmp_path / "run" / "translator-after.safetensors")
    with patch.object(Classifier, "features", None), patch.object(Classifier, "features_and_logits", None):
        found = analyze(tmp_path / "again", "--model.name", str(tmp_path / "run"))  # the backbone does not run again
    read = found["measurement"]["translators"]
    assert read["run"]["overall"] == read["auditor"]["overall"]

    def others(value: Any) -> Any:
        return {k: others(v) for k, v in value.items() if k != "run"} if isinstance(value, dict) else value

    for name in ("measurement", "chance", "information", "concepts", "images"):
        assert others(found[name]) == analysis[1][name], name


def test_two_processes_give_what_one_gives(analysis: tuple[Path, Found], tmp_path: Path) -> None:
    one, two = analysis[1], run_same(2, analyze, tmp_path / "two")[0]
    assert two["machine"]["processes"] == 2
    for name in ("measurement", "chance", "information", "concepts"):
        same(two[name], one[name])
    assert [image["image"] for image in one["images"]] == [image["image"] for image in two["images"]]
