"""From a configuration to the four splits of a run: folders of images, Hugging Face data sets, the built-in scenes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence

import numpy as np

from singreg.config import DataConfig
from singreg.data.classes import resolve_classes
from singreg.data.collective import together
from singreg.data.loader import make_loader
from singreg.data.scenes import sample_scenes
from singreg.data.sources import open_source, read_unlabelled
from singreg.data.splits import (
    UNLABELLED,
    ConcatSplit,
    ImageSplit,
    SceneSplit,
    Splits,
    SubsetSplit,
    TableSplit,
    UnreadableImageError,
)

__all__ = [
    "ConcatSplit",
    "ImageSplit",
    "SceneSplit",
    "Splits",
    "SubsetSplit",
    "TableSplit",
    "load_splits",
    "make_loader",
]

logger = logging.getLogger(__name__)
NAMED = 20  # a message that lists more than this is read by nobody


def load_splits(config: DataConfig) -> Splits:
    """Return the train, bank, audit and test splits that a configuration describes.

    A class keeps its images whatever other classes are chosen. In a process group the first process looks at the data.

    Raises:
        ValueError: classes that do not exist or have too few images, images that cannot be read or are in two splits;
            all are named.
        FileNotFoundError: a folder or split that is not there.

    Example:
        >>> splits = load_splits(DataConfig(scenes={"train": 12, "audit": 6, "test": 5}))
        >>> [len(split) for split in splits]
        [12, 12, 6, 5]
    """
    scenes = config.source == "scenes"
    splits = _scenes(config) if scenes else together(lambda: _stored(config), "reading the data", first_only=True)
    sizes = ", ".join(f"{split.name} {len(split)}" for split in splits)
    logger.info("data %s: %d classes; images: %s", config.source, len(splits.class_names), sizes)
    return splits


def _scenes(config: DataConfig) -> Splits:
    options = config.scene_counts

    def scenes(name: str, stream: int, bias: float) -> ImageSplit:
        seed = int(np.random.SeedSequence([int(options["seed"]), stream]).generate_state(1)[0])
        return SceneSplit(name, sample_scenes(int(options[name]), seed=seed, background_bias=bias))

    train, audit, bank = (scenes(name, i, options["bias"]) for name, i in (("train", 0), ("audit", 1), ("bank", 3)))
    whole = ConcatSplit("bank", [train, bank] if len(bank) else [train])
    return Splits(train, whole, audit, scenes("test", 2, 0.0), train.class_names, None)


def _stored(config: DataConfig) -> Splits:
    """Draw the splits' images, look at those drawn, and draw again without bad ones until all are readable."""
    source, wanted, drop = open_source(config), config.per_class, config.bad_images == "drop"
    subset = resolve_classes(config.classes, source.keys(config.train_split, "data.train_split"))
    try:
        there = resolve_classes(subset.keys, source.keys(config.test_split, "data.test_split"))
    except ValueError as error:
        raise ValueError(f"split {config.test_split!r} of {config.source} (data.test_split): {error}") from error
    train = _Candidates(source.read(config.train_split, subset.keys, subset.names))
    test = _Candidates(source.read(config.test_split, there.keys, subset.names))
    found = [train, test]
    if config.unlabeled is not None:
        found.append(_Candidates(read_unlabelled(config.unlabeled, subset.names)))
    while True:
        draws = [
            train.draw(subset.keys, lambda count: _train_and_audit(count, wanted.get("train"), wanted.get("audit"))),
            test.draw(subset.keys, lambda count: {"test": (wanted.get("test", count), 1)}),
            *(one.draw(None, lambda count: _audit_and_bank(count, config.unlabeled_to_audit)) for one in found[2:]),
        ]
        short = [problem for _, problem in draws if problem]
        if short:
            raise ValueError("\n".join([*short, "lower data.per_class, or leave a key out to take what there is"]))
        bad = [one.examine(np.concatenate(list(rows.values()))) for one, (rows, _) in zip(found, draws, strict=True)]
        if not drop or not any(bad):
            break
    _report_bad(found, drop)
    groups: dict[str, list[ImageSplit]] = {"test": [], "audit": [], "bank": []}
    for one, (drawn, _) in zip(found, draws, strict=True):
        for name, rows in drawn.items():
            groups["bank" if name == "train" else name].append(one.split.subset(rows, name))
    (test_split,), audit, bank = without_copies(list(groups.values()), drop)
    present = set(bank[0].labels.tolist())
    empty = [name for label, name in enumerate(subset.names) if label not in present]
    if empty:
        raise ValueError(f"no training image is left without copies of other splits' images: {', '.join(empty)}")
    bank_split, audit_split = ConcatSplit("bank", bank), ConcatSplit("audit", audit)
    return Splits(bank[0], bank_split, audit_split, test_split, subset.names, subset.indices)


