"""A cache file while it is being computed: locked against other runs, its finished rows hashed, found again after a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # not a Unix: every run computes a file of its own, which no other can go on with
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 10.0  # at most this much work is lost by a kill
LOCK_SECONDS = 10.0  # a killed run's loader processes notice within 5 s, and hold its lock until then


class PartialFile:
    """The rows (N, width) float32 of a cache file to be, beside its target; only the first process of a group makes one.

    `path` is locked by this run until `close`. Beside it lies one journal a process with the hash of every stretch of rows it has
    finished. `done` holds the stretches that were found, read back and hashed equal. Where another run goes on holding the lock, or
    the file system has none, `path` is a new file of this run's own: nobody waits for hours, and the first to finish is kept.
    """

    def __init__(self, target: Path, shape: tuple[int, int]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.with_name(f".{target.stem}.partial.npy")
        self.lock, self.renamed = _locked(path), False
        if self.lock is None:
            handle, own = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".npy", dir=target.parent)
            os.close(handle)
            path = Path(own)
        self.path, self.done = path, _finished_rows(path, shape)
        if not self.done:
            self.forget_rows()
            try:
                _make_empty(path, shape)
            except OSError:
                self.close(keep=False)
                raise

    def forget_rows(self) -> None:
        """Remove the journals, whatever their number of processes was (no shapes)."""
        for journal in _journals(self.path):
            journal.unlink(missing_ok=True)

    def rename(self, target: Path) -> None:
        """Put the finished file in its place: whoever reads what was there before keeps it (a path; no shapes)."""
        self.path.chmod(0o644)
        os.replace(self.path, target)
        self.renamed = True
        self.forget_rows()

    def close(self, *, keep: bool) -> None:
        """Let others have the file; it stays if it is to be kept and another run could go on with it (no shapes)."""
        if not self.renamed and not (keep and self.lock is not None and _journals(self.path)):
            self.forget_rows()
            self.path.unlink(missing_ok=True)
        if self.lock is not None:
            os.close(self.lock)


class RowWriter:
    """One process's rows of the file at `path`: written, and every few seconds flushed to disk and noted in its journal."""

    def __init__(self, path: Path, rank: int) -> None:
        self.rows = np.lib.format.open_memmap(path, mode="r+")
        self.journal = path.with_name(f"{path.stem}.rows-{rank}.jsonl")
        self.pending: list[int] = []
        self.committed = time.monotonic()

    def write(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Put values (B, width) at indices (B,)."""
        self.rows[indices] = values
        self.pending += indices.tolist()
        if time.monotonic() - self.committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Data first, then the note that it is there: a kill between the two only costs the rows in question (no shapes)."""
        self.rows.flush()
        with open(self.journal, "a", encoding="utf-8") as journal:
            for start, stop in stretches(self.pending):
                note = {"start": start, "stop": stop, "sha256": _hash_of(self.rows[start:stop])}
                journal.write(f"\n{json.dumps(note)}\n")  # the first newline ends a line that a kill has torn
            journal.flush()
            os.fsync(journal.fileno())
        self.pending, self.committed = [], time.monotonic()


def stretches(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Increasing indices as stretches [start, stop).

    Example:
        >>> stretches([0, 1, 2, 7, 8])
        [(0, 3), (7, 9)]
    """
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


def _locked(path: Path) -> int | None:
    """A descriptor of the file that holds its lock; None where another run goes on holding it, or there are no locks."""
    if fcntl is None:
        return None
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (
                path.exists() and os.fstat(handle).st_ino == path.stat().st_ino
            ):  # not one that its holder has just renamed or removed
                return handle
            held = False
        except OSError as error:
            held = time.monotonic() < deadline and error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            if not held:
                logger.info("%s is another run's (%s): this one computes a file of its own", path, error.strerror)
                os.close(handle)
                return None
        os.close(handle)
        if held:
            time.sleep(0.1)


def _make_empty(path: Path, shape: tuple[int, int]) -> None:
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    rows.flush()
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:  # now, not as a bus error hours later
                raise OSError(
                    errno.ENOSPC, f"no room for a cache of {rows.nbytes / 2**20:.0f} MiB", str(path)
                ) from error


def _finished_rows(path: Path, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """The stretches noted in any process's journal whose rows still hash to what was written."""
    journals = _journals(path)
    if not journals:
        return []
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # gone and made empty by the lock, too short, or not an array
        return []
    if rows.shape != shape or rows.dtype != np.float32:
        return []
    found: list[tuple[int, int]] = []
    wrong = 0
    for note in [note for journal in journals for note in _notes(journal)]:
        start, stop = note["start"], note["stop"]
        if 0 <= start < stop <= len(rows) and _hash_of(rows[start:stop]) == note["sha256"]:
            found.append((start, stop))
        else:
            wrong += 1
    if wrong:
        logger.warning(
            "%s: %d of %d stretches of rows are not what was written and are computed anew",
            path,
            wrong,
            wrong + len(found),
        )
    return found


def _notes(journal: Path) -> list[dict[str, Any]]:
    notes = []
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            note = json.loads(line)
            if all(isinstance(note[name], int) for name in ("start", "stop")) and isinstance(note["sha256"], str):
                notes.append(note)
        except (ValueError, KeyError, TypeError):
            continue  # an empty or torn line: its rows are computed anew
    return notes


def _journals(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.rows-*.jsonl"))


def _hash_of(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
