"""Where pictures are stored: a folder tree or a `datasets` data set, seen as numbered rows with class labels."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from singreg.data.pictures import SUFFIXES, Checked, PictureChecker
from singreg.data.reading import Origin
from singreg.data.splits import UNLABELLED, FolderSplit, HubSplit, ImageSplit

logger = logging.getLogger(__name__)

NAMED = 10  # a message that lists more than this is read by nobody


class Split(ABC):
    """All rows of one split before any is chosen: `where` (for messages) and `labels` (N,), -1 where not wanted.

    `links`: those found in a folder that are not followed, because they lead out of the data source or to a folder.
    """

    def __init__(self, where: str, labels: np.ndarray, links: Sequence[str] = ()) -> None:
        self.where, self.labels, self.links = where, labels, tuple(links)

    @abstractmethod
    def identifier(self, row: int) -> str:
        """The path or name of a row (no shapes)."""

    @abstractmethod
    def check(self, rows: np.ndarray, checker: PictureChecker) -> Checked:
        """Digests and unreadable ones of rows (M,)."""

    @abstractmethod
    def part(self, name: str, rows: np.ndarray, class_names: Sequence[str], digests: np.ndarray) -> ImageSplit:
        """Rows (M,) as a part, with the digests (M, 32) found before."""


class FolderRows(Split):
    """Files under `root/split`, of the classes whose folders are `keys`; without keys, every picture, unlabelled."""

    def __init__(self, root: Path, folder: Path, keys: Sequence[str] | None) -> None:
        self.paths: list[str] = []
        labels: list[int] = []
        links: list[str] = []
        for label, top in [(UNLABELLED, folder)] if keys is None else enumerate(folder / key for key in keys):
            found = list(_pictures(top, root, links))
            self.paths += found
            labels += [label] * len(found)
        super().__init__(str(folder), np.asarray(labels, dtype=np.int64), links)

    def identifier(self, row: int) -> str:
        return self.paths[row]

    def check(self, rows: np.ndarray, checker: PictureChecker) -> Checked:
        return checker.check_files([self.paths[row] for row in rows])

    def part(self, name: str, rows: np.ndarray, class_names: Sequence[str], digests: np.ndarray) -> ImageSplit:
        return FolderSplit(name, [self.paths[row] for row in rows], class_names, self.labels[rows], digests)


class FolderSource:
    """A folder with SPLIT/CLASS/... picture files; a class folder may hold subfolders. `key`: the option that named it."""

    def __init__(self, source: str, key: str = "data.source") -> None:
        self.root = Path(source).expanduser().resolve()
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root} ({key}); expected one with pictures")

    def keys(self, split: str, option: str = "data.train_split") -> tuple[str, ...]:
        """The class folders of a split, sorted (no shapes); `option` is the one that named the split.

        Raises:
            FileNotFoundError: the split is not there; those that are, are named.
            ValueError: it holds no class folder, or it or a class folder is a link that leads out of the data source.
        """
        folder = self.root / split
        if not folder.is_dir():
            there = ", ".join(_subfolders(self.root, self.root)[0]) or "none"
            raise FileNotFoundError(
                f"no split {split!r} in {self.root}: expected {folder}/CLASS/PICTURE; folders there: {there}; set {option} to one of them"
            )
        if not _inside(folder, self.root):
            raise ValueError(
                f"{folder} leads to {folder.resolve()}, out of {self.root}, and is not followed; copy it, or make the folder that holds "
                f"the splits data.source and set {option}"
            )
        keys, links = _subfolders(folder, self.root)
        if links:
            raise ValueError(
                f"{len(links)} class folders in {folder} are links that lead out of {self.root} or nowhere ({_first(links)}) and are not "
                "followed; copy them, or make the target folder data.source and pick classes with data.classes"
            )
        if not keys:
            raise ValueError(f"{folder} ({option}) holds no class folder: expected {folder}/CLASS/PICTURE")
        return tuple(keys)

    def read(self, split: str, keys: Sequence[str]) -> Split:
        """All pictures of the classes `keys`, labelled by their place in it."""
        return FolderRows(self.root, self.root / split, keys)

    @staticmethod
    def read_unlabelled(folder: str) -> Split:
        """Every picture under a folder, at any depth, without labels."""
        root = FolderSource(folder, "data.unlabeled").root
        split = FolderRows(root, root, None)
        if not split.paths:
            links = f"; {len(split.links)} links are not followed ({_first(split.links)})" if split.links else ""
            endings = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"no picture in {root} (data.unlabeled); the endings known are {endings}{links}")
        return split


class HubRows(Split):
    """Rows of a `datasets` split; labels are places in `keys`, -1 for rows of other classes; `origin`: what rows may point to."""

    def __init__(self, where: str, table: datasets.Dataset, column: str, labels: np.ndarray, origin: Origin) -> None:
        super().__init__(where, labels)
        self.table, self.column, self.origin = table, column, origin

    def identifier(self, row: int) -> str:
        return f"{self.where}#{row}"

    def check(self, rows: np.ndarray, checker: PictureChecker) -> Checked:
        return checker.check_rows(self.table, rows, self.column, self.origin)

    def part(self, name: str, rows: np.ndarray, class_names: Sequence[str], digests: np.ndarray) -> ImageSplit:
        return HubSplit(
            name, self.table, class_names, self.labels[rows], digests, column=self.column, where=self.where, rows=rows,
            origin=self.origin,
        )  # fmt: skip


class HubSource:
    """A data set that `datasets.load_dataset` can load: on the hub, in its cache, or a folder of Parquet files."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._splits: dict[str, tuple[datasets.Dataset, str, str]] = {}

    def keys(self, split: str, option: str = "data.train_split") -> tuple[str, ...]:
        """The class names of a split, in the data set's own label order (no shapes); `option` is the one that named the split.

        Raises:
            ValueError: the split cannot be loaded, or has no label.
        """
        table, _, label = self._load(split, option)
        feature = table.features[label]
        if isinstance(feature, datasets.ClassLabel):
            return tuple(feature.names)
        return text_labels(table.unique(label), label, f"{self.source}/{split}")

    def read(self, split: str, keys: Sequence[str]) -> Split:
        """All rows of the split, those of classes `keys` labelled by their place in it."""
        table, column, label = self._load(split)
        own = table.select_columns([label]).with_format(None)[:][label]
        own = [label_name(value, table.features[label]) for value in own]
        warn_unlabelled(own.count(None), f"{self.source}/{split}", label)
        place = {key: index for index, key in enumerate(keys)}
        labels = np.asarray([place.get(value, UNLABELLED) for value in own], dtype=np.int64)
        return HubRows(f"{self.source}/{split}", table, column, labels, self._origin(table))

    def _load(self, split: str, option: str = "data.train_split") -> tuple[datasets.Dataset, str, str]:
        if split not in self._splits:
            try:
                table = datasets.load_dataset(self.source, split=split)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"data.source {self.source!r}, split {split!r} ({option}), is neither a folder here nor a data set that could be "
                    f"loaded; datasets says: {error}"
                ) from error
            column, label = columns_of(table.features, self.source)
            self._splits[split] = table.cast_column(column, datasets.Image(decode=False)), column, label
        return self._splits[split]

    def _origin(self, table: datasets.Dataset) -> Origin:
        """Rows may point into the folder itself, or into what was downloaded of this very data set."""
        if Path(self.source).is_dir():
            return Origin(self.source, [self.source])
        folders = [Path(datasets.config.HF_HUB_CACHE) / f"datasets--{self.source.replace('/', '--')}"]
        if (
            table.info.builder_name == "imagefolder"
        ):  # its paths are those that `datasets` itself unpacked, not somebody's text
            folders += [Path(datasets.config.DOWNLOADED_DATASETS_PATH), Path(datasets.config.EXTRACTED_DATASETS_PATH)]
        return Origin(self.source, folders)


