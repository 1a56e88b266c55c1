"""Configurations no one would write: each parses, or is refused with all its errors in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzz import fuzz
from tests.faults.in_process import Refused, recipe


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_every_configuration_parses_or_says_what_is_wrong(count: int, tmp_path: Path) -> None:
    found = fuzz(count, tmp_path)
    print(f"\n{found.line()}")
    assert found.parsed + found.refused == count, "\n\n".join(found.wrong[:5])
    assert found.refused > count // 2, "the fuzzing is too kind"
    assert found.parsed > 0, "the fuzzing leaves nothing whole"


@pytest.mark.parametrize("name", ["finetune", "analyze", "steer"])
def test_what_parses_but_cannot_work_is_refused_by_a_dry_run_with_a_sentence(name: str, tmp_path: Path) -> None:
    few = [f"--data.scenes_{part}=20" for part in ("train", "audit", "test")]
    given = ["--cache", str(tmp_path), "--dry_run", "true", *few]
    for key, value in (("model.name", "local-dir:/nowhere"), ("model.name", "no_such_model"), ("vlm.name", "~"), ("data.source", "./x")):
        with pytest.raises(Refused, match="error: "):
            recipe(name, *given, f"--{key}", value)
