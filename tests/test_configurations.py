"""Configurations: shipped ones are read and tried; damaged or wrong ones are refused in one message, before work."""

import copy
import importlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from singreg.config import RunConfig, parse
from tests.test_analyze import analyze
from tests.test_attack_recipe import run as attack
from tests.test_compare import DEMO, compare
from tests.test_steer import steer
from tests.tiny_run import finetune

ROOT = Path(__file__).parents[1]
RECIPES = {name: f"{name}_demo" for name in ("analyze", "steer", "compare")}
RECIPES |= {"finetune": "demo", "attack": "attack_scenes", "study": "study_scenes"}
VALUES: list[Any] = [None, True, -1, 0, 2.5, 1e308, float("nan"), float("inf"), -(10**30), "", " ", "no", "1", "1e3"]
VALUES += ["../up", "\x1b[31mred", "\u202eevil {class}", "x" * 5000, "local-dir:/nowhere", "~/x", "a,b"]
VALUES += [[], [[]], [None], [1, "a", {}], {}, {"a": {"b": {"c": 1}}}, {"": 1}, {1: 2}, {None: None}]
VALUES += [{"class_path": "os.system"}]
RAW = """!!python/object/apply:os.system ['true'] | !unknown 3 | !!int "" | !!float '' | 2024-13-45 | !!binary '***'
!!set {a, b} | &a [*a] | [1 | {a: 1 | {a: 1, a: 2} | << | *nothing | @ | 1_0_0 | 1:30:00 | .nan | ~ | "\\x1b[2J {class}"
? [a, b] : 1 | %YAML 9.9""".replace("\n", " | ").split(" | ")
RAW += ["|", "0x" + "f" * 9000, "[" * 400 + "]" * 400]


def configuration_of(recipe: str) -> type[RunConfig]:
    kinds = [kind for kind in vars(importlib.import_module(recipe)).values() if isinstance(kind, type)]
    return next(k for k in kinds if issubclass(k, RunConfig) and k.__name__.lower() == f"{recipe}config")


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return ([path] if path else []) + [place for key, inner in items for place in _places(inner, (*path, key))]


def _change(content: dict[str, Any], rng: random.Random, marks: dict[str, str]) -> None:
    """Misspell a key, or put another value, a value only YAML's text can express, or a whole section in its place."""
    path = rng.choice(_places(content))
    parent: Any = content
    for step in path[:-1]:
        parent = parent[step]
    kind = rng.choice(["key", "value", "value", "raw", "move"])
    if kind == "key" and isinstance(parent, dict):
        parent[str(path[-1]) + rng.choice(["x", "", ".", " ", "\x07", "ß"])] = parent.pop(path[-1])
    elif kind == "raw":
        mark = f"RAW{len(marks)}MARK"
        parent[path[-1]], marks[mark] = mark, rng.choice(RAW)
    elif kind == "move":
        parent[path[-1]] = {rng.choice(list(content)): copy.deepcopy(parent[path[-1]])}
    else:
        parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))


def configuration(base: str, rng: random.Random) -> str:
    """Return a shipped configuration's text with one to six things wrong with it."""
    content, marks = yaml.safe_load(base), dict[str, str]()
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        if content:
            _change(content, rng, marks)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=rng.random() < 0.5)
    for mark, raw in marks.items():
        text = text.replace(mark, raw)
    letters = list(text)
    for _ in range(rng.randrange(1, 5) if rng.random() < 0.15 else 0):
        letters[rng.randrange(len(letters))] = chr(rng.choice([0, 9, 10, 27, 34, 42, 58, 91, 123, 233, 0x2028]))
    return "".join(letters)


@pytest.mark.parametrize("count", [6, pytest.param(34, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_damage_gives_no_traceback(recipe: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, file, refused = random.Random(recipe), tmp_path / "fuzzed.yaml", 0
    base = (ROOT / "configs" / f"{RECIPES[recipe]}.yaml").read_text(encoding="utf-8")
    for _ in range(count):
        text, given = configuration(base, rng), ["--config", str(file)]
        file.write_text(text, encoding="utf-8")
        if rng.random() < 0.3:
            key = rng.choice(["seed", "training.epochs", "vlm.templates", "data", ""])
            given += [f"--{key}", rng.choice([*RAW[:20], "3"])]
        status = 0
        try:
            parse(configuration_of(recipe), given)
        except SystemExit as error:
            status, refused = error.code, refused + 1
        said = capsys.readouterr().err.strip()
        assert (status, bool(said), "Traceback" in said) in [(0, False, False), (2, True, False)], (text, given, said)
    assert refused >= count / 2


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
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


CASES: list[tuple[Callable[..., Any], list[Any], list[str]]] = [
    (analyze, ["--concepts", '["no/such/file.txt"]'], ["no/such/file.txt"]),
    (analyze, ["--concepts", "[]", "--chance_draws", "1"], ["concepts: expected at least", "chance_draws: expected"]),
    (analyze, ["--neighbours", "5000"], ["neighbours: the gallery"]),
    (analyze, ["--concept_templates", '["a photo"]', "--mlp", '["mlp3", "mlp3"]'], ["{concept}", "mlp"]),
    (finetune, ["--vlm.pretrained", "openai"], ["brings its own weights: set vlm.pretrained to null"]),
    (finetune, ["--data.scenes", "{train: 80, audit: 0, test: 9}"], ["no image is left for the auditor"]),
    (finetune, ["--vlm.name", "local-dir:no/such/folder"], ["no/such/folder"]),
    (finetune, ["--model.name", "no_such_model"], ["no_such_model"]),
    (finetune, ["--model.name", "test_vit", "--model.pretrained", "false", "--model.head", "keep"], ["null space"]),
    (steer, ["--targets", "[]", "--prompts", "[]"], ["targets: expected class names"]),
    (steer, ["--prompts", '["a dog", "..."]'], ["no text in '...'"]),
    (steer, ["--image_score", "180", "--images_per_class", "0"], ["image_score: expected", "images_per_class"]),
    (steer, ["--sources", '["circel"]'], ["'circel' (near: circle"]),
    (steer, ["--targets", "circle", "--sources", "circle", "--prompts", "[]"], ["only target is the source itself"]),
    (compare, [[DEMO]], ["models: expected at least two to compare, got 1"]),
    (compare, [[DEMO, {"name": " "}]], ["models[1].name: expected words"]),
    (compare, [[DEMO, {"naem": "x"}]], ["naem"]),
    (attack, ["--linf", "[8, 2, 0]", "--tau", "0"], ["linf: expected rising", "linf: expected a number", "tau: "]),
    (attack, ["--models", '[{"name": "demo"}, {"name": "demo"}]'], ["listed twice: demo"]),
]


@pytest.mark.parametrize(("recipe", "given", "words"), CASES)
def test_bad_input_is_said(
    recipe: Any, given: Any, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        recipe(tmp_path / "bad", *given)
    said = f"{stop.value} {capsys.readouterr().err}"
    assert all(part in said for part in words), said
    assert list(tmp_path.iterdir()) == []
