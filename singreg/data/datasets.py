"""From a configuration to the four splits of a run: folders of images, Hugging Face data sets, the built-in scenes."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from singreg.config import DataConfig
from singreg.data.classes import resolve_classes
from singreg.data.scenes import sample_scenes
from singreg.data.splits import (
    UNLABELLED,
    ConcatSplit,
    ImageSplit,
    SceneSplit,
    Splits,
    TableSplit,
    cell_bytes,
    examine,
    make_loader,
)
from singreg.utils import cache_folder, sha256_of_json, together

__all__ = ["ImageSplit", "SceneSplit", "Splits", "load_splits", "make_loader"]

logger = logging.getLogger(__name__)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
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
    train = _open_split(config, config.train_split, "data.train_split")
    test = _open_split(config, config.test_split, "data.test_split")
    subset, drop = resolve_classes(config.classes, train.keys), config.bad_images == "drop"
    try:
        there = resolve_classes(subset.keys, test.keys)
    except ValueError as error:
        raise ValueError(f"split {config.test_split!r} of {config.source} (data.test_split): {error}") from error
    read = [train.read(subset.keys, subset.names), test.read(there.keys, subset.names)]
    if config.unlabeled is not None:
        read.append(_read_unlabelled(config.unlabeled, subset.names))
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
    kept, lines = list[list[ImageSplit]](), []
    known: dict[bytes, tuple[ImageSplit, int]] = {}
    for group in groups:
        kept.append([])
        for split in group:
            found = {i: known[content] for i, content in enumerate(map(bytes, split.digests)) if content in known}
            for i, (other, row) in found.items():
                lines.append(f"{split.identifier(i)} ({split.name}) = {other.identifier(row)} ({other.name})")
            kept[-1].append(split.subset(np.delete(np.arange(len(split)), list(found))) if found else split)
        for split in group:  # last, since copies within a group may stay
            known = {bytes(content): (split, i) for i, content in enumerate(split.digests)} | known
    _stop_or_warn(lines, "are copies of another split's (named second)", drop)
    return kept


def _stop_or_warn(lines: Sequence[str], problem: str, drop: bool) -> None:
    """Stop over images and name them all, or warn that they are left out."""
    if lines and not drop:
        names = "\n  ".join(lines)
        raise ValueError(f"{len(lines)} images {problem}; mend or remove them, or set data.bad_images: drop\n  {names}")
    if lines:
        logger.warning("%d images %s and are left out:\n  %s", len(lines), problem, _joined(lines))


def _joined(lines: Sequence[str]) -> str:
    return "\n  ".join([*lines[:NAMED], *([f"and {len(lines) - NAMED} more"] if len(lines) > NAMED else [])])


def _open_split(config: DataConfig, split: str, option: str) -> _Folder | _HuggingFace:
    """Return a split, which `option` named, of the folder of images or Hugging Face data set `config.source`."""
    path = Path(config.source).expanduser()
    if path.is_dir() and not any((*path.glob("*.parquet"), *path.glob("*/*.parquet"))) and not config.streaming:
        return _Folder(path.resolve(), split, option)
    if not path.is_dir() and config.source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no folder {path} (data.source); expected one of SPLIT/CLASS/image files")
    return _HuggingFace(config, split, option)


def _read_unlabelled(folder: str, class_names: Sequence[str]) -> TableSplit:
    """Return every image below a folder, at any depth, without labels."""
    root = Path(folder).expanduser().resolve()
    paths = list(_images_below(root))
    if not paths:
        raise FileNotFoundError(f"there is no image below {root} (data.unlabeled); expected {' '.join(SUFFIXES)}")
    return TableSplit.from_files(str(root), paths, class_names, [UNLABELLED] * len(paths))


class _Folder:
    """CLASS/image files; a class folder may hold subfolders. `keys` are the class folders, sorted."""

    def __init__(self, root: Path, split: str, option: str) -> None:
        self.folder = root / split
        if not self.folder.is_dir():
            there = ", ".join(_subfolders(root))
            raise FileNotFoundError(f"no split {split!r} in {root}; folders there: {there}; set {option} to one")
        self.keys = _subfolders(self.folder)
        if not self.keys:
            raise ValueError(f"{self.folder} ({option}) holds no class folder; expected CLASS/image files in it")

    def read(self, keys: Sequence[str], class_names: Sequence[str]) -> TableSplit:
        """Return all images of the classes `keys`, labelled by their place in it."""
        found = [list(_images_below(self.folder / key)) for key in keys]
        labels = np.repeat(np.arange(len(keys)), [len(paths) for paths in found])
        return TableSplit.from_files(str(self.folder), [path for p in found for path in p], class_names, labels)


class _HuggingFace:
    """A split of a data set of the hub or a folder of Parquet files. `keys` are the class names, in its own order."""

    def __init__(self, config: DataConfig, split: str, option: str) -> None:
        self.config, self.split, self.where = config, split, f"{config.source}/{split}"
        try:
            rows = datasets.load_dataset(config.source, split=split, streaming=config.streaming)
        except (OSError, ValueError) as error:
            tried = "is no folder here and no data set that could be opened; datasets says"
            raise ValueError(f"data.source {config.source!r}, split {split!r} ({option}), {tried}: {error}") from error
        features = rows.features or {}
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        labels += [n for n in ("label", "class", "category") if getattr(features.get(n), "dtype", "") == "string"]
        if not images or not labels:
            wanted = "an image column and a ClassLabel column (or a text column label, class or category)"
            raise ValueError(f"data.source {config.source!r}: expected {wanted}, got {dict(features)}")
        self.column, self.label, self.feature = images[0], labels[0], features[labels[0]]
        self.rows: Any = rows.cast_column(self.column, datasets.Image(decode=False))
        known = getattr(self.feature, "names", None) or sorted({name for name in self._labels() if name is not None})
        self.keys = tuple(known)
        if not known:
            raise ValueError(f"{self.where}: the column {self.label!r} has no class name, only nulls")

    def read(self, keys: Sequence[str], class_names: Sequence[str]) -> TableSplit:
        """Return the images, those of the classes `keys` labelled by their place in it."""
        place = {key: index for index, key in enumerate(keys)}
        if self.config.streaming:
            kept = self._streamed(place)
            return TableSplit(self.where, kept.select_columns(["image"]), class_names, kept["label"][:], self.where)
        names = list(self._labels())
        if None in names:
            text = "%s: %d rows are unlabelled (%s) and are left out"
            logger.warning(text, self.where, names.count(None), self.label)
        labels = [UNLABELLED if name is None else place.get(name, UNLABELLED) for name in names]
        table = self.rows.select_columns([self.column]).rename_columns({self.column: "image"})
        return TableSplit(self.where, table, class_names, labels, self.where)

    def _labels(self) -> Iterator[str | None]:
        return (self._name(row[self.label]) for row in self.rows.select_columns([self.label]))

    def _name(self, value: Any) -> str | None:
        """A row's label as text; None where it has none (null, or -1 as in published test splits)."""
        if isinstance(self.feature, datasets.ClassLabel):
            return str(self.feature.names[value]) if value is not None and value >= 0 else None
        return None if value is None else str(value)

    def _streamed(self, place: dict[str, int]) -> datasets.Dataset:
        """Stream the split, or find it in the cache: the first readable images of each class, as many as wanted."""
        config, counts, wanted = self.config, self.config.per_class, None
        if config.train_split != config.test_split:
            train = counts["train"] + counts["audit"] if "train" in counts and "audit" in counts else None
            wanted = train if self.split == config.train_split else counts.get("test")
        facts = {"source": config.source, "split": self.split, "keys": list(place), "wanted": wanted}
        facts["data"] = datasets.load_dataset_builder(config.source).hash
        try:
            return datasets.Dataset.from_generator(
                lambda: self._taken(place, wanted),
                datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")}),
                cache_dir=str(cache_folder() / "streams"),
                fingerprint=sha256_of_json(facts)[:32],
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{self.where} could not be streamed to the end: {error.__cause__}") from error

    def _taken(self, place: dict[str, int], wanted: int | None) -> Iterator[dict[str, Any]]:
        """Yield rows of the classes, until each has as many readable images as wanted (None: all there are)."""
        missing = dict.fromkeys(place.values(), wanted or 0)
        for row in self.rows:
            name, cell = self._name(row[self.label]), row[self.column]
            if name not in place or (wanted is not None and not missing[place[name]]):
                continue
            cell = {"bytes": cell_bytes(cell), "path": None} if any((cell or {}).values()) else None
            yield {"image": cell, "label": place[name]}
            missing[place[name]] -= examine(cell)[1] is None
            if wanted is not None and not any(missing.values()):
                return


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."))


def _images_below(folder: Path) -> Iterator[str]:
    for where, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        for name in sorted(files):
            if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(where, name)
