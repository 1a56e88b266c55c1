"""What SIGTERM and Ctrl-C do to a run: in a training loop it ends after the step, with a checkpoint; elsewhere at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEATED = 5.0
"""Seconds in which a further signal is the same request: a scheduler may signal the launcher, which passes it on, and each process."""


class _State:
    """Of this process: whether a loop is there to take a request, and the signal that made it."""

    waited_for = False
    number: int | None = None
    since = 0.0


def _end(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _handle(number: int, _: FrameType | None) -> None:
    now = time.monotonic()
    if _State.number is not None and now - _State.since < REPEATED:
        return
    waits = _State.waited_for and _State.number is None
    _State.number, _State.since = number, now
    if not waits:
        _end(number)
    print(
        f"\n{signal.Signals(number).name}: stopping after this step; once more in {REPEATED:.0f} s or later stops at once",
        file=sys.stderr, flush=True,
    )  # fmt: skip


@contextmanager
def signals_end_the_run() -> Iterator[None]:
    """Handle SIGTERM, which schedulers send before they kill, and SIGINT; as they were before on leaving (no shapes).

    Outside the main thread signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.number = None


class StopRequest:
    """Inside `with`, a first signal is noted instead of ending the process: the loop looks for it after its steps."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def __enter__(self) -> StopRequest:
        _State.waited_for = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _State.waited_for = False
        if _State.number is not None and kind is None:  # it came after the last step
            self.end()

    def came(self) -> bool:
        """Whether any process was asked to stop; every process must ask, after the same step (no shapes)."""
        if self.accelerator.num_processes == 1:
            return _State.number is not None
        if _State.number is not None:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def end(self) -> None:
        """End this process as the signal wants it: exit status 128 + its number, Ctrl-C as KeyboardInterrupt (no shapes)."""
        _end(_State.number or signal.SIGTERM)
