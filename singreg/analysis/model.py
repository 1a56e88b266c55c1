"""The old form of scores.py; gone when its callers have moved."""

from __future__ import annotations

from typing import Any

from singreg.analysis.results import HeadSummary, ModelMeasurement
from singreg.analysis.scores import STEERING_IMAGES, describe_head
from singreg.analysis.scores import analyze_model as measured

__all__ = ["STEERING_IMAGES", "analyze_model", "summarize_head"]


def analyze_model(*arguments: Any, **options: Any) -> ModelMeasurement:
    """scores.analyze_model as the old dataclass."""
    rows, figures = measured(*arguments, **options)
    return ModelMeasurement.from_json(figures, {str(name): rows[name].to_numpy() for name in rows})


def summarize_head(*arguments: Any) -> HeadSummary:
    """scores.describe_head as the old dataclass."""
    return HeadSummary(**describe_head(*arguments))
