"""One reader for the bytes of single pictures: regular files of bounded size, and of those only what the data source may name."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.utils.file_utils import xopen
from PIL import Image

MAX_BYTES = 256 << 20  # no encoded picture is near it; what is larger is a mistake or meant to fill the memory
ARCHIVES = frozenset({"zip", "tar", "gzip", "bz2", "lz4", "xz", "zstd"})
# what PIL raises on broken files, which is not OSError alone: a damaged EXIF block struct.error, an absurd size MemoryError
FAILURES = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError, MemoryError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


class RefusedPictureError(ValueError):
    """A picture that is not read at all: too large, no regular file, or outside the data source."""


class Origin:
    """Where a data set's rows may point to when they hold a path instead of bytes (no shapes).

    Whoever wrote a Parquet file chose these paths, so they are followed only into `folders`, links resolved; an address (anything
    with "://") only to one of the files `listed` by `datasets` when it looked through the data set, or into an archive among them.
    """

    def __init__(self, name: str, folders: Sequence[str | Path] = (), listed: Collection[str] = ()) -> None:
        self.name, self.listed = name, listed
        self.folders = tuple(Path(folder).expanduser().resolve() for folder in folders)

    def check(self, path: str) -> None:
        """Raise a RefusedPictureError unless the path or address is the data source's own (no shapes)."""
        *inner, last = path.split("::")
        archived = all(part.partition("://")[0] in ARCHIVES for part in inner)
        if archived and (last in self.listed if "://" in last else self._inside(last)):
            return
        raise RefusedPictureError(
            f"the row holds no bytes but names {path!r}, which is not in {self.name}, so it is not read; "
            "put the bytes into the data set, or the file into its folder"
        )

    def _inside(self, path: str) -> bool:
        try:
            target = Path(path).resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, or a name with a null byte
            return False
        return any(target.is_relative_to(folder) for folder in self.folders)


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file of at most MAX_BYTES (no shapes).

    Raises:
        RefusedPictureError: it is a device, pipe or folder, is larger, or grew while it was read.
        OSError: it cannot be read.
    """
    _size_of(os.stat(path))  # before it is opened: opening alone can make a device do something
    handle = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )  # a pipe would be waited for
    with open(handle, "rb") as file:
        size = _size_of(
            os.fstat(file.fileno())
        )  # once more, of what was opened: the name may stand for another file by now
        content = file.read(size + 1)
    if len(content) > size:
        raise RefusedPictureError(f"the file has more than the {size} bytes it is said to have")
    return content


def cell_bytes(cell: Mapping[str, Any] | None, origin: Origin | None) -> bytes:
    """The encoded bytes of an undecoded `datasets` picture cell; without an `origin` its path is one that was listed here (no shapes).

    Raises:
        RefusedPictureError: an empty cell, or a picture that is not to be read.
        OSError: the file or address cannot be read.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise RefusedPictureError("the row holds no picture (null)")
    if cell["bytes"] is not None:
        return _bounded(bytes(cell["bytes"]))
    path = str(cell["path"])
    if origin is not None:
        origin.check(path)
    if "://" not in path:
        return read_file(path)
    with xopen(path, "rb") as file:
        return _bounded(bytes(file.read(MAX_BYTES + 1)))


def reason(error: BaseException) -> str:
    """What went wrong, in one line without addresses of objects (no shapes)."""
    name = "struct.error" if isinstance(error, struct.error) else type(error).__name__  # its own name is "error"
    return f"{name}: {str(error).split(' <_io')[0]}"


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_BYTES:
        raise RefusedPictureError(f"more than {MAX_BYTES >> 20} MiB, the most that is read of one picture")
    return content


def _size_of(status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise RefusedPictureError("not a regular file")
    if status.st_size > MAX_BYTES:
        raise RefusedPictureError(f"{status.st_size} bytes; at most {MAX_BYTES >> 20} MiB are read of one picture")
    return status.st_size
