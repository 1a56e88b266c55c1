"""The check for GPUs runs on a CPU at toy size, and says by name what that leaves out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_it_runs_and_prints_json_and_a_table(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "gpu" / "check.py"), "--device", "cpu", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found, end = json.JSONDecoder().raw_decode(done.stdout)
    figures = {row["figure"]: row for row in found["figures"]}
    assert all(row["ok"] for row in found["figures"])
    assert {"demo, s", "step: with / without the loss", "loss all, d head: relative to the CPU"} <= figures.keys()
    assert found["skipped"] == ["no synchronisation inside SingLoss.forward", "compiled step", "peak memory"]
    assert all(name in done.stdout[end:] for name in figures)
