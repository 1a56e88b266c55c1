"""Every shipped configuration is read by the recipe it names; those of built-in scenes are built too."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from singreg.config import RunConfig, parse

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FEW = ["--data.scenes", "{train: 48, audit: 300, test: 30, bank: 8}", "--dry_run", "true"]
SCENES = [path for path in CONFIGS if "source: scenes" in path.read_text(encoding="utf-8")]


def recipe_of(path: Path) -> Any:
    """The module that the file's command names."""
    found = re.search(r"recipes/(\w+)\.py", path.read_text(encoding="utf-8"))
    assert found is not None, f"{path.name} opens without its command"
    return importlib.import_module(found[1])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_is_read_by_its_recipe(path: Path) -> None:
    known = [kind for kind in vars(recipe_of(path)).values() if isinstance(kind, type) and issubclass(kind, RunConfig)]
    config = parse(max(known, key=lambda kind: len(kind.__mro__)), ["--config", str(path)])
    assert config.out.startswith("runs/")
    assert not config.dry_run


@pytest.mark.parametrize("path", SCENES, ids=lambda path: path.stem)
def test_configurations_of_scenes_are_built_and_make_nothing(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINGREG_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(True)
    try:
        recipe_of(path).main(["--config", str(path), *FEW, "--out", str(tmp_path / "run")])
    finally:
        AcceleratorState._reset_state(True)
    shown = capsys.readouterr().out
    assert "dry run: nothing was" in shown
    assert not (tmp_path / "run").exists()
