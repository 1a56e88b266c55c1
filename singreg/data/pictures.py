"""Single pictures: opening them so that every failure names the file, and one pass that checks and fingerprints many."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from singreg.files import write_text

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"})
_FAILURES = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, Image.DecompressionBombError)


class UnreadableImageError(ValueError):
    """A picture that cannot be decoded; the text names it."""


def open_rgb(source: bytes | str | Path, identifier: str) -> Image.Image:
    """Decode a picture from its bytes or path, upright by its EXIF tag, as RGB (any size).

    Raises:
        UnreadableImageError: truncated, not an image, missing, or larger than PIL's decompression-bomb limit.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except _FAILURES as error:
        raise UnreadableImageError(f"cannot read the picture {identifier}: {_reason(error)}") from error


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
        self._file = None if cache_dir is None else Path(cache_dir).expanduser() / f"pictures-{key}.json"
        self._known: dict[str, list[Any]] = self._read()
        self._new = False

    def check_files(self, paths: Sequence[str]) -> Checked:
        """Check N files by path."""
        return self._collect(map(self._stamp, paths), paths, _bytes_of_file)

    def check_rows(self, table: Any, rows: Sequence[int], column: str = "image") -> Checked:
        """Check rows of a `datasets` table whose picture column is not decoded ({"bytes", "path"} a row)."""
        stamps = (f"{table._fingerprint}:{row}" for row in rows)
        return self._collect(((stamp, [0, 0]) for stamp in stamps), rows, lambda row: picture_bytes(table[int(row)][column]))

    def save(self) -> None:
        """Write what was learnt to the cache file (atomically); nothing to do without one."""
        if self._file is not None and self._new:
            write_text(self._file, json.dumps(self._known))
            self._new = False

    def _read(self) -> dict[str, list[Any]]:
        if self._file is None or not self._file.is_file():
            return {}
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            logger.warning("the picture cache %s is damaged and is made anew", self._file)
            return {}

    @staticmethod
    def _stamp(path: str) -> tuple[str, list[int]]:
        try:
            status = os.stat(path)
        except OSError:
            return path, [-1, -1]  # never equal to a kept stamp: the reading below then tells why
        return path, [status.st_size, status.st_mtime_ns]

    def _collect(self, stamps: Iterable[tuple[str, list[int]]], items: Sequence[Any], read: Any) -> Checked:
        stamped = list(stamps)
        digests, bad = np.zeros((len(stamped), 32), dtype=np.uint8), {}
        missing = []
        for place, (key, stamp) in enumerate(stamped):
            known = self._known.get(key)
            if known is not None and known[:2] == stamp:
                digests[place] = np.frombuffer(bytes.fromhex(known[2]), dtype=np.uint8)
            else:
                missing.append(place)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
            for place, (digest, reason) in zip(missing, pool.map(lambda i: _examine(items[i], read), missing), strict=True):
                if reason is None:
                    digests[place] = np.frombuffer(digest, dtype=np.uint8)
                    self._known[stamped[place][0]] = [*stamped[place][1], digest.hex()]
                    self._new = True
                else:
                    bad[place] = reason
        return Checked(digests, bad)


def picture_bytes(cell: dict[str, Any]) -> bytes:
    """The encoded bytes of an undecoded `datasets` picture cell."""
    return bytes(cell["bytes"]) if cell["bytes"] is not None else _bytes_of_file(cell["path"])


def _bytes_of_file(path: str) -> bytes:
    return Path(path).read_bytes()


def _examine(item: Any, read: Any) -> tuple[bytes, str | None]:
    try:
        content = read(item)
    except _FAILURES as error:
        return b"", _reason(error)
    problem = trial(content)
    return (hashlib.sha256(content).digest(), None) if problem is None else (b"", problem)


def trial(content: bytes) -> str | None:
    """Why a picture's bytes cannot be decoded, or None; JPEG at 1/8 scale (no shapes)."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except _FAILURES as error:
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).split(' <_io')[0]}"