def label_name(value: Any, feature: Any) -> str | None:
    """A row's label as text; None where it has none (null, or -1 as in published test splits) (no shapes)."""
    if isinstance(feature, datasets.ClassLabel):
        return feature.names[value] if value is not None and value >= 0 else None
    return None if value is None else str(value)


def text_labels(values: Iterable[str | None], label: str, where: str) -> tuple[str, ...]:
    """The class names among the values of a text column, sorted (no shapes); a null is no class.

    Raises:
        ValueError: all are null.
    """
    names = {str(value) for value in values if value is not None}
    if not names:
        raise ValueError(f"{where}: the column {label!r} holds no label, only nulls; expected a class name in each row")
    return tuple(sorted(names))


def warn_unlabelled(count: int, where: str, label: str) -> None:
    """Say how many rows are left out because they have no label (no shapes)."""
    if count:
        logger.warning("%s: %d rows are unlabelled (no value in the column %r) and are left out", where, count, label)


def open_source(source: str) -> FolderSource | HubSource:
    """The source a name stands for: an existing folder (of Parquet files, or of class folders), otherwise the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        parquet = [*path.glob("*.parquet"), *path.glob("*/*.parquet")]
        return HubSource(str(path)) if parquet else FolderSource(source)
    if source.startswith(("/", ".", "~")):
        raise FileNotFoundError(
            f"there is no folder {path} (data.source); expected one with SPLIT/CLASS/PICTURE or Parquet files"
        )
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


def _subfolders(folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """The folders in a folder, and the links in it that lead to a folder outside the root, or nowhere; both sorted."""
    names, links = [], []
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.is_file():
            continue
        if not entry.is_symlink():
            names += [entry.name] if entry.is_dir() else []
        elif entry.is_dir() and _inside(entry.path, root):
            names.append(entry.name)
        else:  # nowhere may be a disk that is not mounted: a class all the same
            links.append(entry.name)
    return sorted(names), sorted(links)


def _inside(path: str | Path, root: Path) -> bool:
    return Path(path).resolve().is_relative_to(root)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _pictures(top: Path, root: Path, links: list[str]) -> Iterator[str]:
    """Picture files under a folder in sorted order; links out of the root, or to folders (they may go round), are added to `links`."""
    for folder, subfolders, files in os.walk(top):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        links += [path for name in subfolders if os.path.islink(path := os.path.join(folder, name))]
        for name in sorted(files):
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            path = os.path.join(folder, name)
            if os.path.islink(path) and not _inside(path, root):
                links.append(path)
            else:
                yield path
