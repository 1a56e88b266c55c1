"""The joint distribution of AS and IS over pictures, with its 1 and 2 sigma ellipses (METHOD section 3, paper figure 4)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from singreg.analysis.results import CENTRED, Rows

POINTS = 2000
SIGMAS = (1.0, 2.0)


@dataclass(frozen=True)
class SigmaEllipse:
    """An ellipse around the mean (IS, AS): full width and height in degrees, tilt in degrees, and what lies inside it.

    share: of the pictures that are inside; 39 % and 86 % at 1 and 2 sigma were the distribution normal.
    """

    sigma: float
    width: float
    height: float
    tilt: float
    share: float


@dataclass(frozen=True)
class JointDistribution:
    """AS and IS of N pictures: means and deviations in degrees, ellipses, and up to 2,000 evenly taken points (IS, AS).

    ratio: mean IS / mean |AS|, the paper's figure of a model. correlation: of AS and IS, None where one does not vary.
    ellipses: none for fewer than three pictures.
    """

    images: int
    mean: tuple[float, float]
    std: tuple[float, float]
    ratio: float | None
    correlation: float | None
    ellipses: tuple[SigmaEllipse, ...]
    points: tuple[tuple[float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict (no shapes)."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> JointDistribution:
        """Back from `to_json`, also after a way through a JSON file (no shapes)."""
        pairs = {name: (value[name][0], value[name][1]) for name in ("mean", "std")}
        ellipses = tuple(SigmaEllipse(**ellipse) for ellipse in value["ellipses"])
        return cls(**{**value, **pairs, "ellipses": ellipses, "points": tuple((x, y) for x, y in value["points"])})


def joint_distribution(rows: Rows, *, translator: str = "auditor", centred: bool = False) -> JointDistribution:
    """The joint distribution by one translator from rows with "AS/NAME" and "IS/NAME" (N,), as `analyze_model(...).rows` has them.

    Raises:
        ValueError: the rows have no such column, or no picture.

    Example:
        >>> found = joint_distribution({"AS/auditor": np.array([-1.0, 3.0]), "IS/auditor": np.array([9.0, 11.0])})
        >>> found.mean, found.ratio
        ((10.0, 1.0), 5.0)
    """
    names = [f"{CENTRED if centred else ''}{figure}/{translator}" for figure in ("IS", "AS")]
    missing = [name for name in names if name not in rows]
    if missing or not len(rows[names[0]]):
        raise ValueError(f"expected rows with {names} of at least one picture, got {', '.join(rows) or 'nothing'}")
    cloud = np.stack([np.asarray(rows[name], dtype=np.float64) for name in names], axis=1)
    mean, std = cloud.mean(0), cloud.std(0)
    absolute = float(np.abs(cloud[:, 1]).mean())
    shown = cloud[:: max(1, -(-len(cloud) // POINTS))].round(4)
    return JointDistribution(
        images=len(cloud),
        mean=(float(mean[0]), float(mean[1])),
        std=(float(std[0]), float(std[1])),
        ratio=float(mean[0]) / absolute if absolute > 0 else None,
        correlation=float(((cloud - mean).prod(1)).mean() / std.prod()) if std.min() > 0 else None,
        ellipses=_ellipses(cloud) if len(cloud) > 2 else (),
        points=tuple((float(x), float(y)) for x, y in shown),
    )


def _ellipses(cloud: np.ndarray) -> tuple[SigmaEllipse, ...]:
    """From the eigenvectors of the covariance of the cloud (N, 2); an axis without variance has no length."""
    values, vectors = np.linalg.eigh(np.cov(cloud.T))
    values = np.maximum(values, 0)
    along = (cloud - cloud.mean(0)) @ vectors
    floor = np.finfo(np.float64).eps * max(float(values.max()), np.finfo(np.float64).tiny)
    radius = np.sqrt((along**2 / np.maximum(values, floor)).sum(1))
    tilt = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
    return tuple(
        SigmaEllipse(
            sigma=sigma,
            width=float(2 * sigma * np.sqrt(values[1])),
            height=float(2 * sigma * np.sqrt(values[0])),
            tilt=tilt,
            share=float((radius <= sigma).mean()),
        )
        for sigma in SIGMAS
    )
