"""What is remembered of checked pictures between two starts: 64 bytes a picture, in memory and on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from singreg.old_seals import DamagedFileError, read_rows
from singreg.utils import atomic_write

logger = logging.getLogger(__name__)

_COLUMNS = {"keys": (2, "<u8"), "stamps": (2, "<i8"), "digests": (32, "|u1")}


class Remembered:
    """N readable pictures, ordered by key: `keys` (N, 2) uint64, `stamps` (N, 2) int64 (size, time of change), `digests` (N, 32) uint8."""

    def __init__(self) -> None:
        self.keys = np.zeros((0, 2), dtype=np.uint64)
        self.stamps = np.zeros((0, 2), dtype=np.int64)
        self.digests = np.zeros((0, 32), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """The places (M,) of keys (M, 2) that are known with these stamps (M, 2); -1 for the others."""
        if not len(self):
            return np.full(len(keys), -1, dtype=np.int64)
        places = np.searchsorted(self.keys[:, 0], keys[:, 0]).clip(max=len(self) - 1)
        same = (self.keys[places] == keys).all(axis=1) & (self.stamps[places] == stamps).all(axis=1)
        return np.where(same, places, -1)

    def add(self, keys: np.ndarray, stamps: np.ndarray, digests: np.ndarray) -> None:
        """Learn keys (M, 2), stamps (M, 2) and digests (M, 32); what was known of the same keys is replaced."""
        keys = np.concatenate([self.keys, keys])
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal keys the newest comes last
        ordered = keys[order]
        last = np.ones(len(order), dtype=bool)
        last[:-1] = (ordered[1:] != ordered[:-1]).any(axis=1)
        newest = order[last]
        self.keys = keys[newest]
        self.stamps = np.concatenate([self.stamps, stamps])[newest]
        self.digests = np.concatenate([self.digests, digests])[newest]

    def write(self, file: Path) -> None:
        """Write all to a file (a path), atomically."""
        with atomic_write(file) as temporary:
            np.savez(temporary, keys=self.keys, stamps=self.stamps, digests=self.digests)

    @classmethod
    def read(cls, file: Path | None) -> Remembered:
        """What `write` wrote to a file (a path); nothing where there is none, or where it is damaged (which is said)."""
        found = cls()
        if file is None or not file.is_file():
            return found
        try:
            rows = read_rows(file)
            for name, (width, kind) in _COLUMNS.items():
                if (
                    name not in rows
                    or rows[name].dtype != np.dtype(kind)
                    or rows[name].shape != (len(rows["keys"]), width)
                ):
                    raise DamagedFileError(f"{file} is damaged: expected {name} as {kind} (N, {width})")
            if (rows["keys"][1:, 0] < rows["keys"][:-1, 0]).any():
                raise DamagedFileError(f"{file} is damaged: its keys are not in order")
        except (DamagedFileError, OSError) as error:
            logger.warning("the picture cache %s cannot be used and is made anew (%s)", file, error)
            return found
        found.keys, found.stamps, found.digests = (rows[name] for name in _COLUMNS)
        return found


def keys_of(names: Iterable[str], count: int) -> np.ndarray:
    """Keys (N, 2) uint64 of N names: half a SHA-256, so that no two names share one even if somebody tries."""
    keys = np.zeros((count, 16), dtype=np.uint8)
    for place, name in enumerate(names):
        keys[place] = np.frombuffer(
            hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:16], dtype=np.uint8
        )
    return keys.view("<u8").astype(np.uint64)
