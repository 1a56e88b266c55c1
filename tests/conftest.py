"""What all tests share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MKL_CBWR", "AUTO")  # as recipes set it, and before anything is computed: both must round alike
os.environ["SINGREG_CACHE"] = tempfile.mkdtemp(prefix="singreg-tests-")  # no test reads or fills the user's own cache


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state a process: no test finds what another left."""
    from accelerate.state import AcceleratorState  # once the environment is set

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole analysis of tiny scenes: its folder and its report."""
    from tests.test_analyze import analyze

    folder = tmp_path_factory.mktemp("analyses") / "whole"
    return folder, analyze(folder)
