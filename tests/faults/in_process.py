"""Recipes run in this process with all that they print caught, and what they refuse as one exception. Nothing here asserts."""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from tests.tiny_run import report_of


class Refused(Exception):
    """A recipe ended with a message instead of a result: exit status or sentence, and what it printed."""


def recipe(name: str, *given: str) -> str:
    """Run recipes/NAME.py with arguments; what it printed.

    Raises:
        Refused: it left with a status other than 0. Anything else is a bare traceback.
    """
    printed, said = io.StringIO(), io.StringIO()
    AcceleratorState._reset_state(True)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            importlib.import_module(f"recipes.{name}").main(list(given))
    except (SystemExit, KeyboardInterrupt) as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else error.code  # what Python leaves with
        if status not in (0, None):
            raise Refused(f"{status}\n{said.getvalue()}") from error
    finally:
        AcceleratorState._reset_state(True)
    return printed.getvalue()


def study_report_of(folder: Path) -> dict[str, Any]:
    """A study's report without what may differ between two runs of the same configuration."""
    import json

    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    for name in ("seconds", "settings", "machine", "sha256"):
        report.pop(name, None)
    for arm in report["arms"]:
        arm.pop("seconds")
    return report


__all__ = ["Refused", "recipe", "report_of", "study_report_of"]
