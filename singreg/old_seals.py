"""Sealed files of the old house; goes with the last module that reads them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from singreg.utils import sha256_of_file, sha256_of_json, write_json, write_text

SEAL = "sha256"
FILES = "files"
CHECKSUMS = "checksums.json"
_MARK = re.compile(rb"sha256\s+of\s+what\s+follows")  # its line may have been broken
_FIRST_LINE = re.compile(r"# sha256 of what follows: ([0-9a-f]{64})")


class DamagedFileError(ValueError):
    """A file is not what was written; the text names it."""


def write_sealed(path: str | Path, value: Mapping[str, Any], beside: Iterable[str] = ()) -> None:
    """Write a mapping as strict JSON to the path, with the SHA-256 of the files named `beside` it and of itself, atomically.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_sealed(target, {"AS": 1.5})
        >>> read_sealed(target)
        {'AS': 1.5}
        >>> _ = target.write_text(target.read_text().replace("1.5", "1.7"))
        >>> read_sealed(target)
        Traceback (most recent call last):
        singreg.utils.DamagedFileError: ...a.json is damaged: its content is not what was written
    """
    path, names = Path(path), list(beside)
    whole = {**value, **({FILES: {name: sha256_of_file(path.parent / name) for name in names}} if names else {})}
    write_json(path, {**whole, SEAL: sha256_of_json(whole)})


def read_sealed(path: str | Path) -> dict[str, Any]:
    """The mapping that `write_sealed` wrote to the path; one without a seal, of an earlier version, as it is.

    Raises:
        DamagedFileError: it, or a file beside it that it answers for, is not what was written, or is gone.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} is damaged: expected a mapping, got {type(value).__name__}")
    seal = value.pop(SEAL, None)
    if seal is not None and seal != sha256_of_json(value):
        raise DamagedFileError(f"{path} is damaged: its content is not what was written")
    beside_it = value.pop(FILES, {})
    if not isinstance(beside_it, dict):
        raise DamagedFileError(f"{path} is damaged: expected a mapping of files, got {type(beside_it).__name__}")
    for name, digest in beside_it.items():
        beside = path.parent / name
        if not beside.is_file():
            raise DamagedFileError(f"{beside} is missing; {path} was written with it")
        if sha256_of_file(beside) != digest:
            raise DamagedFileError(f"{beside} is damaged: its content is not what was written with {path.name}")
    return dict(value)


def read_rows(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file as `numpy.savez` writes it; nothing is unpickled, and no more memory is taken than the file has.

    Raises:
        DamagedFileError: it is no such file, or announces other sizes than it holds.
    """
    size = Path(path).stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                    raise ValueError(f"{member.filename} announces {member.file_size} bytes in a file of {size}")
                with archive.open(member) as file:
                    shape, dtype = _announced(file)
                    if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                        raise ValueError(f"{member.filename} announces {dtype} {shape} in {member.file_size} bytes")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, LookupError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def _announced(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type in the header of an .npy member, which ends where the data begins."""
    version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)  # type: ignore[no-untyped-call]
    return shape, dtype


def seal_folder(folder: Path) -> None:
    """Write checksums.json with the SHA-256 of every other file of a finished folder (a path)."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    write_sealed(folder / CHECKSUMS, {}, names)


def check_folder(folder: Path) -> None:
    """Raise a DamagedFileError that names the first file that is not what was sealed; a folder without a seal passes (a path)."""
    if (folder / CHECKSUMS).is_file():
        read_sealed(folder / CHECKSUMS)


def write_sealed_text(path: str | Path, text: str) -> None:
    """Write a text whose first line, a comment for YAML, is the SHA-256 of the rest, to the path, atomically."""
    write_text(path, f"# sha256 of what follows: {hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read_sealed_text(path: str | Path) -> str:
    """The text at the path without its seal; one that never had one, such as anybody's own YAML, as it is.

    Raises:
        DamagedFileError: it is not what was written, or no UTF-8.
    """
    whole = Path(path).read_bytes()
    first, _, rest = whole.partition(b"\n")
    if not _MARK.search(whole):
        try:
            return whole.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedFileError(f"{path} is no text in UTF-8: {error}") from error
    found = _FIRST_LINE.fullmatch(first.decode("utf-8", "replace"))
    if found is None or hashlib.sha256(rest).hexdigest() != found[1]:
        raise DamagedFileError(
            f"{path} was changed or damaged after it was written; to begin another run with it, copy it without its first line"
        )
    return rest.decode("utf-8")
