"""What all tests share."""

import os
import tempfile
from collections.abc import Iterator

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
