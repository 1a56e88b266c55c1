"""Folder trees of small pictures, each with its own content."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from singreg.data import DataConfig, ImagePart, Parts


def write_picture(path: Path, seed: int | None = None, size: tuple[int, int] = (9, 7)) -> Path:
    """A picture of random pixels; the seed defaults to one made of the path's last three parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32("/".join(path.parts[-3:]).encode()) if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_tree(root: Path, counts: dict[str, dict[str, int]], suffix: str = ".png") -> Path:
    """Write root/SPLIT/CLASS/iSUFFIX for every count."""
    for split, classes in counts.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                write_picture(root / split / name / f"{index}{suffix}")
    return root


def config(source: Path, **changes: Any) -> DataConfig:
    return DataConfig(source=str(source), **changes)


def contents(part: ImagePart) -> set[bytes]:
    return {bytes(digest) for digest in part.digests}


def per_class(part: ImagePart) -> list[int]:
    return np.bincount(part.labels[part.labels >= 0], minlength=len(part.class_names)).tolist()


def names(part: ImagePart) -> list[str]:
    return [part.identifier(index) for index in range(len(part))]


def check_disjoint(parts: Parts) -> None:
    for one, other in ((parts.train, parts.audit), (parts.train, parts.test), (parts.audit, parts.test)):
        assert not contents(one) & contents(other)
    assert not contents(parts.bank) & (contents(parts.audit) | contents(parts.test))
