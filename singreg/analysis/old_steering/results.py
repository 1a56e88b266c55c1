"""The dataclasses of a steering measurement: plain numbers that go to JSON unchanged; None is what is not defined."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from singreg.analysis.results import ModelMeasurement, nulls_for_nan

Matrix = list[list[float | None]]


@dataclass(frozen=True)
class SteeringPairs:
    """Paper table 1 for every source class and target prompt, by one attacker and one judge.

    matrices: (S, K) by figure: AS, AS_abs (towards the target, degrees), their _std, success, step (ε / |f|), reachable, images.
    AS, AS_abs and step are over the reachable pictures; success and reachable are shares of all. None: pair not steered, or no
    picture of it reachable. overall: the same figures over all pairs, with pairs, rows (picture, target) and images as counts.
    intervals: 95 % bootstrap over source classes and pictures. calibration_error: largest |IS - wanted| in degrees by the attacker, of the
    reachable. logit_change: largest |Δlogit| of a steered picture, float64.
    """

    attacker: str
    judge: str
    overall: dict[str, float | None]
    intervals: dict[str, list[float | None]]
    matrices: dict[str, Matrix]
    calibration_error: float | None
    logit_change: float


@dataclass(frozen=True)
class SteeringCurve:
    """AS, AS_abs (degrees) and success against a growing budget, means over pictures (each over its targets).

    budget: "step" (grid: ε / |f|), "radius" or "on-manifold" (grid: Mahalanobis radius over its natural median; steps along
    the gradient's null part, or along Σ times the gradient). intervals: 95 % bootstrap over source classes and
    pictures at every grid point. area: [mean height over the grid, low, high]. outside: share of rows that no step brings
    within the budget (left unmoved).
    """

    attacker: str
    judge: str
    budget: str
    grid: list[float]
    figures: dict[str, list[float]]
    intervals: dict[str, list[list[float]]]
    area: dict[str, list[float]]
    outside: list[float]

    def at(self, value: float, figure: str) -> float:
        """The figure at one point of the grid (degrees or a share). Raises ValueError when it is not on the grid."""
        if value not in self.grid:
            raise ValueError(f"{value} is not on the grid of {self.budget}: {', '.join(f'{known:g}' for known in self.grid)}")
        return self.figures[figure][self.grid.index(value)]


@dataclass(frozen=True)
class NaturalRadii:
    """Mahalanobis radii of the untouched pictures' null component given their row-space component (no unit).

    median, p95, p99: of `images` held-out pictures. dimensions: of the null space. fit_images: pictures behind the covariance;
    floored: its directions whose variance is held at `floor` times the mean one.
    """

    median: float
    p95: float
    p99: float
    images: int
    dimensions: int
    fit_images: int
    floor: float
    floored: int

    @property
    def marks(self) -> dict[str, float]:
        """The percentiles as multiples of the median, which is the curves' unit (no shapes)."""
        return {"50 %": 1.0, "95 %": self.p95 / self.median, "99 %": self.p99 / self.median}


@dataclass(frozen=True)
class ShownSteering:
    """One picture chosen to be drawn: place and name in the part, source class, target prompt, step ε / |f| (None: out of reach)."""

    index: int
    image: str
    source: str
    target: str
    step: float | None


@dataclass(frozen=True)
class SteerReport:
    """What a steering run found. pairs and curves: one for every attacker and judge (and budget).

    measurement: the classifier on all test pictures, with the translators' quality. findings, warnings: sentences.
    settings: the resolved configuration. machine: what it ran on. seconds: by stage. shown: pictures chosen to be drawn.
    """

    measurement: ModelMeasurement
    image_score: float
    sources: list[str]
    targets: list[str]
    pairs: list[SteeringPairs]
    curves: list[SteeringCurve]
    natural: NaturalRadii
    findings: list[str]
    warnings: list[str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: dict[str, float]
    shown: list[ShownSteering] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict, null for what is not defined; the measurement without its per-image rows (no shapes)."""
        value: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        value["measurement"] = self.measurement.to_json()
        value["pairs"], value["curves"] = [asdict(p) for p in self.pairs], [asdict(c) for c in self.curves]
        value["natural"], value["shown"] = asdict(self.natural), [asdict(picture) for picture in self.shown]
        strict: dict[str, Any] = nulls_for_nan({"kind": "steer", "format": 1, **value})
        return strict
