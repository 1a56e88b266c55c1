"""Work that all processes wait for: a failure on one of them reaches all, so that none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from singreg.utils import rank_and_world

Value = TypeVar("Value")


def together(work: Callable[[], Value], what: str, *, first_only: bool = False) -> Value:
    """Run `work` on every process, or on the first alone for all, and wait; return its result (pickled to the others).

    Raises:
        Exception: where the work failed its own failure; elsewhere a ValueError that names process and failure.
    """
    rank, world = rank_and_world()
    results: list[Any] = [None]
    failure: Exception | None = None
    if rank == 0 or not first_only:
        try:
            results = [work()]
        except Exception as error:  # raised below, once the others know
            failure = error
    texts: list[str | None] = [None] * world
    if world > 1:
        dist.all_gather_object(texts, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if any(texts):
        failed = "; ".join(f"process {place}: {text}" for place, text in enumerate(texts) if text)
        raise ValueError(f"{what} failed elsewhere: {failed}")
    if first_only and world > 1:
        dist.broadcast_object_list(results, src=0)
    value: Value = results[0]
    return value
