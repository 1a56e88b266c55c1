"""A fine-tuning run in a process of its own that can be killed; starts in a fraction of a second. Nothing here asserts."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal as signals
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from tests.tiny_run import arguments, report_of

PATIENCE = 300.0  # seconds a run may take before it counts as stuck


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (minus a signal's number), what it printed, seconds."""

    status: int
    said: str
    seconds: float


def _work(name: str, given: list[str], log: str, limit: int | None) -> None:
    if limit is not None:  # no file may grow beyond it: writing fails as it does on a full disk, in every library
        signals.signal(signals.SIGXFSZ, signals.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if hasattr(os, "sched_setaffinity"):  # one core, one thread: runs beside other work repeat all the same
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"recipes/{name}.py", *given]
    module = __import__(f"recipes.{name}", fromlist=["main"])
    module.main(given)


@contextmanager
def one_core() -> Iterator[None]:
    """This process on one core for a while: recipes then take one thread, and sums round as they do in `start`'s processes."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def start(given: list[str], log: Path, *, limit: int | None = None, recipe: str = "finetune") -> BaseProcess:
    """A process running the recipe; forked from a server that has the libraries loaded, so that it starts at once."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recipes.finetune", "tests.tiny_run"])
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    process: BaseProcess = context.Process(target=_work, args=(recipe, given, str(log), limit))
    process.start()
    return process


def run(
    given: list[str], log: Path, *, signal: int | None = None, after: float = 0.0, when: Callable[[], bool] | None = None,
    limit: int | None = None, recipe: str = "finetune",
) -> Ended:  # fmt: skip
    """Run the recipe to its end, or send it a signal after some seconds or when something is the case; `limit` bytes a file."""
    begun, process = time.monotonic(), start(given, log, limit=limit, recipe=recipe)
    try:
        if signal is not None:
            while process.is_alive() and (time.monotonic() < begun + after if when is None else not when()):
                process.join(0.01)
                if time.monotonic() > begun + PATIENCE:
                    raise TimeoutError(f"the moment for the signal never came; the run said:\n{log.read_text()}")
            if process.is_alive():
                os.kill(process.pid or 0, signal)
        process.join(PATIENCE)
        if process.is_alive():
            raise TimeoutError(f"the run did not end in {PATIENCE} s; it said:\n{log.read_text()}")
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    return Ended(process.exitcode or 0, log.read_text(errors="replace"), time.monotonic() - begun)


def tiny(runs: Path, cache: Path, *more: str) -> list[str]:
    """Arguments of the tiny run, named "run"."""
    return arguments(runs, cache, "--name", "run", *more)


def demo(runs: Path, cache: Path, *more: str) -> list[str]:
    """Arguments of the demo as it is shipped, named "run"."""
    return ["--config", "demo.yaml", "--name", "run", "--runs", str(runs), "--cache", str(cache), *more]


def differences(folder: Path, wanted: Path) -> list[str]:
    """Files whose numbers are not exactly those of another run of the same configuration; empty when all are."""
    found = []
    for model in ("model", "model-control"):
        name = f"{model}/model.safetensors"
        mine, theirs = load_file(folder / name), load_file(wanted / name)
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[key], theirs[key]) for key in theirs):
            found.append(name)
    for path in sorted(wanted.glob("translator-*.safetensors")):
        mine, theirs = load_file(folder / path.name), load_file(path)
        if not all(torch.equal(mine[key], theirs[key]) for key in theirs):
            found.append(path.name)
    if not pq.read_table(folder / "scores.parquet").equals(pq.read_table(wanted / "scores.parquet")):
        found.append("scores.parquet")
    if report_of(folder) != report_of(wanted):
        found.append("report.json")
    if left := [str(path.relative_to(folder)) for path in folder.rglob(".*")]:
        found.append(f"left behind: {', '.join(left)}")
    return found
