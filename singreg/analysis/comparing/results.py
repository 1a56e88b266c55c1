"""What a comparison of several classifiers found; plain data that reports draw and JSON keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from singreg.analysis.chance_results import ChanceReport
from singreg.analysis.old_passport import HeadPassport
from singreg.analysis.results import ModelMeasurement, nulls_for_nan


@dataclass(frozen=True)
class ComparedHead:
    """One of the classifiers: how it is called here, where it came from, its head's passport, and why it was not measured.

    passport: None for a model that has no linear head.
    """

    label: str
    source: str
    passport: HeadPassport | None
    omitted: str | None = None


@dataclass(frozen=True)
class ModelDifference:
    """figure of `second` minus that of `first` in one view, paired by image, with its 95 % interval; degrees, points, or no unit."""

    figure: str
    space: str
    translator: str
    first: str
    second: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class OrderCheck:
    """Whether one figure orders the models alike in every view (a vision-language space read by a translator).

    views: V names. orders: the models in each view, best first. tau: Kendall's τ between views (V, V). same: share of the
    bootstrap resamples in which two views order all models alike (V, V). stable: share in which a view's own order comes again
    (V,). everywhere: share in which all views agree.
    """

    figure: str
    views: list[str]
    orders: list[list[str]]
    tau: list[list[float]]
    same: list[list[float]]
    stable: list[float]
    everywhere: float

    @property
    def lowest_tau(self) -> float:
        """The least agreement between two views, in [-1, 1]; 1 with a single view."""
        return min((tau for place, row in enumerate(self.tau) for tau in row[:place]), default=1.0)


@dataclass(frozen=True)
class CompareReport:
    """Everything recipes/compare.py found; angles in degrees, shares in [0, 1].

    heads: all classifiers in the order given, those without a null space too. measurements, chance, agreement: by space and
    label. differences and orders: paired by image. findings: who leaks least, whether the order holds, what is distinguishable.
    """

    heads: list[ComparedHead]
    measurements: dict[str, dict[str, ModelMeasurement]]
    chance: dict[str, dict[str, ChanceReport]]
    agreement: dict[str, dict[str, float]]
    differences: list[ModelDifference]
    orders: list[OrderCheck]
    findings: list[str]
    warnings: list[str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict without per-image rows (no shapes)."""
        value = {
            "kind": "compare",
            "format": 1,
            "heads": [{**asdict(head), "passport": head.passport and head.passport.to_json()} for head in self.heads],
            "measurements": {s: {name: m.to_json() for name, m in found.items()} for s, found in self.measurements.items()},
            "chance": {s: {name: c.to_json() for name, c in found.items()} for s, found in self.chance.items()},
            "agreement": self.agreement,
            "differences": [asdict(difference) for difference in self.differences],
            "orders": [asdict(order) for order in self.orders],
            **{name: getattr(self, name) for name in ("findings", "warnings", "settings", "machine", "seconds")},
        }
        result: dict[str, Any] = nulls_for_nan(value)
        return result
