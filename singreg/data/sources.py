"""Where pictures are stored: a folder tree or a `datasets` data set, seen as numbered rows with class labels."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from singreg.data.parts import UNLABELLED, FolderPart, HubPart, ImagePart
from singreg.data.pictures import SUFFIXES, Checked, PictureChecker

logger = logging.getLogger(__name__)


class Split(ABC):
    """All rows of one split before any is chosen: `where` (for messages) and `labels` (N,), -1 where not wanted."""

    def __init__(self, where: str, labels: np.ndarray) -> None:
        self.where, self.labels = where, labels

    @abstractmethod
    def identifier(self, row: int) -> str:
        """The path or name of a row (no shapes)."""

    @abstractmethod
    def check(self, rows: np.ndarray, checker: PictureChecker) -> Checked:
        """Digests and unreadable ones of rows (M,)."""

    @abstractmethod
    def part(self, name: str, rows: np.ndarray, class_names: Sequence[str], digests: np.ndarray) -> ImagePart:
        """Rows (M,) as a part, with the digests (M, 32) found before."""


class FolderSplit(Split):
    """Files under `root/split`, of the classes whose folders are `keys`; without keys, every picture, unlabelled."""

    def __init__(self, root: Path, folder: Path, keys: Sequence[str] | None) -> None:
        self.paths: list[str] = []
        labels: list[int] = []
        for label, top in [(UNLABELLED, folder)] if keys is None else enumerate(folder / key for key in keys):
            found = list(_pictures(top, root))
            self.paths += found
            labels += [label] * len(found)
        super().__init__(str(folder), np.asarray(labels, dtype=np.int64))

    def identifier(self, row: int) -> str:
        return self.paths[row]

    def check(self, rows: np.ndarray, checker: PictureChecker) -> Checked:
        return checker.check_files([self.paths[row] for row in rows])

    def part(self, name: str, rows: np.ndarray, class_names: Sequence[str], digests: np.ndarray) -> ImagePart:
        return FolderPart(name, [self.paths[row] for row in rows], class_names, self.labels[rows], digests)


class FolderSource:
    """A folder with SPLIT/CLASS/... picture files; a class folder may hold subfolders."""

    def __init__(self, source: str) -> None:
        self.root = Path(source).expanduser().resolve()
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root} (data.source)")

    def keys(self, split: str) -> tuple[str, ...]:
        """The class folders of a split, sorted (no shapes).

        Raises:
            FileNotFoundError: the split is not there; those that are, are named.
            ValueError: it holds no class folder.
        """
        folder = self.root / split
        if not folder.is_dir():
            there = ", ".join(_subfolders(self.root, self.root)) or "none"
            raise FileNotFoundError(
                f"no split {split!r} in {self.root}: expected {folder}/CLASS/PICTURE; subfolders there: {there}"
            )
        keys = tuple(_subfolders(folder, self.root))
        if not keys:
            raise ValueError(f"{folder} holds no class folder: expected {folder}/CLASS/PICTURE")
        return keys

    def read(self, split: str, keys: Sequence[str]) -> Split:
        """All pictures of the classes `keys`, labelled by their place in it."""
        return FolderSplit(self.root, self.root / split, keys)

    @staticmethod
    def read_unlabelled(folder: str) -> Split:
        """Every picture under a folder, at any depth, without labels."""
        root = FolderSource(folder).root
        split = FolderSplit(root, root, None)
        if not split.paths:
            raise ValueError(f"no picture in {root} (data.unlabeled); the endings known are {', '.join(sorted(SUFFIXES))}")
        return split


class HubSplit(Split):
    """Rows of a `datasets` split; labels are places in `keys`, -1 for rows of other classes."""

    def __init__(self, where: str, table: datasets.Dataset, column: str, labels: np.ndarray) -> None:
        super().__init__(where, labels)
        self.table, self.column = table, column

    def identifier(self, row: int) -> str:
        return f"{self.where}#{row}"

    def check(self, rows: np.ndarray, checker: PictureChecker) -> Checked:
        return checker.check_rows(self.table, [int(row) for row in rows], self.column)

    def part(self, name: str, rows: np.ndarray, class_names: Sequence[str], digests: np.ndarray) -> ImagePart:
        return HubPart(
            name, self.table, class_names, self.labels[rows], digests, column=self.column, where=self.where, rows=rows
        )  # fmt: skip


class HubSource:
    """A data set that `datasets.load_dataset` can load: on the hub, in its cache, or a folder of Parquet files."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._splits: dict[str, tuple[datasets.Dataset, str, str]] = {}

    def keys(self, split: str) -> tuple[str, ...]:
        """The class names of a split, in the data set's own label order (no shapes)."""
        table, _, label = self._load(split)
        feature = table.features[label]
        if isinstance(feature, datasets.ClassLabel):
            return tuple(feature.names)
        return tuple(sorted(table.unique(label)))

    def read(self, split: str, keys: Sequence[str]) -> Split:
        """All rows of the split, those of classes `keys` labelled by their place in it."""
        table, column, label = self._load(split)
        own = table.select_columns([label]).with_format(None)[:][label]
        if isinstance(table.features[label], datasets.ClassLabel):
            names = table.features[label].names
            own = [names[value] if value is not None and value >= 0 else None for value in own]
        place = {key: index for index, key in enumerate(keys)}
        labels = np.asarray([place.get(value, UNLABELLED) for value in own], dtype=np.int64)
        return HubSplit(f"{self.source}/{split}", table, column, labels)

    def _load(self, split: str) -> tuple[datasets.Dataset, str, str]:
        if split not in self._splits:
            try:
                table = datasets.load_dataset(self.source, split=split)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"data.source {self.source!r}, split {split!r}, is neither a folder here nor a data set that could be "
                    f"loaded; datasets says: {error}"
                ) from error
            column, label = columns_of(table.features, self.source)
            self._splits[split] = table.cast_column(column, datasets.Image(decode=False)), column, label
        return self._splits[split]


def open_source(source: str) -> FolderSource | HubSource:
    """The source a name stands for: an existing folder (of Parquet files, or of class folders), otherwise the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        parquet = [*path.glob("*.parquet"), *path.glob("*/*.parquet")]
        return HubSource(str(path)) if parquet else FolderSource(source)
    if source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no folder {path} (data.source)")
    return HubSource(source)


def columns_of(features: Mapping[str, Any], source: str) -> tuple[str, str]:
    """The picture column and the label column of a data set's features (no shapes).

    Raises:
        ValueError: it has none of the one or the other.
    """
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    texts = [name for name in ("label", "class", "category") if getattr(features.get(name), "dtype", None) == "string"]
    if not pictures or not labels + texts:
        raise ValueError(
            f"{source!r} needs a picture column and a ClassLabel column (or a text column label, class or category); "
            f"it has {dict(features)}"
        )
    return pictures[0], (labels + texts)[0]


def _subfolders(folder: Path, root: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".") and _inside(entry.path, entry.is_symlink(), root)
    )  # fmt: skip


def _inside(path: str, is_link: bool, root: Path) -> bool:
    return not is_link or Path(path).resolve().is_relative_to(root)


def _pictures(top: Path, root: Path) -> Iterator[str]:
    """Picture files under a folder in sorted order; links that lead out of the root are left out and counted."""
    outside = 0
    for folder, subfolders, files in os.walk(top):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            path = os.path.join(folder, name)
            if _inside(path, os.path.islink(path), root):
                yield path
            else:
                outside += 1
    if outside:
        logger.warning("%d links in %s lead out of %s and were left out", outside, top, root)
