"""Large cache files are hashed once a run, not at every use: which files were found whole, by all that a change would alter."""

from __future__ import annotations

import os
import time
from pathlib import Path

from singreg.utils import sha256_of_file

SETTLED_NS = 2_000_000_000  # a younger file could change once more within the tick of the file system's clock
Stamp = tuple[str, str, int, int, int, int]
_whole: set[Stamp] = set()


def hashes_to(path: Path, digest: str) -> bool:
    """Whether a file's (a path) SHA-256 is `digest`; read again only when inode, size or a time of change are others (no shapes)."""
    stamp = _stamp(path, digest)
    if stamp in _whole:
        return True
    if sha256_of_file(path) != digest:
        return False
    if stamp == _stamp(path, digest) and time.time_ns() - max(stamp[4:]) > SETTLED_NS:
        _whole.add(stamp)
    return True


def known_whole() -> frozenset[Stamp]:
    """What this process has verified, to be handed to others that see the same files (no shapes)."""
    return frozenset(_whole)


def trust(stamps: frozenset[Stamp]) -> None:
    """Take over what another process of this run has verified; a file that looks different here is still hashed (no shapes)."""
    _whole.update(stamps)


def _stamp(path: Path, digest: str) -> Stamp:
    status = os.stat(path)
    return str(path.absolute()), digest, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
