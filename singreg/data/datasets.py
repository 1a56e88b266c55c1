"""From a configuration to the four splits of a run: folders of images, Hugging Face data sets, the built-in scenes."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from timm.utils.misc import natural_key

from singreg.classes import ClassSubset, read_list, renamed, resolve_classes
from singreg.config import SCENES, DataConfig
from singreg.data.scenes import SHAPES, sample_scenes
from singreg.data.splits import UNLABELLED, ConcatSplit, ImageSplit, SceneSplit, Splits, TableSplit, is_image
from singreg.utils import together

logger = logging.getLogger(__name__)
TABLES = ("*.parquet", "*/*.parquet", "*.tar", "*/*.tar")  # that `datasets` reads
TEXTS = ("string", "large_string", "string_view")  # polars' and pandas' Parquet files have the longer ones
LABELS = ("label", "class", "category", "cls")  # columns of labels by their names
NAMED = 20  # a warning that lists more than this is read by nobody
SHOWN = 3  # an error


def load_splits(config: DataConfig) -> Splits:
    """Return the train, bank, audit and test splits that a configuration describes.

    A class keeps its images whatever other classes are chosen. In a process group the first process looks at the data.

    Example:
        >>> splits = load_splits(DataConfig(scenes={"train": 12, "audit": 6, "test": 5}))
        >>> [len(split) for split in splits]
        [12, 12, 6, 5]
    """
    stored = partial(together, partial(_stored, config), "reading the data", first_only=True)
    splits = _scenes(config) if config.built_in else stored()
    sizes = ", ".join(f"{split.name} {len(split)}" for split in splits)
    logger.info("data %s: %d classes; images: %s", config.source, len(splits.class_names), sizes)
    return splits


def _scenes(config: DataConfig) -> Splits:
    options = {**SCENES, **config.scenes}

    def scenes(name: str, stream: int, bias: float) -> ImageSplit:
        seed = int(np.random.SeedSequence([int(options["seed"]), stream]).generate_state(1)[0])
        return SceneSplit(name, sample_scenes(int(options[name]), seed=seed, background_bias=bias))

    train, audit, bank = (scenes(name, i, options["bias"]) for name, i in (("train", 0), ("audit", 1), ("bank", 3)))
    whole = ConcatSplit("bank", [train, bank] if len(bank) else [train])
    return Splits(train, whole, audit, scenes("test", 2, 0.0), SHAPES, ClassSubset(SHAPES, SHAPES, None, SHAPES))


def _stored(config: DataConfig) -> Splits:
    """Draw the splits' images, look at those drawn, and draw again without bad ones until all are readable."""
    train = _open_split(config, config.train_split, "data.train_split")
    test = _open_split(config, config.test_split, "data.test_split")
    subset, drop = replace(resolve_classes(config.classes, train.keys), order=train.keys), config.bad_images == "drop"
    try:
        there = resolve_classes(subset.keys, test.keys)
    except ValueError as error:
        raise ValueError(f"split {config.test_split!r} of {config.source} (data.test_split): {error}") from error
    if config.class_names is not None:
        subset = renamed(subset, config.class_names)
        told = [f"{key}: {name}" for key, name in zip(subset.keys, subset.names, strict=True)]
        logger.info("classes: %s", ", ".join(told[:NAMED]))
    if numbers := [name for name in subset.names if name.isdigit()]:
        logger.warning("class names such as %s mean nothing in a prompt; give data.class_names: FILE", numbers[0])
    if config.classes is None:
        _tell_left_out(sorted(set(test.keys) - set(there.keys)), f"classes are in {config.test_split} alone")
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
    aside, labelled = len(audit[0]), len(audit[0]) + len(bank[0])
    said = f"{aside} of the {labelled} labelled training images fit the auditor (data.per_class.audit)"
    logger.log(logging.INFO if aside else logging.WARNING, "%s", said)
    return Splits(bank[0], ConcatSplit("bank", bank), ConcatSplit("audit", audit), tested, subset.names, subset)


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
                short.append(f"{Path(split.name).name}: {key} has {len(rows)} for {asked}")
        draws.append({name: np.concatenate(rows) for name, rows in chosen.items()})
    if short:
        left_out = f" ({sum(len(split.bad) for split in read)} unreadable ones not counted)"
        wanted = f"too few images{left_out}; lower data.per_class, or leave a key out"
        raise ValueError(f"{wanted}\n  {_joined(short, SHOWN)}")
    return draws


