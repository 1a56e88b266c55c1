"""What is known about classes after an analysis: plain numbers that go to JSON and back unchanged; None is what is not defined."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FIGURES = ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "kappa", "accuracy")
DISTRIBUTION_POINTS = 51


@dataclass(frozen=True)
class ClassScore:
    """One class: means by figure (`FIGURES`; degrees, κ and accuracy without unit) over its `images` pictures.

    intervals: 95 % bootstrap over the pictures, None where there is one picture only. distribution: 51 evenly spaced quantiles
    (0 to 1) of AS and IS in degrees.
    """

    label: int
    name: str
    images: int
    means: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    distribution: dict[str, list[float]]


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ over classes between a figure and accuracy, with a 95 % interval of resampled classes (no unit).

    None: fewer than three classes, or one of the two does not vary. undefined: resamples left out for that reason.
    """

    value: float | None
    low: float | None
    high: float | None
    classes: int
    undefined: int


@dataclass(frozen=True)
class ClassMeasurement:
    """Every class that has pictures, the leakiest (AS⁻) first, by one translator and one removal.

    empty: names of the classes without pictures. unlabelled: pictures that belong to no class. correlations: of AS_neg, AS_abs
    and IS (degrees) with accuracy.
    """

    translator: str
    centred: bool
    images: int
    unlabelled: int
    classes: tuple[ClassScore, ...]
    empty: tuple[str, ...]
    correlations: dict[str, Correlation]

    def omissions(self) -> list[str]:
        """Sentences about what could not be scored, none when everything was (no shapes)."""
        found = []
        if self.empty:
            found.append(f"{len(self.empty)} of {len(self.empty) + len(self.classes)} classes have no picture: {', '.join(self.empty)}.")
        if self.unlabelled:
            found.append(f"{self.unlabelled} pictures have no label and are not counted.")
        return found

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict (no shapes)."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ClassMeasurement:
        """Back from `to_json`, also after a way through a JSON file (no shapes)."""
        classes = tuple(ClassScore(**{**score, "intervals": _pairs(score["intervals"])}) for score in value["classes"])
        correlations = {name: Correlation(**found) for name, found in value["correlations"].items()}
        return cls(**{**value, "classes": classes, "empty": tuple(value["empty"]), "correlations": correlations})


def _pairs(intervals: dict[str, Any]) -> dict[str, tuple[float, float] | None]:
    return {name: None if found is None else (found[0], found[1]) for name, found in intervals.items()}
