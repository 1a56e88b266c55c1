"""Image splits: numbered images with labels and a fingerprint of their content, and their batches."""

import hashlib
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import datasets
import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from singreg.classes import ClassSubset
from singreg.data.scenes import SHAPES, SceneTable, render_scene
from singreg.utils import progress, usable_cores

logger = logging.getLogger(__name__)
Labels = Sequence[int] | np.ndarray
Transform = Callable[[Image.Image], Tensor]
UNLABELLED = -1
SCENES_KEPT = 20_000  # drawing costs more than a small network's forward pass, and every pass asks for the same images
# PIL knows stranger formats too, one of which starts another program.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
PHOTOMETRIC = 262  # TIFF's tag of what 0 means: white where it is 0


def cell_bytes(cell: Mapping[str, Any] | None) -> bytes:
    """Return the encoded bytes of an undecoded image cell of `datasets`: its own, or those of the file it names."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError("the row holds no image (null)")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    with xopen(cell["path"], "rb") as file:
        return bytes(file.read())


def examine(cell: Mapping[str, Any] | None) -> tuple[bytes, str | None, int | None]:
    """Return an image cell's SHA-256, why it cannot be decoded or None, and the brightest of 16-bit values or None."""
    try:
        content = cell_bytes(cell)
        brightest = _decode(content, draft=True)[1]  # JPEG at 1/8 scale
    except Exception as error:  # on broken files PIL raises nearly anything
        return bytes(32), _reason(error), None
    return hashlib.sha256(content).digest(), None, brightest


def open_image(file: Any) -> Image.Image:
    """Open a path or file of one of the `FORMATS`, not yet decoded."""
    Image.init()  # before it, PIL does not know which formats it was built with
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def is_image(path: str) -> bool:
    """Tell by the ending, so that a million files are not opened, and where it says nothing by the content."""
    if Image.registered_extensions().get(os.path.splitext(path)[1].lower()) in FORMATS:
        return True
    try:
        with open_image(path):
            return True
    except Exception:  # PIL raises nearly anything
        return False


def _decode(content: bytes, *, draft: bool = False) -> tuple[Image.Image, int | None]:
    """Decode as RGB, upright by the EXIF tag, under PIL's own limit of size; of 16-bit images the brightest value."""
    with open_image(io.BytesIO(content)) as image:
        if draft:
            image.draft("RGB", (1, 1))
        high_bytes = ";16" in str(image.tile) and image.mode in ("RGB", "RGBA", "LA")  # all that PIL reads of them
        wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        inverted = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
        upright = ImageOps.exif_transpose(image)
    if not wide:
        if upright.mode in ("I", "F"):
            raise ValueError("32-bit values have no known range; save it with 8 or 16 bits")
        colour = upright.convert("RGB")
        return colour, 256 * int(np.asarray(colour).max()) if high_bytes else None
    values = np.asarray(upright)  # PIL's own conversion would make everything above 255 white
    values = 65535 - values if inverted else values
    return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB"), int(values.max())


def _reason(error: Exception) -> str:
    return str(error).split(" <_io")[0] or type(error).__name__


class ImageSplit:
    """N numbered images, the base of every source; a new source needs `image` and `identifier` only.

    Shape: class_names C; labels (N,), -1 for unlabelled; digests (N, 32) uint8, SHA-256 of each image's content.
    """

    def __init__(self, name: str, class_names: Sequence[str], labels: Labels, digests: np.ndarray) -> None:
        self.name, self.class_names = name, tuple(class_names)
        self.labels, self.digests = np.asarray(labels, dtype=np.int64), digests

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over content and label of every image in order, wherever the files lie."""
        digest = hashlib.sha256(f"{len(self)} {self.class_names}".encode())
        digest.update(np.ascontiguousarray(self.digests).tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Return image `index` as RGB."""
        raise NotImplementedError

    def identifier(self, index: int) -> str:
        """Return the name of image `index` for messages and tables: a path, SOURCE/SPLIT#ROW or scene-SEED-INDEX."""
        raise NotImplementedError

    def subset(self, indices: Labels, name: str | None = None) -> "SubsetSplit":
        """Return the images at `indices` (M,), in that order."""
        return SubsetSplit(self, indices, name)


