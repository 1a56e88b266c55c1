"""SIGKILL a fine-tuning run at random moments, resume it: every one ends in the bits of an undisturbed run."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.tiny_run import arguments, differences, run

AT_MOST = 4  # kills of one run before it is let go on to its end


def where(folder: Path) -> str:
    """How far a killed run had come: the last files that it finished."""
    if (folder / "report.json").is_file():
        return "report"
    done = [f"stage {path.parent.name}" for path in sorted(folder.glob("checkpoints/stages/*/stage.json"))]
    steps = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("checkpoints/*/step-*"))
    return ", ".join([*done, *steps[-1:]]) or ("begun" if folder.is_dir() else "not begun")


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_ends_in_the_same_bits(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINGREG_CACHE", str(tmp_path / "cache"))
    rng, log, kills, runs = random.Random(count), tmp_path / "log", 0, 0
    # The second start finds the embeddings, as every one after it: its time is that of the runs to be killed.
    whole, again = (run(arguments(tmp_path / name), log) for name in ("whole", "again"))
    assert (whole.status, again.status, differences(tmp_path / "again", tmp_path / "whole")) == (0, 0, [])
    while kills < count:
        folder, more, killed, runs = tmp_path / f"killed-{runs}", list[str](), 0, runs + 1
        while kills < count and killed < AT_MOST:
            moment = rng.uniform(0, again.seconds)
            if run(arguments(folder, *more), log, signal=signal.SIGKILL, after=moment).status != -signal.SIGKILL:
                break
            killed, more, kills = killed + 1, ["--resume", "true"], kills + 1
            print(f"kill {kills} after {moment:.1f} of {again.seconds:.1f} s: {where(folder)}")
        if killed:
            ended = run(arguments(folder, "--resume", "true"), log)
            assert ended.status == 0, ended.said
            assert differences(folder, tmp_path / "whole") == []
    print(f"kills: {kills} at random moments of {runs} runs, all resumed to the same bits")
