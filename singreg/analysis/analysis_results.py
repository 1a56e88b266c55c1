"""What an analysis of one classifier found, all levels together; plain data that reports draw and JSON keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from singreg.analysis.chance_results import ChanceReport
from singreg.analysis.information_results import UniqueInformation
from singreg.analysis.levels.class_results import ClassMeasurement
from singreg.analysis.levels.concept_results import ConceptMeasurement
from singreg.analysis.levels.image_results import ImageMeasurement, PictureShift
from singreg.analysis.levels.joint import JointDistribution
from singreg.analysis.passport import HeadPassport
from singreg.analysis.perturbation import PerturbationReport
from singreg.analysis.results import ModelMeasurement, nulls_for_nan

PRIMARY = "auditor"
"""The translator that class, concept and image level are read with; the fitted one stands beside it at model level."""


@dataclass(frozen=True)
class AnalysisReport:
    """Everything recipes/analyze.py found about one classifier; angles in degrees, shares in [0, 1].

    chance: by translator. agreement: mean cosine of the class directions of the two translators. shifts: nearest pictures of the
    worst images, in their order. omissions: what was left out, counted. findings: what leaks, how much, where. warnings: reasons
    not to believe it. settings: the resolved configuration. machine: what it ran on. seconds: by stage.
    """

    passport: HeadPassport
    measurement: ModelMeasurement
    agreement: float
    joint: dict[str, JointDistribution]
    chance: dict[str, ChanceReport]
    information: UniqueInformation
    perturbation: PerturbationReport
    classes: ClassMeasurement
    concepts: ConceptMeasurement
    images: ImageMeasurement
    shifts: list[PictureShift]
    omissions: list[str]
    findings: list[str]
    warnings: list[str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict without per-image rows and features (no shapes)."""
        value: dict[str, Any] = {"kind": "analyze", "format": 1}
        for name in self.__dataclass_fields__:
            value[name] = _plain(getattr(self, name))
        result: dict[str, Any] = nulls_for_nan(value)
        return result


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
