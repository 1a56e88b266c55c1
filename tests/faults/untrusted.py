"""Files made to do harm: how each is written. Nothing here asserts."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.pictures_for_tests import write_picture


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(path: Path, side: int = 100_000) -> Path:
    """A PNG of a few bytes whose header announces side × side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b""))
    return path


def huge_bmp(path: Path, side: int = 100_000) -> Path:
    """The same as a BMP."""
    path.write_bytes(b"BM" + struct.pack("<IHHI", 60, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0))
    return path


def truncated_jpeg(path: Path) -> Path:
    """The first two thirds of a JPEG."""
    write_picture(path, size=(64, 48))
    content = path.read_bytes()
    path.write_bytes(content[: 2 * len(content) // 3])
    return path


def text_as_picture(path: Path) -> Path:
    """A text with a picture's name."""
    path.write_text("this is no picture\n" * 20)
    return path


def damaged_exif(path: Path) -> Path:
    """A JPEG that decodes, with an orientation to be undone beside a number stored as text, at which PIL raises struct.error."""
    entries = struct.pack(">HHIHH", 0x112, 3, 1, 6, 0) + struct.pack(">HHIHH", 0x103, 2, 2, 6, 0)
    Image.new("RGB", (64, 48)).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + bytes(4))
    return path


def sparse_png(path: Path, size: int = 2**40) -> Path:
    """A PNG that takes no room on the disk and 1 TiB in memory."""
    write_picture(path)
    os.truncate(path, size)
    return path


def pipe(path: Path) -> Path:
    """A pipe that nobody writes to: whoever opens it to read waits for ever."""
    os.mkfifo(path)
    return path


def postscript(path: Path) -> Path:
    """A program in PostScript, which PIL would hand to an interpreter that it looks for."""
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    return path


def link_outside(path: Path, target: Path) -> Path:
    """A link with a picture's name to a file elsewhere."""
    path.symlink_to(target)
    return path


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def pickled(path: Path, touched: Path) -> Path:
    """A pickle that makes the file `touched` when it is read."""
    path.write_bytes(pickle.dumps(_Touch(touched)))
    return path


def pickled_npy(path: Path, touched: Path) -> Path:
    """An .npy file of objects that make the file `touched` when they are read."""
    with open(path, "wb") as file:
        np.lib.format.write_array(file, np.asarray([_Touch(touched)], dtype=object), allow_pickle=True)
    return path


def absurd_safetensors(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A weights file of a few bytes whose header announces a matrix of 10^12 × 10^6 numbers."""
    header = {"matrix": {"dtype": "F32", "shape": [10**12, 10**6], "data_offsets": [0, 4 * 10**18]}, "__metadata__": metadata or {}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    return path


def long_header_safetensors(path: Path) -> Path:
    """A weights file whose header is said to be 2^62 bytes long."""
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    return path


def absurd_npz(path: Path) -> Path:
    """Rows of a few bytes that announce 10^12 numbers."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header += b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("AS.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(80))
    return path


def bomb_npz(path: Path, size: int = 2**24) -> Path:
    """Rows that are small when compressed and would fill the memory when not."""
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("AS.npy", bytes(size))
    return path
