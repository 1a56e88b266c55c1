"""Where images are stored: folders of class folders, and data sets that Hugging Face `datasets` loads or streams."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from singreg.config import DataConfig
from singreg.data.splits import UNLABELLED, TableSplit, cell_bytes, examine
from singreg.utils import atomic_write, cache_folder, progress, sha256_of_json

logger = logging.getLogger(__name__)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
STREAMED_ROWS = 500  # held in memory at once


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
        endings = " ".join(sorted(SUFFIXES))
        raise FileNotFoundError(f"there is no image below {root} (data.unlabeled); expected files ending in {endings}")
    return TableSplit.from_files(str(root), paths, class_names, [UNLABELLED] * len(paths))


class Folder:
    """A folder of SPLIT/CLASS/image files; a class folder may hold subfolders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def keys(self, split: str, option: str) -> tuple[str, ...]:
        """Return the class folders, sorted, of the split that `option` named."""
        folder = self.root / split
        if not folder.is_dir():
            there = ", ".join(_subfolders(self.root)) or "none"
            raise FileNotFoundError(
                f"there is no split {split!r} in {self.root}; folders there: {there}; set {option} to one of them"
            )
        if not _subfolders(folder):
            raise ValueError(f"{folder} ({option}) holds no class folder; expected {folder}/CLASS/image files")
        return _subfolders(folder)

    def read(self, split: str, keys: Sequence[str], class_names: Sequence[str]) -> TableSplit:
        """Return all images of the classes `keys`, labelled by their place in it."""
        found = [list(_images_below(self.root / split / key)) for key in keys]
        labels = np.repeat(np.arange(len(keys)), [len(paths) for paths in found])
        paths = [path for of_class in found for path in of_class]
        return TableSplit.from_files(str(self.root / split), paths, class_names, labels)


class HuggingFace:
    """A data set of the hub, or a folder of Parquet files; streamed, it is read once and what is wanted is kept."""

    def __init__(self, config: DataConfig) -> None:
        self.source, self.streaming = config.source, config.streaming
        self.opened: dict[str, tuple[Any, str, str]] = {}
        counts = config.per_class
        self.wanted: dict[str, int | None] = {}
        if config.train_split != config.test_split:
            rest = "train" not in counts or "audit" not in counts
            self.wanted[config.train_split] = None if rest else counts["train"] + counts["audit"]
            self.wanted[config.test_split] = counts.get("test")

    def keys(self, split: str, option: str) -> tuple[str, ...]:
        """Return the class names, in the data set's own order, of the split that `option` named."""
        rows, _, label = self._open(split, option)
        if isinstance(rows.features[label], datasets.ClassLabel):
            return tuple(rows.features[label].names)
        names = {value for value in _labels(rows, label) if value is not None}
        if not names:
            raise ValueError(f"{self.source}/{split}: expected class names in the column {label!r}, got only nulls")
        return tuple(sorted(names))

    def read(self, split: str, keys: Sequence[str], class_names: Sequence[str]) -> TableSplit:
        """Return the images of the split, those of the classes `keys` labelled by their place in it."""
        rows, column, label = self._open(split)
        where, place = f"{self.source}/{split}", {key: index for index, key in enumerate(keys)}
        if self.streaming:
            kept = self._kept(split, keys)
            return TableSplit(where, kept.select_columns(["image"]), class_names, kept["label"][:], where=where)
        names = list(_labels(rows, label))
        if None in names:
            text = "%s: %d rows are unlabelled (no value in the column %r) and are left out"
            logger.warning(text, where, names.count(None), label)
        table = rows.select_columns([column])
        table = table if column == "image" else table.rename_column(column, "image")
        labels = [UNLABELLED if name is None else place.get(name, UNLABELLED) for name in names]
        return TableSplit(where, table, class_names, labels, where=where)

    def _open(self, split: str, option: str = "") -> tuple[Any, str, str]:
        """Return the split's rows with undecoded images, and its image and label columns."""
        if split not in self.opened:
            try:
                rows = datasets.load_dataset(self.source, split=split, streaming=self.streaming)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"data.source {self.source!r}, split {split!r} ({option}), is no folder here and no data set that "
                    f"could be opened; datasets says: {error}"
                ) from error
            features = rows.features or {}
            images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
            labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
            texts = [n for n in ("label", "class", "category") if getattr(features.get(n), "dtype", "") == "string"]
            if not images or not labels + texts:
                raise ValueError(
                    f"data.source {self.source!r}: expected an image column and a ClassLabel column (or a text column "
                    f"label, class or category), got {dict(features)}"
                )
            rows = rows.cast_column(images[0], datasets.Image(decode=False))
            self.opened[split] = rows, images[0], (labels + texts)[0]
        return self.opened[split]

    def _kept(self, split: str, keys: Sequence[str]) -> datasets.Dataset:
        """Stream the split unless that was done before; the first readable images of each class are kept as Arrow."""
        rows, column, label = self._open(split)
        place, wanted = {key: index for index, key in enumerate(keys)}, self.wanted.get(split)
        facts = {"source": self.source, "split": split, "keys": list(keys), "wanted": wanted}
        facts["data"] = datasets.load_dataset_builder(self.source).hash
        target = cache_folder() / f"stream-{sha256_of_json(facts)[:32]}.arrow"
        if not target.is_file():
            schema = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}).arrow_schema
            taken = _taken(rows, column, label, place, wanted)
            shown = progress(taken, f"streaming {self.source}/{split}")
            with atomic_write(target) as temporary, pa.ipc.new_stream(str(temporary), schema) as writer:
                held: list[dict[str, Any]] = []
                for row in shown:
                    held.append(row)
                    if len(held) == STREAMED_ROWS:
                        writer.write_batch(pa.RecordBatch.from_pylist(held, schema))
                        held = []
                writer.write_batch(pa.RecordBatch.from_pylist(held, schema))
        return datasets.Dataset.from_file(str(target)).cast_column("image", datasets.Image(decode=False))


def _taken(rows: Any, column: str, label: str, place: dict[str, int], wanted: int | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of the wanted classes, until each has as many readable images as wanted (None: all there are)."""
    missing = dict.fromkeys(place.values(), wanted or 0)
    for row in rows:
        name = _label_name(row[label], rows.features[label])
        if name not in place or (wanted is not None and not missing[place[name]]):
            continue
        cell = row[column]
        if cell is not None and cell["bytes"] is None and cell["path"] is not None:
            cell = {"bytes": cell_bytes(cell), "path": None}
        yield {"image": cell, "label": place[name]}
        missing[place[name]] -= examine(cell)[1] is None
        if wanted is not None and not any(missing.values()):
            return


def _labels(rows: Any, label: str) -> Iterable[str | None]:
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
