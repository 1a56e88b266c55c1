"""The old form of probes.py; gone when its callers have moved."""

from __future__ import annotations

from typing import Any

from singreg.analysis.information_results import UniqueInformation
from singreg.analysis.probes import BlockFits, fit_blocks
from singreg.analysis.probes import measure_information as measured

__all__ = ["BlockFits", "fit_blocks", "measure_information"]


def measure_information(*arguments: Any, **options: Any) -> UniqueInformation:
    """probes.measure_information as the old dataclass."""
    return UniqueInformation.from_json(measured(*arguments, **options))
