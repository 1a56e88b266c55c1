"""What a study arm is measured by, as plain numbers that go to JSON and back unchanged (METHOD sections 8 and 9)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from singreg.analysis.information_results import UniqueInformation
from singreg.analysis.results import ModelMeasurement, Rows, nan_for_null, nulls_for_nan

RELATIVE_STEPS = (0.1, 0.25)
"""Steps, as shares of |f|, at which AS and success are always read."""
MARKS = ("50 %", "95 %", "99 %")
"""Natural percentiles of the Mahalanobis radius at which on-manifold steering is read."""


@dataclass(frozen=True)
class EqualEffort:
    """Steering each picture towards one other class's prompt, by one attacker and one judge, means over `images`.

    At the fixed image score: AS (signed, degrees), step (ε / |f|), both over the reachable; reachable, success: shares of all.
    at_steps: {"10 %": {"AS", "AS_abs", "success"}} at fixed relative steps. on_manifold: the same by natural percentile, along Σ
    times the gradient (a picture that no step brings within the budget stays where it is). area: mean height of the AS, AS_abs
    and success curve over relative steps from 0 to the largest of the grid.
    """

    image_score: float
    AS: float
    step: float
    reachable: float
    success: float
    at_steps: dict[str, dict[str, float]]
    on_manifold: dict[str, dict[str, float]]
    area: dict[str, float]
    images: int


@dataclass(frozen=True)
class OodScores:
    """AUROC of telling strange pictures from known ones, 0.5 at chance (METHOD section 8.8).

    null_energy: by |Π_n(f - μ)|. energy: by -logsumexp of the logits. vim: by α|Π_n(f - μ)| - logsumexp, ViM's combination.
    """

    null_energy: float
    energy: float
    vim: float


@dataclass(frozen=True)
class SideEffects:
    """ece: expected calibration error, 15 bins. nll: nats. corrupted: top-1 by kind of corruption. ood: None without such pictures."""

    ece: float
    nll: float
    corrupted: dict[str, float]
    ood: OodScores | None


@dataclass(frozen=True)
class ArmFigures:
    """Everything measured about one arm on the test pictures; angles in degrees.

    measurement: top-1, null share, and by translator AS, AS_neg, AS_abs, IS, IS/AS (ratio), kappa, of both removals.
    information: the fresh null probe for the class (accuracy["null_space"]) and unique information.
    harmless_r2: [value, low, high] of R²(z off the span of the class prompts | f), held out.
    attributes: {name: {"features": R², "row_space": R², "null_space": R²}} of known attributes, held out; empty if none are known.
    steering: by translator, attacking and judging itself, and by "ATTACKER→JUDGE".
    agreement: cosine of class directions by "A|B", every two linear translators of one VLM.

    rows: one value a picture (N,), not in the JSON: those of `analyze_model` (correct, AS/NAME, IS/NAME, ...); of steering, each
    /NAME: steering_AS, steering_step (NaN where the angle is out of reach), steering_reachable, steering_success, AS10, success10,
    AS25, success25, area_success, manifold_AS95, manifold_success95, ..., all NaN for pictures beyond the 1024 that are steered;
    nll, null_energy_centred, energy_score, harmless_residual, harmless_spread, correct_KIND of every corruption.
    """

    measurement: ModelMeasurement
    information: UniqueInformation
    harmless_r2: list[float]
    attributes: dict[str, dict[str, float]]
    steering: dict[str, EqualEffort]
    agreement: dict[str, float]
    side_effects: SideEffects
    rows: Rows = field(default_factory=dict, repr=False, compare=False)

    def flat(self) -> dict[str, float]:
        """The figures a table or a plot wants, by one name each, "AS_neg/auditor" (degrees, shares; no shapes)."""
        measured, side = self.measurement, self.side_effects
        found = {
            "top1": measured.top1,
            "null_share": measured.null_share,
            "null_energy": measured.null_energy,
            "nullity": float(measured.head.nullity),
            "null_probe": self.information.accuracy["null_space"],
            "probe_chance": self.information.chance,
            "unique_r2": self.information.unique,
            "harmless_r2": self.harmless_r2[0],
            "ece": side.ece,
            "nll": side.nll,
            **{f"corrupted/{kind}": value for kind, value in side.corrupted.items()},
            **({f"ood_{kind}": value for kind, value in asdict(side.ood).items()} if side.ood else {}),
            **{f"{block}_r2/{name}": value for name, blocks in self.attributes.items() for block, value in blocks.items()},
            **{f"agreement/{pair}": value for pair, value in self.agreement.items()},
        }
        for name, scores in measured.translators.items():
            found |= {f"{key}/{name}": scores.overall[key] for key in ("AS", "AS_neg", "AS_pos", "AS_abs", "IS", "ratio", "kappa")}
            found |= {f"centred_{key}/{name}": scores.centred[key] for key in ("AS", "AS_neg", "AS_abs", "IS")}
            found |= {f"cosine/{name}": scores.cosine, f"zero_shot/{name}": scores.zero_shot}
        for name, effort in self.steering.items():
            found |= {f"steering_{key}/{name}": getattr(effort, key) for key in ("AS", "step", "reachable", "success")}
            found |= {f"{key}{label.removesuffix(' %')}/{name}": v for label, at in effort.at_steps.items() for key, v in at.items()}
            found |= {f"area_{key}/{name}": value for key, value in effort.area.items()}
            found |= {
                f"manifold_{key}{label.removesuffix(' %')}/{name}": v for label, at in effort.on_manifold.items() for key, v in at.items()
            }
        return found

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict without the per-image rows: NaN becomes null (no shapes)."""
        value: dict[str, Any] = nulls_for_nan(
            {
                "harmless_r2": self.harmless_r2,
                "attributes": self.attributes,
                "steering": {name: asdict(effort) for name, effort in self.steering.items()},
                "agreement": self.agreement,
                "side_effects": asdict(self.side_effects),
                "information": self.information.to_json(),
            }
        )
        return {"measurement": self.measurement.to_json(), **value}

    @classmethod
    def from_json(cls, value: dict[str, Any], rows: Rows | None = None) -> ArmFigures:
        """Back from `to_json` (no shapes)."""
        side = value["side_effects"]
        ood = None if side["ood"] is None else OodScores(**nan_for_null(side["ood"]))
        return cls(
            measurement=ModelMeasurement.from_json(value["measurement"], rows),
            information=UniqueInformation.from_json(nan_for_null(value["information"])),
            harmless_r2=nan_for_null(value["harmless_r2"]),
            attributes=nan_for_null(value["attributes"]),
            steering={name: EqualEffort(**nan_for_null(effort)) for name, effort in value["steering"].items()},
            agreement=nan_for_null(value["agreement"]),
            side_effects=SideEffects(**nan_for_null({**side, "ood": 0}) | {"ood": ood}),
            rows=rows or {},
        )
