"""Configurations no one would write: each is read, or all its mistakes stand in one message, and never a traceback.

python -m tests.faults.fuzz --count 200
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import random
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import yaml

from singreg.config import RunConfig, parse

ROOT = Path(__file__).parents[2]
RECIPES = {
    "finetune": "demo",
    "analyze": "analyze_demo",
    "steer": "steer_demo",
    "attack": "attack_scenes",
    "compare": "compare_demo",
    "study": "study_scenes",
}
VALUES: list[Any] = [None, True, -1, 0, 2.5, 1e308, float("nan"), float("inf"), -(10**30), "", " ", "no", "1", "1e3"]
VALUES += [
    "../up",
    "\x1b[31mred",
    "\u202eevil {class}",
    "x" * 5000,
    "local-dir:/nowhere",
    [],
    [[]],
    [None],
    [1, "a", {}],
]
VALUES += [{}, {"a": {"b": {"c": 1}}}, {"": 1}, {1: 2}, {None: None}, {"class_path": "os.system", "init_args": {}}]
RAW = [
    "!!python/object/apply:os.system ['true']",
    "!unknown 3",
    '!!int ""',
    "!!float ''",
    "2024-13-45",
    "!!binary '***'",
]
RAW += [
    "!!set {a, b}",
    "0x" + "f" * 9000,
    "[" * 400 + "]" * 400,
    "&a [*a]",
    "[1",
    "{a: 1",
    "{a: 1, a: 2}",
    "<<",
    "*nothing",
]
RAW += ["|", "@", "1_0_0", "1:30:00", ".inf", ".nan", "~", '"\\x1b[2J {class}"', "? [a, b] : 1", "%YAML 9.9"]


def configuration_of(recipe: str) -> type[RunConfig]:
    """Return the configuration class of a recipe."""
    kinds = [kind for kind in vars(importlib.import_module(recipe)).values() if isinstance(kind, type)]
    return next(k for k in kinds if issubclass(k, RunConfig) and k.__name__.lower() == f"{recipe}config")


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


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
        marks[mark] = rng.choice(RAW)
        parent[path[-1]] = mark
    elif kind == "move":
        parent[path[-1]] = {rng.choice(list(content) or ["a"]): copy.deepcopy(parent[path[-1]])}
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
    if rng.random() < 0.15:
        letters = list(text)
        for _ in range(rng.randrange(1, 5)):
            letters[rng.randrange(len(letters))] = chr(rng.choice([0, 9, 10, 27, 34, 42, 58, 91, 123, 233, 0x2028]))
        text = "".join(letters)
    return text


def fuzz(count: int, scratch: Path, *, seed: int = 0) -> tuple[int, int, list[str]]:
    """Return how many configurations were read, how many refused in one message, and the stories of all others."""
    rng, file = random.Random(seed), scratch / "fuzzed.yaml"
    kinds = {name: configuration_of(name) for name in RECIPES}
    bases = {name: (ROOT / "configs" / f"{RECIPES[name]}.yaml").read_text(encoding="utf-8") for name in RECIPES}
    read, refused, wrong = 0, 0, []
    for place in range(count):
        name = list(RECIPES)[place % len(RECIPES)]
        text, said = configuration(bases[name], rng), io.StringIO()
        file.write_text(text, encoding="utf-8")
        given = ["--config", str(file)]
        if rng.random() < 0.3:
            given += [
                f"--{rng.choice(['seed', 'training.epochs', 'vlm.templates', 'data', ''])}",
                rng.choice([*RAW[:20], "3"]),
            ]
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                parse(kinds[name], given)
            read += 1
        except SystemExit as error:
            message = said.getvalue()
            if error.code == 2 and message.strip() and "Traceback" not in message:
                refused += 1
            else:
                wrong.append(f"{name} {given[2:]}: status {error.code}: {message[:500]!r}\n{text[:2000]}")
        except BaseException:
            wrong.append(f"{name} {given[2:]}: {traceback.format_exc()[-1500:]}\n{text[:2000]}")
    return read, refused, wrong


def main() -> None:
    """Print the counts; exit status 1 where something was neither read nor refused with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "recipes"))
    with tempfile.TemporaryDirectory() as scratch:
        read, refused, wrong = fuzz(given.count, Path(scratch), seed=given.seed)
    print("\n\n".join(wrong))
    print(f"{given.count} configurations: {read} read, {refused} refused in one message, {len(wrong)} neither")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