class SubsetSplit(ImageSplit):
    """Some images of another split: `indices` (M,) into it."""

    def __init__(self, parent: ImageSplit, indices: Labels, name: str | None = None) -> None:
        self.parent, self.indices = parent, np.asarray(indices, dtype=np.int64)
        labels, digests = parent.labels[self.indices], parent.digests[self.indices]
        super().__init__(name or parent.name, parent.class_names, labels, digests)

    def image(self, index: int) -> Image.Image:
        return self.parent.image(int(self.indices[index]))

    def identifier(self, index: int) -> str:
        return self.parent.identifier(int(self.indices[index]))


class ConcatSplit(ImageSplit):
    """Several splits of the same classes, one after the other."""

    def __init__(self, name: str, splits: Sequence[ImageSplit]) -> None:
        labels = np.concatenate([split.labels for split in splits])
        super().__init__(name, splits[0].class_names, labels, np.concatenate([split.digests for split in splits]))
        self.splits, self.ends = tuple(splits), np.cumsum([len(split) for split in splits])

    def _locate(self, index: int) -> tuple[ImageSplit, int]:
        place = int(np.searchsorted(self.ends, index, side="right"))
        return self.splits[place], int(index - self.ends[place] + len(self.splits[place]))

    def image(self, index: int) -> Image.Image:
        split, row = self._locate(index)
        return split.image(row)

    def identifier(self, index: int) -> str:
        split, row = self._locate(index)
        return split.identifier(row)


class TableSplit(ImageSplit):
    """Images in a `datasets` table with an undecoded column "image", named WHERE#ROW or (None) by their path."""

    def __init__(
        self, name: str, table: datasets.Dataset, class_names: Sequence[str], labels: Labels, where: str | None = None
    ) -> None:
        super().__init__(name, class_names, labels, np.zeros((len(table), 32), dtype=np.uint8))
        self.table, self.where = table, where
        self.seen = np.zeros(len(table), dtype=bool)
        self.bad: dict[int, str] = {}  # why a row cannot be used
        self.brightest: dict[int, int] = {}  # value in a row's 16-bit image

    @classmethod
    def from_files(cls, name: str, paths: Sequence[str], class_names: Sequence[str], labels: Labels) -> "TableSplit":
        """Return image files as a split."""
        features = datasets.Features({"image": datasets.Image(decode=False)})
        return cls(name, datasets.Dataset.from_dict({"image": list(paths)}, features), class_names, labels)

    def examine(self, rows: Labels) -> bool:
        """Read those of the rows (M,) not read before, keep their digests, return whether any cannot be decoded."""
        new = np.asarray(rows, dtype=np.int64)
        new = new[~self.seen[new]]
        self.seen[new] = True
        known = len(self.bad)
        # Chunks, since a million waiting tasks would take a gigabyte.
        chunks = np.split(new, range(1024, len(new), 1024))
        with ThreadPoolExecutor(min(8, usable_cores())) as pool:  # decoding releases the interpreter lock
            for chunk in progress(chunks, f"checking images [{self.name}]"):
                found = pool.map(lambda row: examine(self.table[int(row)]["image"]), chunk)
                for row, (digest, problem, brightest) in zip(chunk.tolist(), found, strict=True):
                    self.digests[row] = np.frombuffer(digest, dtype=np.uint8)
                    self.bad |= {} if problem is None else {row: problem}
                    self.brightest |= {row: brightest} if brightest else {}
        most = max(self.brightest.values(), default=2**16)
        if most <= 2**12:  # a camera's 12 bits would be black; a dark image among bright ones is no fault
            wrong = f"16-bit values up to {most} alone (12 bits?); save it with 8 bits"
            self.bad |= dict.fromkeys(self.brightest, wrong)
        elif most <= 2**14:
            _say_once(f"{self.name}: 16-bit images have values up to {most} alone and are used as dark as that is")
        return len(self.bad) > known

    def image(self, index: int) -> Image.Image:
        try:
            return _decode(cell_bytes(self.table[int(index)]["image"]))[0]
        except Exception as error:
            raise ValueError(f"cannot read the image {self.identifier(index)}: {_reason(error)}") from error

    def identifier(self, index: int) -> str:
        return f"{self.where}#{index}" if self.where else str(self.table[int(index)]["image"]["path"])


