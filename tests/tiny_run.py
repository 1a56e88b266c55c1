"""A fine-tuning run that takes seconds: its arguments, and running it in this process. Nothing here asserts."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from recipes.finetune import main

TINY = [
    "--data.scenes_train", "80", "--data.scenes_audit", "64", "--data.scenes_test", "45", "--data.scenes_bank", "10",
    "--data.augmentation", "none", "--training.epochs", "2", "--training.batch_size", "16", "--training.watch", "20",
    "--training.log_every", "2", "--training.checkpoint_every", "3", "--translator.refreshes", "1", "--translator.ridge", "1",
    "--auditor.ridge", "1",
]  # fmt: skip


def arguments(runs: Path, cache: Path, *more: str) -> list[str]:
    return ["--runs", str(runs), "--cache", str(cache), *TINY, *more]


def finetune(runs: Path, cache: Path, *more: str, keep_group: bool = False) -> None:
    """Run the recipe; `keep_group` leaves the process group, which the tests' processes own, as it is."""
    AcceleratorState._reset_state(True)
    with patch.object(Accelerator, "end_training", lambda _: None) if keep_group else nullcontext():
        try:
            main(arguments(runs, cache, *more))
        finally:
            AcceleratorState._reset_state(True)


def report_of(folder: Path) -> dict[str, Any]:
    """report.json without what may differ between two runs of the same configuration."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    for name in ("seconds", "settings", "machine", "sha256"):  # the last is the report's own
        report.pop(name)
    return report
