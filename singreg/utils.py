"""Files written whole or not at all, hashes, progress, sums over processes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from accelerate.utils import tqdm
from torch import Tensor

_TEMPORARY = re.compile(r"\..*-writing-[a-z0-9_]{8}(\.[^.]+)?")  # the names that atomic_write takes from mkstemp


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is flushed to disk and renamed onto `path`.

    An exception (full disk, Ctrl-C) removes the temporary file and leaves what was there before untouched.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_write(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-writing-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp's private mode is not what a shared run folder wants
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: str | Path) -> None:
    """Remove what `atomic_write` had begun anywhere below a folder (a path) when its process was killed; for its only writer."""
    for path in Path(folder).rglob(".*"):
        if path.is_file() and _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to the path atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented, strict JSON (no NaN) to the path atomically."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal; reads the path in chunks."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and float32 values, any shape, independent of device and memory layout."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of key order (no shapes)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


def seal_of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a safetensors file with the SHA-256 of tensors (any shape and dtype) and of the metadata itself."""
    plain = {key: value for key, value in metadata.items() if key != SEAL}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {**plain, SEAL: digest.hexdigest()}


def check_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise a DamagedFileError unless tensors and metadata are those that were sealed; a file without a seal passes (any shapes)."""
    if SEAL in metadata and seal_of_tensors(tensors, metadata)[SEAL] != metadata[SEAL]:
        raise DamagedFileError("it is damaged: its content is not what was written")


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


def is_distributed() -> bool:
    """True inside an initialised process group of more than one process (no shapes involved)."""
    return (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    )


@torch.no_grad()
def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over processes, any shape (...) to the same; detached; every process must call it."""
    value = value.detach().clone()
    if is_distributed():
        torch.distributed.all_reduce(value)
    return value


@torch.no_grad()
def all_reduce_max(value: Tensor) -> Tensor:
    """Largest over processes, any shape (...) to the same, element by element; detached; every process must call it."""
    value = value.detach().clone()
    if is_distributed():
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value


@torch.no_grad()
def all_reduce_mean(values: Tensor) -> Tensor:
    """Mean over all images of all processes, weighted by their counts; values (B,) to (), detached."""
    total = torch.stack([values.detach().sum(), values.new_tensor(float(values.numel()))])
    total = all_reduce_sum(total)
    return total[0] / total[1]


@torch.no_grad()
def broadcast_from_first(values: Sequence[Tensor]) -> None:
    """Overwrite tensors of any shapes, in place, with the first process's: work done by all alike may round differently."""
    if is_distributed():
        for value in values:
            torch.distributed.broadcast(value, src=0)


def seed_process(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch's and CUDA's random numbers from all three, so that no two processes draw the same dropout masks (no shapes)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]))


def gather_rows(batches: list[dict[str, np.ndarray]], *, sort_by: str | None = None) -> dict[str, np.ndarray]:
    """Concatenate named columns (B, ...) over batches and processes, in the order of one column; the same on every process.

    A process without batches passes an empty list. Each row appears once: nothing is padded.
    """
    mine = {name: np.concatenate([batch[name] for batch in batches]) for name in (batches[0] if batches else {})}
    shares = [mine]
    if is_distributed():
        shares = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(shares, mine)
    filled = [share for share in shares if share]
    if not filled:
        raise ValueError("no process has any row to gather")
    rows = {name: np.concatenate([share[name] for share in filled]) for name in filled[0]}
    if sort_by is not None:
        order = np.argsort(rows[sort_by], kind="stable")
        rows = {name: values[order] for name, values in rows.items()}
    return rows


Item = TypeVar("Item")
EVERY_SECONDS = 15.0


def progress(
    items: Iterable[Item], description: str, *, total: int | None = None, done: int = 0, enabled: bool = True
) -> Iterator[Item]:
    """Yield the items and show how far it is (no shapes). `done` of `total` were finished before.

    Example:
        >>> list(progress(range(3), "counting", enabled=False))
        [0, 1, 2]
    """
    if not enabled:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=description, total=total, initial=done, leave=False)
    else:
        yield from _lines(items, description, total, done)


def _lines(items: Iterable[Item], description: str, total: int | None, done: int) -> Iterator[Item]:
    """A line at most every quarter of a minute: a log file or CI has no use for a bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    start = shown = time.monotonic()
    for count, item in enumerate(items, start=done + 1):
        yield item
        now = time.monotonic()
        if now - shown >= EVERY_SECONDS:
            shown = now
            share = f"{count}/{total} ({count / total:.0%})" if total else str(count)
            print(f"{description}: {share}, {now - start:.0f} s", file=sys.stderr, flush=True)
