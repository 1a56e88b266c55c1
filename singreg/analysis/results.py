"""The dataclasses that measurements return and reports draw. Plain numbers, so that they go to JSON and back unchanged."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

Rows = dict[str, np.ndarray]
PRIMARY = "auditor"
CENTRED = "centred "  # before the names of the figures of f - Π_n (f - μ), METHOD section 8.4


@dataclass(frozen=True)
class HeadSummary:
    """Passport of a head (METHOD section 8.3): sizes, rank, null share of the dimensions, σ_min/σ_max, hash."""

    tag: str
    classes: int
    features: int
    rank: int
    rank_loose: int
    nullity: int
    null_dimensions: float
    conditioning: float
    head_hash: str


@dataclass(frozen=True)
class TranslatorScores:
    """One translator's reading of one model on the test images; angles in degrees.

    overall and centred: mean figures by name (AS, AS_neg, AS_pos, AS_abs, IS, kappa, their _std, ratio, count) for the paper's
    removal and for the centred one; intervals: 95 % bootstrap [low, high], the centred ones as "centred NAME"; per_class: the
    same names, one value a class.
    cosine, r2: translator against the VLM on the test images; zero_shot: accuracy of T(f) with the class prompts.
    """

    overall: dict[str, float]
    centred: dict[str, float]
    intervals: dict[str, list[float]]
    per_class: dict[str, list[float | None]]
    quantiles: dict[str, float]
    cosine: float
    r2: float
    zero_shot: float
    ridge: float
    fit_images: int
    standardized: bool
    validation_r2: float | None


@dataclass(frozen=True)
class SteeringSummary:
    """Steering to another class's prompt at a fixed image score (paper table 1): AS towards the target and the step taken.

    attribute_score, std in degrees; step: mean ε / |f| over reachable images; reachable: their share; success: share whose
    target prompt outranks all classes.
    """

    image_score: float
    attribute_score: float
    attribute_score_std: float
    step: float
    reachable: float
    success: float
    images: int


@dataclass(frozen=True)
class ModelMeasurement:
    """Everything measured about one model on the test images.

    null_share: mean |Π_n f| / |f|. logit_change_*: largest |Δlogit| between f and f~, in float64 and in the model's float32.
    rows: one value an image, by column name (not part of the JSON).
    """

    images: int
    top1: float
    top1_interval: list[float]
    null_share: float
    null_energy: float
    logit_change_float64: float
    logit_change_float32: float
    vlm_zero_shot: float
    head: HeadSummary
    translators: dict[str, TranslatorScores]
    steering: dict[str, SteeringSummary]
    rows: Rows = field(default_factory=dict, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict without the per-image rows: what is not defined (NaN, infinite) becomes null (no shapes)."""
        value: dict[str, Any] = nulls_for_nan({**asdict(replace(self, rows={})), "rows": None})
        value.pop("rows")
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any], rows: Rows | None = None) -> ModelMeasurement:
        """Back from `to_json` (no shapes)."""
        return cls(
            **{
                **{key: nan_for_null(inner) for key, inner in value.items()},
                "head": HeadSummary(**value["head"]),
                "translators": {name: _scores_from_json(scores) for name, scores in value["translators"].items()},
                "steering": {name: SteeringSummary(**nan_for_null(summary)) for name, summary in value["steering"].items()},
                "rows": rows or {},
            }
        )


def nulls_for_nan(value: Any) -> Any:
    """Dicts and lists with None for every NaN and infinity, which strict JSON does not have (no shapes)."""
    if isinstance(value, dict):
        return {key: nulls_for_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [nulls_for_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nan_for_null(value: Any) -> Any:
    """Dicts and lists with NaN for every None: numbers that are not defined, back from JSON (no shapes)."""
    if isinstance(value, dict):
        return {key: nan_for_null(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [nan_for_null(inner) for inner in value]
    return math.nan if value is None else value


def _scores_from_json(scores: dict[str, Any]) -> TranslatorScores:
    """Back from JSON; only `validation_r2` and classes without pictures are really None."""
    plain = ("validation_r2", "per_class")
    return TranslatorScores(**{key: value if key in plain else nan_for_null(value) for key, value in scores.items()})


@dataclass(frozen=True)
class Comparison:
    """After against before or against the control, paired by image: difference (or ratio) and its 95 % interval."""

    name: str
    translator: str
    value: float
    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tuning run found: the measurements by stage name ("before", "control", "sing"), in that order.

    comparisons: sing against control, paired by image. audit_gap: AS⁻ of the auditor over AS⁻ of the loop's own translator.
    verdict: sentences in plain words. settings: the resolved configuration. machine: what it ran on. seconds: by stage.
    """

    measurements: dict[str, ModelMeasurement]
    comparisons: list[Comparison]
    audit_gap: float | None
    verdict: list[str]
    warnings: list[str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: dict[str, float]
    class_names: list[str]
