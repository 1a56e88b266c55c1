"""A study's arms over seeds and against the reference: means, spreads, paired intervals, targets, Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from singreg.analysis.results import Rows, nan_for_null, nulls_for_nan
from singreg.analysis.statistics import Interval, paired_difference, paired_ratio, resampled_means
from singreg.analysis.study.arm_results import ArmFigures
from singreg.analysis.study.auditors import AgreementPoint

FORMAT = 2
AUDITOR = "auditor"
SECOND = "auditor VLM2"


@dataclass(frozen=True)
class ArmRun:
    """One arm at one seed as it was measured; figures: None where there is no null space to measure, extra: notes by name.

    trained: False where its seed says nothing, since neither it nor the arm it took its weights from was trained.
    control_of: the arm a placebo stands beside.
    validation: the few figures an arm is chosen by, on pictures that serve nothing else; empty without them.
    """

    arm: str
    role: str
    train: str
    note: str
    seed: int
    figures: ArmFigures | None
    extra: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    trained: bool = True
    control_of: str | None = None
    validation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Paired:
    """An arm against the reference: [low, high] is the 95 % bootstrap interval over classes and pictures, seeds averaged first.

    unit: × (ratio of means), points or share. by_seed: the same figure seed by seed, for the spread.
    """

    value: float
    low: float
    high: float
    unit: str
    by_seed: list[float]


@dataclass(frozen=True)
class Target:
    """One of the study's aims for one arm: what was wanted, what was found (already words), and whether it is reached."""

    name: str
    wanted: str
    found: str
    reached: bool


