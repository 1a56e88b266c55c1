"""Progress of long work: a bar on a terminal, plain lines elsewhere, and only from the main process of a machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from accelerate.utils import tqdm

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
