"""Configurations no one would write, through the parsing of every recipe: each parses, or all its errors stand in one message.

python -m tests.faults.fuzz --count 500
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from singreg.evaluation.analyze_config import parse_analyze
from singreg.evaluation.compare_config import parse_compare
from singreg.evaluation.steer_config import parse_steer
from singreg.training.config import parse_finetune
from singreg.training.study_config import parse_study
from singreg.workbench.parsing import find_config

RECIPES: dict[str, tuple[Callable[..., Any], str]] = {
    "finetune": (parse_finetune, "demo"),
    "analyze": (parse_analyze, "analyze_demo"),
    "steer": (parse_steer, "steer_demo"),
    "compare": (parse_compare, "compare_demo"),
    "study": (parse_study, "study_scenes"),
}
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2.5, -0.5, 1e308, -1e308, float("nan"), float("inf"), 10**400, -(10**30), "", " ", "no", "1", "1e3",
    "../up", "a\x00b", "\x1b[31mred", "\u202eevil {class}", "\u2028", "x" * 5000, "{class}" * 50, "<script>alert(1)</script>",
    "local-dir:/nowhere",
    "~root", [], [[]], [None], [1, "a", {}], {}, {"a": {"b": {"c": 1}}}, {"": 1}, {1: 2}, {None: None}, {"__class__": "os.system"}, "$HOME",
    {"class_path": "os.system", "init_args": {}}, "https://example.org/x.yaml", "/dev/null", ["an image of a {class}", "\x07 {class}"],
]  # fmt: skip
RAW = [
    "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!unknown 3", '!!int ""', '!!float ""', "!!bool maybe",
    "!!timestamp never", "2024-13-45", "!!binary '***'", "!!set {a, b}", "!!omap [a: 1]", "!!map [1]", "!!map text", "0x" + "f" * 9000,
    "9" * 6000, "[" * 400 + "]" * 400, "{a: " * 400 + "1" + "}" * 400, "&a [*a]", "&a {b: *a}", "[1", "{a: 1",
    '"\\x00\\x1b[2J {class}"', "\t- 1",
    "? [a, b] : 1", "{a: 1, a: 2}", "<<", "*nothing", "|", ">", "@", "%YAML 9.9", "1_0_0", "1:30:00", "0o17", ".inf", "-.INF", ".nan", "~",
]  # fmt: skip
LAUGHS = "l0: &l0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 10))


@dataclass
class Fuzzed:
    """Configurations that parsed, those refused with a message, those with anything else (its story), and kinds of damage."""

    parsed: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: int = 0
    longest: int = 0
    by_recipe: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        return (
            f"fuzzed configurations: {self.parsed + self.refused + len(self.wrong)} ({dict(self.by_recipe)}); {self.parsed} parsed, "
            f"{self.refused} refused with {self.errors} errors in one message each, {len(self.wrong)} neither"
        )


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a nested value can be changed."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _places(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            found += _places(inner, (*path, place))
    return found


def _misspelt(key: Any, rng: random.Random) -> Any:
    text = str(key)
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice(["x", "", ".", " ", "_", "\x07", "ß"]) + text[place + rng.randrange(2) :]


def _change(content: dict[str, Any], rng: random.Random, marks: dict[str, str]) -> None:
    """One change in place: a misspelt key, another value, a value only YAML's text can express, or a section in the wrong place."""
    path = rng.choice(_places(content))
    parent: Any = content
    for step in path[:-1]:
        parent = parent[step]
    kind = rng.choice(["key", "value", "value", "raw", "move"])
    if kind == "key" and isinstance(parent, dict):
        parent[_misspelt(path[-1], rng)] = parent.pop(path[-1])
    elif kind == "raw":
        mark = f"RAW{len(marks)}MARK"
        marks[mark] = rng.choice(RAW)
        parent[path[-1]] = mark
    elif kind == "move":
        parent[path[-1]] = {rng.choice(list(content) or ["a"]): copy.deepcopy(parent[path[-1]])}
    else:
        parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))


def configuration(base: str, rng: random.Random) -> str:
    """A shipped configuration (its text) with one to six things wrong with it, or with its text damaged."""
    content, marks = yaml.safe_load(base), dict[str, str]()
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        if content:
            _change(content, rng, marks)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=rng.random() < 0.5)
    for mark, raw in marks.items():
        text = text.replace(mark, raw)
    draw = rng.random()
    if draw < 0.05:
        text += LAUGHS
    elif draw < 0.2:
        letters = list(text)
        for _ in range(rng.randrange(1, 5)):
            letters[rng.randrange(len(letters))] = chr(rng.choice([0, 9, 10, 27, 34, 39, 42, 58, 91, 123, 233, 0x2028, 0xFFFE]))
        text = "".join(letters)
    return text


def _flags(rng: random.Random, text: str) -> list[str]:
    """Now and then a flag besides, as damaged as the file."""
    if rng.random() < 0.7:
        return []
    keys = [line.split(":")[0].strip() for line in text.splitlines() if line.strip()]
    key = rng.choice([*keys, "training.epochs", "loss.terms.leak", "vlm.templates", "data", "models", "arms", ""])
    value = rng.choice([*RAW[:20], "3", "[1, 2]", "\x1b[2J", ""])
    return [f"--{key}={value}"] if rng.random() < 0.5 else [f"--{key}", value]


def fuzz(count: int, scratch: Path, *, seed: int = 0) -> Fuzzed:
    """Parse `count` configurations, the recipes in turn."""
    rng, found = random.Random(seed), Fuzzed()
    bases = {name: find_config(shipped).read_text(encoding="utf-8") for name, (_, shipped) in RECIPES.items()}
    file = scratch / "fuzzed.yaml"
    for place in range(count):
        name = list(RECIPES)[place % len(RECIPES)]
        text = configuration(bases[name], rng)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        given, said = ["--config", str(file), *_flags(rng, text)], io.StringIO()
        found.by_recipe[name] += 1
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                RECIPES[name][0](given)
            found.parsed += 1
        except SystemExit as error:
            message = said.getvalue()
            found.longest = max(found.longest, len(message))
            if error.code != 2 or not message.strip() or "Traceback" in message or any(ord(c) < 32 and c not in "\n\t" for c in message):
                found.wrong.append(f"{name} {given[2:]}: status {error.code}: {message[:500]!r}\n{text}")
            else:
                found.refused += 1
                found.errors += max(1, message.count("\n  - "))
        except BaseException:
            found.wrong.append(f"{name} {given[2:]}: {traceback.format_exc()[-1500:]}\n{text[:3000]}")
    return found


def main() -> None:
    """Print the counts; exit status 1 when something was neither parsed nor refused with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = fuzz(given.count, Path(scratch), seed=given.seed)
    print("\n\n".join([*found.wrong, found.line()]))
    sys.exit(1 if found.wrong else 0)


if __name__ == "__main__":
    main()
