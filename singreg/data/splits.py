"""The parts of a data set (train, bank, audit, test): numbered pictures with labels and a fingerprint of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from singreg.data.classes import imagenet_names
from singreg.data.loader import TensorView, Transform
from singreg.data.pictures import PictureChecker, UnreadableImageError, open_rgb
from singreg.data.reading import FAILURES, Origin, cell_bytes, reason

if TYPE_CHECKING:
    from singreg.data.scenes import SceneTable

UNLABELLED = -1
_SCENES_KEPT_BYTES = 2**28


class ImageSplit(Dataset[tuple[Image.Image, int, int]]):
    """N numbered pictures: the base of every source, itself without pictures.

    Attributes: `name` ("train", "bank", "audit", "test"), `class_names`, `labels` (N,) int64 with -1 for unlabelled,
    `digests` (N, 32) uint8, the SHA-256 of every picture. A new source needs `image` and `identifier` only.
    """

    def __init__(self, name: str, class_names: Sequence[str], labels: np.ndarray, digests: np.ndarray) -> None:
        labels = np.asarray(labels, dtype=np.int64)
        if labels.ndim != 1 or digests.shape != (len(labels), 32):
            raise ValueError(f"part {name!r}: labels {labels.shape} must be (N,) and digests {digests.shape} (N, 32)")
        if len(labels) and not UNLABELLED <= labels.min() <= labels.max() < len(class_names):
            raise ValueError(
                f"part {name!r}: labels {labels.min()}..{labels.max()} do not fit {len(class_names)} classes"
            )
        self.name, self.class_names = name, tuple(class_names)
        self.labels, self.digests = labels, np.asarray(digests, dtype=np.uint8)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content and label of every picture in order: equal wherever the files lie (no shapes)."""
        digest = hashlib.sha256(f"{len(self)} {self.class_names}".encode())
        digest.update(np.ascontiguousarray(self.digests).tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int, int]:
        return self.image(index), int(self.labels[index]), index

    def image(self, index: int) -> Image.Image:
        """Picture `index` as RGB, any size.

        Raises:
            UnreadableImageError: it cannot be decoded; the text names it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define image(index)")

    def identifier(self, index: int) -> str:
        """The name of picture `index` for messages and tables: a path, or "scene-SEED-INDEX" (no shapes)."""
        raise NotImplementedError(f"{type(self).__name__} must define identifier(index)")

    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> ImageSplit:
        """The pictures at `indices` (M,), in that order, as a part of their own."""
        return SubsetSplit(self, indices, name)

    def tensors(self, transform: Transform, clean_transform: Transform | None = None, *, seed: int = 0) -> TensorView:
        """Items (tensor, label, index), or (tensor, clean tensor, label, index) with a second transform; (3, H, W) each."""
        return TensorView(self, transform, clean_transform, seed=seed)


class SubsetSplit(ImageSplit):
    """Some pictures of another part: `indices` (M,) into it."""

    def __init__(self, parent: ImageSplit, indices: Sequence[int] | np.ndarray, name: str | None = None) -> None:
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(parent):
            raise ValueError(
                f"indices {chosen.min()}..{chosen.max()} are outside part {parent.name!r} of {len(parent)} pictures"
            )
        super().__init__(name or parent.name, parent.class_names, parent.labels[chosen], parent.digests[chosen])
        self.parent, self.indices = parent, chosen

    def image(self, index: int) -> Image.Image:
        return self.parent.image(int(self.indices[index]))

    def identifier(self, index: int) -> str:
        return self.parent.identifier(int(self.indices[index]))


class RelabelledSplit(ImageSplit):
    """Another part's pictures among more classes: label k becomes `indices[k]`, unlabelled stays unlabelled."""

    def __init__(self, parent: ImageSplit, indices: Sequence[int], class_names: Sequence[str]) -> None:
        labels = np.append(np.asarray(indices, dtype=np.int64), UNLABELLED)[parent.labels]
        super().__init__(parent.name, class_names, labels, parent.digests)
        self.parent = parent

    def image(self, index: int) -> Image.Image:
        return self.parent.image(index)

    def identifier(self, index: int) -> str:
        return self.parent.identifier(index)


