"""Every damaged configuration is read or refused in one message (see tests/faults/fuzz.py)."""

from __future__ import annotations

from pathlib import Path

from tests.faults.fuzz import fuzz


def test_damaged_configurations_never_give_a_traceback(tmp_path: Path) -> None:
    read, refused, wrong = fuzz(36, tmp_path, seed=1)
    assert wrong == []
    assert read + refused == 36
    assert refused > read