def _shares(place: int, count: int, config: DataConfig) -> dict[str, int]:
    """How many of `count` train (0), test (1) or unlabelled (2) images each split gets; None is what is left."""
    train, audit, test, bank = (config.per_class.get(name) for name in ("train", "audit", "test", "bank"))
    if place == 1:
        return {"test": count if test is None else test}
    if place == 2:
        cut = round(config.unlabeled_to_audit * count)
        return {"audit": cut, "bank": count - cut}
    if audit is None:
        audit = count // 2 if train is None else count - train - (bank or 0)
    shares = {"train": count - audit - (bank or 0) if train is None else train, "audit": audit}
    return shares if bank is None else {**shares, "bank": bank}


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
    """Stop over images, or warn that they are left out."""
    if lines and not drop:
        names = _joined(lines, SHOWN)
        raise ValueError(f"{len(lines)} images {problem}; mend or remove them, or set data.bad_images: drop\n  {names}")
    _tell_left_out(lines, f"images {problem}")


def _tell_left_out(lines: Sequence[str], what: str) -> None:
    if lines:
        logger.warning("%d %s and are left out:\n  %s", len(lines), what, _joined(lines))


def _joined(lines: Sequence[str], most: int = NAMED) -> str:
    return "\n  ".join([*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])])


def _open_split(config: DataConfig, split: str, option: str) -> "_Folder | _HuggingFace":
    """Return a split, which `option` named, of the folder of images or Hugging Face data set `config.source`."""
    path = Path(config.source).expanduser()
    classes = (path / split).is_dir() and class_folders(path / split)
    if path.is_dir() and (classes or not any(any(path.glob(pattern)) for pattern in TABLES)):
        return _Folder(path.resolve(), split, option)
    if path.is_file():
        raise FileNotFoundError(f"{path} (data.source) is a file; unpack it, or give the folder it is in")
    if not path.is_dir() and config.source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no folder {path} (data.source); expected one of SPLIT/CLASS/image files")
    return _HuggingFace(config, split, option)


def _read_unlabelled(folder: str, class_names: Sequence[str]) -> TableSplit:
    """Return every image below a folder, at any depth, without labels."""
    root, others = Path(folder).expanduser().resolve(), list[str]()
    paths = list(_images_below(root, others))
    if not paths:
        raise FileNotFoundError(f"there is no image below {root} (data.unlabeled)")
    _tell_left_out(others, "files are no images")
    return TableSplit.from_files(str(root), paths, class_names, [UNLABELLED] * len(paths))


class _Folder:
    """CLASS/image files; a class folder may hold subfolders. `keys` are the class folders, sorted as timm sorts."""

    def __init__(self, root: Path, split: str, option: str) -> None:
        self.folder = root / split
        if not self.folder.is_dir():
            there = class_folders(root)
            places = [root.parent, root.parent.parent, *(root / name for name in there)]
            right = [folder for folder in places if (folder / split).is_dir()]
            named = f"set {option} to a folder of class folders; there are: {', '.join(there[:6]) or 'none'}"
            hint = f"set data.source to {right[0]}" if right else named
            raise FileNotFoundError(f"no split {split!r} in {root}; {hint}")
        folders = class_folders(self.folder)
        self.keys = tuple(key for key in folders if next(_images_below(self.folder / key, []), None) is not None)
        _tell_left_out(sorted(set(folders) - set(self.keys)), f"class folders in {split} hold no image")
        if not self.keys:
            raise ValueError(f"{self.folder} ({option}) holds no class folder with images; expected CLASS/image files")

    def read(self, keys: Sequence[str], class_names: Sequence[str]) -> TableSplit:
        """Return all images of the classes `keys`, labelled by their place in it."""
        others = sorted(entry.path for entry in os.scandir(self.folder) if entry.is_file() and entry.name[0] != ".")
        found = [list(_images_below(self.folder / key, others)) for key in keys]
        _tell_left_out(others, "files are no images in a class folder")
        labels = np.repeat(np.arange(len(keys)), [len(paths) for paths in found])
        return TableSplit.from_files(str(self.folder), [path for p in found for path in p], class_names, labels)


