"""SIGKILL at random moments: every resumed run ends in the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kill import kill_at_random


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path: Path) -> None:
    counts = kill_at_random(2, tmp_path)
    print(f"\n{counts.line()}")
    assert counts.kills == 2
    assert not counts.wrong


@pytest.mark.slow
def test_twenty_kills_of_the_tiny_run(tmp_path: Path) -> None:
    counts = kill_at_random(20, tmp_path, seed=1)
    print(f"\n{counts.line()}\nthey came at: {'; '.join(counts.stopped_at)}")
    assert counts.kills == 20
    assert not counts.wrong
