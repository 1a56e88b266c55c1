"""Work of one process for all, and work of all that one may fail: a failure reaches everybody, so that nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from singreg.utils import is_distributed

Value = TypeVar("Value")


class ElsewhereError(RuntimeError):
    """Another process failed, so this one cannot go on; the text names process and failure."""


def rank() -> int:
    """This process's number in its group; 0 without one (no shapes)."""
    return torch.distributed.get_rank() if is_distributed() else 0


def world() -> int:
    """How many processes the group has; 1 without one (no shapes)."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def first_for_all(work: Callable[[], Value], what: str) -> Value:
    """Run `work` on the first process only and give its result to all; `what` it is, for messages (no shapes).

    Raises:
        Exception: on the first process its own failure, on the others an ElsewhereError that tells it.
    """
    result: list[Value] = []

    def first_only() -> None:
        if rank() == 0:
            result.append(work())

    everywhere(first_only, what)
    if not is_distributed():
        return result[0]
    sent: list[Value | None] = [result[0] if result else None]
    torch.distributed.broadcast_object_list(sent, src=0)
    return sent[0]  # type: ignore[return-value]


def everywhere(work: Callable[[], None], what: str) -> None:
    """Run `work` on every process and wait for all; `what` it is, for messages (no shapes).

    Raises:
        Exception: where it failed its own failure, elsewhere an ElsewhereError that names process and failure.
    """
    failure: Exception | None = None
    try:
        work()
    except Exception as error:  # handed on below, once the others know: they would wait for ever otherwise
        failure = error
    texts: list[str | None] = [None] * world()
    if is_distributed():
        torch.distributed.all_gather_object(texts, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [f"process {place}: {text}" for place, text in enumerate(texts) if text is not None]
    if failed:
        raise ElsewhereError(f"{what} failed elsewhere: {'; '.join(failed)}")
