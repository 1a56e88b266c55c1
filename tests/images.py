"""Folder trees and Parquet files of small images, each with its own content; light, since processes import it."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from singreg.config import DataConfig
from singreg.data.datasets import load_splits
from singreg.data.splits import ImageSplit, Splits, TableSplit


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels in [0, 1], (3, H, W); torchvision's does the same but takes each process seconds to import."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def write_image(path: Path, seed: int | None = None, size: tuple[int, int] = (9, 7)) -> Path:
    """An image of random pixels; the seed defaults to one made of the path's last three parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32("/".join(path.parts[-3:]).encode()) if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_tree(root: Path, counts: dict[str, dict[str, int]]) -> Path:
    """Write root/SPLIT/CLASS/i.png for every count."""
    for split, classes in counts.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                write_image(root / split / name / f"{index}.png")
    return root


def write_parquet(file: Path, images: Sequence[Any], labels: Sequence[Any], kind: Any = None) -> Path:
    """A Parquet file of image cells (paths go in with their bytes) and a column "label" of `kind`, or "class"."""
    cells = [{"bytes": c.read_bytes(), "path": c.name} if isinstance(c, Path) else c for c in images]
    name = "class" if kind is None else "label"
    schema = datasets.Features({"image": datasets.Image(), name: kind or datasets.Value("string")}).arrow_schema
    columns = [pa.array(cells, type=schema.field("image").type), pa.array(labels, type=schema.field(name).type)]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), file)
    return file


def file_split(folder: Path, count: int = 11) -> TableSplit:
    """A split of image files with their digests."""
    paths = [str(write_image(folder / f"{index}.png", index)) for index in range(count)]
    split = TableSplit.from_files("audit", paths, ["x"], [0] * count)
    assert not split.examine(range(count))
    return split


def per_class(split: ImageSplit) -> list[int]:
    return np.bincount(split.labels[split.labels >= 0], minlength=len(split.class_names)).tolist()


def names(split: ImageSplit) -> list[str]:
    return [split.identifier(index) for index in range(len(split))]


def contents(split: ImageSplit) -> set[bytes]:
    return {bytes(digest) for digest in split.digests}


def load(source: Path, **changes: Any) -> Splits:
    return load_splits(DataConfig(source=str(source), **changes))


def check_disjoint(splits: Splits) -> None:
    for one, other in ((splits.bank, splits.audit), (splits.bank, splits.test), (splits.audit, splits.test)):
        assert not contents(one) & contents(other)
