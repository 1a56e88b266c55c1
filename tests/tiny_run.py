"""A fine-tuning run that takes seconds: its arguments, running it here or in a process that can be killed."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.recipe_run import run_recipe

TINY = {
    "data.scenes": "{train: 80, audit: 64, test: 45, bank: 10}",
    "data.augmentation": "none",
    "training.batch_size": "16",
    "translator.refreshes": "1",
    "translator.ridge": "1",
}
WORDS = [word for key, value in TINY.items() for word in (f"--{key}", value)]
EVERY = 3  # steps between checkpoints, in the middle of an epoch too
PATIENCE = 300.0  # seconds a run may take before it counts as stuck


def arguments(out: Path, *more: str) -> list[str]:
    """Ten steps an arm, the translator refreshed after the fifth."""
    return [*WORDS, "--out", str(out), *more]


def finetune(out: Path, *more: str) -> dict[str, Any]:
    """Run the recipe in this process and return its report."""
    import finetune as recipe

    with patch.object(recipe, "CHECKPOINT_EVERY", EVERY):
        return run_recipe(recipe.main, out, *WORDS, *more)


def report_of(folder: Path) -> dict[str, Any]:
    """report.json without what may differ between two runs of the same configuration."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return {name: value for name, value in report.items() if name not in ("seconds", "settings", "machine")}


def differences(folder: Path, wanted: Path) -> list[str]:
    """Files whose numbers are not exactly those of another run of the same configuration; empty when all are."""
    found = []
    names = ["model/model.safetensors", "model-control/model.safetensors"]
    for name in [*names, *sorted(path.name for path in wanted.glob("translator-*.safetensors"))]:
        mine, theirs = load_file(folder / name), load_file(wanted / name)
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[key], theirs[key]) for key in theirs):
            found.append(name)
    if not pq.read_table(folder / "scores.parquet").equals(pq.read_table(wanted / "scores.parquet")):
        found.append("scores.parquet")
    if report_of(folder) != report_of(wanted):
        found.append("report.json")
    if left := [str(path.relative_to(folder)) for path in folder.rglob(".*")]:
        found.append(f"left behind: {', '.join(left)}")
    return found


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (minus a signal's number), what it printed, seconds."""

    status: int
    said: str
    seconds: float


def _work(given: list[str], log: str) -> None:
    if hasattr(os, "sched_setaffinity"):  # one core, one thread: runs beside other work repeat all the same
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["recipes/finetune.py", *given]
    import finetune as recipe

    with patch.object(recipe, "CHECKPOINT_EVERY", EVERY):
        recipe.main(given)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the tests that import it: one cache, and one core, where runs repeat to the bit beside other work."""
    with pytest.MonkeyPatch.context() as changed, one_core():
        changed.setenv("SINGREG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@contextmanager
def one_core() -> Iterator[None]:
    """This process on one core for a while: recipes then take one thread and sums round as in `run`'s processes."""
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


def run(given: list[str], log: Path, *, signal: int | None = None, when: Callable[[], bool] = lambda: True) -> Ended:
    """Run the recipe in a forked process; a signal is sent to it once something is the case."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the server's, which has no other way to know
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune", "tests.tiny_run"])
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    process, begun = context.Process(target=_work, args=(given, str(log))), time.monotonic()
    process.start()
    try:
        while process.is_alive():
            if signal is not None and when():
                os.kill(process.pid, signal)
                signal = None
            if time.monotonic() > begun + PATIENCE:
                raise TimeoutError(f"the run did not end in {PATIENCE} s; it said:\n{log.read_text()}")
            process.join(0.01)
    finally:
        process.kill()
        process.join()
    return Ended(process.exitcode, log.read_text(errors="replace"), time.monotonic() - begun)
