"""What is known about single pictures after an analysis: the worst ones, which concepts moved, and their nearest pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from singreg.analysis.levels.concept_results import ConceptShift

By = Literal["AS", "IS"]


@dataclass(frozen=True)
class WorstImage:
    """One picture: AS of its true class and IS in degrees, what the head calls it, and the concepts that moved most.

    index: place in the part. image: its name there. rises: concepts that come closer when the null component goes, the largest
    AS first; falls: those that move away, the most negative first.
    """

    index: int
    image: str
    label: int
    class_name: str
    predicted: str
    attribute_score: float
    image_score: float
    rises: tuple[ConceptShift, ...]
    falls: tuple[ConceptShift, ...]


@dataclass(frozen=True)
class ImageMeasurement:
    """The worst pictures of a part: by the most negative AS, or by the largest IS (METHOD section 3, image level).

    images: labelled pictures searched. unlabelled: pictures left out, since AS needs a true class. features: (k, m) of the worst
    in their order, for their nearest pictures; not part of the JSON.
    """

    by: By
    centred: bool
    images: int
    unlabelled: int
    worst: tuple[WorstImage, ...]
    features: np.ndarray | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict without the features (no shapes)."""
        value = {name: getattr(self, name) for name in ("by", "centred", "images", "unlabelled")}
        return {**value, "worst": [asdict(image) for image in self.worst]}

    @classmethod
    def from_json(cls, value: dict[str, Any], features: np.ndarray | None = None) -> ImageMeasurement:
        """Back from `to_json`. Shapes: features (k, m)."""
        worst = tuple(
            WorstImage(**{**image, **{side: tuple(ConceptShift(**shift) for shift in image[side]) for side in ("rises", "falls")}})
            for image in value["worst"]
        )
        return cls(**{**value, "worst": worst, "features": features})


@dataclass(frozen=True)
class Neighbour:
    """A picture of a gallery: place, name, and its angle to what was searched for in degrees."""

    index: int
    image: str
    angle: float


@dataclass(frozen=True)
class PictureShift:
    """The nearest pictures of one picture's translation before (T f) and after (T f~) the removal, nearest first.

    steered: those of T of a steered feature, None when there is none.
    """

    index: int
    image: str
    before: tuple[Neighbour, ...]
    after: tuple[Neighbour, ...]
    steered: tuple[Neighbour, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict (no shapes)."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PictureShift:
        """Back from `to_json` (no shapes)."""
        sides = {
            side: None if value[side] is None else tuple(Neighbour(**found) for found in value[side])
            for side in ("before", "after", "steered")
        }
        return cls(**{**value, **sides})
