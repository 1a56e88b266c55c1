"""The dataclasses of chance levels: plain numbers that go to JSON and back unchanged."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FIGURES = ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "kappa")
KINDS = ("dimension", "energy", "texts")
"""The null space replaced by a random subspace of its dimension; by one that removes its energy from every picture; the text
of every class replaced by another's."""


@dataclass(frozen=True)
class ChanceLevel:
    """One kind of chance: mean and spread (standard deviation) over draws of AS, AS_neg, AS_pos, AS_abs, IS (degrees), kappa.

    per_class: mean over draws by figure, one value a class, None for a class without pictures. energy: share of the features'
    squared norm that is removed, mean over draws.
    """

    mean: dict[str, float]
    spread: dict[str, float]
    per_class: dict[str, list[float | None]]
    energy: float


@dataclass(frozen=True)
class ChanceScores:
    """The scores of one removal by one translator (degrees; κ without unit) beside every kind of chance in `KINDS`.

    energy: share of the squared norm removed, Σ|Π_n g|² / Σ|g|², with g = f, or f - mean for the centred removal.
    """

    observed: dict[str, float]
    energy: float
    levels: dict[str, ChanceLevel]

    def beyond(self, kind: str, figure: str) -> float | None:
        """(observed - mean of the draws) / their spread; None when the draws do not differ (no shapes, no unit)."""
        level = self.levels[kind]
        return (self.observed[figure] - level.mean[figure]) / level.spread[figure] if level.spread[figure] > 0 else None


@dataclass(frozen=True)
class ChanceReport:
    """Chance levels of one translator's reading. dimensions: of the null space and of every random one, out of `features`."""

    images: int
    draws: int
    seed: int
    features: int
    dimensions: int
    paper: ChanceScores
    centred: ChanceScores

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict (no shapes)."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ChanceReport:
        """Back from `to_json` (no shapes)."""
        both = {name: _scores_from_json(value[name]) for name in ("paper", "centred")}
        return cls(**{**value, **both})


def _scores_from_json(value: dict[str, Any]) -> ChanceScores:
    return ChanceScores(**{**value, "levels": {kind: ChanceLevel(**level) for kind, level in value["levels"].items()}})


def measure_chance(batches: Any, **options: Any) -> dict[str, ChanceReport]:
    """chance.measure_chance as the old dataclasses."""
    from singreg.analysis.chance import measure_chance as measured

    return {name: ChanceReport.from_json(value) for name, value in measured(batches, **options).items()}
