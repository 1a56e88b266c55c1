"""Every benchmark runs at toy size and prints its line; what it measures there means nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
STEP = "--model test_resnet --pixels 32 --batch 4 --classes 5 --dim 8 --pairs 3"
TOY = {
    "growth": ("--largest 5000 --features 200 --dim 6", r"5000 / 500 features: peak memory ratio \d"),
    "step_time": (STEP, r"ratio, pair by pair: median \d"),
    "analysis_speed": ("--audit 64 --test 40 --dim 8 --pairs 2", r"ratio, pair by pair: median \d"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOY)
def test_it_runs_and_prints_its_line(name: str, tmp_path: Path) -> None:
    words, line = TOY[name]
    command = [sys.executable, str(FOLDER / f"{name}.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(line, done.stdout), done.stdout
    if name == "growth":
        assert (tmp_path / "growth.png").stat().st_size > 5000
