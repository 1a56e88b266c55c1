"""What the benchmarks share: options, the machine, and two ways of doing one thing, timed in turn (A B A B ...)."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def options(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Options of the command line, each of its default's type."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    return parser.parse_args()


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call: by the clock, and of this process's processors, which say more on a busy machine."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - busy


def compare(what: str, first: Callable[[], Any], second: Callable[[], Any], count: int) -> None:
    """Print the machine, and medians and ratios (second over first, pair by pair), after a call of each for warmth."""
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{what}; {platform.machine()}, {os.cpu_count()} processors, {threads} threads, load at its start {load:.1f}")
    first(), second()
    measured = [(seconds(first), seconds(second)) for _ in range(count)]
    for place, kind in enumerate(("clock", "processor")):
        one, other = ([each[way][place] for each in measured] for way in (0, 1))
        ratios = sorted(b / a for a, b in zip(one, other, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        print(f"{kind} seconds: medians {statistics.median(one):.4g} and {statistics.median(other):.4g}, ", end="")
        print(f"ratio, pair by pair: median {statistics.median(ratios):.3f}, quartiles {low:.3f} to {high:.3f}")