class ConcatSplit(ImageSplit):
    """Several parts of the same classes, one after the other."""

    def __init__(self, name: str, parts: Sequence[ImageSplit]) -> None:
        labels = np.concatenate([part.labels for part in parts])
        super().__init__(name, parts[0].class_names, labels, np.concatenate([part.digests for part in parts]))
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def image(self, index: int) -> Image.Image:
        part, row = self._locate(index)
        return part.image(row)

    def identifier(self, index: int) -> str:
        part, row = self._locate(index)
        return part.identifier(row)

    def _locate(self, index: int) -> tuple[ImageSplit, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside part {self.name!r} of {len(self)} pictures")
        place = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[place], int(index - self._ends[place] + len(self.parts[place]))


class TableSplit(ImageSplit):
    """Pictures in a `datasets` table, read and decoded one at a time, only when asked for.

    `table` has its picture column undecoded: `table.cast_column(column, datasets.Image(decode=False))`. Without an `origin` every path
    in it is read, so it must be one that was listed here and not one that somebody wrote into a file.
    """

    def __init__(
        self, name: str, table: datasets.Dataset, class_names: Sequence[str], labels: Sequence[int] | np.ndarray,
        digests: np.ndarray, *, column: str = "image", origin: Origin | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, class_names, np.asarray(labels), digests)
        if len(table) != len(self.labels):
            raise ValueError(f"part {name!r}: {len(table)} pictures and {len(self.labels)} labels must agree")
        self.table, self.column, self.origin = table, column, origin

    def image(self, index: int) -> Image.Image:
        name, cell = self.identifier(index), self.table[int(index)][self.column]
        try:
            content = cell_bytes(cell, self.origin)
        except FAILURES as error:
            raise UnreadableImageError(f"cannot read the picture {name}: {reason(error)}") from error
        return open_rgb(content, name)


class FolderSplit(TableSplit):
    """Picture files by path; identifiers are the paths.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> file = Path(tempfile.mkdtemp()) / "a.png"
        >>> Image.new("RGB", (9, 7), "red").save(file)
        >>> part = FolderSplit("train", [str(file)], ["red"], [0])
        >>> len(part), part.image(0).size, part.labels.tolist()
        (1, (9, 7), [0])
    """

    def __init__(
        self, name: str, paths: Sequence[str], class_names: Sequence[str], labels: Sequence[int] | np.ndarray,
        digests: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        if digests is None:
            checked = PictureChecker().check_files(paths)
            if checked.bad:
                raise UnreadableImageError(
                    f"unreadable pictures: {[(paths[i], why) for i, why in checked.bad.items()]}"
                )
            digests = checked.digests
        features = datasets.Features({"image": datasets.Value("string")})
        table = datasets.Dataset.from_dict({"image": list(paths)}, features=features)
        super().__init__(name, table.cast_column("image", datasets.Image(decode=False)), class_names, labels, digests)

    def identifier(self, index: int) -> str:
        # from the table itself: a tuple of a million strings would double what a process holds
        return str(self.table.data.column("image")[range(len(self))[index]]["path"])


class HubSplit(TableSplit):
    """Rows of a data set from the Hugging Face hub (or of Parquet files); identifiers are "SOURCE/SPLIT#ROW".

    A row without bytes is read only from where `origin` allows it, by default from nowhere.
    """

    def __init__(
        self, name: str, table: datasets.Dataset, class_names: Sequence[str], labels: Sequence[int] | np.ndarray,
        digests: np.ndarray, *, column: str, where: str, rows: np.ndarray, origin: Origin | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            name, table.select(rows), class_names, labels, digests, column=column, origin=origin or Origin(where)
        )
        self.where, self.rows = where, rows

    def identifier(self, index: int) -> str:
        return f"{self.where}#{self.rows[int(index)]}"


class SceneSplit(ImageSplit):
    """Built-in rendered scenes; the label is the shape. `table` holds the hidden attributes of every scene."""

    def __init__(self, name: str, table: SceneTable, *, pixels: int = 64) -> None:
        from singreg.data.scenes import SHAPES, shape_labels

        rows = [hashlib.sha256(f"{table.fingerprint} {pixels} {i}".encode()).digest() for i in range(len(table))]
        digests = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 32)
        super().__init__(name, SHAPES, shape_labels(table), digests)
        self.table, self.pixels = table, pixels
        self._drawn: dict[int, np.ndarray] = {}

    def image(self, index: int) -> Image.Image:
        from singreg.data.scenes import render_scene

        # Drawing costs more than a small network's forward pass and every pass asks for the same pictures.
        drawn = self._drawn.get(int(index))
        if drawn is None:
            drawn = render_scene(self.table, int(index), pixels=self.pixels)
            if len(self._drawn) * drawn.nbytes < _SCENES_KEPT_BYTES:
                self._drawn[int(index)] = drawn
        return Image.fromarray(drawn)

    def identifier(self, index: int) -> str:
        return f"scene-{self.table.seed}-{index}"


@dataclass(frozen=True)
class Splits:
    """The four parts of a run: train, audit and test share no picture; bank is train (first) and the unlabelled ones.

    `class_indices` are the classes' places in ImageNet-1k, or None; `bank[: len(train)]` is `train` in the same order.
    """

    train: ImageSplit
    bank: ImageSplit
    audit: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    class_indices: tuple[int, ...] | None

    def __iter__(self) -> Iterator[ImageSplit]:
        return iter((self.train, self.bank, self.audit, self.test))

    def among_imagenet(self) -> Splits:
        """The same pictures with their labels and names among all 1000 classes of ImageNet-1k (for a head kept whole).

        Raises:
            ValueError: the classes are not ImageNet-1k's.
        """
        if self.class_indices is None:
            raise ValueError(
                f"these {len(self.class_names)} classes are not all ImageNet-1k's ({', '.join(self.class_names[:4])}, ...), so "
                "their rows in a kept head are not known; use model.head: new"
            )
        names = imagenet_names()
        train, bank, audit, test = (RelabelledSplit(part, self.class_indices, names) for part in self)
        return Splits(train, bank, audit, test, names, tuple(range(len(names))))
