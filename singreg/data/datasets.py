"""From a configuration to the four splits of a run: folders of images, Hugging Face data sets, the built-in scenes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np

from singreg.config import DataConfig
from singreg.data.classes import resolve_classes
from singreg.data.loader import make_loader
from singreg.data.scenes import sample_scenes
from singreg.data.sources import open_split, read_unlabelled
from singreg.data.splits import UNLABELLED, ConcatSplit, ImageSplit, SceneSplit, Splits, TableSplit
from singreg.utils import together

__all__ = ["ImageSplit", "SceneSplit", "Splits", "load_splits", "make_loader"]

logger = logging.getLogger(__name__)
NAMED = 20  # a message that lists more than this is read by nobody


def load_splits(config: DataConfig) -> Splits:
    """Return the train, bank, audit and test splits that a configuration describes.

    A class keeps its images whatever other classes are chosen. In a process group the first process looks at the data.

    Raises:
        ValueError: classes that are not there or have too few images, images that cannot be read or are in two splits.
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
    train = open_split(config, config.train_split, "data.train_split")
    test = open_split(config, config.test_split, "data.test_split")
    subset, drop = resolve_classes(config.classes, train.keys), config.bad_images == "drop"
    try:
        there = resolve_classes(subset.keys, test.keys)
    except ValueError as error:
        raise ValueError(f"split {config.test_split!r} of {config.source} (data.test_split): {error}") from error
    read = [train.read(subset.keys, subset.names), test.read(there.keys, subset.names)]
    if config.unlabeled is not None:
        read.append(read_unlabelled(config.unlabeled, subset.names))
    while True:
        draws = _draw(read, subset.keys, config)
        bad = [split.examine(np.concatenate(list(rows.values()))) for split, rows in zip(read, draws, strict=True)]
        if not drop or not any(bad):
            break
    lines = [f"{split.identifier(row)} ({why})" for split in read for row, why in sorted(split.bad.items())]
    _stop_or_warn(lines, "cannot be read", drop)
    groups: dict[str, list[ImageSplit]] = {"test": [], "audit": [], "bank": []}
    for split, rows in zip(read, draws, strict=True):
        for name, drawn in rows.items():
            groups["bank" if name == "train" else name].append(split.subset(drawn, name))
    (tested,), audit, bank = without_copies(list(groups.values()), drop)
    present = set(bank[0].labels.tolist())
    empty = [name for label, name in enumerate(subset.names) if label not in present]
    if empty:
        raise ValueError(f"no training image is left without copies of other splits' images: {', '.join(empty)}")
    return Splits(bank[0], ConcatSplit("bank", bank), ConcatSplit("audit", audit), tested, subset.names, subset.indices)


def _draw(read: Sequence[TableSplit], keys: Sequence[str], config: DataConfig) -> list[dict[str, np.ndarray]]:
    """Rows by the name of the split they are for, from train, test and unlabelled images; by class, in label order."""
    draws, short = [], []
    for place, split in enumerate(read):
        chosen: dict[str, list[np.ndarray]] = {}
        for label, key in enumerate(keys) if place < 2 else [(UNLABELLED, "unlabelled")]:
            # A generator of its own: a class keeps its images whatever other classes are chosen.
            word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
            rows = np.random.default_rng([0, word]).permutation(np.flatnonzero(split.labels == label))
            rows = rows[~np.isin(rows, list(split.bad))]
            counts, start = _shares(place, len(rows), config), 0
            for name, count in counts.items():
                chosen.setdefault(name, []).append(np.sort(rows[start : start + max(count, 0)]))
                start += count
            none = place < 2 and any(count < 1 for name, count in counts.items() if config.per_class.get(name) != 0)
            if start > len(rows) or none:
                asked = " + ".join(f"{name} {count}" for name, count in counts.items())
                short.append(f"{split.name}: {key} has {len(rows)} for {asked}")
        draws.append({name: np.concatenate(rows) for name, rows in chosen.items()})
    if short:
        left_out = f" ({sum(len(split.bad) for split in read)} unreadable ones not counted)"
        raise ValueError(f"too few images{left_out}; lower data.per_class, or leave a key out\n  {_joined(short)}")
    return draws


def _shares(place: int, count: int, config: DataConfig) -> dict[str, int]:
    """How many of `count` train (0), test (1) or unlabelled (2) images each split gets; None is what is left."""
    train, audit, test = (config.per_class.get(name) for name in ("train", "audit", "test"))
    if place == 1:
        return {"test": count if test is None else test}
    if place == 2:
        cut = round(config.unlabeled_to_audit * count)
        return {"audit": cut, "bank": count - cut}
    if audit is None:
        audit = count // 2 if train is None else count - train
    return {"train": count - audit if train is None else train, "audit": audit}


def without_copies(groups: Sequence[Sequence[ImageSplit]], drop: bool) -> list[list[ImageSplit]]:
    """Refuse images with the bytes of an image in an earlier group, or drop them; within one group they are no leak."""
    kept, lines = [list(groups[0])], []
    for place, group in enumerate(groups[1:], start=1):
        known = ConcatSplit("known", [split for before in groups[:place] for split in before])
        codes = _codes(known)
        kept.append([])
        for split in group:
            own = _codes(split)
            copied = np.isin(own, codes)
            for index in np.flatnonzero(copied).tolist():
                other, row = known.locate(int((codes == own[index]).argmax()))
                lines.append(f"{split.identifier(index)} ({split.name}) = {other.identifier(row)} ({other.name})")
            kept[-1].append(split.subset(np.flatnonzero(~copied)) if copied.any() else split)
    _stop_or_warn(lines, "are copies of another split's (named second)", drop)
    return kept


def _codes(split: ImageSplit) -> np.ndarray:
    """The digests as one value an image, (N,)."""
    return np.ascontiguousarray(split.digests).view("S32").reshape(-1)


def _stop_or_warn(lines: Sequence[str], problem: str, drop: bool) -> None:
    """Stop over images and name them all, or warn that they are left out."""
    if lines and not drop:
        names = "\n  ".join(lines)
        raise ValueError(f"{len(lines)} images {problem}; mend or remove them, or set data.bad_images: drop\n  {names}")
    if lines:
        logger.warning("%d images %s and are left out:\n  %s", len(lines), problem, _joined(lines))


def _joined(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
    return "\n  ".join([*lines[:NAMED], *more])
