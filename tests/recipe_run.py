"""Running a recipe in this process, as its tests do, and the leaves of what it reports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from accelerate.state import AcceleratorState


def run_recipe(main: Callable[[list[str]], None], out: Path, *words: str) -> dict[str, Any]:
    """Return its report.json, {} where none was written; the process group, which the tests own, stays as it is."""
    AcceleratorState._reset_state(True)
    with patch("torch.distributed.destroy_process_group"):
        try:
            main(["--out", str(out), *words])
        finally:
            AcceleratorState._reset_state(True)
    report = out / "report.json"
    return dict(json.loads(report.read_text())) if report.is_file() else {}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested dictionaries and lists by its path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return {path: value} if pairs is None else {k: v for n, each in pairs for k, v in flat(each, f"{path}/{n}").items()}


def same(found: Any, wanted: Any, *, rel: float = 1e-3, abs: float = 1e-3) -> None:
    """Assert that two reports, or parts of them, are equal in every word and count, and numbers but for rounding."""
    one, other = flat(found), flat(wanted)
    assert one.keys() == other.keys()
    for key, value in other.items():
        close = pytest.approx(value, rel=rel, abs=abs, nan_ok=True) if isinstance(value, float) else value
        assert one[key] == close, key
