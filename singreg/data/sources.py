"""Where images are stored: folders of class folders, and data sets that Hugging Face `datasets` loads or streams."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from singreg.config import DataConfig
from singreg.data.splits import UNLABELLED, TableSplit, cell_bytes, examine
from singreg.utils import cache_folder, sha256_of_json

logger = logging.getLogger(__name__)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}


def open_split(config: DataConfig, split: str, option: str) -> Folder | HuggingFace:
    """Return a split, which `option` named, of the folder of images or Hugging Face data set `config.source`."""
    path = Path(config.source).expanduser()
    if path.is_dir() and not any((*path.glob("*.parquet"), *path.glob("*/*.parquet"))) and not config.streaming:
        return Folder(path.resolve(), split, option)
    if not path.is_dir() and config.source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no folder {path} (data.source); expected one of SPLIT/CLASS/image files")
    return HuggingFace(config, split, option)


def read_unlabelled(folder: str, class_names: Sequence[str]) -> TableSplit:
    """Return every image below a folder, at any depth, without labels."""
    root = Path(folder).expanduser().resolve()
    paths = list(_images_below(root))
    if not paths:
        raise FileNotFoundError(f"there is no image below {root} (data.unlabeled); expected {' '.join(SUFFIXES)}")
    return TableSplit.from_files(str(root), paths, class_names, [UNLABELLED] * len(paths))


class Folder:
    """CLASS/image files; a class folder may hold subfolders. `keys` are the class folders, sorted."""

    def __init__(self, root: Path, split: str, option: str) -> None:
        self.folder = root / split
        if not self.folder.is_dir():
            there = ", ".join(_subfolders(root))
            raise FileNotFoundError(f"no split {split!r} in {root}; folders there: {there}; set {option} to one")
        self.keys = _subfolders(self.folder)
        if not self.keys:
            raise ValueError(
                f"{self.folder} ({option}) holds no class folder; expected {self.folder}/CLASS/image files"
            )

    def read(self, keys: Sequence[str], class_names: Sequence[str]) -> TableSplit:
        """Return all images of the classes `keys`, labelled by their place in it."""
        found = [list(_images_below(self.folder / key)) for key in keys]
        labels = np.repeat(np.arange(len(keys)), [len(paths) for paths in found])
        return TableSplit.from_files(str(self.folder), [path for p in found for path in p], class_names, labels)


class HuggingFace:
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
            empty = cell is None or (cell["bytes"] is None and cell["path"] is None)
            cell = None if empty else {"bytes": cell_bytes(cell), "path": None}
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
