"""Single pictures: opening them so that every failure names the file, and one pass that checks and fingerprints many."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from singreg.data.reading import FAILURES, Origin, cell_bytes, read_file, reason
from singreg.data.remembered import Remembered, keys_of

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
)
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_CHUNK = 4096  # pictures handed to the threads at once: a million waiting ones would take a gigabyte


class UnreadableImageError(ValueError):
    """A picture that cannot be decoded; the text names it."""


def open_rgb(source: bytes | str | Path, identifier: str) -> Image.Image:
    """Decode a picture from its bytes or path, upright by its EXIF tag, as RGB (any size).

    Raises:
        UnreadableImageError: truncated, not an image, missing, or larger than PIL's decompression-bomb limit.
    """
    try:
        content = source if isinstance(source, bytes) else read_file(source)
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FAILURES as error:
        raise UnreadableImageError(f"cannot read the picture {identifier}: {reason(error)}") from error


@dataclass(frozen=True)
class Checked:
    """What the pass over N pictures found: `digests` (N, 32) uint8, the SHA-256 of each file, and `bad`: row -> reason."""

    digests: np.ndarray
    bad: dict[int, str]


class PictureChecker:
    """Reads every picture once: SHA-256 of its bytes and a decoding trial; remembered by path, size and time of change.

    The trial decodes JPEG at 1/8 scale (all of the file's data is read, a fraction of the arithmetic is done), others in
    full, so that a truncated file is found before a long run and not in the middle of it. With a `cache_dir` the results
    of readable pictures are kept in one file per `name`, and a second start costs one `stat` a picture.
    """

    def __init__(self, name: str = "", cache_dir: str | Path | None = None) -> None:
        key = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._file = None if cache_dir is None else Path(cache_dir).expanduser() / f"pictures-{key}.npz"
        self.known, self._new = Remembered.read(self._file), False

    def check_files(self, paths: Sequence[str]) -> Checked:
        """Check N files by path."""
        stamps = np.zeros((len(paths), 2), dtype=np.int64)
        for place, path in enumerate(paths):
            stamps[place] = _stamp(path)
        return self._collect(keys_of(paths, len(paths)), stamps, paths, read_file)

    def check_rows(
        self, table: Any, rows: Sequence[int] | np.ndarray, column: str = "image", origin: Origin | None = None
    ) -> Checked:
        """Check N rows of a `datasets` table whose picture column is not decoded ({"bytes", "path"} a row)."""
        keys = keys_of((f"{table._fingerprint}:{row}" for row in rows), len(rows))
        stamps = np.zeros((len(rows), 2), dtype=np.int64)
        return self._collect(keys, stamps, rows, lambda row: cell_bytes(table[int(row)][column], origin))

    def save(self) -> None:
        """Write what was learnt to the cache file (atomically); nothing to do without one."""
        if self._file is not None and self._new:
            self.known.write(self._file)
            self._new = False

    def _collect(
        self, keys: np.ndarray, stamps: np.ndarray, items: Sequence[Any] | np.ndarray, read: Callable[[Any], bytes]
    ) -> Checked:
        places = self.known.find(keys, stamps)
        digests, bad = np.zeros((len(keys), 32), dtype=np.uint8), {}
        digests[places >= 0] = self.known.digests[places[places >= 0]]
        missing = np.flatnonzero(places < 0)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
            for start in range(0, len(missing), _CHUNK):
                chunk = missing[start : start + _CHUNK].tolist()
                for place, (digest, why) in zip(
                    chunk, pool.map(lambda i: _examine(items[i], read), chunk), strict=True
                ):
                    if why is None:
                        digests[place] = np.frombuffer(digest, dtype=np.uint8)
                    else:
                        bad[place] = why
        learnt = np.setdiff1d(missing, np.fromiter(bad, dtype=np.int64, count=len(bad)))
        if len(learnt):
            self.known.add(keys[learnt], stamps[learnt], digests[learnt])
            self._new = True
        return Checked(digests, bad)


@cache
def _formats() -> tuple[str, ...]:
    """The kinds of SUFFIXES that PIL was built with: it knows stranger ones too, one of which starts another program."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1  # never equal to a kept stamp: the reading that follows tells why
    return status.st_size, status.st_mtime_ns


def _examine(item: Any, read: Callable[[Any], bytes]) -> tuple[bytes, str | None]:
    try:
        content = read(item)
    except FAILURES as error:
        return b"", reason(error)
    problem = trial(content)
    return (hashlib.sha256(content).digest(), None) if problem is None else (b"", problem)


def trial(content: bytes) -> str | None:
    """Why a picture's bytes cannot be decoded as `open_rgb` does it, or None; JPEG at 1/8 scale (no shapes)."""
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            image.draft("RGB", (1, 1))
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode != "RGB":
                image.convert("RGB")
    except FAILURES as error:
        return reason(error)
    return None
