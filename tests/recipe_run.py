"""Running a recipe in this process, as its tests do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.state import AcceleratorState


def run_recipe(main: Callable[[list[str]], None], out: Path, *words: str) -> dict[str, Any]:
    """Return its report.json, {} where none was written; the process group, which the tests own, stays as it is."""
    AcceleratorState._reset_state(True)
    with patch.object(Accelerator, "end_training", lambda _: None):
        try:
            main(["--out", str(out), *words])
        finally:
            AcceleratorState._reset_state(True)
    report = out / "report.json"
    return dict(json.loads(report.read_text())) if report.is_file() else {}
