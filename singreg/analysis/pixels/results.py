"""What a pixel attack found: one row a picture, and their sums; plain data that goes to JSON unchanged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from singreg.analysis.pixels.passes import ClimbSummary
from singreg.analysis.pixels.plain_robustness import PlainRobustness
from singreg.analysis.pixels.twins import TwinReport
from singreg.analysis.results import nulls_for_nan
from singreg.analysis.old_robustness.results import RobustnessFigures
from singreg.analysis.old_robustness.sanity import Check

ATTACK, ONE_STEP, RANDOM, NO_BUDGET, NO_LIMITS, HOLD = "attack", "one step", "random", "no budget", "no limits", "hold"
"""Arms: the ascent, a single step, a random direction, the ascent without a budget and without any limit, the opposite direction."""
HELD_TO_NOTHING = (RANDOM, NO_LIMITS, HOLD)
CONTROLS = (NO_BUDGET, NO_LIMITS)
"""Arms of a few pictures, which only the sanity checks read."""
READINGS = ("fooled the translator", "fooled the translators", "fooled the VLM", "changed meaning")
"""Who saw the target first, from the attacked translator alone to all image encoders, of which there must be two."""


@dataclass(frozen=True)
class AttackedPicture:
    """One picture, as the attack left it: where its files are (paths in the run's folder) and what was wanted of it."""

    model: str
    budget: str
    arm: str
    picture: int
    identifier: str
    label: int
    target: int
    original: str
    file: str


@dataclass(frozen=True)
class JudgedPicture:
    """One attacked picture as its file reads, by every judge: "fitted" (attacked), "auditor", and the image encoders by name.

    logit_change: largest |Δlogit|. linf (255ths), l2: how far it was moved. kept: logits within τ, the decision stays, within budget.
    rise: angle gained towards the target prompt; shift: angle between the readings before and after (degrees). first, first_before:
    whether the target outranks every class prompt. cosine_change: largest change of the cosine to any class prompt.
    """

    attacked: AttackedPicture
    kept: bool
    logit_change: float
    decision: int
    decision_before: int
    linf: float
    l2: float
    rise: dict[str, float]
    shift: dict[str, float]
    first: dict[str, bool]
    first_before: dict[str, bool]
    cosine_change: dict[str, float]

    def won(self, judge: str) -> bool:
        """Whether the target became first by that judge, all else kept (no shapes)."""
        return self.kept and self.first[judge] and not self.first_before[judge]


@dataclass(frozen=True)
class PixelSummary:
    """One model, budget and arm. rise, shift: [mean, low, high] in degrees by judge, of pictures that were not kept as 0 (but for
    random directions and the opposite direction, which are held to nothing); success, readings: [share, low, high] by Wilson."""

    model: str
    budget: str
    arm: str
    pictures: int
    kept: float
    flipped: float
    logit_change: float
    rise: dict[str, list[float]]
    shift: dict[str, list[float]]
    success: dict[str, list[float]]
    readings: dict[str, list[float]]


@dataclass(frozen=True)
class Transfer:
    """Pictures crafted on one model, held to the other's τ and read by its fitted translator; rises in degrees beside its own."""

    crafted_on: str
    judged_on: str
    budget: str
    rise: float
    own: float
    kept: float


@dataclass(frozen=True)
class PixelDifference:
    """`second` minus `first`, paired by picture, with its 95 % interval: rise in degrees or success in points, by one judge."""

    first: str
    second: str
    budget: str
    figure: str
    judge: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AttackedModel:
    """How a model is called, its head (nullity of a logit null space), top-1 and logit scale (sd) on the attacked pictures.

    cosine: of each translator on the test part (by name). note: what is particular about it, or nothing.
    """

    label: str
    source: str
    classes: int
    features: int
    nullity: int
    top1: float
    logit_sd: float
    cosine: dict[str, float]
    note: str = ""


@dataclass
class PixelReport:
    """A whole run. zero_shot: every image encoder's own accuracy on the untouched pictures; encoders: those that count.

    features: by model, how far the same pictures are steered in feature space; dropped: models whose null space was dropped there.
    climbs: how far the passes got by themselves.
    """

    models: list[AttackedModel]
    tau: float
    pictures: int
    zero_shot: dict[str, float]
    encoders: list[str]
    summaries: list[PixelSummary]
    transfers: list[Transfer]
    differences: list[PixelDifference]
    twins: list[TwinReport]
    robustness: list[PlainRobustness]
    checks: list[Check]
    findings: list[str]
    warnings: list[str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: dict[str, float]
    rows: list[JudgedPicture] = field(default_factory=list, repr=False)
    climbs: list[ClimbSummary] = field(default_factory=list)
    features: dict[str, RobustnessFigures] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values without the rows, which have a file of their own (no shapes)."""
        value = {name: inner for name, inner in vars(self).items() if name != "rows"}
        plain = {
            name: [asdict(item) for item in inner]
            if isinstance(inner, list) and inner and hasattr(inner[0], "__dataclass_fields__")
            else inner
            for name, inner in value.items()
        }
        plain["features"] = {label: figures.to_json() for label, figures in self.features.items()}
        return {"kind": "steer pixels", **dict(nulls_for_nan(plain))}

    def of(self, model: str, budget: str, arm: str = ATTACK) -> PixelSummary | None:
        """One summary, or None (no shapes)."""
        return next((s for s in self.summaries if (s.model, s.budget, s.arm) == (model, budget, arm)), None)

    def largest(self, model: str) -> PixelSummary:
        """The attack on a model at the largest budget of the first norm (no shapes)."""
        mine = [s for s in self.summaries if (s.model, s.arm) == (model, ATTACK)]
        return [s for s in mine if s.budget.split()[0] == mine[0].budget.split()[0]][-1]
