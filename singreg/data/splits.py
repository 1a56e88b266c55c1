"""Image splits: numbered images with labels and a fingerprint of their content."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import fsspec
import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from singreg.data.classes import imagenet_names
from singreg.data.scenes import SHAPES, SceneTable, render_scene, shape_labels
from singreg.utils import progress

Labels = Sequence[int] | np.ndarray
UNLABELLED = -1
SCENES_KEPT_BYTES = 2**28
# PIL knows stranger formats too, one of which starts another program.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")


class UnreadableImageError(ValueError):
    """An image that cannot be read; the text names it."""


def open_rgb(cell: Mapping[str, Any] | None, identifier: str) -> Image.Image:
    """Decode an undecoded image cell of `datasets` as RGB, upright by its EXIF tag, under PIL's own limit of size.

    Raises:
        UnreadableImageError: truncated, not an image, missing or too large.
    """
    try:
        with _opened(cell_bytes(cell)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # on broken files PIL raises nearly anything
        raise UnreadableImageError(f"cannot read the image {identifier}: {_reason(error)}") from error


def cell_bytes(cell: Mapping[str, Any] | None) -> bytes:
    """Return the encoded bytes of an undecoded image cell of `datasets`: its own, or those of the file it names."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError("the row holds no image (null)")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    with fsspec.open(cell["path"], "rb") if "://" in cell["path"] else open(cell["path"], "rb") as file:
        return bytes(file.read())


def examine(cell: Mapping[str, Any] | None) -> tuple[bytes, str | None]:
    """Return an image cell's SHA-256 and why it cannot be decoded, or None; JPEG is tried at 1/8 scale."""
    try:
        content = cell_bytes(cell)
        with _opened(content) as image:
            image.draft("RGB", (1, 1))
            ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        return bytes(32), _reason(error)
    return hashlib.sha256(content).digest(), None


def _opened(content: bytes) -> Image.Image:
    Image.init()  # before it, PIL does not know which formats it was built with
    return Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).split(' <_io')[0]}"


class ImageSplit(Dataset[tuple[Image.Image, int, int]]):
    """N numbered images, the base of every source; a new source needs `image` and `identifier` only.

    Args:
        name: train, bank, audit or test.
        class_names: C names.
        labels: (N,) class of each image, -1 for unlabelled.
        digests: (N, 32) uint8, SHA-256 of each image's content.
    """

    def __init__(self, name: str, class_names: Sequence[str], labels: np.ndarray, digests: np.ndarray) -> None:
        labels = np.asarray(labels, dtype=np.int64)
        if labels.ndim != 1 or digests.shape != (len(labels), 32):
            raise ValueError(f"{name}: expected labels (N,), digests (N, 32), got {labels.shape}, {digests.shape}")
        if len(labels) and not UNLABELLED <= labels.min() <= labels.max() < len(class_names):
            raise ValueError(f"{name}: labels {labels.min()}..{labels.max()} do not fit {len(class_names)} classes")
        self.name, self.class_names = name, tuple(class_names)
        self.labels, self.digests = labels, np.asarray(digests, dtype=np.uint8)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over content and label of every image in order, wherever the files lie."""
        digest = hashlib.sha256(f"{len(self)} {self.class_names}".encode())
        digest.update(np.ascontiguousarray(self.digests).tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int, int]:
        return self.image(index), int(self.labels[index]), index

    def image(self, index: int) -> Image.Image:
        """Return image `index` as RGB.

        Raises:
            UnreadableImageError: it cannot be decoded; the text names it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define image(index)")

    def identifier(self, index: int) -> str:
        """Return the name of image `index` for messages and tables: a path, SOURCE/SPLIT#ROW or scene-SEED-INDEX."""
        raise NotImplementedError(f"{type(self).__name__} must define identifier(index)")

    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> ImageSplit:
        """Return the images at `indices` (M,), in that order."""
        return SubsetSplit(self, indices, name)


class SubsetSplit(ImageSplit):
    """Some images of another split: `indices` (M,) into it."""

    def __init__(self, parent: ImageSplit, indices: Sequence[int] | np.ndarray, name: str | None = None) -> None:
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(parent):
            raise ValueError(
                f"expected indices below {len(parent)} (split {parent.name!r}), got {chosen.min()}..{chosen.max()}"
            )
        super().__init__(name or parent.name, parent.class_names, parent.labels[chosen], parent.digests[chosen])
        self.parent, self.indices = parent, chosen

    def image(self, index: int) -> Image.Image:
        return self.parent.image(int(self.indices[index]))

    def identifier(self, index: int) -> str:
        return self.parent.identifier(int(self.indices[index]))


class RelabelledSplit(SubsetSplit):
    """Another split's images among more classes: label k becomes `indices[k]`, unlabelled stays unlabelled."""

    def __init__(self, parent: ImageSplit, indices: Sequence[int], class_names: Sequence[str]) -> None:
        super().__init__(parent, np.arange(len(parent)))
        self.labels = np.append(np.asarray(indices, dtype=np.int64), UNLABELLED)[parent.labels]
        self.class_names = tuple(class_names)


