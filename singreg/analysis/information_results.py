"""What the null space knows that the row space does not, as plain numbers (METHOD section 8.5)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BLOCKS = ("features", "row_space", "null_space")
"""What a fit was given: f, Π_p f or Π_n f."""


@dataclass(frozen=True)
class UniqueInformation:
    """Held-out R² and class accuracy of fits on f, Π_p f and Π_n f; each with a 95 % bootstrap interval over classes and pictures.

    r2: of z from each block. unique: R²(z|f) - R²(z|Π_p f), what of the image embedding only the null space tells.
    accuracy: of a fresh linear probe for the class on each block. chance: accuracy of always naming the class most frequent
    in the fit. unique_accuracy: accuracy on f minus accuracy on Π_p f. intervals: [low, high] by the name of the field, or
    "r2 BLOCK", "accuracy BLOCK". ridges: the relative penalty chosen, under the same names. fit_*: pictures behind the fits;
    unseen: test pictures of classes the probe never saw (it cannot name them).
    """

    r2: dict[str, float]
    unique: float
    accuracy: dict[str, float]
    unique_accuracy: float
    chance: float
    intervals: dict[str, list[float]]
    ridges: dict[str, float]
    images: int
    labelled: int
    unseen: int
    fit_images: int
    fit_labelled: int

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict (no shapes)."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> UniqueInformation:
        """Back from `to_json` (no shapes)."""
        return cls(**value)
