"""Every shipped configuration is read by the recipe it names; those of built-in scenes are built too."""

import importlib
import re
from pathlib import Path

import pytest

from singreg.config import parse
from tests.test_fuzz import configuration_of

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FEW = ["--data.scenes", "{train: 48, audit: 300, test: 30, bank: 8}", "--dry_run", "true"]
SCENES = [path for path in CONFIGS if "source: scenes" in path.read_text(encoding="utf-8")]


def recipe_of(path: Path) -> str:
    found = re.search(r"recipes/(\w+)\.py", path.read_text(encoding="utf-8"))
    assert found is not None, f"{path.name} opens without its command"
    return found[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_is_read_by_its_recipe(path: Path) -> None:
    assert f"--config configs/{path.name}" in path.read_text(encoding="utf-8")
    config = parse(configuration_of(recipe_of(path)), ["--config", str(path)])
    assert config.out.startswith("runs/")
    assert not config.dry_run


@pytest.mark.parametrize("path", SCENES, ids=lambda path: path.stem)
def test_scenes_are_tried_and_nothing_is_made(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(recipe_of(path)).main(["--config", str(path), *FEW, "--out", str(tmp_path / "run")])
    assert "dry run: nothing was" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