@dataclass(frozen=True)
class ArmSummary:
    """An arm over its seeds: mean and spread (standard deviation over seeds, NaN with one) of every figure by name.

    paired: against the reference, empty for itself. top1_kept: the interval of the change stays above minus the margin. targets:
    empty where nothing is compared. omitted: why there are no figures, or None. front: no arm is better in both top-1 and auditor AS⁻.
    validation: means over seeds on the validation part.
    """

    arm: str
    role: str
    train: str
    trained: bool
    note: str
    seeds: list[int]
    mean: dict[str, float]
    spread: dict[str, float]
    intervals: dict[str, list[float]]
    paired: dict[str, Paired]
    top1_kept: bool | None
    targets: list[Target]
    front: bool
    omitted: str | None
    extra: dict[str, Any]
    seconds: float
    control_of: str | None = None
    validation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyReport:
    """What the report says, as plain numbers and words; angles in degrees.

    agreement: two auditors of N pictures each before training, N by N. images_needed: an auditor of fewer supports no claim.
    """

    arms: list[ArmSummary]
    reference: str
    sentences: list[str]
    warnings: list[str]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: dict[str, float]
    images: int
    auditor_images: int
    agreement: list[AgreementPoint] = field(default_factory=list)
    images_needed: float = 0.0

    def by_name(self, name: str) -> ArmSummary:
        """The summary of one arm (no shapes)."""
        return next(arm for arm in self.arms if arm.arm == name)

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict: what is not defined becomes null (no shapes)."""
        value: dict[str, Any] = nulls_for_nan({"format": FORMAT, **asdict(self)})
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StudyReport:
        """Back from `to_json` (no shapes).

        Raises:
            ValueError: another format.
        """
        if value.get("format") != FORMAT:
            raise ValueError(f"this is not a study's report of format {FORMAT}, but of {value.get('format')!r}")
        given = {key: item for key, item in value.items() if key != "format"}
        arms = [_summary_from_json(arm) for arm in given["arms"]]
        return cls(**{**given, "arms": arms, "agreement": [AgreementPoint(**point) for point in given["agreement"]]})


def _summary_from_json(arm: dict[str, Any]) -> ArmSummary:
    targets = [Target(**target) for target in arm["targets"]]
    numbers = nan_for_null(arm) | {name: arm[name] for name in ("top1_kept", "omitted", "control_of")}  # there null is no number
    return ArmSummary(**{**numbers, "paired": {name: Paired(**found) for name, found in numbers["paired"].items()}, "targets": targets})


Figure = Callable[[Rows], np.ndarray]


def _column(name: str) -> Figure:
    return lambda rows: np.asarray(rows[name], np.float64)


def _harm(name: str) -> Figure:
    return lambda rows: np.maximum(-np.asarray(rows[name], np.float64), 0)


def _size(name: str) -> Figure:
    return lambda rows: np.abs(np.asarray(rows[name], np.float64))


RATIOS: dict[str, Figure] = {
    "AS_neg": _harm(f"AS/{AUDITOR}"),
    "AS_abs": _size(f"AS/{AUDITOR}"),
    "IS": _column(f"IS/{AUDITOR}"),
    "step": _column(f"steering_step/{AUDITOR}"),
    "AS25": _size(f"AS25/{AUDITOR}"),
    "success25": _column(f"success25/{AUDITOR}"),
    "area_success": _column(f"area_success/{AUDITOR}"),
    "manifold_success95": _column(f"manifold_success95/{AUDITOR}"),
    f"AS_neg {SECOND}": _harm(f"AS/{SECOND}"),
    f"manifold_success95 {SECOND}": _column(f"manifold_success95/{SECOND}"),
}
"""Ratios of means to the reference by name; a picture that is not steered or out of reach in either arm is in neither."""


def compare_with_reference(arm: Mapping[int, Rows], reference: Mapping[int, Rows]) -> dict[str, Paired]:
    """All paired figures from the rows (N,) by seed. Only seeds that both have are compared; an arm
    whose seed says nothing is given with every seed of the reference.

    Raises:
        ValueError: no seed in common, or other pictures.
    """
    common = sorted(arm.keys() & reference.keys())
    if not common:
        raise ValueError(f"no seed in common: {sorted(arm)} and {sorted(reference)}")
    pairs = [(arm[seed], reference[seed]) for seed in common]
    if any(list(one["image"]) != list(other["image"]) for one, other in pairs):
        raise ValueError("the arms were measured on other pictures, so they cannot be paired")
    groups = pairs[0][1].get("label")
    found = {
        name: _over_seeds([(figure(one), figure(other)) for one, other in pairs], paired_ratio, "×", groups)
        for name, figure in RATIOS.items()
        if all(_has(figure, rows) for pair in pairs for rows in pair)
    }
    hits = [(100 * one["correct"], 100 * other["correct"]) for one, other in pairs]
    found["top1"] = _over_seeds(hits, paired_difference, "points", groups)
    found["harmless_r2"] = _r2_ratio(pairs)
    return found


def _has(figure: Figure, rows: Rows) -> bool:
    try:
        return bool(np.isfinite(figure(rows)).any())
    except KeyError:
        return False


def _over_seeds(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], statistic: Callable[..., Interval], unit: str, groups: np.ndarray | None
) -> Paired:
    """Pictures that are defined in both arms at every seed, averaged over seeds; unit × or points, groups the classes (N,)."""
    both = np.stack([np.stack(pair) for pair in pairs])  # seeds, arm and reference, pictures
    defined = np.isfinite(both).all((0, 1))
    if not defined.any():
        return Paired(math.nan, math.nan, math.nan, unit, [math.nan] * len(pairs))
    both = both[:, :, defined]
    means = both.mean(0)
    by_seed = [_plain(one, other, unit) for one, other in both]
    clusters = None if groups is None else groups[defined]
    return Paired(*statistic(means[0], means[1], groups=clusters), unit=unit, by_seed=by_seed)


def _plain(one: np.ndarray, other: np.ndarray, unit: str) -> float:
    """The figure alone, without its interval."""
    if unit != "×":
        return float(one.mean() - other.mean())
    return float(one.mean() / other.mean()) if other.mean() else math.nan


def _r2_ratio(pairs: Sequence[tuple[Rows, Rows]]) -> Paired:
    """R² of the harmless part, arm over reference: 1 - Σ residual / Σ spread of each, the same pictures drawn for both."""

    def ratio(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            value: np.ndarray = (1 - means[..., 0] / means[..., 1]) / (1 - means[..., 2] / means[..., 1])
            return value

    columns = np.stack(
        [[one["harmless_residual"], one["harmless_spread"], other["harmless_residual"]] for one, other in pairs]
    ).transpose(0, 2, 1)
    means = columns.mean(0)
    drawn = ratio(resampled_means(means, groups=pairs[0][1].get("label")))
    low, high = np.quantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).all() else (math.nan, math.nan)
    return Paired(float(ratio(means.mean(0))), float(low), float(high), "×", [float(ratio(c.mean(0))) for c in columns])


def summarize(runs: Sequence[ArmRun]) -> tuple[dict[str, float], dict[str, float]]:
    """(mean, spread) over seeds of every figure that all runs of one arm have; spread: standard deviation, NaN with one seed."""
    flats = [_flat(run) for run in runs]
    names = [name for name in flats[0] if all(name in flat for flat in flats)]
    table = np.array([[flat[name] for name in names] for flat in flats], np.float64)
    spread = table.std(0, ddof=1) if len(table) > 1 else np.full(len(names), math.nan)
    return dict(zip(names, table.mean(0).tolist(), strict=True)), dict(zip(names, spread.tolist(), strict=True))


def _flat(run: ArmRun) -> dict[str, float]:
    """Every figure by name, with the audit gap: auditor AS⁻ over that of the translator the loss saw."""
    if run.figures is None:
        return {"top1": float(run.extra["top1"])}
    flat = run.figures.flat()
    loop = flat.get("AS_neg/loop", 0.0)
    return {**flat, **({"audit_gap": flat[f"AS_neg/{AUDITOR}"] / loop} if loop > 0 else {})}


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names of (top-1, AS⁻) that no other beats: none has as much of the first, as little of the second and one of them strictly.

    Example:
        >>> sorted(pareto_front({"a": (0.9, 2.0), "b": (0.8, 1.0), "c": (0.8, 3.0)}))
        ['a', 'b']
    """

    def beaten(name: str) -> bool:
        top1, harm = points[name]
        return any(
            other[0] >= top1 and other[1] <= harm and other != (top1, harm) for key, other in points.items() if key != name
        )

    return {name for name in points if not beaten(name)}
