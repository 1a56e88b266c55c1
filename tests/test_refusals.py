"""What a recipe cannot do is said before any work, all of it in one message, and nothing is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_attack_recipe import run as attack
from tests.test_compare import DEMO, compare
from tests.test_steer import steer

CASES: list[tuple[Callable[..., Any], list[Any], list[str]]] = [
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
def test_bad_input_is_said_before_any_work(
    recipe: Callable[..., Any], given: list[Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        recipe(tmp_path / "bad", *given)
    said = f"{stop.value} {capsys.readouterr().err}"
    assert all(part in said for part in words), said
    assert list(tmp_path.iterdir()) == []
