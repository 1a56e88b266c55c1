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


def open_source(config: DataConfig) -> Folder | HuggingFace:
    """Return the folder of images that `config.source` names, else the Hugging Face data set."""
    path = Path(config.source).expanduser()
    if path.is_dir() and not any((*path.glob("*.parquet"), *path.glob("*/*.parquet"))) and not config.streaming:
        return Folder(path.resolve())
    if not path.is_dir() and config.source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no folder {path} (data.source); expected one of SPLIT/CLASS/image files")
    return HuggingFace(config)


def read_unlabelled(folder: str, class_names: Sequence[str]) -> TableSplit:
    """Return every image below a folder, at any depth, without labels."""
    root = Path(folder).expanduser().resolve()
    paths = list(_images_below(root))
    if not paths:
        raise FileNotFoundError(f"there is no image below {root} (data.unlabeled); expected {' '.join(SUFFIXES)}")
    return TableSplit.from_files(str(root), paths, class_names, [UNLABELLED] * len(paths))


class Folder:
    """A folder of SPLIT/CLASS/image files; a class folder may hold subfolders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def keys(self, split: str, option: str) -> tuple[str, ...]:
        """Return the class folders, sorted, of the split that `option` named."""
        folder, there = self.root / split, ", ".join(_subfolders(self.root))
        if not folder.is_dir():
            raise FileNotFoundError(f"no split {split!r} in {self.root}; folders there: {there}; set {option} to one")
        if not (keys := _subfolders(folder)):
            raise ValueError(f"{folder} ({option}) holds no class folder; expected {folder}/CLASS/image files")
        return keys

    def read(self, split: str, keys: Sequence[str], class_names: Sequence[str]) -> TableSplit:
        """Return all images of the classes `keys`, labelled by their place in it."""
        found = [list(_images_below(self.root / split / key)) for key in keys]
        labels = np.repeat(np.arange(len(keys)), [len(paths) for paths in found])
        return TableSplit.from_files(str(self.root / split), [path for p in found for path in p], class_names, labels)


class HuggingFace:
    """A data set of the hub, or a folder of Parquet files; streamed, it is read once and what is wanted is kept."""

    def __init__(self, config: DataConfig) -> None:
        self.config, self.opened = config, dict[str, tuple[Any, str, str]]()

    def keys(self, split: str, option: str) -> tuple[str, ...]:
        """Return the class names, in the data set's own order, of the split that `option` named."""
        rows, _, label = self._open(split, option)
        if isinstance(rows.features[label], datasets.ClassLabel):
            return tuple(rows.features[label].names)
        names = {value for value in _labels(rows, label) if value is not None}
        if not names:
            raise ValueError(f"{self.config.source}/{split}: the column {label!r} has no class name, only nulls")
        return tuple(sorted(names))

    def read(self, split: str, keys: Sequence[str], class_names: Sequence[str]) -> TableSplit:
        """Return the images of the split, those of the classes `keys` labelled by their place in it."""
        rows, column, label = self._open(split)
        where, place = f"{self.config.source}/{split}", {key: index for index, key in enumerate(keys)}
        if self.config.streaming:
            kept = self._streamed(split, place)
            return TableSplit(where, kept.select_columns(["image"]), class_names, kept["label"][:], where)
        names = list(_labels(rows, label))
        if None in names:
            logger.warning("%s: %d rows are unlabelled (%s) and are left out", where, names.count(None), label)
        labels = [UNLABELLED if name is None else place.get(name, UNLABELLED) for name in names]
        table = rows.select_columns([column]).rename_columns({column: "image"})
        return TableSplit(where, table, class_names, labels, where)

    def _open(self, split: str, option: str = "") -> tuple[Any, str, str]:
        """Return the split's rows with undecoded images, and its image and label columns."""
        if split not in self.opened:
            source = self.config.source
            try:
                rows = datasets.load_dataset(source, split=split, streaming=self.config.streaming)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"data.source {source!r}, split {split!r} ({option}), is no folder here and no data set that could "
                    f"be opened; datasets says: {error}"
                ) from error
            features = rows.features or {}
            images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
            labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
            labels += [n for n in ("label", "class", "category") if getattr(features.get(n), "dtype", "") == "string"]
            if not images or not labels:
                wanted = "an image column and a ClassLabel column (or a text column label, class or category)"
                raise ValueError(f"data.source {source!r}: expected {wanted}, got {dict(features)}")
            self.opened[split] = rows.cast_column(images[0], datasets.Image(decode=False)), images[0], labels[0]
        return self.opened[split]

    def _streamed(self, split: str, place: dict[str, int]) -> datasets.Dataset:
        """Stream the split, or find it in the cache: the first readable images of each class, as many as wanted."""
        source, counts, wanted = self.config.source, self.config.per_class, None
        if self.config.train_split != self.config.test_split:
            train = counts["train"] + counts["audit"] if "train" in counts and "audit" in counts else None
            wanted = train if split == self.config.train_split else counts.get("test")
        facts = {"source": source, "split": split, "keys": list(place), "wanted": wanted}
        facts["data"] = datasets.load_dataset_builder(source).hash
        rows = self._open(split)
        try:
            return datasets.Dataset.from_generator(
                lambda: _taken(*rows, place, wanted),
                datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")}),
                cache_dir=str(cache_folder() / "streams"),
                fingerprint=sha256_of_json(facts)[:32],
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{source}/{split} could not be streamed to the end: {error.__cause__}") from error


def _taken(rows: Any, column: str, label: str, place: dict[str, int], wanted: int | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of the wanted classes, until each has as many readable images as wanted (None: all there are)."""
    missing = dict.fromkeys(place.values(), wanted or 0)
    for row in rows:
        name, cell = _label_name(row[label], rows.features[label]), row[column]
        if name not in place or (wanted is not None and not missing[place[name]]):
            continue
        empty = cell is None or (cell["bytes"] is None and cell["path"] is None)
        cell = None if empty else {"bytes": cell_bytes(cell), "path": None}
        yield {"image": cell, "label": place[name]}
        missing[place[name]] -= examine(cell)[1] is None
        if wanted is not None and not any(missing.values()):
            return


def _labels(rows: Any, label: str) -> Iterator[str | None]:
    """The label of every row as text."""
    feature = rows.features[label]
    return (_label_name(row[label], feature) for row in rows.select_columns([label]))


def _label_name(value: Any, feature: Any) -> str | None:
    """A row's label as text; None where it has none (null, or -1 as in published test splits)."""
    if isinstance(feature, datasets.ClassLabel):
        return str(feature.names[value]) if value is not None and value >= 0 else None
    return None if value is None else str(value)


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."))


def _images_below(folder: Path) -> Iterator[str]:
    for where, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        for name in sorted(files):
            if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(where, name)
