"""Work that all processes wait for: a failure on one of them reaches all, so that none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from singreg.utils import rank_and_world

Value = TypeVar("Value")


def together(work: Callable[[], Value], what: str, *, first_only: bool = False) -> Value:
    """Run `work` on every process and wait for all; return this process's result.

    Args:
        what: the work in words, for messages.
        first_only: run it on the first process alone and return its result, pickled, on all.

    Raises:
        Exception: where the work failed its own failure; elsewhere a ValueError that names process and failure, or a
            RuntimeError where the failure is not a user's mistake (ValueError or OSError).
    """
    rank, world = rank_and_world()
    results: list[Any] = [None]
    failure: Exception | None = None
    if rank == 0 or not first_only:
        try:
            results = [work()]
        except Exception as error:  # raised below, once the others know
            failure = error
    if world > 1:
        told: list[tuple[bool, str] | None] = [None] * world
        mistake = isinstance(failure, (ValueError, OSError))
        dist.all_gather_object(told, None if failure is None else (mistake, f"{type(failure).__name__}: {failure}"))
        failed = [f"process {place}: {text[1]}" for place, text in enumerate(told) if text is not None]
        if failed and failure is None:
            kind = ValueError if all(text is None or text[0] for text in told) else RuntimeError
            raise kind(f"{what} failed elsewhere: {'; '.join(failed)}")
    if failure is not None:
        raise failure
    if first_only and world > 1:
        dist.broadcast_object_list(results, src=0)
    value: Value = results[0]
    return value
