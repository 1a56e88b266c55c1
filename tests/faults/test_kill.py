"""SIGKILL a fine-tuning run at random moments, resume it: every one ends in the bits of an undisturbed run."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import arguments, differences, run

AT_MOST = 4  # kills of one run before it is let go on to its end


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
            due = time.monotonic() + rng.uniform(0, again.seconds)
            options: Any = {"signal": signal.SIGKILL, "when": lambda due=due: time.monotonic() >= due}
            if run(arguments(folder, *more), log, **options).status != -signal.SIGKILL:
                break
            killed, more, kills = killed + 1, ["--resume", "true"], kills + 1
        if killed:
            ended = run(arguments(folder, "--resume", "true"), log)
            assert ended.status == 0, ended.said
            assert differences(folder, tmp_path / "whole") == []