class _HuggingFace:
    """A split of a data set of the hub or a folder of Parquet or tar files; `keys` are class names in its own order."""

    def __init__(self, config: DataConfig, split: str, option: str) -> None:
        self.where = f"{config.source}/{split}"
        path = Path(config.source).expanduser()
        source = str(path) if path.is_dir() else config.source
        try:
            rows = datasets.load_dataset(source, split=split)
        except Exception as error:  # of broken files `datasets` passes on nearly anything
            said = " ".join(str(error.__cause__ or error).split())[:90]
            where = "" if path.is_dir() else " (no folder here)"
            raise ValueError(f"data.source {config.source!r}{where}, split {split!r} ({option}): {said}") from error
        features = rows.features
        kinds = {name: str(getattr(feature, "dtype", "")) for name, feature in features.items()}
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not images and (isinstance(features.get("image"), dict) or kinds.get("image") == "binary"):
            images = ["image"]  # as pandas, polars and pyarrow write it
        labels = [n for n in LABELS if kinds.get(n) in TEXTS or "int" in kinds.get(n, "")]
        labels += [n for n, f in features.items() if isinstance(f, datasets.ClassLabel) and n not in labels]
        column = self._only("image", images, features)
        if config.label_column is not None:
            labels = [config.label_column] if config.label_column in features else []
        label = self._only("label", labels, features)
        feature = features[label]
        if "int" in kinds[label] and not isinstance(feature, datasets.ClassLabel):
            if config.class_names is None:
                raise ValueError(f"{self.where}: {label} holds numbers; set data.class_names to a list of names")
            feature = datasets.ClassLabel(names=list(read_list(config.class_names)))
        values, known = rows[label][:], list(getattr(feature, "names", ()))
        # No name: null, or -1 as in published test splits.
        values = [None if value is None or (known and value < 0) else value for value in values]
        if wrong := [value for value in values if known and value is not None and value >= len(known)]:
            raise ValueError(f"{self.where}: label {wrong[0]}, but there are {len(known)} names of classes")
        self.names = [None if value is None else known[value] if known else str(value) for value in values]
        self.keys = tuple(known or in_order({name for name in self.names if name is not None}))
        if not self.keys:
            raise ValueError(f"{self.where}: the column {label!r} has no class name, only nulls")
        if unlabelled := self.names.count(None):
            logger.warning("%s: %d rows are unlabelled (%s) and are left out", self.where, unlabelled, label)
        images = rows.select_columns([column]).rename_columns({column: "image"})
        self.images = images.cast_column("image", datasets.Image(decode=False))

    def _only(self, kind: str, found: Sequence[str], features: Mapping[str, Any]) -> str:
        """The only column of a kind, or the one that is called so."""
        chosen = found if len(found) == 1 else [name for name in found if name == kind]
        if len(chosen) != 1:
            got = f"got {', '.join(found) or 'none'} among {', '.join(features)}"
            raise ValueError(f"{self.where}: expected one column of {kind}s (data.label_column names labels), {got}")
        return chosen[0]

    def read(self, keys: Sequence[str], class_names: Sequence[str]) -> TableSplit:
        """Return the images, those of the classes `keys` labelled by their place in it."""
        place: dict[str | None, int] = {key: index for index, key in enumerate(keys)}
        labels = [place.get(name, UNLABELLED) for name in self.names]
        return TableSplit(self.where, self.images, class_names, labels, self.where)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Folders and links to folders, in order."""
    return in_order(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort the names of classes as timm numbers them (2 before 10)."""
    return tuple(sorted(sorted(names), key=natural_key))


def _images_below(folder: Path, others: list[str]) -> Iterator[str]:
    """Yield the paths of all images, in order; `others` gets what PIL cannot open and names that are not UTF-8."""
    seen = set[str]()
    for where, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        if os.path.realpath(where) in seen:  # a link back to a folder above
            subfolders.clear()
            continue
        seen.add(os.path.realpath(where))
        for path in (os.path.join(where, name) for name in sorted(files) if name[0] != "."):
            named = path.encode("utf-8", "backslashreplace").decode()
            if named == path and is_image(path):
                yield path
            else:
                others.append(named)
