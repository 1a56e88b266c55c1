"""Folder trees of small pictures, each with its own content."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from singreg.data import DataConfig, ImageSplit, Splits
from singreg.utils import atomic_write


def write_picture(path: Path, seed: int | None = None, size: tuple[int, int] = (9, 7)) -> Path:
    """A picture of random pixels; the seed defaults to one made of the path's last three parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32("/".join(path.parts[-3:]).encode()) if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    with atomic_write(path) as whole:  # another process of a test may be reading the one that is there
        Image.fromarray(pixels).save(whole)
    return path


def write_tree(root: Path, counts: dict[str, dict[str, int]], suffix: str = ".png") -> Path:
    """Write root/SPLIT/CLASS/iSUFFIX for every count."""
    for split, classes in counts.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                write_picture(root / split / name / f"{index}{suffix}")
    return root


def write_parquet(file: Path, pictures: Sequence[Any], labels: Sequence[Any], kind: Any = None) -> Path:
    """A Parquet file of picture cells (paths are put in with their bytes) and a column "label" of `kind`, or "class" of text."""
    cells = [{"bytes": cell.read_bytes(), "path": cell.name} if isinstance(cell, Path) else cell for cell in pictures]
    name = "class" if kind is None else "label"
    features = datasets.Features({"image": datasets.Image(), name: kind or datasets.Value("string")})
    schema = features.arrow_schema
    columns = [pa.array(cells, type=schema.field("image").type), pa.array(labels, type=schema.field(name).type)]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), file)
    return file


def config(source: Path, **changes: Any) -> DataConfig:
    return DataConfig(source=str(source), **changes)


def contents(part: ImageSplit) -> set[bytes]:
    return {bytes(digest) for digest in part.digests}


def per_class(part: ImageSplit) -> list[int]:
    return np.bincount(part.labels[part.labels >= 0], minlength=len(part.class_names)).tolist()


def names(part: ImageSplit) -> list[str]:
    return [part.identifier(index) for index in range(len(part))]


def check_disjoint(parts: Splits) -> None:
    for one, other in ((parts.train, parts.audit), (parts.train, parts.test), (parts.audit, parts.test)):
        assert not contents(one) & contents(other)
    assert not contents(parts.bank) & (contents(parts.audit) | contents(parts.test))
