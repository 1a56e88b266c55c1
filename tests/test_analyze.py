"""recipes/analyze.py on tiny scenes: whole, again from the cache, on two processes, and on bad input."""

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import analyze as recipe
from singreg.models.classifier import Classifier
from singreg.tables import analysis_warnings
from singreg.translator import load_translator
from tests.demo import ASSETS
from tests.processes import run_processes
from tests.recipe_run import run_recipe

TINY = [
    *("--data.scenes", "{train: 150, audit: 140, test: 61, bank: 10}", "--worst", "3", "--neighbours", "2"),
    *("--concepts", '["red", "grass", "water", "Red"]', "--chance_draws", "2"),
]
PLOTS = ("joint", "classes", "concepts", "images", "perturbations")
Found = dict[str, Any]


def analyze(out: Path, *more: str) -> Found:
    return run_recipe(recipe.main, out, *TINY, *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, analyze(folder)


def test_the_files_and_what_they_say(whole: tuple[Path, Found]) -> None:
    folder, found = whole
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


def test_a_runs_model_is_read_by_its_translator_and_features_are_cached(
    whole: tuple[Path, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder with the packaged model, and the first analysis' auditor for its translator."""

    def forbidden(*_: object) -> None:
        raise AssertionError("the backbone ran again although its features are cached")

    monkeypatch.setattr(Classifier, "features", forbidden)
    monkeypatch.setattr(Classifier, "features_and_logits", forbidden)
    shutil.copytree(ASSETS / "demo_classifier", tmp_path / "run" / "model")
    shutil.copy(whole[0] / "translator-auditor.safetensors", tmp_path / "run" / "translator-after.safetensors")
    found = analyze(tmp_path / "again", "--model.name", str(tmp_path / "run"))
    read = found["measurement"]["translators"]
    assert read["run"]["overall"] == read["auditor"]["overall"]

    def others(value: Any) -> Any:
        return {k: others(v) for k, v in value.items() if k != "run"} if isinstance(value, dict) else value

    for name in ("measurement", "chance", "information", "concepts", "images"):
        assert others(found[name]) == whole[1][name], name


def in_process(rank: int, world: int, folder: str, cache: str) -> Found:
    os.environ["SINGREG_CACHE"] = cache
    return analyze(Path(folder))


def test_two_processes_give_what_one_gives(whole: tuple[Path, Found], tmp_path: Path) -> None:
    one, two = whole[1], run_processes(2, in_process, str(tmp_path / "two"), os.environ["SINGREG_CACHE"])[0]
    assert two["machine"]["processes"] == 2
    for name in ("fitted", "auditor"):
        mine, theirs = (r["measurement"]["translators"][name]["overall"] for r in (one, two))
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert one["concepts"]["overall"]["AS"] == pytest.approx(two["concepts"]["overall"]["AS"], abs=1e-3)
    assert [image["image"] for image in one["images"]] == [image["image"] for image in two["images"]]
    assert one["information"]["accuracy"] == pytest.approx(two["information"]["accuracy"])
    observed = (r["chance"]["auditor"]["paper"]["observed"] for r in (one, two))
    assert next(observed) == pytest.approx(next(observed), abs=1e-3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--concepts", '["no/such/file.txt"]'], "no/such/file.txt"),
        (["--concepts", "[]"], "concepts"),
        (["--concept_templates", '["a photo"]'], "{concept}"),
        (["--neighbours", "5000"], "neighbours"),
        (["--chance_draws", "1"], "chance_draws"),
        (["--mlp", '["mlp3", "mlp3"]'], "mlp"),
    ],
)
def test_bad_input_is_said(more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        analyze(tmp_path / "bad", *more)
    assert words in f"{stop.value} {capsys.readouterr().err}"
    assert not (tmp_path / "bad").exists()
