"""README: its Python runs, its commands exist and are what CI runs, its figures come from the reports kept beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from singreg.loss_terms import PRESETS, TERMS
from singreg.reporting.readme import block_of, insert

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line]
FIGURES = re.findall(r"<!-- begin generated: (\w+) -->", TEXT)


def test_it_has_code_and_commands() -> None:
    assert len(PYTHON) >= 3
    assert len(SHELL) >= 6


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a block writes beside itself
    exec(compile(code, "README.md", "exec"), {})


def test_the_snippet_for_a_checkpoint_of_ones_own_gives_a_folder_whose_rows_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from singreg import Classifier

    monkeypatch.chdir(tmp_path)
    (code,) = [code for language, code in BLOCKS if language == "py"]
    trained = timm.create_model("resnet50", num_classes=16)
    torch.save({"state_dict": trained.state_dict()}, "model_best.pth.tar")
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    turned = found["names"][::-1]
    sliced = Classifier.from_timm("local-dir:mine", head_mode="slice", class_names=turned)
    assert torch.equal(sliced.weight, trained.fc.weight.flip(0))


@pytest.mark.parametrize("line", SHELL)
def test_recipes_configurations_and_flags_exist(line: str) -> None:
    from recipes import analyze, compare, finetune, steer, study
    from singreg.evaluation.analyze_config import parse_analyze
    from singreg.evaluation.compare_config import parse_compare
    from singreg.evaluation.steer_config import parse_steer
    from singreg.evaluation.steer_pixels_config import asks_for_pixels, parse_pixels
    from singreg.training.config import parse_finetune
    from singreg.training.study_config import parse_study

    parsers = {
        finetune: parse_finetune, analyze: parse_analyze, steer: parse_steer, compare: parse_compare, study: parse_study,
    }  # fmt: skip
    known = {f"recipes/{module.__name__.rpartition('.')[2]}.py": parse for module, parse in parsers.items()}
    for recipe, arguments in re.findall(r"(recipes/\w+\.py)((?: --[\w.]+ \S+)*)", line):
        words = arguments.split()
        assert "--config" in words
        path = ROOT / words[words.index("--config") + 1]
        assert path.is_file(), path
        given = [str(path) if word == words[words.index("--config") + 1] else word for word in words]
        (parse_pixels if recipe == "recipes/steer.py" and asks_for_pixels(given) else known[recipe])(given)


def test_every_preset_and_every_term_is_named_with_its_weights() -> None:
    for preset, terms in PRESETS.items():
        assert f"`{preset}`" in TEXT, preset
        assert len(terms) > 0
    for term in TERMS:
        assert f"`{term}`" in TEXT, term
    assert ", ".join(f"{name} {weight:g}" for name, weight in PRESETS["sing"].items()) in TEXT


def test_the_test_command_is_what_ci_runs() -> None:
    (command,) = [line for line in SHELL if "pytest" in line]
    assert command.endswith("pip install -e '.[test]' && python -m pytest")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install --quiet --editable '.[test]'" in ci
    assert "\npython -m pytest" in ci


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_those_of_the_kept_report(name: str) -> None:
    report = ROOT / ".github" / f"{name}.json"
    assert insert(TEXT, name, block_of(report)) == TEXT, f"run python -m singreg.reporting.readme README.md {name}=RUN"


def test_figures_named_here_are_known_configurations_and_the_picture_is_there() -> None:
    assert FIGURES == ["demo", "imagenet16_lite0", "steer_pixels", "study_imagenet16", "study_scenes"]
    for name in FIGURES:
        assert yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert TEXT.count("<details>") == TEXT.count("</details>") > 3
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / picture).is_file(), picture
