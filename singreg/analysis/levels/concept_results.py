"""What is known about concepts after an analysis: their angles before and after the removal, overall and by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FIGURES = ("before", "before_std", "after", "after_std", "AS", "AS_std", "AS_abs", "AS_low", "AS_high", "kappa")
CLASS_FIGURES = ("before", "after", "AS", "AS_std")
NORMAL_95 = 1.959963984540054
Order = Literal["strongest", "weakest", "rises", "falls"]


@dataclass(frozen=True)
class ConceptShift:
    """One concept's angle before and after the removal, in degrees, of one picture or as a mean over `images` pictures.

    score: AS = before - after, positive where the concept came closer. std: of AS over pictures. low, high: 95 % interval of
    the mean (normal, over pictures). kappa: AS as a share of what the displacement would allow, 0 at chance; overall only. None
    is what is not defined.
    """

    concept: str
    before: float
    after: float
    score: float
    images: int = 1
    std: float | None = None
    low: float | None = None
    high: float | None = None
    kappa: float | None = None


@dataclass(frozen=True, eq=False)
class ConceptMeasurement:
    """Angles of K concepts to N pictures before (T f) and after (T f~) the removal, in degrees (METHOD sections 3 and 8).

    overall: (K,) by figure (`FIGURES`): mean, deviation, 95 % interval over pictures. per_class: (C, K) by figure
    (`CLASS_FIGURES`), NaN for a class without pictures, rounded to 1e-5 degrees. class_images (C,): pictures behind each row;
    unlabelled pictures count in `overall` only. image_score, image_score_std: IS, the bound of every |AS|.
    centred: which removal (METHOD section 8.4).
    """

    concepts: tuple[str, ...]
    class_names: tuple[str, ...]
    images: int
    unlabelled: int
    centred: bool
    image_score: float
    image_score_std: float
    class_images: np.ndarray
    overall: dict[str, np.ndarray]
    per_class: dict[str, np.ndarray]

    @property
    def empty_classes(self) -> tuple[str, ...]:
        """Names of the classes without a single picture: their rows are NaN (no shapes)."""
        return tuple(name for name, count in zip(self.class_names, self.class_images, strict=True) if not count)

    def shift(self, concept: str, label: int | None = None) -> ConceptShift:
        """One concept's figures in degrees, overall or for one class.

        Raises:
            KeyError: no such concept. ValueError: a class without pictures, or no class of that number.
        """
        if concept not in self.concepts:
            raise KeyError(f"{concept!r} is not among the {len(self.concepts)} concepts measured")
        return self._shift(self.concepts.index(concept), self._checked(label))

    def select(self, order: Order = "strongest", count: int = 10, label: int | None = None) -> tuple[ConceptShift, ...]:
        """The `count` concepts that moved most or least by mean AS (degrees), overall or for the class `label`.

        Args:
            order: "strongest" and "weakest" by |AS|; "rises" come closer (AS > 0), "falls" move away (AS < 0).

        Raises:
            ValueError: another order, or a class without pictures.
        """
        label = self._checked(label)
        score = self.overall["AS"] if label is None else self.per_class["AS"][label]
        keys = {"strongest": -np.abs(score), "weakest": np.abs(score), "rises": -score, "falls": score}
        if order not in keys:
            raise ValueError(f"order must be one of {', '.join(keys)}, got {order!r}")
        places = np.argsort(keys[order], kind="stable")
        if order in ("rises", "falls"):
            places = places[keys[order][places] < 0]
        return tuple(self._shift(int(place), label) for place in places[:count])

    def to_json(self) -> dict[str, Any]:
        """A strictly JSON-able dict: arrays as lists, what is not defined (NaN) as null (no shapes)."""
        value = {name: getattr(self, name) for name in self.__dataclass_fields__}
        value |= {"concepts": list(self.concepts), "class_names": list(self.class_names)}
        value["class_images"] = self.class_images.tolist()
        for table in ("overall", "per_class"):
            value[table] = {name: _lists(array) for name, array in value[table].items()}
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ConceptMeasurement:
        """Back from `to_json` (no shapes)."""
        tables = {
            table: {name: np.array(rows, dtype=np.float64) for name, rows in value[table].items()}  # null becomes NaN
            for table in ("overall", "per_class")
        }
        names = {name: tuple(value[name]) for name in ("concepts", "class_names")}
        return cls(**{**value, **tables, **names, "class_images": np.array(value["class_images"], dtype=np.int64)})

    def _checked(self, label: int | None) -> int | None:
        if label is None:
            return None
        if not 0 <= label < len(self.class_names):
            raise ValueError(f"there are {len(self.class_names)} classes, numbered from 0; got {label}")
        if not self.class_images[label]:
            raise ValueError(f"class {self.class_names[label]!r} has no pictures, so no concept was measured on it")
        return label

    def _shift(self, place: int, label: int | None) -> ConceptShift:
        if label is not None:
            before, after, score, std = (float(self.per_class[name][label, place]) for name in CLASS_FIGURES)
            count = int(self.class_images[label])
            half = NORMAL_95 * std / count**0.5
            low, high = (score - half, score + half) if count > 1 else (None, None)
            return ConceptShift(self.concepts[place], before, after, score, count, std, low, high)
        of = {name: float(values[place]) for name, values in self.overall.items()}
        return ConceptShift(
            self.concepts[place], of["before"], of["after"], of["AS"], self.images,
            of["AS_std"], of["AS_low"], of["AS_high"], of["kappa"],
        )  # fmt: skip


def _lists(array: np.ndarray) -> Any:
    found = array.astype(object)
    found[np.isnan(array)] = None
    return found.tolist()