class _Candidates:
    """All images of a split; those drawn are looked at, and bad ones are not drawn again."""

    def __init__(self, split: TableSplit) -> None:
        self.split = split
        self.bad: dict[int, str] = {}
        self.seen = np.zeros(len(split), dtype=bool)

    def draw(
        self, keys: Sequence[str] | None, shares: Callable[[int], dict[str, tuple[int, int]]]
    ) -> tuple[dict[str, np.ndarray], str]:
        """Return rows by the name of the split they are for, and a sentence about classes with too few images.

        Args:
            keys: the classes, in label order; None for the unlabelled images.
            shares: of a class with so many images, how many each split gets, and how many at least.
        """
        chosen: dict[str, list[np.ndarray]] = {}
        short = []
        for label, key in enumerate(keys) if keys is not None else [(UNLABELLED, "unlabelled")]:
            rows, start = self._shuffled(label, key), 0
            counts = shares(len(rows))
            for name, (count, _) in counts.items():
                chosen.setdefault(name, []).append(np.sort(rows[start : start + max(count, 0)]))
                start += count
            if start > len(rows) or any(count < least for count, least in counts.values()):
                asked = " + ".join(f"{name} {count}" for name, (count, _) in counts.items())
                short.append(f"{key} has {len(rows)} for {asked}")
        left_out = f" ({len(self.bad)} unreadable ones not counted)" if self.bad else ""
        problem = f"{self.split.name}: too few images{left_out}: {_joined(short, ', ')}" if short else ""
        return {name: np.concatenate(rows) for name, rows in chosen.items()}, problem

    def _shuffled(self, label: int, key: str) -> np.ndarray:
        """The readable rows of a label in an order that depends on `key` alone."""
        word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        rows = np.random.default_rng([0, word]).permutation(np.flatnonzero(self.split.labels == label))
        return rows[~np.isin(rows, list(self.bad))]

    def examine(self, rows: np.ndarray) -> bool:
        """Look at those of the rows (M,) not looked at before; return whether any of them is bad."""
        new = rows[~self.seen[rows]]
        self.seen[new] = True
        bad = self.split.examine(new)
        self.bad |= bad
        return bool(bad)


def _train_and_audit(count: int, train: int | None, audit: int | None) -> dict[str, tuple[int, int]]:
    """What each gets and must have at least: without a number what the other leaves, or half of what there is."""
    least = 0 if audit == 0 else 1
    if audit is None:
        audit = count // 2 if train is None else count - train
    return {"train": (count - audit if train is None else train, 1), "audit": (audit, least)}


def _audit_and_bank(count: int, to_audit: float) -> dict[str, tuple[int, int]]:
    cut = round(to_audit * count)
    return {"audit": (cut, 0), "bank": (count - cut, 0)}


def _report_bad(found: Sequence[_Candidates], drop: bool) -> None:
    """Stop over unreadable images and name them all, or warn that they are left out."""
    bad = [f"{one.split.identifier(row)} ({why})" for one in found for row, why in sorted(one.bad.items())]
    if bad and not drop:
        names = "\n  ".join(bad)
        raise UnreadableImageError(
            f"{len(bad)} images cannot be read; mend them or set data.bad_images: drop\n  {names}"
        )
    if bad:
        logger.warning("%d images cannot be read and are left out:\n  %s", len(bad), _joined(bad))


def without_copies(groups: Sequence[Sequence[ImageSplit]], drop: bool) -> list[list[ImageSplit]]:
    """Refuse images with the bytes of an image in an earlier group, or drop them; within one group they are no leak."""
    kept, copies = [list(groups[0])], []
    for place, group in enumerate(groups[1:], start=1):
        known = ConcatSplit("known", [split for before in groups[:place] for split in before])
        codes = _codes(known)
        kept.append([])
        for split in group:
            own = _codes(split)
            copied = np.isin(own, codes)
            for index in np.flatnonzero(copied).tolist():
                other, row = known.locate(int((codes == own[index]).argmax()))
                copies.append(f"{split.identifier(index)} ({split.name}) = {other.identifier(row)} ({other.name})")
            kept[-1].append(split.subset(np.flatnonzero(~copied)) if copied.any() else split)
    if copies and not drop:
        raise ValueError(
            f"{len(copies)} images are in two splits that must not share any; remove one of each pair, or set "
            f"data.bad_images: drop to keep the second of each line only\n  {_joined(copies)}"
        )
    if copies:
        logger.warning(
            "%d images of another split are left out of the first named:\n  %s", len(copies), _joined(copies)
        )
    return kept


def _codes(split: ImageSplit) -> np.ndarray:
    """The digests as one value an image, (N,)."""
    return np.ascontiguousarray(split.digests).view("S32").reshape(-1)


def _joined(texts: Sequence[str], separator: str = "\n  ") -> str:
    more = f"{separator}and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return separator.join(texts[:NAMED]) + more
