"""From a configuration to the four splits of a run: folders of images, Hugging Face data sets, the built-in scenes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

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
Rows = dict[str, np.ndarray]


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
    if config.source == "scenes":
        splits = _scenes(config)
    else:
        splits = together(lambda: _stored(config), "reading the data", first_only=True)
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
    source = open_source(config)
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
    drop = config.bad_images == "drop"
    while True:  # until all that is drawn is readable
        drawn = _draw(config, subset.keys, found)
        bad = [one.examine(np.concatenate(list(rows.values()))) for one, rows in zip(found, drawn, strict=True)]
        if not (drop and any(bad)):
            break
    _report_bad(found, drop)
    bank, audit = ([train.split.subset(drawn[0][name], name)] for name in ("train", "audit"))
    if config.unlabeled is not None:
        bank.append(found[2].split.subset(drawn[2]["bank"], "bank"))
        audit.append(found[2].split.subset(drawn[2]["audit"], "audit"))
    groups = [[test.split.subset(drawn[1]["test"], "test")], audit, bank]
    (test_split,), audit, bank = without_copies(groups, drop)
    empty = [subset.names[label] for label in set(range(len(subset))) - set(bank[0].labels.tolist())]
    if empty:
        raise ValueError(
            f"no training image is left once copies of other splits' images are dropped: {', '.join(empty)}"
        )
    bank_split, audit_split = ConcatSplit("bank", bank), ConcatSplit("audit", audit)
    return Splits(bank[0], bank_split, audit_split, test_split, subset.names, subset.indices)


class _Candidates:
    """All images of a split, of which some are drawn; those drawn are examined, and bad ones are drawn no more."""

    def __init__(self, split: TableSplit) -> None:
        self.split = split
        self.bad: dict[int, str] = {}
        self.seen = np.zeros(len(split), dtype=bool)

    def shuffled(self, label: int, key: str) -> np.ndarray:
        """Return the rows of a label (M,) in an order that depends on `key` alone."""
        rows = np.flatnonzero(self.split.labels == label)
        word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        rows = np.random.default_rng([0, word]).permutation(rows)
        return rows[[int(row) not in self.bad for row in rows]] if self.bad else rows

    def examine(self, rows: np.ndarray) -> bool:
        """Look at those of the rows (M,) not yet looked at; return whether any of them is bad."""
        new = rows[~self.seen[rows]]
        self.seen[new] = True
        bad = self.split.examine(new)
        self.bad |= bad
        return bool(bad)


def _draw(config: DataConfig, keys: Sequence[str], found: Sequence[_Candidates]) -> list[Rows]:
    """Return the rows for train and audit, for test, and of unlabelled images for bank and audit."""
    train, audit, test = ([np.zeros(0, dtype=np.int64)] for _ in range(3))
    short: dict[int, list[str]] = {0: [], 1: []}
    wanted = config.per_class
    for label, key in enumerate(keys):
        rows = found[0].shuffled(label, key)
        for_train, for_audit = _shares(len(rows), wanted.get("train"), wanted.get("audit"))
        if for_train < 1 or for_train + for_audit > len(rows) or (for_audit < 1 and wanted.get("audit") != 0):
            asked = [wanted.get(name, "the rest, at least 1") for name in ("train", "audit")]
            short[0].append(f"{key} has {len(rows)} for train ({asked[0]}) + audit ({asked[1]})")
        train.append(np.sort(rows[:for_train]))
        audit.append(np.sort(rows[for_train : for_train + for_audit]))
        rows = found[1].shuffled(label, key)
        count = wanted.get("test", len(rows))
        if not 1 <= count <= len(rows):
            short[1].append(f"{key} has {len(rows)} for test ({wanted.get('test', 'all, at least 1')})")
        test.append(np.sort(rows[:count]))
    problems = [
        f"{found[place].split.name}: too few images ({len(found[place].bad)} unreadable ones not counted): {_list(texts)}"
        for place, texts in short.items()
        if texts
    ]
    if problems:
        raise ValueError("\n".join([*problems, "lower data.per_class, or leave a key out to take what there is"]))
    drawn = [
        {"train": np.concatenate(train), "audit": np.concatenate(audit)},
        {"test": np.concatenate(test)},
    ]
    for extra in found[2:]:
        rows = extra.shuffled(UNLABELLED, "unlabelled")
        cut = round(config.unlabeled_to_audit * len(rows))
        drawn.append({"audit": np.sort(rows[:cut]), "bank": np.sort(rows[cut:])})
    return drawn


def _shares(count: int, train: int | None, audit: int | None) -> tuple[int, int]:
    if train is None:
        audit = count // 2 if audit is None else audit
        return count - audit, audit
    return train, count - train if audit is None else audit


def _list(texts: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return separator.join(texts[:NAMED]) + more


def _report_bad(found: Sequence[_Candidates], drop: bool) -> None:
    """Stop over unreadable images and name them all, or warn that they are left out."""
    bad = [f"{one.split.identifier(row)} ({why})" for one in found for row, why in sorted(one.bad.items())]
    text = f"{len(bad)} images cannot be read" + (
        " and are left out" if drop else "; mend them or set data.bad_images: drop"
    )
    if bad and not drop:
        raise UnreadableImageError("\n  ".join([text, *bad]))
    if bad:
        logger.warning("%s:\n  %s", text, _list(bad, "\n  "))


def without_copies(groups: Sequence[Sequence[ImageSplit]], drop: bool) -> list[list[ImageSplit]]:
    """Refuse images with the bytes of an image in an earlier group, or drop them; within one group they are no leak."""
    kept, before = [list(groups[0])], list(groups[0])
    copies: list[str] = []
    for group in groups[1:]:
        known = ConcatSplit("known", before)
        codes, left = _codes(known), []
        for split in group:
            own = _codes(split)
            copied = np.isin(own, codes)
            for index in np.flatnonzero(copied).tolist():
                first = ""
                if len(copies) < NAMED:
                    other, place = known.locate(int(np.flatnonzero(codes == own[index])[0]))
                    first = f"{split.identifier(index)} ({split.name}) = {other.identifier(place)} ({other.name})"
                copies.append(first)
            left.append(split.subset(np.flatnonzero(~copied)) if copied.any() else split)
        kept.append(left)
        before += group
    if copies and not drop:
        raise ValueError(
            f"{len(copies)} images are in two splits that must not share any; remove one of each pair, or set "
            f"data.bad_images: drop to keep the second of each line only:\n  " + _list(copies, "\n  ")
        )
    if copies:
        text = "%d images that are in another split too were dropped from the first one named:\n  %s"
        logger.warning(text, len(copies), _list(copies, "\n  "))
    return kept


def _codes(split: ImageSplit) -> np.ndarray:
    """The digests as one value an image, (N,)."""
    return np.ascontiguousarray(split.digests).view("S32").reshape(-1)
