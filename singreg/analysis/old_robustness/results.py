"""The dataclasses of a robustness measurement: plain numbers that go to JSON unchanged; None is what is not defined."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from singreg.analysis.old_steering.results import Matrix
from singreg.analysis.results import nulls_for_nan
from singreg.analysis.old_robustness.sanity import Check

FIGURES = ("success", "decision_success", "AS", "AS_abs", "kept", "similarity")
"""What a curve shows; see `RobustnessCurve`."""
FORMAT = 2


@dataclass(frozen=True)
class RobustnessCurve:
    """One attack, crafted on one translator and read by one judge, against a growing budget.

    attack: its name; crafted_on, judge: names of translators; defence: "" or "drop_null" (the judge reads Π_p (f + d)).
    budget: "step" (grid: ε / |f|) or "radius" (grid: Mahalanobis radius over its natural median).
    figures: success: share of the steerings whose target prompt did not outrank all classes before, and does after, with the
    decision kept, and every logit within the tolerance where the attack cannot promise that (transfer, adaptive);
    decision_success: the same with the decision kept alone, however far logits move; AS, AS_abs: degrees towards the target,
    by the judge; kept: share whose decision stays; similarity: cosine to the target by the translator it was crafted on. Figures
    over pictures and their targets; intervals: 95 % bootstrap over pictures; area: [mean height over the grid, low, high].
    logit_change: largest |Δlogit| (float64); longest: largest displacement in the grid's unit; each at every grid point.
    tolerance: what |Δlogit| was allowed, None where the attack could not know (another head's null space).
    """

    attack: str
    crafted_on: str
    judge: str
    defence: str
    budget: str
    grid: list[float]
    figures: dict[str, list[float | None]]
    intervals: dict[str, list[list[float | None]]]
    area: dict[str, list[float | None]]
    logit_change: list[float]
    longest: list[float]
    tolerance: float | None

    def at(self, value: float, figure: str) -> float | None:
        """The figure at one point of the grid (degrees, a share or a cosine). Raises ValueError when it is not on the grid."""
        if value not in self.grid:
            raise ValueError(f"{value} is not on the grid of {self.budget}: {', '.join(f'{known:g}' for known in self.grid)}")
        return self.figures[figure][self.grid.index(value)]


@dataclass(frozen=True)
class SuccessMatrix:
    """Success, AS (degrees) and counts of every source class (S) and target prompt (K) at one relative step; None: not steered."""

    attack: str
    crafted_on: str
    judge: str
    step: float
    success: Matrix
    AS: Matrix
    rows: Matrix


@dataclass(frozen=True)
class RobustnessFigures:
    """How far features can be steered, by every attack, and whether the sanity rules held.

    already: by judge, share of the steerings whose target prompt outranks all classes before any attack (left out of success).
    limit: relative step of the largest budget; limit_success: by translator, success there, crafted on and judged by it, among the
    steerings that are reachable: those a null displacement of any length puts first. reachable: by translator, their share; None of
    a network, of which all are counted. logit_tolerance: of success by attacks that promise none.
    natural: radii of untouched pictures by percentile ("50 %", "95 %", "99 %"), over their median as the grid is; None without radii.
    absent: attacks that could not be made, with the reason. seconds: of the whole measurement.
    """

    classifier: str
    images: int
    rows: int
    sources: list[str]
    targets: list[str]
    nullity: int
    features: int
    curves: list[RobustnessCurve]
    matrices: list[SuccessMatrix]
    already: dict[str, float]
    limit: float
    limit_success: dict[str, float | None]
    reachable: dict[str, float | None]
    logit_tolerance: float
    natural: dict[str, float] | None
    absent: dict[str, str]
    checks: list[Check]
    seconds: float

    def curve(
        self, attack: str, *, crafted_on: str | None = None, judge: str | None = None, budget: str = "step", defence: str = ""
    ) -> RobustnessCurve:
        """The only curve of that description (no shapes).

        Raises:
            ValueError: none or several; the attacks there are get named.
        """
        found = [
            curve for curve in self.curves
            if (curve.attack, curve.budget, curve.defence) == (attack, budget, defence)
            and crafted_on in (None, curve.crafted_on) and judge in (None, curve.judge)
        ]  # fmt: skip
        if len(found) != 1:
            known = sorted({f"{c.attack} on {c.crafted_on} by {c.judge}, {c.budget} {c.defence}".strip() for c in self.curves})
            wanted = f"{attack!r} on {crafted_on} by {judge}, {budget} {defence}".strip()
            raise ValueError(f"{len(found)} curves are {wanted}; there are: {'; '.join(known)}")
        return found[0]

    @property
    def sound(self) -> bool:
        """Whether every sanity rule held."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict, null for what is not defined (no shapes)."""
        strict: dict[str, Any] = nulls_for_nan({"kind": "robustness", "format": FORMAT, **asdict(self)})
        return strict

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RobustnessFigures:
        """Back from `to_json` (no shapes).

        Raises:
            ValueError: it is something else, or of another version.
        """
        if (value.get("kind"), value.get("format")) != ("robustness", FORMAT):
            raise ValueError(f"expected robustness figures of format {FORMAT}, got {value.get('kind')!r} of format {value.get('format')!r}")
        plain = {field.name: value[field.name] for field in fields(cls)}
        plain["curves"] = [RobustnessCurve(**curve) for curve in value["curves"]]
        plain["matrices"] = [SuccessMatrix(**matrix) for matrix in value["matrices"]]
        plain["checks"] = [Check(**check) for check in value["checks"]]
        return cls(**plain)
