"""Run a function on several gloo processes and return each one's result; fail, never skip, when one does not start.

The processes are started once a session and wait for work: starting one costs seconds, using it almost nothing.
"""

import atexit
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

TIMEOUT = 240
_workers: list[tuple[Any, Connection]] = []


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            work = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("ok", _one(*work)))
        except BaseException:
            connection.send(("error", traceback.format_exc()))


def _one(rank: int, world: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        result = function(rank, world, *arguments)
        torch.distributed.barrier()
        return result
    finally:
        torch.distributed.destroy_process_group()


def _start(count: int) -> None:
    context = torch.multiprocessing.get_context("spawn")
    while len(_workers) < count:
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        _workers.append((process, mine))


@atexit.register
def _stop() -> None:
    for process, _ in _workers:
        process.terminate()


def run_processes(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(rank, world, *arguments) for every rank], each in a process of its own with a gloo group."""
    _start(world)
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, connection) in enumerate(_workers[:world]):
            connection.send((rank, world, f"{folder}/store", function, arguments))
        answers = []
        for rank, (process, connection) in enumerate(_workers[:world]):
            if not connection.poll(TIMEOUT):
                _stop()
                _workers.clear()
                raise AssertionError(
                    f"process {rank} of {world} did not answer within {TIMEOUT} s (alive: {process.is_alive()})"
                )
            answers.append(connection.recv())
    failed = [f"process {rank}:\n{text}" for rank, (status, text) in enumerate(answers) if status != "ok"]
    assert not failed, "\n".join(failed)
    return [result for _, result in answers]


def _same(rank: int, world: int, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def run_same(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(*arguments)] of every process: of one that finds its own rank by itself."""
    return run_processes(world, _same, function, *arguments)
