"""What every benchmark prints: the machine, and the ratio of two ways of doing one thing, timed in turn (A B A B ...)."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of every pair: by the clock, and of this process's processors (all threads), which say more on a busy machine."""

    wall: list[tuple[float, float]]
    work: list[tuple[float, float]]


def machine() -> str:
    """Processor, threads, torch and how busy the machine is."""
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} processors, {threads} threads, torch {torch.__version__}, load at its start {load:.1f}"


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """(clock, processor) seconds of one call."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - busy


def pairs(first: Callable[[], Any], second: Callable[[], Any], count: int, *, warm: bool = True) -> Times:
    """Time both in turn, after one call of each that does not count."""
    if warm:
        first(), second()
    measured = [(seconds(first), seconds(second)) for _ in range(count)]
    return Times([(a[0], b[0]) for a, b in measured], [(a[1], b[1]) for a, b in measured])


def ratio_line(what: str, columns: list[tuple[float, float]], *, first_over_second: bool = True) -> str:
    """Medians of both and the ratio pair by pair: median and quartiles."""
    ratios = sorted(a / b if first_over_second else b / a for a, b in columns)
    medians = [statistics.median(column) for column in zip(*columns, strict=True)]
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    return (
        f"{what}: ratio median {statistics.median(ratios):.3f}, quartiles {low:.3f} to {high:.3f} "
        f"({len(ratios)} pairs, medians {medians[0]:.4g} s and {medians[1]:.4g} s)"
    )


def memory_mib(*, peak: bool) -> float:
    """MiB this process holds now, or has held at most. Linux's own figures: getrusage's peak counts the parent's before exec too."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    with open("/proc/self/status", encoding="ascii") as status:
        (line,) = (line for line in status if line.startswith(wanted))
    return int(line.split()[1]) / 1024
