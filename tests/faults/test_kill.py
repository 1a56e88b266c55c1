"""SIGKILL at random moments: every resumed run ends in the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kill import kill_at_random


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_ends_in_the_same_bits(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINGREG_CACHE", str(tmp_path / "cache"))
    counts = kill_at_random(count, tmp_path, seed=count)
    print(f"\n{counts.line()}\nthey came at: {'; '.join(counts.stopped_at)}")
    assert counts.kills == count
    assert not counts.wrong