class SceneSplit(ImageSplit):
    """Built-in rendered scenes; the label is the shape. `table` holds the hidden attributes of every scene."""

    def __init__(self, name: str, table: SceneTable) -> None:
        rows = [hashlib.sha256(f"{table.fingerprint} 64 {i}".encode()).digest() for i in range(len(table))]
        super().__init__(name, SHAPES, table.codes["shape"], np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32))
        self.table = table
        self._drawn: dict[int, np.ndarray] = {}

    def image(self, index: int) -> Image.Image:
        drawn = self._drawn.get(index)
        if drawn is None:
            drawn = render_scene(self.table, index)
            if len(self._drawn) < SCENES_KEPT:
                self._drawn[index] = drawn
        return Image.fromarray(drawn)

    def identifier(self, index: int) -> str:
        return f"scene-{self.table.seed}-{index}"


@dataclass(frozen=True)
class Splits:
    """The four splits of a run: train, audit and test share no image; bank is train (first) and the unlabelled ones.

    `classes` are the data's own, None where labels are among other rows; `bank[: len(train)]` is `train` in its order.
    """

    train: ImageSplit
    bank: ImageSplit
    audit: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    classes: ClassSubset | None

    def __iter__(self) -> Iterator[ImageSplit]:
        return iter((self.train, self.bank, self.audit, self.test))

    def among(self, rows: Sequence[int], names: Sequence[str]) -> "Splits":
        """Return the same images with class i as label rows[i] among more or other ordered classes, `names`."""
        places, moved = np.array([*rows, UNLABELLED]), [split.subset(np.arange(len(split))) for split in self]
        for split in moved:
            split.labels, split.class_names = places[split.labels], tuple(names)
        return Splits(moved[0], moved[1], moved[2], moved[3], tuple(names), None)


@dataclass(eq=False)
class _Views(Dataset[tuple[Any, ...]]):
    """A split's images as (tensor, label, index), or (tensor, clean tensor, label, index) with a second transform."""

    split: ImageSplit
    transform: Transform
    clean_transform: Transform | None
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, label = self.split.image(index), int(self.split.labels[index])
        with _seeded(self.seed, self.epoch, index):
            view = self.transform(image)
        clean = () if self.clean_transform is None else (self.clean_transform(image),)
        return view, *clean, label, index


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """The order of one epoch; accelerate calls `set_epoch` on samplers alone, so the views hear of it from here."""

    views: _Views
    shuffle: bool

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.views.seed, self.views.epoch, 1])
        return iter(generator.permutation(len(self)).tolist() if self.shuffle else range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        self.views.epoch = epoch


def make_loader(
    split: ImageSplit,
    transform: Transform,
    batch_size: int,
    *,
    clean_transform: Transform | None = None,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """Return batches (images (B, 3, H, W), labels (B,), indices (B,)); `clean_transform` puts a clean view second."""
    views, most = _Views(split, transform, clean_transform, seed), usable_cores()
    if workers > most:
        _say_once(f"data.workers: {workers} are more than the {most} cores that may be used; {most} are started")
        workers = most
    sampler = EpochSampler(views, shuffle)
    generator = torch.Generator().manual_seed(seed)  # or every pass would draw from the training's dropout
    return DataLoader(views, batch_size, sampler=sampler, num_workers=workers, drop_last=drop_last, generator=generator)


@cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)


@contextmanager
def _seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Run with the CPU generators of torch, numpy and Python seeded; what they had before is put back."""
    state = [int(word) for word in np.random.SeedSequence([seed, epoch, index, 2]).generate_state(3)]
    kept = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(state[0])  # torch.manual_seed would reset a GPU's generator too
            np.random.seed(state[1])
            random.seed(state[2])
            yield
    finally:
        np.random.set_state(kept[0])
        random.setstate(kept[1])
