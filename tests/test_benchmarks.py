"""Every benchmark runs at toy size and prints its line; what it measures there means nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
TOY = {
    "growth": (
        ["--largest", "5000", "--features", "200", "--dim", "6", "--out", "growth.png"],
        [r"5000 / 500 features: peak memory ratio \d"],
    ),
    "step_time": (
        ["--model", "test_resnet", "--pixels", "32", "--batch", "4", "--classes", "5", "--dim", "8", "--pairs", "3"],
        [r"ratio, pair by pair: median \d"],
    ),
}


def test_every_benchmark_is_among_them() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {
        *TOY,
        "analysis_speed",
        "paired",
        "process_equality",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TOY)
def test_it_runs_and_prints_its_line(name: str, tmp_path: Path) -> None:
    arguments, lines = TOY[name]
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for line in lines:
        assert re.search(line, done.stdout), done.stdout
    if name == "growth":
        assert (tmp_path / "growth.png").stat().st_size > 5000
        rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
        assert [row["count"] for row in rows] == [50, 500, 5000]