class ConcatSplit(ImageSplit):
    """Several splits of the same classes, one after the other."""

    def __init__(self, name: str, splits: Sequence[ImageSplit]) -> None:
        labels = np.concatenate([split.labels for split in splits])
        super().__init__(name, splits[0].class_names, labels, np.concatenate([split.digests for split in splits]))
        self.splits, self.ends = tuple(splits), np.cumsum([len(split) for split in splits])

    def locate(self, index: int) -> tuple[ImageSplit, int]:
        """Return the split that image `index` is from, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside split {self.name!r} of {len(self)} images")
        place = int(np.searchsorted(self.ends, index, side="right"))
        return self.splits[place], int(index - self.ends[place] + len(self.splits[place]))

    def image(self, index: int) -> Image.Image:
        split, row = self.locate(index)
        return split.image(row)

    def identifier(self, index: int) -> str:
        split, row = self.locate(index)
        return split.identifier(row)


class TableSplit(ImageSplit):
    """Images in a `datasets` table with an undecoded column "image", opened one at a time.

    Args:
        where: names rows as WHERE#ROW; None names them by their path.
    """

    def __init__(
        self, name: str, table: datasets.Dataset, class_names: Sequence[str], labels: Labels, where: str | None = None
    ) -> None:
        super().__init__(name, class_names, np.asarray(labels), np.zeros((len(table), 32), dtype=np.uint8))
        self.table, self.where = table, where

    @classmethod
    def from_files(cls, name: str, paths: Sequence[str], class_names: Sequence[str], labels: Labels) -> TableSplit:
        """Return image files as a split whose digests are not known before `examine`.

        Example:
            >>> import tempfile
            >>> file = f"{tempfile.mkdtemp()}/a.png"
            >>> Image.new("RGB", (9, 7), "red").save(file)
            >>> split = TableSplit.from_files("train", [file], ["red"], [0])
            >>> split.examine([0]), split.image(0).size
            ({}, (9, 7))
        """
        features = datasets.Features({"image": datasets.Value("string")})
        table = datasets.Dataset.from_dict({"image": list(paths)}, features=features)
        return cls(name, table.cast_column("image", datasets.Image(decode=False)), class_names, labels)

    def examine(self, rows: Sequence[int] | np.ndarray) -> dict[int, str]:
        """Read rows (M,) once, keep their digests and return what is wrong with those that cannot be decoded."""
        bad: dict[int, str] = {}
        rows = np.asarray(rows, dtype=np.int64)
        # Chunks, since a million waiting tasks would take a gigabyte.
        chunks = np.split(rows, range(1024, len(rows), 1024))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
            for chunk in progress(chunks, f"checking images [{self.name}]"):
                found = pool.map(lambda row: examine(self.table[int(row)]["image"]), chunk)
                for row, (digest, problem) in zip(chunk.tolist(), found, strict=True):
                    self.digests[row] = np.frombuffer(digest, dtype=np.uint8)
                    if problem is not None:
                        bad[row] = problem
        return bad

    def image(self, index: int) -> Image.Image:
        return open_rgb(self.table[int(index)]["image"], self.identifier(index))

    def identifier(self, index: int) -> str:
        return f"{self.where}#{index}" if self.where else str(self.table[int(index)]["image"]["path"])


class SceneSplit(ImageSplit):
    """Built-in rendered scenes; the label is the shape. `table` holds the hidden attributes of every scene."""

    def __init__(self, name: str, table: SceneTable) -> None:
        rows = [hashlib.sha256(f"{table.fingerprint} 64 {i}".encode()).digest() for i in range(len(table))]
        super().__init__(name, SHAPES, shape_labels(table), np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32))
        self.table = table
        self._drawn: dict[int, np.ndarray] = {}

    def image(self, index: int) -> Image.Image:
        # Drawing costs more than a small network's forward pass and every pass asks for the same images.
        drawn = self._drawn.get(int(index))
        if drawn is None:
            drawn = render_scene(self.table, int(index))
            if len(self._drawn) * drawn.nbytes < SCENES_KEPT_BYTES:
                self._drawn[int(index)] = drawn
        return Image.fromarray(drawn)

    def identifier(self, index: int) -> str:
        return f"scene-{self.table.seed}-{index}"


@dataclass(frozen=True)
class Splits:
    """The four splits of a run: train, audit and test share no image; bank is train (first) and the unlabelled ones.

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
        """Return the same images with labels and names among all 1000 classes of ImageNet-1k, for a head kept whole.

        Raises:
            ValueError: the classes are not ImageNet-1k's.
        """
        if self.class_indices is None:
            raise ValueError(
                f"these {len(self.class_names)} classes are not all ImageNet-1k's ({', '.join(self.class_names[:4])}, "
                "...), so their rows in a kept head are not known; use model.head: new"
            )
        names = imagenet_names()
        train, bank, audit, test = (RelabelledSplit(split, self.class_indices, names) for split in self)
        return Splits(train, bank, audit, test, names, tuple(range(len(names))))
